"""`python -m scaledistill.cli`: the command line of a run."""

import sys

from scaledistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
