from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from scaledistill.checkpoint.saver import Outcome
from scaledistill.config.schema import DistillConfig
from scaledistill.distributed.ranks import Ranks
from scaledistill.errors import DataError
from scaledistill.training.saves import CheckpointSchedule
from scaledistill.training.session import Session


class FakeSession:
    """A session, and its saver, whose saves take some steps and fail at given ones."""

    def __init__(self, config: DistillConfig, lasting: int, failing: tuple[int, ...] = ()) -> None:
        self.config, self.ranks = config, Ranks(0, 1, 0, torch.device("cpu"))
        self.step, self.saved, self.saver = 0, list[int](), self
        self._lasting, self._failing = lasting, failing
        self._begun: int | None = None

    def save(self) -> None:
        assert self._begun is None
        self._begun = self.step
        self.saved.append(self.step)

    @property
    def pending(self) -> bool:
        return self._begun is not None

    def settle(self, *, wait: bool) -> Outcome | None:
        step = self._begun
        if step is None or (not wait and self.step < step + self._lasting):
            return None
        self._begun = None
        return Outcome(step, "full" if step in self._failing else None, remedy="free some space")


@pytest.fixture
def run(tiny_config: Callable[..., DistillConfig]) -> Callable[..., FakeSession]:
    """Return a function that makes 25 steps and returns the session then."""

    def make(every: int, *, last_step: int = 25, **options: Any) -> FakeSession:
        config = tiny_config(checkpoint={"every_steps": every, "max_failed_saves": 1})
        session = FakeSession(config, **options)
        schedule = CheckpointSchedule(cast(Session, session), lambda phase: None)
        for session.step in range(1, last_step + 1):
            schedule.after_step(leaving=session.step == last_step)
        return session

    return make


def test_saves_are_made_when_due_and_at_the_end(run: Callable[..., FakeSession]) -> None:
    assert run(10, lasting=1).saved == [10, 20, 25]
    assert run(10, lasting=99).saved == [10, 20, 25]
    assert run(0, lasting=1).saved == [25]
    assert not run(5, lasting=99).pending


def test_a_failed_save_is_made_again_as_soon_as_it_is_known(
    run: Callable[..., FakeSession], caplog: pytest.LogCaptureFixture
) -> None:
    # A save is looked at after a tenth of the interval.
    assert run(20, lasting=1, failing=(20,)).saved == [20, 22, 25]
    assert run(20, lasting=3, failing=(20,)).saved == [20, 24, 25]
    assert "checkpoint of step 20 not saved: full" in caplog.text


def test_too_many_failed_saves_end_the_run(run: Callable[..., FakeSession]) -> None:
    with pytest.raises(
        DataError,
        match=(
            r"^the checkpoint of step 11 could not be saved: full; 2 saves failed in a row, "
            r"checkpoint\.max_failed_saves=1 allows no more\. Free some space; no checkpoint was "
        ),
    ):
        run(10, lasting=1, failing=(10, 11))
    assert run(10, lasting=1, failing=(10, 20)).saved == [10, 11, 20, 21, 25]
    with pytest.raises(DataError, match=r"step 25 could .* full; the run ends here\. Free some"):
        run(10, lasting=1, failing=(25,))


def test_the_newest_is_that_of_the_save_under_way(
    tiny_config: Callable[..., DistillConfig],
) -> None:
    session = FakeSession(tiny_config(), lasting=9)
    schedule = CheckpointSchedule(cast(Session, session), lambda phase: None)
    assert schedule.newest() is None
    session.save()
    folder = Path(session.config.run.folder) / "checkpoints" / "step-000000003"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    assert schedule.newest() == 3
    assert not session.pending
