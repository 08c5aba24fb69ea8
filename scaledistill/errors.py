"""Errors that end a run with a documented exit code.

A message names the setting, the actual value, the expected one and the remedy. Any other exception
is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
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


def near_misses(
    found: str, known: Iterable[str], *, at_most: int, cutoff: float = 0.6
) -> list[str]:
    """Return the known names most like a wrong one, the most similar first.

    `cutoff` is the least similarity, from 0 (anything) to 1 (equal).
    """
    return difflib.get_close_matches(found, list(known), n=at_most, cutoff=cutoff)


def near_miss(found: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name most like a wrong one; None if none is alike (see `near_misses`)."""
    return next(iter(near_misses(found, known, at_most=1, cutoff=cutoff)), None)


def did_you_mean(near: object | None) -> str:
    """Return the end of a message that suggests `near`; "" for None."""
    return "" if near is None else f"; did you mean {near}?"


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
