from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaledistill.config.schema import TrainSettings
from scaledistill.distributed.ranks import Ranks
from scaledistill.errors import DivergedError, PeerError
from scaledistill.relations import QKV
from scaledistill.training import step as steps
from scaledistill.training.skips import SkipGuard
from scaledistill.training.step import StepResult, StudentStep

SETTINGS = TrainSettings(
    global_batch_size=8, max_steps=9, learning_rate=1e-3, warmup_steps=0, max_skipped_steps=1
)
GOOD, BAD = (
    StepResult({"s": StudentStep(1.0, {}, 1e-3, 1.0, skipped, cause)}, stop_requested=False)
    for skipped, cause in ((False, None), (True, "student"))
)


def make_guard(rank: int, newest: int | None = None) -> SkipGuard:
    return SkipGuard(SETTINGS, Ranks(rank, 2, rank, torch.device("cpu")), lambda: newest)


def test_skipped_steps_are_reported_and_those_in_a_row_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = make_guard(0, newest=2)
    for step, result in enumerate((BAD, GOOD, BAD), start=1):
        guard.check(step, result)
    assert [record.getMessage() for record in caplog.records] == [
        f"step {step} skipped: the student's output was not finite on samples {samples}"
        for step, samples in ((1, "0 to 7"), (3, "16 to 23"))
    ]
    with pytest.raises(
        DivergedError,
        match=(
            r"^2 steps in a row had .* the last on samples 24 to 31, where the student's output "
            r"was not finite; train\.max_skipped_steps=1 allows no more.*; the last checkpoint is "
            r"step 2$"
        ),
    ):
        guard.check(4, BAD)


def test_only_rank_0_reports(caplog: pytest.LogCaptureFixture) -> None:
    guard = make_guard(1)
    guard.check(1, BAD)
    with pytest.raises(PeerError, match=r"there is no checkpoint yet$"):
        guard.check(2, BAD)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_diverged_students_are_dropped_while_others_are_left() -> None:
    settings = SETTINGS.model_copy(update={"on_divergence": "drop"})
    guard = SkipGuard(settings, Ranks(0, 1, 0, torch.device("cpu")), lambda: 3)
    good, bad = GOOD.students["s"], BAD.students["s"]

    def check(step: int, **students: StudentStep) -> dict[str, str]:
        return guard.check(step, StepResult(students, stop_requested=False))

    assert check(1, a=good, b=bad, c=bad) == {}
    assert check(2, a=bad, b=bad, c=good) == {
        "b": "2 steps in a row of student b had a non-finite loss or gradient, the last on samples "
        "8 to 15, where the student's output was not finite"
    }
    assert check(3, a=good, c=bad) == {}
    assert check(4, a=bad, c=good) == {}
    with pytest.raises(DivergedError, match=r"^2 steps in a row had .* the last checkpoint is"):
        check(5, a=bad)


def test_the_teacher_is_run_once_for_all_skipped_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "all_reduce_sum", lambda values: values)
    forwards: list[str] = []

    def model(name: str, value: float) -> Any:
        def forward(tokens: Any) -> QKV:
            forwards.append(name)
            return QKV(*torch.full((3, 1, 2, 4), value))

        return forward

    modes: list[tuple[str, bool]] = []
    students = [
        SimpleNamespace(
            name=name,
            engine=SimpleNamespace(
                forward=model(name, value),
                train_mode=lambda mode, name=name: modes.append((name, mode)),
            ),
        )
        for name, value in (("a", 1.0), ("b", math.nan), ("c", 1.0), ("d", 1.0))
    ]
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    session: Any = SimpleNamespace(students=students, ranks=ranks, teacher=model("teacher", 1.0))
    batch: Any = SimpleNamespace(tokens=None, mask_BT=None)
    losses = {"a": (1.0, False), "b": (math.nan, True), "c": (math.nan, True), "d": (1.0, True)}
    results = {name: StudentStep(x, {}, 1e-3, 1.0, skips) for name, (x, skips) in losses.items()}
    found = steps._with_causes(session, results, [batch, batch])
    assert {name: each.cause for name, each in found.items()} == {
        "a": None,
        "b": "student",
        "c": "loss",
        "d": "gradient",
    }
    assert forwards == 2 * ["teacher", "b", "c", "d"]
    assert modes == [(name, mode) for mode in (False, True) for name in "bcd"]
