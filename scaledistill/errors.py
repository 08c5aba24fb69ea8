"""Errors that end a run with a documented exit code.

A message names the setting, the actual value, the expected one and the remedy. Any other exception
is a bug.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_DIVERGED = 4
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 rank", "1,024 ranks", "2 micro-batches"."""
    plural = plural or noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


class ConfigError(ValueError):
    """A setting is wrong or settings contradict each other; raised before any training."""

    exit_code = EXIT_CONFIG


class DataError(RuntimeError):
    """Data, a model folder, the disk or the machine does not meet the run's needs."""

    exit_code = EXIT_ENVIRONMENT


class DivergedError(RuntimeError):
    """The loss or the gradients stayed non-finite past the stated limit."""

    exit_code = EXIT_DIVERGED


class Problems:
    """Collects the problems of several checks, to report them all at once."""

    def __init__(self) -> None:
        self.found: list[ConfigError | DataError] = []

    def attempt(self, check: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return the result of a check; None, and the problem is kept, if it fails."""
        try:
            return check(*arguments)
        except (ConfigError, DataError) as error:
            self.found.append(error)
            return None

    def raise_all(self) -> None:
        """Raise one error that lists all problems; do nothing if there are none.

        Its type is that of the first problem; each distinct message takes one line.
        """
        if self.found:
            messages = dict.fromkeys(str(problem) for problem in self.found)
            raise type(self.found[0])("\n".join(messages)) from self.found[0]


class PeerError(RuntimeError):
    """A failure that rank 0 reports for all: this rank exits silently with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
