"""Requests to stop that come at awkward times."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_train import LONG, distil, make_tree, rows_of, status_of

from scaledistill.config.load import parse_config
from scaledistill.run import folder as runfolder
from scaledistill.run.folder import StopRequest, job_seconds

__all__ = ["make_tree"]


def stop_at_awkward_times(
    validating: dict[str, Any], starting: dict[str, Any]
) -> list[tuple[str, int, str]]:
    """Run twice; rank 1 gets a signal in its second batch of a validation, then while it loads."""
    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.session import open_session

    batches, is_hit = 0, os.environ["RANK"] == "1"

    def validated(module: Any, inputs: Any) -> None:
        nonlocal batches
        if not torch.is_grad_enabled():
            batches += 1
            if is_hit and batches == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def watched(*arguments: Any, **options: Any) -> Any:
        session = open_session(*arguments, **options)
        session.teacher.register_forward_pre_hook(validated)
        return session

    def opened(*arguments: Any, **options: Any) -> Any:
        if is_hit:
            os.kill(os.getpid(), signal.SIGUSR1)
        return watched(*arguments, **options)

    with process_group(60):
        ends = [distil(validating, open_session=watched), distil(starting, open_session=opened)]
    return [*ends, ("batches", batches, "")]


def test_stops_while_validating_and_while_starting(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path
) -> None:
    blocks: dict[str, Any] = {
        "data": {"validation": str(tiny_shards / "validation")},
        "train": {
            **LONG,
            "micro_batch_size": 1,
            "validation_every_steps": 2,
            "validation_rows": 40,
        },
    }
    validating, starting = make_tree("validating", **blocks), make_tree("starting", **blocks)
    for validated, started, (_, batches, _) in run_ranks(
        stop_at_awkward_times, 2, validating, starting
    ):
        assert (validated[:2], started[:2]) == (("stopped", 75), ("stopped", 75))
        assert batches == 4, "of 20: the ranks agree every four"
    status = status_of(validating)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 2)
    assert (
        status["message"]
        == "stopped after step 2 (another rank was asked to); rerun the same command to resume"
    )
    folder = Path(validating["run"]["folder"])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000002"]
    assert [row["step"] for row in rows_of(validating)] == [1, 2]
    assert not any("validation_loss" in row for row in rows_of(validating))
    assert not (folder / "export").exists()
    status = status_of(starting)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 0)


def stop_in_the_last_validation(tree: dict[str, Any]) -> tuple[str, int, str]:
    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.session import open_session

    def opened(*arguments: Any, **options: Any) -> Any:
        session = open_session(*arguments, **options)

        def validated(module: Any, inputs: Any) -> None:
            if not torch.is_grad_enabled() and session.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        session.teacher.register_forward_pre_hook(validated)
        return session

    with process_group(60):
        return distil(tree, open_session=opened)


def test_a_validation_that_was_stopped_leaves_no_loss(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path
) -> None:
    """That of the step before is not the loss of the student that is exported."""
    train = {"micro_batch_size": 1, "validation_every_steps": 1, "validation_rows": 40}
    tree = make_tree(
        data={"validation": str(tiny_shards / "validation")},
        train={**LONG, **train, "max_steps": 2},
    )
    assert run_ranks(stop_in_the_last_validation, 1, tree)[0][:2] == ("done", 0)
    assert [row["step"] for row in rows_of(tree) if "validation_loss" in row] == [1]
    exports = Path(tree["run"]["folder"]) / "export"
    cards = {path.name: (path / "README.md").read_text() for path in exports.iterdir()}
    assert "| validation loss | not measured |" in cards["l2"]
    assert re.search(r"\| validation loss \| [\d.]+ \|", cards["l2-best"])


def ends_of_a_run(tree: dict[str, Any]) -> tuple[list[float], float]:
    """Run with a tracker that takes time to finish; return when it had finished, on the rank that
    has it, and when this rank has left the run.
    """
    from scaledistill.metrics.trackers import Trackers
    from scaledistill.training.loop import distill

    finished = []

    def finish(self: Trackers) -> None:
        time.sleep(0.7)
        finished.append(time.monotonic())  # a clock that the ranks share

    Trackers.finish = finish  # type: ignore[method-assign]
    distill(parse_config(tree))
    return finished, time.monotonic()


def test_the_ranks_leave_after_rank_0_s_trackers(make_tree: Callable[..., dict[str, Any]]) -> None:
    ends = run_ranks(ends_of_a_run, 2, make_tree(train={**LONG, "max_steps": 2}))
    ([finished], _), (others, left) = ends
    assert others == []
    assert left >= finished


def test_the_job_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runfolder, "job_seconds", lambda: 3590.0)
    monkeypatch.setattr(runfolder.time, "monotonic", lambda: now[0])
    stop, forever = (
        StopRequest(tmp_path, watch_file=False, max_hours=hours) for hours in (1, None)
    )
    assert stop.reason() is None
    now[0] += 10.5
    assert stop.reason() == "run.max_hours=1 reached"
    assert forever.reason() is None


def test_the_age_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = job_seconds()
    assert 0 < ours < 24 * 3600
    time.sleep(0.1)
    assert 0.05 < job_seconds() - ours < 5
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert job_seconds() > ours, "torchrun's agent is our parent, and older"
