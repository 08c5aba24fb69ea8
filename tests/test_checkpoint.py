from __future__ import annotations

import contextlib
import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from scaledistill.checkpoint.format import newest_checkpoint, verify
from scaledistill.checkpoint.saver import Saver
from scaledistill.distributed.ranks import Ranks
from scaledistill.errors import DataError, PeerError

GROUPS = {
    "l2.weights": {
        # Not contiguous.
        "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).t(),
        "odd": torch.tensor([0.0, -0.0, 1e-45, 3e38, float("inf"), -float("inf")]),
        "step": torch.tensor(3),
    },
    "l2.exp_avg": {"matrix": torch.full((5, 7), 1e-30), "half": torch.randn(3).bfloat16()},
}
STATE = {"step": 0, "best": {}, "optimizer_steps": {"l2": 12}, "name": "é"}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


def save(root: Path, ranks: Ranks, step: int, *, keep: int = 9, groups: Any = GROUPS) -> str | None:
    saver = Saver(root, ranks, keep=keep)
    saver.begin(
        step,
        0,
        lambda: (
            {group: dict(tensors) for group, tensors in groups.items()},
            {**STATE, "step": step},
        ),
    )
    outcome = saver.settle(wait=True)
    assert outcome is not None
    assert outcome.step == step
    return outcome.error


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip_is_bit_for_bit(tmp_path: Path, ranks: Ranks) -> None:
    assert newest_checkpoint(tmp_path / "none yet", ranks) is None
    assert save(tmp_path / "checkpoints", ranks, 40) is None
    checkpoint = newest_checkpoint(tmp_path / "checkpoints", ranks)
    assert checkpoint is not None
    assert checkpoint.state == {**STATE, "step": 40}
    for group, expected in GROUPS.items():
        found = checkpoint.tensors(group)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert bits(found[name]) == bits(tensor)


def test_a_folder_holds_safetensors_and_json_only(tmp_path: Path, ranks: Ranks) -> None:
    save(tmp_path, ranks, 40)
    assert names(tmp_path) == ["step-000000040"]
    folder = tmp_path / "step-000000040"
    assert names(folder) == [
        "l2.exp_avg.safetensors",
        "l2.weights.safetensors",
        "manifest.json",
        "state.json",
    ]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads(path.read_text()) | changes
        path.write_text(
            json.dumps({key: value for key, value in manifest.items() if value is not None})
        )

    return change


def drop_state(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))


WEIGHTS, MOMENTS = "l2.weights.safetensors", "l2.exp_avg.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights flipped": (WEIGHTS, flip, f"the sha256 of {WEIGHTS} differs"),
    "moments flipped": (MOMENTS, flip, f"the sha256 of {MOMENTS} differs"),
    "state flipped": ("state.json", flip, "the sha256 of state.json differs"),
    "weights cut": (WEIGHTS, cut, f"{WEIGHTS} has "),
    "state cut": ("state.json", cut, "state.json has "),
    "weights empty": (
        WEIGHTS,
        lambda path: path.write_bytes(b""),
        f"{WEIGHTS} has 0 bytes, expected ",
    ),
    "weights missing": (WEIGHTS, Path.unlink, f"{WEIGHTS} is missing"),
    "state missing": ("state.json", Path.unlink, "state.json is missing"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is unreadable: FileNotFoundError"),
    "manifest empty": (
        "manifest.json",
        lambda path: path.write_bytes(b""),
        "manifest.json is unreadable: JSON",
    ),
    "manifest cut": (
        "manifest.json",
        lambda path: path.write_text(path.read_text()[:90]),
        "manifest.json is unread",
    ),
    "manifest garbage": (
        "manifest.json",
        lambda path: path.write_bytes(b"\xff" * 90),
        "manifest.json is unreadable: U",
    ),
    "manifest null": (
        "manifest.json",
        lambda path: path.write_text("null"),
        "manifest.json is unreadable: TypeError",
    ),
    "files a list": (
        "manifest.json",
        change_manifest(files=[]),
        "manifest.json is unreadable: AttributeError",
    ),
    "facts missing": (
        "manifest.json",
        change_manifest(files={WEIGHTS: {}}),
        "manifest.json is unreadable: KeyError",
    ),
    "no version": (
        "manifest.json",
        change_manifest(version=None),
        r"manifest.json is unreadable: KeyError('version')",
    ),
    "version 2": (
        "manifest.json",
        change_manifest(version=2),
        "manifest.json: written by another version: ",
    ),
    "state not named": ("manifest.json", drop_state, "manifest.json does not name state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_wins(
    damage: str, tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (20, 40):
        save(tmp_path, ranks, step)
    newest = tmp_path / "step-000000040"
    assert verify(newest) is None
    file, damaging, message = DAMAGES[damage]
    damaging(newest / file)
    found = verify(newest)
    assert found is not None
    assert found.startswith(message)
    checkpoint = newest_checkpoint(tmp_path, ranks)
    assert checkpoint is not None
    assert checkpoint.state["step"] == 20
    [warning] = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert warning == f"checkpoint {newest} is damaged ({found}); falling back to the one before"


def test_the_only_one_is_damaged(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, ranks, 7)
    (tmp_path / "step-000000007" / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path, ranks) is None
    assert caplog.messages[0].endswith(
        "; there is none before it: the run starts from the beginning"
    )


def test_every_bit_of_the_data_counts(tmp_path: Path, ranks: Ranks) -> None:
    save(tmp_path, ranks, 1)
    folder = tmp_path / "step-000000001"
    for file in (WEIGHTS, "state.json"):
        content = (folder / file).read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            (folder / file).write_bytes(damaged)
            assert verify(folder) == f"the sha256 of {file} differs", position
        (folder / file).write_bytes(content)
    assert verify(folder) is None


def test_all_damaged_means_none(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (20, 40):
        save(tmp_path, ranks, step)
        cut(tmp_path / f"step-{step:09d}" / WEIGHTS)
    assert newest_checkpoint(tmp_path, ranks) is None
    assert len(caplog.records) == 2


def test_leftovers_of_a_crash_are_removed_and_never_loaded(tmp_path: Path, ranks: Ranks) -> None:
    save(tmp_path, ranks, 20)
    for name in (".partial-step-000000040", ".partial-old-step-000000020"):
        shutil.copytree(tmp_path / "step-000000020", tmp_path / name)
    (tmp_path / "step-000000060.bak").mkdir()  # not ours: neither loaded nor touched
    checkpoint = newest_checkpoint(tmp_path, ranks)
    assert checkpoint is not None
    assert checkpoint.folder.name == "step-000000020"
    assert names(tmp_path) == ["step-000000020", "step-000000060.bak"]


def test_a_leftover_does_not_disturb_the_next_save(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / ".partial-step-000000020").mkdir()
    (tmp_path / ".partial-step-000000020" / "other.safetensors").write_bytes(b"half")
    assert save(tmp_path, ranks, 20) is None
    assert verify(tmp_path / "step-000000020") is None
    assert "other.safetensors" not in names(tmp_path / "step-000000020")


@pytest.mark.parametrize("keep", [1, 2])
def test_keep(keep: int, tmp_path: Path, ranks: Ranks) -> None:
    for step in (5, 10, 1000, 1_000_000):
        save(tmp_path, ranks, step, keep=keep)
    assert names(tmp_path) == ["step-000001000", "step-001000000"][2 - keep :]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_ones_do_not_push_out_new_ones(
    keep: int, tmp_path: Path, ranks: Ranks
) -> None:
    for step in (80, 90):
        save(tmp_path, ranks, step, keep=keep)
    for folder in tmp_path.iterdir():
        cut(folder / WEIGHTS)
    for step in (10, 20, 30):  # the run began again
        assert save(tmp_path, ranks, step, keep=keep) is None
        checkpoint = newest_checkpoint(tmp_path, ranks)
        assert checkpoint is not None
        assert checkpoint.state["step"] == step
    save(tmp_path, ranks, 90, keep=keep)
    assert verify(tmp_path / "step-000000090") is None
    assert len(names(tmp_path)) == keep


def test_the_same_step_again_replaces_it(tmp_path: Path, ranks: Ranks) -> None:
    save(
        tmp_path,
        ranks,
        20,
        groups={"l2.weights": {"matrix": torch.zeros(3)}, "stale": {"x": torch.zeros(1)}},
    )
    assert save(tmp_path, ranks, 20, groups={"l2.weights": {"matrix": torch.ones(3)}}) is None
    assert names(tmp_path) == ["step-000000020"]
    checkpoint = newest_checkpoint(tmp_path, ranks)
    assert checkpoint is not None
    assert checkpoint.tensors("l2.weights")["matrix"].tolist() == [1.0, 1.0, 1.0]
    assert "stale.safetensors" not in names(checkpoint.folder)


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let the system refuse to write more into a file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (4000, {"small": {"x": torch.zeros(1)}, "large": {"x": torch.zeros(2000)}}),
        (60, {}),
        (300, {"a": {}, "b": {}}),
    ],
    ids=["weights", "state", "manifest"],
)
def test_a_disk_that_takes_no_more(
    limit: int, groups: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    for step in (20, 40):
        save(tmp_path, ranks, step, keep=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with largest_file(limit):
        error = save(tmp_path, ranks, 60, keep=2, groups=groups)
    assert error is not None
    assert "File too large" in error
    assert str(tmp_path / ".partial-step-000000060") in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["step-000000020", "step-000000040"]
    assert save(tmp_path, ranks, 60, keep=2, groups=groups) is None
    assert names(tmp_path) == ["step-000000040", "step-000000060"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "checkpoints").write_text("a file stands in the way")
    error = save(tmp_path / "checkpoints", ranks, 20)
    assert error is not None
    assert str(tmp_path / "checkpoints") in error


def test_what_cannot_be_written_as_json_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            Saver(tmp_path, ranks, keep=1).begin(20, 0, lambda value=value: ({}, {"loss": value}))
    assert newest_checkpoint(tmp_path, ranks) is None
    assert names(tmp_path) == []


def on_two_ranks(root: Path) -> tuple[Any, ...]:
    from scaledistill.distributed.ranks import process_group

    with process_group(60) as ranks:
        # Only rank 0 holds tensors.
        mine = GROUPS if ranks.is_main else {group: {} for group in GROUPS}
        errors = [save(root, ranks, step, keep=2, groups=mine) for step in (20, 40)]
        with largest_file(100) if ranks.is_main else contextlib.nullcontext():
            errors.append(save(root, ranks, 60, groups=mine))
        if ranks.is_main:
            flip(root / "step-000000040" / "state.json")
        checkpoint = newest_checkpoint(root, ranks)
        assert checkpoint is not None
        found = checkpoint.state["step"], bits(checkpoint.tensors("l2.weights")["matrix"])
        try:
            newest_checkpoint(root if ranks.is_main else root / "not shared", ranks)
        except (DataError, PeerError) as error:
            return errors, found, (type(error).__name__, error.exit_code, str(error))
        return errors, found, None


def test_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(on_two_ranks, 2, tmp_path)
    assert first[:2] == second[:2]
    (saved, saved_too, failed), found, _ = first
    assert (saved, saved_too) == (None, None)
    assert "File too large" in failed
    assert found == (20, bits(GROUPS["l2.weights"]["matrix"]))
    assert (first[2][:2], second[2][:2]) == (("DataError", 3), ("PeerError", 3))
    assert first[2][2].startswith("rank 1 on ")
    assert (
        "rank 0 reads it, rank 1 does not (No such file or directory); run.folder must be on"
        in first[2][2]
    )
