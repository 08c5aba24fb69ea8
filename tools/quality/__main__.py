"""`python tools/quality`: see `command`."""

from __future__ import annotations

import os
import sys

# Spinning threads would slow down other work on the machine. Torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from command import main

sys.exit(main())
