"""`python -m scaledistill`: the command line of a run, as `launch/distill.py` is."""

import sys

from scaledistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
