"""Command lines: parsing, calling, exit codes."""

from scaledistill.cli.distill import main

__all__ = ["main"]
