"""Make shards of token ids from text, as `scaledistill shards make` does; see --help."""

from __future__ import annotations

import sys

from scaledistill.cli.shards_make import main

if __name__ == "__main__":
    sys.exit(main(prog="make_shards"))
