from __future__ import annotations

import logging

import pytest
import torch

from scaledistill.config.schema import TrainSettings
from scaledistill.distributed.ranks import Ranks
from scaledistill.errors import DivergedError, PeerError
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
