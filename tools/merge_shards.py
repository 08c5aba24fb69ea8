"""Merge shards made in parts, as `scaledistill shards merge` does; see --help."""

from __future__ import annotations

import sys

from scaledistill.cli.shards_merge import main

if __name__ == "__main__":
    sys.exit(main(prog="merge_shards"))
