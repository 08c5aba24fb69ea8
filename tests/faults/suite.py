"""The kinds of faults, run in turn: the line of each, its figures."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from conftest import write_tiny_shards, write_tiny_teacher
from faults.common import Place
from faults.run import ALL
from faults.tally import Tally

KINDS = tuple(ALL.split(","))


def make_place(folder: Path, *, seed: int, short: bool, only: int | None) -> Place:
    """Make the tiny teacher and its shards in a folder."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    teacher = write_tiny_teacher(folder / "teacher")
    shards = write_tiny_shards(folder / "shards", teacher)
    return Place(folder, teacher, shards, seed, short, only, say=say)


def say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def run_kind(kind: str, place: Place) -> Tally:
    """Run one kind of faults and print its line."""
    start = time.monotonic()
    tally: Tally = importlib.import_module(f"faults.{kind}").run(place)
    sys.stdout.write(f"{tally.line()} ({time.monotonic() - start:.0f} s)\n")
    sys.stdout.flush()
    return tally


def figures(tallies: list[Tally]) -> list[dict[str, object]]:
    """Return the figures for machines."""
    return [
        {"name": f"faults/{tally.kind}/{name}", "value": value, "unit": unit, "n": tally.tried}
        for tally in tallies
        for name, value, unit in (
            ("tried", tally.tried, "cases"),
            ("survived", tally.survived, "cases"),
            ("lost", tally.lost, "rows"),
        )
    ]
