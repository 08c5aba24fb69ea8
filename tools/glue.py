"""Fine-tune and score models on GLUE and SQuAD 2.0; see `--help`."""

from __future__ import annotations

import sys

from scaledistill.glue.command import main

if __name__ == "__main__":
    sys.exit(main())
