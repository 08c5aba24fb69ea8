"""`python -m scaledistill`: the command `scaledistill`."""

import sys

from scaledistill.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
