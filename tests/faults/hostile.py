"""Hostile input: nothing of it is executed or written outside, memory stays bounded, each is
refused with a message.

The cases are in `hostile_models`, `hostile_text` and `hostile_data`; they run in a child with
little address space.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.common import Place
from faults.tally import Tally
from ranks import Job

MEMORY_BYTES = 300 << 20
"""How much a case may add to the child's peak."""
ADDRESS_BYTES = 8 << 30


class Evil:
    """Touches the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._canary}",)


@dataclass
class Box:
    """Where one case plays."""

    folder: Path
    """For the hostile files."""
    outside: Path
    """Beside it: nothing may be written here."""
    teacher: Path
    shards: Path

    @property
    def canary(self) -> Path:
        """The file that hostile code would make."""
        return self.outside / "canary"

    def command(self) -> str:
        return f"touch {self.canary}"


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Box], Callable[[], object]]
    """Writes the hostile files and returns what a user would have the package do with them."""
    refusal: str | None
    """Part of the message; None where nothing has to be refused, because what is hostile is not
    looked at."""


def case(refusal: str | None) -> Callable[[Callable[[Box], Callable[[], object]]], Case]:
    return lambda prepare: Case(prepare.__name__.replace("_", " "), prepare, refusal)


def all_cases() -> list[Case]:
    from faults import hostile_data, hostile_models, hostile_text

    modules = (hostile_models, hostile_text, hostile_data)
    return [found for module in modules for found in vars(module).values() if type(found) is Case]


def run(place: Place) -> Tally:
    """Try every case, in the short form too."""
    cases = all_cases()
    wanted, results = place.cases(len(cases), len(cases)), place.folder / "hostile.jsonl"
    tally = Tally("hostile", len(wanted), place.say)
    largest, control = 0, place.folder / "control"
    pickle.loads(pickle.dumps(Evil(control)))
    tally.need(control.exists(), "run the hostile code by itself")
    while wanted:
        results.write_text("")
        job = Job(
            try_cases,
            1,
            str(place.folder),
            str(place.teacher),
            str(place.shards),
            wanted,
            str(results),
        )
        job.processes[0].join(300)
        job.kill()
        for line in results.read_text().splitlines():
            found = json.loads(line)
            number, problems = wanted.pop(0), found["problems"]
            largest = max(largest, found["grown"])
            tally.case(f"case {number} ({cases[number].name})", problems)
        if wanted:
            code = job.processes[0].exitcode
            if code == 0 and not results.read_text():
                raise RuntimeError("the child tried nothing")
            tally.case(
                f"case {wanted[0]} ({cases[wanted[0]].name})", [f"the process ended with {code}"]
            )
            wanted.pop(0)
    tally.notes.append(f"memory grew by {largest / 1e6:.0f} MB at most")
    return tally


def try_cases(folder: str, teacher: str, shards: str, wanted: list[int], results: str) -> None:
    """Try cases in this process and append what is wrong with each, a line a case."""
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    limit = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        + ADDRESS_BYTES
    )
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    cases = all_cases()
    for number in wanted:
        root = Path(folder) / f"hostile-{number}"
        box = Box(root / "box", root / "outside", Path(teacher), Path(shards))
        box.folder.mkdir(parents=True)
        box.outside.mkdir()
        os.chdir(box.folder)
        action = cases[number].prepare(box)
        before = {path for path in root.rglob("*") if "__pycache__" not in path.parts}
        grown, problems = attempt(action, cases[number].refusal)
        problems += [f"{path} was written" for path in set(root.rglob("*")) - before]
        with open(results, "a") as file:
            file.write(json.dumps({"problems": problems, "grown": grown}) + "\n")


def attempt(action: Callable[[], object], refusal: str | None) -> tuple[int, list[str]]:
    """Return by how many bytes the peak of memory grew, and what is wrong."""
    from scaledistill.errors import ConfigError, DataError

    before, problems = reset_peak_bytes(), []
    try:
        action()
        if refusal is not None:
            problems.append("it was not refused")
    except (ConfigError, DataError) as error:
        if refusal is None or refusal not in str(error):
            problems.append(f"refused with {str(error)[:300]!r}, expected {refusal!r}")
    except BaseException as error:  # noqa: BLE001 - a defect, which is what is looked for
        problems.append(
            f"not refused with a message, but {type(error).__name__}: {str(error)[:200]}"
        )
    grown = peak_bytes() - before
    if grown > MEMORY_BYTES:
        problems.append(f"memory grew by {grown / 1e6:.0f} MB")
    return grown, problems


def reset_peak_bytes() -> int:
    """Let the peak begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
