"""Start a run: `deepspeed launch/distill.py --config configs/large_to_l6.json`; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scaledistill.cli.distill import main

if __name__ == "__main__":
    sys.exit(main(prog="distill"))
