from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from ranks import run_ranks
from safetensors.torch import load_file
from test_train import LONG, check_export, distil

from scaledistill.config.load import parse_config
from scaledistill.config.schema import DistillConfig
from scaledistill.errors import ConfigError, DataError
from scaledistill.publishing.source import open_student
from scaledistill.storage.files import locked
from scaledistill.training.exports import export_checkpoint


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_shards: Path
) -> dict[str, Any]:
    """The settings of a run of two ranks under ZeRO-3, with checkpoints of steps 4, 8 and 10."""
    tree = tiny_tree(
        tmp_path_factory.mktemp("finished"),
        tiny_teacher,
        tiny_shards,
        data={"validation": str(tiny_shards / "validation")},
        train={**LONG, "max_steps": 10, "validation_every_steps": 4, "validation_rows": 13},
        checkpoint={"every_steps": 4, "keep": 3},
        logging={"every_steps": 3},
        engine={"deepspeed": {"zero_optimization": {"stage": 3}}},
    )
    assert run_ranks(distil, 2, tree)[0][:2] == ("done", 0)
    return tree


@pytest.fixture
def run(finished: dict[str, Any], tmp_path: Path) -> DistillConfig:
    """The settings of a copy of that run."""
    folder = shutil.copytree(finished["run"]["folder"], tmp_path / "copy")
    return parse_config({**finished, "run": {**finished["run"], "folder": str(folder)}})


def checkpoints(config: DistillConfig) -> Path:
    return Path(config.run.folder) / "checkpoints"


def card_of(folder: Path) -> dict[str, str]:
    lines = (folder / "README.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| ")]
    return dict(cell for cell in cells if len(cell) == 2)


def test_a_checkpoint_that_several_ranks_wrote(run: DistillConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoints(run).rglob("*")}
    with locked(Path(run.run.folder)):  # a run in progress
        [folder] = export_checkpoint(run, 8)
    assert folder == Path(run.run.folder) / "export" / "l2-step-8"
    check_export(folder, checkpoints(run) / "step-000000008" / "l2.weights.safetensors")
    assert {path: path.stat().st_mtime_ns for path in checkpoints(run).rglob("*")} == before
    card, end = card_of(folder), card_of(folder.with_name("l2"))
    rows = [
        json.loads(line)
        for line in (Path(run.run.folder) / "metrics.jsonl").read_text().splitlines()
    ]
    [row] = [row for row in rows if row["step"] == 8]
    assert card["tokens"] == "1,024 (8 steps of 8 × 16)"
    assert card["validation loss"] == f"{row['validation_loss']:.4f}"
    assert card["training loss"] == f"{row['loss']:.4f}"
    different = {"tokens", "validation loss", "training loss"}
    assert {key: card[key] for key in card.keys() - different} == {
        key: end[key] for key in end.keys() - different
    }


def test_the_newest_is_what_the_run_itself_exported(run: DistillConfig) -> None:
    [folder] = export_checkpoint(run, "newest")
    assert folder.name == "l2-step-10"
    own = load_file(folder.with_name("l2") / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)


def test_losses_that_were_measured_before(run: DistillConfig) -> None:
    path = Path(run.run.folder) / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": 0.5, "validation_loss": 0.75}\n{"step": 3, "loss": 0.25}\n'
    )
    card = card_of(*export_checkpoint(run, 4))
    assert card["validation loss"] == "0.7500 (at step 2)"
    assert card["training loss"] == "0.2500 (at step 3)"
    path.unlink()
    card = card_of(*export_checkpoint(run, 4))
    assert card["validation loss"] == "not measured"
    assert "training loss" not in card


def test_the_checkpoints_own_settings_count(
    run: DistillConfig, tiny_teacher: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tiny_teacher, tmp_path / "moved"))
    tree = run.model_dump()
    tree["teacher"]["model"] = str(moved)
    tree["students"]["l2"] |= {"num_layers": 1, "hidden_size": 32}
    [folder] = export_checkpoint(parse_config(tree), 8)
    check_export(folder, checkpoints(run) / "step-000000008" / "l2.weights.safetensors")
    change = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**change, "vocab_size": 300}))
    with pytest.raises(
        ConfigError, match=r"^teacher\.model='.*/moved' is not the one that .*step-000000008 was "
    ):
        export_checkpoint(parse_config(tree), 8)


def test_a_checkpoint_that_is_not_there(run: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"^--export 5: .*/checkpoints has no checkpoint of step 5; there are 4, 8, 10 "
            r"\(checkpoint\."
        ),
    ):
        export_checkpoint(run, 5)
    tree = run.model_dump()
    tree["checkpoint"]["remote"] = "s3://nowhere/run"  # without s3fs, or without a network
    assert [path.name for path in export_checkpoint(parse_config(tree), 4)] == ["l2-step-4"]
    with pytest.raises(ConfigError, match=r"say which are kept\)$"):
        export_checkpoint(parse_config(tree), 5)
    shutil.copytree(checkpoints(run), tmp_path / "remote")
    shutil.rmtree(checkpoints(run))
    with pytest.raises(ConfigError, match=r"^run\.folder='.*/copy' has no checkpoints$"):
        export_checkpoint(run, "newest")
    tree["checkpoint"]["remote"] = str(tmp_path / "remote")
    with pytest.raises(
        ConfigError,
        match=r"no checkpoints; .*/remote has step-000000004, .*: copy one to .* first$",
    ):
        export_checkpoint(parse_config(tree), "newest")


def test_a_damaged_checkpoint(run: DistillConfig, caplog: pytest.LogCaptureFixture) -> None:
    for step in (8, 10):
        (checkpoints(run) / f"step-{step:09d}" / "l2.weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        DataError, match=r"^--export 8: no checkpoint in .* can be used; there are 4, 8, 10, see"
    ):
        export_checkpoint(run, 8)
    assert [path.name for path in export_checkpoint(run, "newest")] == ["l2-step-4"]
    assert (
        "step-000000010 is damaged, or the run has removed it meanwhile (l2.weights.safetensors has"
        in caplog.text
    )


def test_the_extra_tap_is_left_out(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> None:
    students = {
        "l2": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "tap": "extra"}
    }
    # The forward passes of the comparison with the export leave the weights gathered.
    engine = {"name": "fsdp", "fsdp": {"reshard_after_forward": False}}
    tree = tiny_tree(
        tmp_path,
        tiny_teacher,
        tiny_shards,
        students=students,
        train={"max_steps": 2},
        engine=engine,
    )
    assert run_ranks(distil, 1, tree)[0][:2] == ("done", 0)
    [folder] = export_checkpoint(parse_config(tree), "newest")
    own = load_file(folder.with_name("l2") / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)
    assert (
        "None: the loss was taken from a query, key and value projection"
        in (folder / "README.md").read_text()
    )


def test_a_student_to_publish(
    run: DistillConfig, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(run.run.folder)
    for source, step, found in (
        (folder, "newest", 10),
        (folder, 8, 8),
        (checkpoints(run) / "step-000000004", "newest", 4),
    ):
        student = open_student(source, step=step)
        weights = load_file(checkpoints(run) / f"step-{found:09d}" / "l2.weights.safetensors")
        assert student.state.keys() == weights.keys()
        assert all(torch.equal(student.state[name], weights[name]) for name in weights)
        assert student.card["tokens"] == f"{128 * found:,} ({found} steps of 8 × 16)"
        assert (student.name, student.trained_layers, student.num_tokens) == ("l2", 1, 16)
        assert parse_config(json.loads(student.settings or "")).students.keys() == {"l2"}
    monkeypatch.chdir(checkpoints(run))
    assert open_student(Path("step-000000004")).card["tokens"].startswith("512 (4 steps")
    with pytest.raises(ConfigError, match=r"^step=8 is read only for runs; leave it out$"):
        open_student(Path("step-000000004"), step=8)
    # The run's own export, which says the same.
    student = open_student(folder / "export" / "l2")
    assert (student.trained_layers, student.num_tokens) == (1, 16)
    moved = str(shutil.copytree(tiny_teacher, tmp_path / "moved"))
    assert open_student(folder, teacher=moved).tokenizer == moved
    with pytest.raises(
        ConfigError, match=r"^student='l9' is not a student of this checkpoint; use l2$"
    ):
        open_student(folder, student="l9")
    with pytest.raises(ConfigError, match=r"^--step 5: .* no checkpoint of step 5; there are 4, 8"):
        open_student(folder, step=5)
