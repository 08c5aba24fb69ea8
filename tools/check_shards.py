"""Check a folder of shards, as `scaledistill shards check` does; see --help."""

from __future__ import annotations

import sys

from scaledistill.cli.shards_check import main

if __name__ == "__main__":
    sys.exit(main(prog="check_shards"))
