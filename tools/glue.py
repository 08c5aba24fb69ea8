"""Fine-tune and score models on GLUE and SQuAD 2.0, as `scaledistill glue` does; see --help."""

from __future__ import annotations

import sys

from scaledistill.cli.glue import main

if __name__ == "__main__":
    sys.exit(main(prog="glue"))
