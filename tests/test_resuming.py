from __future__ import annotations

import time
from pathlib import Path

import pytest

from scaledistill.run import resume_hint as resuming
from scaledistill.run.resume_hint import newest_step, resume_hint


def test_the_hint_says_whether_there_is_a_checkpoint(tmp_path: Path) -> None:
    nothing = "no checkpoint was saved yet: rerun the same command to start from the beginning"
    assert resume_hint(tmp_path / "none") == nothing
    # None of them is whole.
    for name in (".partial-step-000000030", "step-000000040", "step-000000012.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".partial-step-000000030" / "manifest.json").touch()
    assert resume_hint(str(tmp_path)) == nothing
    for name in ("step-000000012", "step-000000020"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert newest_step(tmp_path) == 20
    assert (
        resume_hint(tmp_path) == "rerun the same command to resume from the checkpoint of step 20"
    )


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "DISK_SECONDS", 0.05)
    monkeypatch.setattr(resuming, "newest_step", lambda folder: time.sleep(0.5))
    assert resume_hint(tmp_path) == "rerun the same command"
