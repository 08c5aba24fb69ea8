"""The parser that the subcommands share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from typing import Any, NoReturn

from scaledistill.errors import EXIT_CONFIG, did_you_mean, near_miss


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations that suggests the nearest option for a misspelt one.

    Texts keep their line breaks; the epilog ends with two examples.
    """

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error(self.unknown(unknown))
        return options

    def unknown(self, words: list[str]) -> str:
        """Return the error message for unknown arguments; it is about the first of them."""
        known = [name for action in self._actions for name in action.option_strings]
        first = words[0]
        if not first.startswith("-"):
            return f"unexpected argument {first!r}"
        return f"unknown option {first}{did_you_mean(near_miss(first.partition('=')[0], known))}"

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CONFIG, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def spin_briefly() -> None:
    """Let OpenMP's threads spin for microseconds, not milliseconds; call this before torch loads.

    The loss on CPUs waits for all threads thousands of times. If other processes need the
    processors too, each long wait takes their whole time slice: the loss took 20 times as long.
    On an idle machine the shorter time costs nothing that could be measured.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def positive(text: str) -> int:
    """Read a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1 up")
    return int(text)


def not_negative(text: str) -> float:
    """Read a finite number from 0 up."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 up")


def step_or_newest(text: str) -> int | str:
    """Read the step of a checkpoint, or "newest"."""
    if text in ("newest", "latest", "last"):
        return "newest"
    if text == "best":
        raise argparse.ArgumentTypeError(
            "the best student by validation loss is exported while a run lasts: see "
            "<run.folder>/export/<student>-best"
        )
    number = text.removeprefix("step-")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected a step that has a checkpoint, or 'newest'"
        )
    return int(number)
