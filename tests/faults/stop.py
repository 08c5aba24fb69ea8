"""Requests to stop, by every way there is, in training, validation and saving: gone in time, with a
checkpoint.

Launchers take 15 s to start, so that only cases in which a launcher passes a request on, or gets in
its way, use one.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any, NamedTuple

from faults.common import Place, Ranks, good_checkpoints, status_of, tail
from faults.launched import Launched
from faults.tally import Tally

LIMIT_SECONDS = 20
SAVE_STAGE = "checkpoint.format.write_state"


class Case(NamedTuple):
    launcher: str
    """"torchrun", "deepspeed" or "ranks": forked, by no launcher."""
    how: str
    to: str
    phase: str


CASES = [
    *(Case("torchrun", "SIGTERM", "agent", phase) for phase in ("train", "validate", "save")),
    Case("torchrun", "SIGINT", "agent", "train"),
    Case("torchrun", "SIGUSR1", "rank 0", "train"),
    Case("torchrun", "SIGUSR1", "rank 1", "validate"),
    Case("torchrun", "SIGTERM", "rank 1", "save"),
    *(Case("deepspeed", "STOP", "run folder", phase) for phase in ("train", "validate", "save")),
    *(Case("deepspeed", "Ctrl-C", "all", phase) for phase in ("train", "validate", "save")),
    *(Case("deepspeed", "two Ctrl-C", "all", phase) for phase in ("train", "validate", "save")),
    *(Case("ranks", "deadline", "all", phase) for phase in ("train", "validate", "save")),
    *(Case("ranks", "STOP", "run folder", phase) for phase in ("train", "validate")),
    *(
        Case("ranks", "SIGTERM", to, phase)
        for to, phase in (("rank 0", "validate"), ("all", "save"))
    ),
    *(
        Case("ranks", "SIGINT", to, phase)
        for to, phase in (("rank 1", "train"), ("rank 0", "save"))
    ),
    *(Case("ranks", "SIGUSR1", to, phase) for to, phase in (("rank 1", "save"), ("all", "train"))),
    Case("ranks", "SIGTERM", "rank 1", "start"),
    *(Case("ranks", "two SIGINT", "all", phase) for phase in ("train", "save")),
]
SHORT_CASES = [CASES.index(Case("ranks", "SIGTERM", "rank 0", "validate"))]
DEADLINE_SECONDS = 12


def run(place: Place) -> Tally:
    numbers = place.cases(len(CASES), SHORT_CASES)
    tally, how = Tally("stop", len(numbers), place.say), Counter[str]()
    slowest = 0.0
    for number in numbers:
        case = CASES[number]
        problems, took = try_case(place, number, case)
        slowest = max(slowest, took)
        how[case.launcher] += 1
        tally.case(f"case {number} ({', '.join(case)})", problems)
    tally.notes.append(", ".join(f"{count} under {launcher}" for launcher, count in how.items()))
    tally.notes.append(f"gone within {slowest:.1f} s")
    return tally


def try_case(place: Place, number: int, case: Case) -> tuple[list[str], float]:
    """Ask a run to stop; return what is wrong with how it ended, and how long that took."""
    twice = case.how.startswith("two")
    slow = {case.phase: 4.0 if twice else 2.0 if case.phase == "save" else 0.3}
    blocks: dict[str, dict[str, Any]] = {
        "train": {"max_steps": 2000},
        "checkpoint": {"every_steps": 4},
        "run": {"lost_rank_seconds": 30},
    }
    if case.phase == "validate":
        blocks["train"] |= {"validation_every_steps": 3, "validation_rows": 59}
    if case.how == "deadline":
        blocks["run"] |= {"max_hours": DEADLINE_SECONDS / 3600}
    tree = place.tree(
        f"stop-{number}", data={"validation": str(place.shards / "validation")}, **blocks
    )
    folder = place.folder / f"stop-{number}" / "start"
    facts = {"slow": slow, "save_stages": [SAVE_STAGE]}
    job: Launched | Ranks
    if case.launcher == "ranks":
        job = Ranks(folder, tree, **facts)
    else:
        job = Launched(case.launcher, folder, tree, **facts)
    if not reached(job, case):
        job.seconds_until_gone(0)
        return [f"{case.phase} was not reached:\n{tail(job.output(), 20)}"], 0.0
    before = good_checkpoints(job.run_folder)[:1]
    asked = request(job, case)
    job.seconds_until_gone(60)
    took = time.monotonic() - asked
    return judge(job, case, before, took), took


def reached(job: Launched | Ranks, case: Case) -> bool:
    """Wait until the run is where the request is to find it."""
    steps = job.folder / "steps-0"
    if case.phase == "start":
        return job.wait_for(
            lambda: (job.folder / "in-start-0").exists() and (job.folder / "in-start-1").exists()
        )
    if case.how == "deadline":
        return job.wait_for(
            lambda: (job.folder / "pid-0").exists() and seconds_past_deadline(job) > 0
        )
    return job.wait_for(
        lambda: (
            steps.exists()
            and steps.read_text().count("\n") > 4
            and (job.folder / f"in-{case.phase}-0").exists()
        )
    )


def seconds_past_deadline(job: Launched | Ranks) -> float:
    """Return how long ago the deadline was: it counts from the start of the process, which may have
    waited for one.
    """
    return time.time() - (job.folder / "pid-0").stat().st_mtime - DEADLINE_SECONDS


def request(job: Launched | Ranks, case: Case) -> float:
    """Ask, and return when that was."""
    asked = time.monotonic()
    if case.how == "deadline":
        return asked - seconds_past_deadline(job)
    if case.how == "STOP":
        (job.run_folder / "STOP").touch()
        return asked
    for time_number in range(2 if case.how.startswith("two") else 1):
        if time_number:
            time.sleep(1.3)
        if isinstance(job, Launched) and case.to == "all":
            job.interrupt()
            continue
        targets = {"agent": [], "all": [0, 1]}.get(
            case.to, [int(case.to[-1])] if case.to.startswith("rank") else []
        )
        pids = [int((job.folder / f"pid-{number}").read_text()) for number in targets]
        if isinstance(job, Launched) and case.to == "agent":
            pids = [job.process.pid]
        for pid in pids:
            os.kill(pid, getattr(signal, case.how.removeprefix("two ")))
    return asked


def judge(job: Launched | Ranks, case: Case, before: list[int], took: float) -> list[str]:
    status, problems = status_of(job.run_folder), []
    good = good_checkpoints(job.run_folder)[:1]
    made = (
        len((job.folder / "steps-0").read_text().splitlines())
        if (job.folder / "steps-0").exists()
        else 0
    )
    if took > LIMIT_SECONDS:
        problems.append(f"gone only after {took:.0f} s")
    found = status.get("state"), status.get("exit_code")
    if case.how.startswith("two"):
        if found != ("failed", 130):
            problems.append(f"status.json says {found}, expected failed, 130")
        if good < before:
            problems.append(f"the newest checkpoint is {good}, before it was {before}")
    else:
        if found != ("stopped", 75):
            problems.append(
                f"status.json says {found}, expected stopped, 75: {status.get('message')}"
            )
        if (good or [0])[0] < made - 1 or (good or [0])[0] != status.get("step"):
            problems.append(
                f"the newest checkpoint is {good} after {made} steps, status.json says "
                f"{status.get('step')}"
            )
    if problems:
        problems[-1] += "\n" + tail(job.output(), 12)
    return problems
