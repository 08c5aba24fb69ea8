"""SIGKILL of rank 0, rank 1 or both, at random and at each stage of a commit; the same command goes
on.
"""

from __future__ import annotations

import itertools
import signal
from dataclasses import dataclass, field
from typing import Any

from faults.common import ENGINES, Place, Ranks, good_checkpoints, misplaced_rows, tail, whole_run
from faults.tally import Tally

STAGES = [
    f"checkpoint.format.{name}"
    for name in (
        "write_group",
        "write_state",
        "read_back",
        "sync",
        "write_manifest",
        "write_json",
        "commit",
        "prune",
    )
]
POINTS = [(stage, side) for stage in STAGES for side in ("before", "after")]
WHO = ([0], [1], [0, 1])
KILLS_PER_ENGINE, KILLS_PER_CHAIN, STEPS = 50, 10, 100
PEER_SECONDS = 40
"""What a rank that is left alone has, to notice it; before the ranks have met, only
run.timeout_seconds ends it."""


@dataclass
class Figures:
    """What the suite must have done to prove anything."""

    during_save: int = 0
    replayed: int = 0
    points: set[tuple[str, str]] = field(default_factory=set)
    slowest: float = 0.0


def run(place: Place) -> Tally:
    """Kill runs under each engine until each has been killed often enough."""
    figures = Figures()
    engines = ["fsdp"] if place.short else list(ENGINES)
    kills, per_chain, steps = (
        (2, 2, 24) if place.short else (KILLS_PER_ENGINE, KILLS_PER_CHAIN, STEPS)
    )
    tally = Tally("kill", kills * len(engines), place.say)
    for case in itertools.count() if place.only is None else [place.only]:
        engine, done = engines[case % len(engines)], tally.tried
        if done >= tally.planned:
            break
        chain = Chain(place, case, engine, steps, tally, figures)
        chain.run(min(per_chain, tally.planned - done))
    tally.need(figures.during_save > 0, "kill during a save")
    tally.need(figures.replayed > 0, "make steps again")
    if not place.short and place.only is None:
        missed = set(POINTS) - figures.points
        tally.need(not missed, f"kill at every stage of a commit: not {sorted(missed)}")
    tally.notes += [
        f"{figures.during_save} killed during a save",
        f"{figures.replayed} steps made again",
        f"the rank left alone gone within {figures.slowest:.1f} s",
    ]
    return tally


class Chain:
    """A run that is killed and started again until it is done."""

    def __init__(
        self, place: Place, case: int, engine: str, max_steps: int, tally: Tally, figures: Figures
    ) -> None:
        self.place, self.case, self.tally, self.figures = place, case, tally, figures
        self.draw = place.draw("kill", case)
        self.folder = place.folder / f"kill-{case}"
        blocks: dict[str, Any] = {
            "engine": ENGINES[engine],
            "train": {"max_steps": max_steps},
            "checkpoint": {"every_steps": 3},
            "run": {"lost_rank_seconds": 4, "timeout_seconds": 25},
        }
        self.name = f"case {case} ({engine}, seed {place.seed})"
        self.tree = place.tree(self.folder.name, **blocks)
        self.whole = whole_run(place, **blocks)
        self.history: list[list[dict[str, Any]]] = [[], []]
        """By rank, what each step of the surviving history trained on."""

    def run(self, kills: int) -> None:
        pending: list[str] = []
        """What is wrong with the kill before; the start that follows it is part of it."""
        for number in range(kills + 1):
            kill = self.plan(number) if number < kills else None
            expected = next(iter(good_checkpoints(self.folder / "run")), 0) + 1
            job = Ranks(
                self.folder / f"start-{number}",
                self.tree,
                kill=kill if kill and "stage" in kill else None,
            )
            problems = self.strike(job, kill)
            pending += self.take(job, expected)
            finished = job.exit_codes() == [0, 0]
            lost = self.end(pending) if finished else 0
            if number:
                self.tally.case(f"{self.name}, kill {number - 1}", pending, lost=lost)
            if finished:
                return
            pending = problems
        self.tally.failures.append(f"kill {self.name}: not done:\n{tail(job.output())}")

    def plan(self, number: int) -> dict[str, Any]:
        """Choose whom to kill and when; every second kill is at a stage of a save."""
        index = self.case * KILLS_PER_CHAIN + number
        who = WHO[self.draw.randrange(len(WHO))]
        if index % 2 == 0:
            stage, side = POINTS[index // 2 % len(POINTS)]
            return {"stage": stage, "side": side, "nth": self.draw.randint(1, 2), "ranks": who}
        at_start = self.draw.random() < 0.2
        return {
            "ranks": who,
            "at_start": at_start,
            "seconds": self.draw.uniform(0, 2.5 if at_start else 0.6),
        }

    def strike(self, job: Ranks, kill: dict[str, Any] | None) -> list[str]:
        """Kill as planned and wait for the end; return what is wrong with it."""
        if kill and "stage" not in kill:
            job.wait_for(
                lambda: bool((job.folder / "pid-1").exists() if kill["at_start"] else job.steps())
            )
            job.wait_for(lambda: False, kill["seconds"])
            job.kill(kill["ranks"])
        job.wait_for(lambda: False, 120)
        took = job.seconds_until_gone(PEER_SECONDS)
        killed = [code for code in job.exit_codes() if code == -signal.SIGKILL]
        if kill is None or job.exit_codes() == [0, 0]:
            return []
        if took is None:
            return [
                f"a rank was left alone by {kill}, and did not end in {PEER_SECONDS} "
                f"s:\n{tail(job.output())}"
            ]
        if not killed:
            return [f"ended by itself with {job.exit_codes()}:\n{tail(job.output())}"]
        self.figures.slowest = max(self.figures.slowest, took)
        if (job.folder / "killed").exists():
            self.figures.points.add((kill["stage"], kill["side"]))
            self.figures.during_save += 1
        else:
            self.figures.during_save += any((job.run_folder / "checkpoints").glob(".partial-*"))
        return []

    def take(self, job: Ranks, expected: int) -> list[str]:
        """Put what a start trained on behind what it went on from; return what is wrong with it."""
        records, problems = [job.steps(number) for number in (0, 1)], []
        first = min((rows[0]["step"] for rows in records if rows), default=None)
        if first is None:
            return []
        if first != expected:
            problems.append(
                f"went on with step {first}, expected {expected}, after the newest good checkpoint"
            )
        self.figures.replayed += max(0, len(self.history[0]) - first + 1)
        for rows, more in zip(self.history, records, strict=True):
            del rows[first - 1 :]
            rows += more
        for row in itertools.chain(*records):
            if row["loss"] != self.whole.losses[row["step"] - 1]:
                problems.append(
                    f"loss of step {row['step']} is {row['loss']}, not "
                    f"{self.whole.losses[row['step'] - 1]}"
                )
        return problems[:3]

    def end(self, problems: list[str]) -> int:
        """Compare a finished chain with the whole run; return how many rows were lost or
        repeated.
        """
        problems += self.whole.differences(self.folder / "run")
        lost = misplaced_rows(self.place, self.tree, self.history)
        if lost:
            problems.append(f"{lost} rows lost or repeated")
        return lost
