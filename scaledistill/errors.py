"""Errors that end a run with a stated exit code.

A message names the setting, what was found, what was expected and the remedy. Anything else that is raised is a defect.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_DIVERGED = 4
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


class ConfigError(ValueError):
    """A setting is wrong or settings contradict each other; found before any training."""

    exit_code = EXIT_CONFIG


class DataError(RuntimeError):
    """Data, a model folder, the disk or the machine is not what the run needs."""

    exit_code = EXIT_ENVIRONMENT


class DivergedError(RuntimeError):
    """The loss or the gradients stayed non-finite past the stated limit."""

    exit_code = EXIT_DIVERGED


class PeerError(RuntimeError):
    """A failure that rank 0 reports for all: this rank leaves with the same exit code and says nothing."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
