from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from ranks import Job, run_ranks
from safetensors.torch import load_file
from safetensors.torch import save_file as reference_save_file
from test_checkpoint import GROUPS, bits, flip
from test_train import LONG, distil, distil_all, fresh, losses_of, make_tree, status_of

from scaledistill.checkpoint import format as checkpoint
from scaledistill.checkpoint import mirror
from scaledistill.checkpoint import saver as saving
from scaledistill.checkpoint.format import newest_checkpoint, verify, write_group
from scaledistill.checkpoint.saver import Outcome, Saver
from scaledistill.distributed.ranks import Ranks
from scaledistill.errors import ConfigError, DataError
from scaledistill.storage import remote

__all__ = ["make_tree"]
STAGES = ("write_group", "write_state", "read_back", "write_manifest", "commit", "prune")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.0)


def begin(saver: Saver, step: int, num_bytes: int = 0) -> None:
    groups = {group: dict(tensors) for group, tensors in GROUPS.items()}
    saver.begin(step, num_bytes, lambda: (groups, {"step": step}))


def save(saver: Saver, step: int) -> str | None:
    begin(saver, step)
    outcome = saver.settle(wait=True)
    assert outcome is not None
    return outcome.error


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    dtypes = [dtype for dtype in checkpoint.DTYPES if dtype is not torch.bool]
    tensors = {f"{dtype}": torch.arange(5).to(dtype) for dtype in dtypes}
    tensors |= {
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "é": torch.tensor(1.5),
    }
    tensors |= GROUPS["l2.weights"]
    reference_save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs"
    )
    write_group(tmp_path / "ours", tensors)
    assert not tensors
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_group(tmp_path / "empty", {})
    assert load_file(tmp_path / "empty") == {}


def test_tensors_are_freed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{number}": torch.zeros(9) for number in range(3)}
    alive, seen = [weakref.ref(tensor) for tensor in tensors.values()], []
    append = checkpoint._append

    def watched(*arguments: Any) -> None:
        append(*arguments)
        seen.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(checkpoint, "_append", watched)
    write_group(tmp_path / "group", tensors)
    assert seen[0] == 3
    assert seen[-1] <= 1


def test_what_the_disk_gives_back_is_compared(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state = checkpoint.write_state

    def rotten(path: Path, state: str) -> str:
        digest = write_state(path, state)
        flip(path.with_name("l2.weights.safetensors"))
        return digest

    saver = Saver(tmp_path, ranks, keep=2)
    assert save(saver, 10) is None
    monkeypatch.setattr(checkpoint, "write_state", rotten)
    error = save(saver, 20)
    assert error is not None
    assert error.startswith("the data read back differs from what was written (")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]


class Gate:
    """Holds a stage of a save until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
        self._open, self.entered = threading.Event(), threading.Event()
        original = getattr(checkpoint, stage)

        def held(*arguments: Any) -> Any:
            self.entered.set()
            assert self._open.wait(30)
            return original(*arguments)

        monkeypatch.setattr(checkpoint, stage, held)

    def open(self) -> None:
        self._open.set()


def test_one_save_is_in_flight_at_most(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "write_group")
    saver = Saver(tmp_path, ranks, keep=2)
    assert saver.settle(wait=True) is None
    begin(saver, 10)
    assert gate.entered.wait(10)
    assert saver.pending
    assert saver.settle(wait=False) is None
    with pytest.raises(RuntimeError, match="the save of step 10 is not settled"):
        begin(saver, 20)
    gate.open()
    assert saver.settle(wait=True) == Outcome(10, None)
    assert not saver.pending
    assert save(saver, 20) is None


def test_a_disk_that_hangs_is_told(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saving, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(saving, "WORD_SECONDS", 0.1)
    gate = Gate(monkeypatch, "read_back")

    def open_after_two_words() -> None:
        while len(caplog.records) < 2:
            time.sleep(0.01)
        gate.open()

    saver, start = Saver(tmp_path, ranks, keep=2), time.monotonic()
    begin(saver, 10)
    threading.Thread(target=open_after_two_words, daemon=True).start()
    assert saver.settle(wait=True) == Outcome(10, None)
    words = [record.getMessage() for record in caplog.records]
    pattern = re.compile(
        rf"waiting for the checkpoint of step 10 for \d+ s; is {re.escape(str(tmp_path))} slow, "
        r"or gone\?"
    )
    assert all(pattern.fullmatch(word) for word in words), words
    assert 2 <= len(words) <= (time.monotonic() - start) / 0.1


def test_an_error_waits_for_the_write_and_a_hard_leave_does_not(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "commit")

    def leave_by(error: BaseException, step: int) -> None:
        with Saver(tmp_path, ranks, keep=2) as saver:
            begin(saver, step)
            raise error

    with pytest.raises(KeyboardInterrupt):
        leave_by(KeyboardInterrupt(), 10)
    assert not (tmp_path / "step-000000010").exists()
    gate.open()
    with pytest.raises(DataError):
        leave_by(DataError("a shard is damaged"), 20)
    assert verify(tmp_path / "step-000000020") is None


def test_no_room(tmp_path: Path, ranks: Ranks) -> None:
    saver, free = Saver(tmp_path / "checkpoints", ranks, keep=2), shutil.disk_usage(tmp_path).free
    gathered = []
    saver.begin(10, 2 * free, lambda: (gathered.append(1), {}))  # type: ignore[arg-type, return-value]
    outcome = saver.settle(wait=False)
    assert outcome is not None
    assert outcome.error is not None
    assert (
        f" MB free, {(2 * free + saving.SPARE_BYTES) / 1e6:,.1f} MB needed "
        f"({tmp_path / 'checkpoints'})" in outcome.error
    )
    assert not gathered
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_hangs_does_not_hold_up_the_ranks(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, real = threading.Event(), shutil.disk_usage
    monkeypatch.setattr(saving, "ROOM_SECONDS", 0.05)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: answers.wait(60) and real(path))
    saver, start = Saver(tmp_path, ranks, keep=2), time.monotonic()
    assert save(saver, 10) is None, "what has room is saved"
    assert save(saver, 20) is None
    assert time.monotonic() - start < 30
    answers.set()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-000000010",
        "step-000000020",
    ]


def test_what_nobody_expected_is_a_failed_save(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(folder: Path, keep: int) -> None:
        raise MemoryError("not enough")

    monkeypatch.setattr(checkpoint, "write_state", broken)
    assert save(Saver(tmp_path, ranks, keep=2), 10) == "MemoryError('not enough')"
    assert "Traceback" in caplog.text


def die_at(stage: str, side: str, root: Path) -> None:
    """Save twice; die beside a stage of the second save, in the thread."""
    from scaledistill.distributed.ranks import process_group

    with process_group(60) as facts:
        saver = Saver(root, facts, keep=1)
        assert save(saver, 10) is None
        original = getattr(checkpoint, stage)

        def deadly(*arguments: Any) -> Any:
            if side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(checkpoint, stage, deadly)
        save(saver, 20)


@pytest.mark.parametrize("stage", STAGES)
def test_death_at_each_stage_leaves_a_good_one(stage: str, tmp_path: Path, ranks: Ranks) -> None:
    for side in ("before", "after"):
        root = tmp_path / side
        job = Job(die_at, 1, stage, side, root)
        job.processes[0].join(60)
        assert job.processes[0].exitcode == -signal.SIGKILL
        found = newest_checkpoint(root, ranks)
        assert found is not None
        committed = stage == "prune" or (stage, side) == ("commit", "after")
        assert found.state["step"] == (20 if committed else 10)
        assert bits(found.tensors("l2.weights")["odd"]) == bits(GROUPS["l2.weights"]["odd"])
        assert not list(root.glob(".partial-*"))


@pytest.fixture(params=["memory", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for copies: a bucket, or a folder."""
    if request.param == "folder":
        yield str(tmp_path / "copies" / "run")
        return
    yield "memory://bucket/copies/run"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def files_of(place: str) -> Any:
    return fsspec.core.url_to_fs(place)


def test_copies_are_pruned_and_found(
    place: str, tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.check(place, tmp_path / "here")
    assert mirror.checkpoints(place) == []
    saver = Saver(tmp_path / "here", ranks, keep=2, remote=place)
    for step in (10, 20, 30):
        assert save(saver, step) is None
    assert mirror.checkpoints(place) == ["step-000000030", "step-000000020"]
    files, path = files_of(place)
    assert not files.exists(f"{path}/step-000000010")
    found = newest_checkpoint(tmp_path / "elsewhere", ranks, place)  # an empty folder
    assert found is not None
    assert found.folder == tmp_path / "elsewhere" / "step-000000030"
    assert bits(found.tensors("l2.weights")["matrix"]) == bits(GROUPS["l2.weights"]["matrix"])
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["step-000000030"]
    # A newer one of our own wins; an older one does not.
    assert save(Saver(tmp_path / "here", ranks, keep=9), 40) is None
    assert getattr(newest_checkpoint(tmp_path / "here", ranks, place), "state", {})["step"] == 40
    shutil.rmtree(tmp_path / "here" / "step-000000040")
    flip(tmp_path / "here" / "step-000000030" / "l2.weights.safetensors")
    assert getattr(newest_checkpoint(tmp_path / "here", ranks, place), "state", {})["step"] == 30
    assert verify(tmp_path / "here" / "step-000000030") is None


def test_damaged_and_unfinished_copies_are_not_taken(
    place: str, tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path / "here", ranks, keep=3, remote=place)
    for step in (10, 20, 30):
        save(saver, step)
    files, path = files_of(place)
    files.rm_file(f"{path}/step-000000030/manifest.json")  # as an upload leaves it that was cut off
    content = bytearray(files.cat_file(f"{path}/step-000000020/state.json"))
    content[3] ^= 1
    files.pipe_file(f"{path}/step-000000020/state.json", bytes(content))
    found = newest_checkpoint(tmp_path / "elsewhere", ranks, place)
    assert found is not None
    assert found.state["step"] == 10
    [warning] = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert warning == (
        f"checkpoint {place}/step-000000020 is damaged (the sha256 of state.json differs); falling "
        "back to the one before"
    )
    assert save(saver, 40) is None  # what was cut off does not count
    assert mirror.checkpoints(place) == ["step-000000040", "step-000000020", "step-000000010"]
    assert not files.exists(f"{path}/step-000000030")


def test_an_upload_that_fails_keeps_the_save(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = "memory://bucket/failing"
    files = fsspec.filesystem("memory")
    calls = 0

    def put_file(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(files), "put_file", put_file)
    assert save(Saver(tmp_path, ranks, keep=2, remote=place), 10) is None
    assert calls == remote.ATTEMPTS
    assert verify(tmp_path / "step-000000010") is None
    warning = caplog.records[-1].getMessage()
    assert warning.startswith(
        f"{tmp_path / 'step-000000010'} is not copied: checkpoint.remote: {place}/step-000000010: "
    )
    assert "reset by peer; training continues and the next save tries again" in warning
    assert mirror.checkpoints(place) == []


@pytest.mark.parametrize(
    "place", ["https://host/run", "hf://datasets/a/b", "pipe:cat", "file:///run", "s3://a::b://c"]
)
def test_places_that_cannot_be_written(place: str) -> None:
    for function, more in ((mirror.check, (Path("run"),)), (mirror.set_aside, ())):
        with pytest.raises(
            ConfigError,
            match="cannot hold checkpoints; use one of s3://, gs://, memory:// or a fold",
        ):
            function(place, *more)


def test_the_run_s_own_checkpoints_are_no_copies(tmp_path: Path) -> None:
    own = tmp_path / "run" / "checkpoints"
    own.mkdir(parents=True)
    (tmp_path / "linked").symlink_to(own)
    for place in (own, tmp_path / "linked"):
        with pytest.raises(ConfigError, match="is where the run keeps its own checkpoints"):
            mirror.check(str(place), own)
    assert not list(own.iterdir())
    mirror.check(str(tmp_path / "other"), own)


def test_a_place_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^checkpoint.remote: .*/file"):
        mirror.check(str(tmp_path / "file"), tmp_path)


def distil_beside_slow_writes(
    tree: dict[str, Any], beside: int
) -> tuple[Any, list[tuple[float, float]], list[float]]:
    """Run with writes that last for `beside` steps, or a minute where training waits for them.

    Returns:
        How it ended, when each write began and ended, and when each step ended.
    """
    from scaledistill.training.step import train_step

    max_steps = tree["train"]["max_steps"]
    write_group = checkpoint.write_group
    writes: list[tuple[float, float]] = []
    steps: list[float] = []

    def slow(path: Path, tensors: Any) -> str:
        start = time.monotonic()
        if path.name == "l2.exp_avg.safetensors":
            until = min(len(steps) + beside, max_steps)
            while len(steps) < until and time.monotonic() < start + 60:
                time.sleep(0.01)
        digest = write_group(path, tensors)
        writes.append((start, time.monotonic()))
        return digest

    def timed(*arguments: Any) -> Any:
        result = train_step(*arguments)
        steps.append(time.monotonic())
        return result

    checkpoint.write_group = slow
    return distil(tree, train_step=timed), writes, steps


def test_training_goes_on_beside_a_write(
    make_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """And what is written is what was gathered, whatever training has done to the student since."""
    blocks = {"train": {**LONG, "max_steps": 24}, "checkpoint": {"every_steps": 9, "keep": 9}}
    beside, alone = make_tree("beside", **blocks), make_tree("alone", **blocks)
    (end, writes, steps), _ = run_ranks(distil_beside_slow_writes, 2, beside, 5)
    assert end[:2] == ("done", 0)
    first, last = writes[0][0], writes[2][1]
    assert sum(first < step < last for step in steps) >= 5
    assert all(ended <= began for (_, ended), (began, _) in pairwise(writes))
    run_ranks(distil, 2, alone)
    assert losses_of(beside) == losses_of(alone)
    for step in (9, 18, 24):
        folders = [
            Path(tree["run"]["folder"]) / "checkpoints" / f"step-{step:09d}"
            for tree in (beside, alone)
        ]
        found, expected = (
            json.loads((folder / "manifest.json").read_text())["files"] for folder in folders
        )
        for name in ("l2.weights", "l2.exp_avg", "l2.exp_avg_sq"):
            assert found[f"{name}.safetensors"] == expected[f"{name}.safetensors"]


def test_a_run_goes_on_from_its_copy(
    make_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    place = str(tmp_path / "copies")
    whole = make_tree("whole", checkpoint={"every_steps": 3})
    begun = make_tree(
        "begun", checkpoint={"every_steps": 3, "remote": place}, train={"max_steps": 6}
    )
    elsewhere = make_tree("elsewhere", checkpoint={"every_steps": 3, "remote": place})
    run_ranks(distil_all, 1, [whole, begun])
    shutil.rmtree(Path(place) / "step-000000006")  # the end did not get there
    refused = make_tree("refused", checkpoint={"remote": "https://host/run"})
    end, (kind, code, message) = run_ranks(distil_all, 1, [elsewhere, refused])[0]
    assert end[0] == "done"
    assert losses_of(elsewhere) == losses_of(whole)[3:]
    # Starting over leaves nothing there to go on from.
    assert run_ranks(fresh, 1, elsewhere)[0][0] == "done"
    assert losses_of(elsewhere) == losses_of(whole)
    assert mirror.checkpoints(f"{place}.1") == ["step-000000006", "step-000000003"]
    # A restart after a start that ended before the copies were moved.
    (Path(elsewhere["run"]["folder"]) / ".starting-over").touch()
    shutil.rmtree(Path(elsewhere["run"]["folder"]) / "checkpoints")
    assert run_ranks(distil_all, 1, [elsewhere])[0][0][0] == "done"
    assert mirror.checkpoints(f"{place}.2") == ["step-000000006", "step-000000003"]
    assert not (Path(elsewhere["run"]["folder"]) / ".starting-over").exists()
    assert (kind, code) == ("ConfigError", 2)
    assert "checkpoint.remote='https://host/run' cannot hold checkpoints" in message
    assert status_of(refused)["state"] == "failed"
