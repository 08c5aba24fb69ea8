"""`scaledistill glue`: the command line of the GLUE runner, which `glue.command` holds.

It is there because a run also fine-tunes and scores its students, from a lower layer.
"""

from scaledistill.glue.command import main, parser

__all__ = ["main", "parser"]
