"""A rank that stands still, by SIGSTOP or by itself: the job ends in the stated time and names it,
nothing is left.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NamedTuple

from faults.common import Place, Ranks, good_checkpoints, status_of, tail
from faults.launched import Launched
from faults.stop import SAVE_STAGE
from faults.tally import Tally

LOST_RANK_SECONDS, TIMEOUT_SECONDS = 4, 15
SLACK_SECONDS = 10
"""For the verdict, the stack dumps and the end of the processes."""
LAUNCHER_SECONDS = 35
"""What launchers wait before they kill a process that does not end on SIGTERM, as one that is
stopped cannot."""


class Case(NamedTuple):
    launcher: str
    """"torchrun", "deepspeed" or "ranks": forked, by no launcher."""
    rank: int
    how: str
    """"SIGSTOP", or "hang": the main thread alone stands still."""
    phase: str


CASES = [
    *(
        Case("ranks", rank, "SIGSTOP", phase)
        for phase in ("train", "validate", "save")
        for rank in (1, 0)
    ),
    *(Case("ranks", rank, "hang", "train") for rank in (1, 0)),
    Case("torchrun", 1, "SIGSTOP", "train"),
    Case("deepspeed", 0, "SIGSTOP", "train"),
]


def run(place: Place) -> Tally:
    numbers = place.cases(len(CASES), 1)
    tally, slowest, launched = Tally("stall", len(numbers), place.say), 0.0, 0.0
    for number in numbers:
        case = CASES[number]
        problems, took = try_case(place, number, case)
        if case.launcher == "ranks" and case.how == "SIGSTOP":
            slowest = max(slowest, took)
        elif case.launcher != "ranks":
            launched = max(launched, took)
        tally.case(f"case {number} ({', '.join(map(str, case))})", problems)
    if slowest:
        tally.notes.append(
            f"run.lost_rank_seconds={LOST_RANK_SECONDS}: the others gone {slowest:.1f} s after a "
            "SIGSTOP"
        )
    if launched:
        tally.notes.append(f"all of a launcher's processes after {launched:.1f} s")
    return tally


def try_case(place: Place, number: int, case: Case) -> tuple[list[str], float]:
    """Let a rank stand still; return what is wrong with how the job ended, and how long that
    took.
    """
    blocks: dict[str, dict[str, Any]] = {
        "train": {"max_steps": 2000},
        "checkpoint": {"every_steps": 4},
        "run": {"lost_rank_seconds": LOST_RANK_SECONDS, "timeout_seconds": TIMEOUT_SECONDS},
    }
    if case.phase == "validate":
        blocks["train"] |= {"validation_every_steps": 3, "validation_rows": 59}
    tree = place.tree(
        f"stall-{number}", data={"validation": str(place.shards / "validation")}, **blocks
    )
    facts: dict[str, Any] = {
        "slow": {case.phase: 0.1 if case.phase == "train" else 0.4},
        "save_stages": [SAVE_STAGE],
    }
    if case.how == "hang":
        facts["stall"] = {"step": 9, "rank": case.rank}
    folder = place.folder / f"stall-{number}" / "start"
    job = (
        Ranks(folder, tree, **facts)
        if case.launcher == "ranks"
        else Launched(case.launcher, folder, tree, **facts)
    )
    phase = folder / f"in-{case.phase}-{0 if case.phase == 'save' else case.rank}"
    steps = folder / f"steps-{case.rank}"
    reached = job.wait_for(
        lambda: steps.exists() and steps.read_text().count("\n") > 8 and phase.exists()
    )
    if not reached:
        job.seconds_until_gone(0)
        return [f"{case.phase} was not reached:\n{tail(job.output(), 20)}"], 0.0
    since = time.monotonic()
    if case.how == "SIGSTOP":
        os.kill(int((folder / f"pid-{case.rank}").read_text()), signal.SIGSTOP)
    limit = SLACK_SECONDS + (LOST_RANK_SECONDS if case.how == "SIGSTOP" else TIMEOUT_SECONDS)
    if isinstance(job, Launched):
        gone = job.seconds_until_gone(limit + LAUNCHER_SECONDS) is not None
        others = []
    else:
        others = [
            process
            for rank, process in enumerate(job.processes)
            if case.how == "hang" or rank != case.rank
        ]
        for process in others:
            process.join(max(0.0, since + limit - time.monotonic()))
        gone = all(process.exitcode is not None for process in others)
        job.kill()  # what is stopped, nobody but a launcher can end
    took = time.monotonic() - since
    status, problems = status_of(job.run_folder), []
    if not gone:
        problems.append(f"not gone after {took:.0f} s")
    if (status.get("state"), status.get("exit_code")) != ("failed", 3):
        problems.append(
            f"status.json says {status.get('state')}, {status.get('exit_code')}, expected failed, 3"
        )
    for where, text in (("status.json", str(status.get("message"))), ("the output", job.output())):
        if f"rank {case.rank}" not in text:
            problems.append(f"{where} does not name rank {case.rank}: {text[-300:]}")
    if not good_checkpoints(job.run_folder):
        problems.append("no good checkpoint to go on from")
    if problems:
        problems[-1] += "\n" + tail(job.output(), 12)
    return problems, took
