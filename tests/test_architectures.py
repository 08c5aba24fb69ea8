"""Every architecture as teacher and student: cuts, documents, a run's first steps, its export."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES as SIZES
from conftest import tiny_tree
from encoders import NAMES, tiny_config
from ranks import run_ranks
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from scaledistill.config.load import parse_config
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError, DataError
from scaledistill.metrics.recorder import read_rows
from scaledistill.models.architectures import ARCHITECTURES, architecture_of, build_encoder
from scaledistill.models.export import export_student
from scaledistill.models.student import build_student, set_dropout, student_config
from scaledistill.models.teacher import load_config, load_encoder
from scaledistill.models.view import capture_view

# `test_student` and `test_documents` have the others.
OLD = ("bert", "electra", "electra-wide", "roberta", "xlm-roberta", "camembert")
NEW = [name for name in NAMES if name not in OLD]
IDS_BT = torch.randint(5, 97, (3, 17), generator=torch.Generator().manual_seed(0))
RIGHT = torch.ones(3, 17, dtype=torch.bool)
RIGHT[1, 9:] = RIGHT[2, 1:] = False
SAME = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64}
HALF = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def teacher_of(name: str) -> PreTrainedModel:
    """A teacher in which every weight, that of a norm too, tells itself from an initial one."""
    torch.manual_seed(0)
    teacher = build_encoder(tiny_config(name, SIZES))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.3)
    return teacher.eval()


@pytest.mark.parametrize("name", NEW)
def test_same_sizes_give_an_exact_copy(name: str) -> None:
    teacher = teacher_of(name)
    student = build_student(teacher, student_config(teacher.config, **SAME), init="teacher").eval()
    expected = teacher.state_dict()
    assert list(student.state_dict()) == list(expected)
    assert all(torch.equal(x, expected[key]) for key, x in student.state_dict().items())
    tokens = TokenInputs(IDS_BT, RIGHT)
    found = capture_view(student, 4)(tokens)
    assert all(map(torch.equal, found, capture_view(teacher, 4)(tokens)))


@pytest.mark.parametrize("name", NEW)
def test_cut_by_whole_heads(name: str) -> None:
    """16 wide with 2 heads of 8, from 48 with 4 heads of 12, of layers 2 and 4."""
    teacher = teacher_of(name)
    row = architecture_of(teacher.config)
    student = build_student(
        teacher, student_config(teacher.config, **HALF), init="teacher", layer_map=[2, 4]
    )
    in_head = [*range(8)]
    if row.rotates(teacher.config):
        in_head = [0, 1, 3, 4, 6, 7, 9, 10]
    heads = [start + i for start in (0, 12) for i in in_head]
    source = teacher.get_submodule(row.block_path(4))
    block = student.get_submodule(row.block_path(2))
    for path in row.projections:
        theirs, ours = source.get_submodule(path), block.get_submodule(path)
        rows = [third * 48 + i for third in range(3) for i in heads] if row.fused else heads
        assert torch.equal(ours.weight, theirs.weight[rows][:, :16])
        assert ours.bias is None or torch.equal(ours.bias, theirs.bias[rows])
    path = f"{row.attention_output}.weight"
    assert torch.equal(block.get_parameter(path), source.get_parameter(path)[:16][:, heads])
    output = capture_view(student, 2)(TokenInputs(IDS_BT, RIGHT))
    assert all(each.isfinite().all() for each in output)


@pytest.mark.parametrize("name", NEW)
def test_dropout_is_for_training_only(name: str) -> None:
    config = student_config(tiny_config(name, SIZES), **SAME)
    student = build_student(None, config)
    hidden = student(input_ids=IDS_BT).last_hidden_state
    assert torch.equal(hidden, student.eval()(input_ids=IDS_BT).last_hidden_state)
    set_dropout(student.train(), 0.5)
    assert not torch.equal(hidden, student(input_ids=IDS_BT).last_hidden_state)


def packed(name: str, attention: str) -> tuple[Tensor, list[Tensor]]:
    """Return Q, K and V of a row of two documents, and of each document alone."""
    config = tiny_config(name, {**SIZES, "initializer_range": 0.15})
    config._attn_implementation = attention
    torch.manual_seed(0)
    view = capture_view(build_encoder(config).eval(), 4)
    ends = (0, 6, 17)
    positions_T = torch.cat([torch.arange(6), torch.arange(11)])
    segments_T = torch.tensor([0] * 6 + [1] * 11, dtype=torch.int32)
    with torch.no_grad():
        whole = view(TokenInputs(IDS_BT[:1], None, segments_T[None], positions_T[None]))
        alone = [
            torch.cat(view(TokenInputs(IDS_BT[:1, start:end])), -1) for start, end in pairwise(ends)
        ]
    return torch.cat(whole, -1), alone


@pytest.mark.parametrize("name", NEW)
def test_documents_give_what_they_give_alone(name: str) -> None:
    row = ARCHITECTURES[tiny_config(name, SIZES).model_type]
    if row.no_documents:
        with pytest.raises(ConfigError, match=r"^segment_ids_BT: attention within .* \"row\"$"):
            packed(name, "sdpa")
        return
    for attention in ("eager",) if row.eager_only else ("sdpa", "eager"):
        whole, alone = packed(name, attention)
        torch.testing.assert_close(whole, torch.cat(alone, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
def test_rotary_frequencies_stay_exact_in_16_bits(name: str) -> None:
    encoder = build_encoder(tiny_config(name, SIZES))
    row = architecture_of(encoder.config)
    view = capture_view(encoder, 4).module.bfloat16()
    if row.rotates(encoder.config):
        buffers = list(view.get_submodule(row.rotary).buffers())
        assert buffers
        assert {buffer.dtype for buffer in buffers} == {torch.float32}
        moved = view.to("meta").get_submodule(row.rotary).buffers()
        assert {buffer.device.type for buffer in moved} == {"meta"}
    assert not dict(view.named_buffers()).keys() & view.state_dict().keys()


@pytest.mark.parametrize("name", NEW)
def test_export_and_reload(name: str, tmp_path: Path, tiny_teacher: Path) -> None:
    config = student_config(tiny_config(name, SIZES), **HALF)
    student = build_student(None, config, seed=5).eval()
    folder = export_student(
        tmp_path / "l2",
        student.config,
        student.state_dict(),
        tokenizer_source=tiny_teacher,
        card={"init": "random"},
    )
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    missing = {key.split(".")[0] for key in info["missing_keys"]}
    row = architecture_of(config)
    assert missing <= {*row.dropped, row.rotary}
    assert not info["unexpected_keys"]
    assert torch.equal(
        model.eval()(input_ids=IDS_BT).last_hidden_state,
        student(input_ids=IDS_BT).last_hidden_state,
    )
    assert "FFN 24" in (folder / "README.md").read_text()


def write_teacher(name: str, folder: Path, tokenizer: Path) -> Path:
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = tiny_config(name, {**SIZES, "vocab_size": 200, "initializer_range": 0.2})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModel.from_config(config).save_pretrained(folder)
    return folder


def losses_of(trees: list[dict[str, Any]]) -> list[list[float]]:
    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.loop import distill

    losses = []
    with process_group(60):
        for tree in trees:
            assert distill(parse_config(tree)).state == "done"
            rows = read_rows(Path(tree["run"]["folder"]) / "metrics.jsonl")
            losses.append([row["loss"] for row in rows if "loss" in row])
    return losses


def run_of(name: str, root: Path, tokenizer: Path, shards: Path, **blocks: Any) -> dict[str, Any]:
    teacher = write_teacher(name, root / f"teacher-{name}", tokenizer)
    documents = not ARCHITECTURES[load_config(teacher).model_type].no_documents
    blocks["data"] = {"attention": "document" if documents else "row"}
    blocks["train"] = {"max_steps": 3, "warmup_steps": 1, **blocks.get("train", {})}
    tree = tiny_tree(root, teacher, shards, **blocks)
    tree["run"]["folder"] = str(root / f"run-{name}")
    return tree


def test_three_steps_and_an_export(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> None:
    """A run of each architecture, on one rank; within documents where it allows that."""
    trees = [run_of(name, tmp_path, tiny_teacher, tiny_shards) for name in NEW]
    for name, losses in zip(NEW, run_ranks(losses_of, 1, trees, timeout=200)[0], strict=True):
        assert len(losses) == 3, name
        assert all(0 < loss < 1e3 for loss in losses), name
        (export,) = (tmp_path / f"run-{name}/export").iterdir()
        model = AutoModel.from_pretrained(export).eval()
        again = load_encoder(export)
        assert torch.equal(
            model(input_ids=IDS_BT).last_hidden_state, again(input_ids=IDS_BT).last_hidden_state
        )


@pytest.mark.full
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("engine", "placement"), [("deepspeed", "shard"), ("fsdp", "replicate"), ("fsdp", "shard")]
)
def test_engines(
    name: str,
    precision: str,
    engine: str,
    placement: str,
    tmp_path: Path,
    tiny_teacher: Path,
    tiny_shards: Path,
) -> None:
    tree = run_of(
        name,
        tmp_path,
        tiny_teacher,
        tiny_shards,
        engine={"name": engine},
        train={"precision": precision},
    )
    tree["teacher"]["placement"] = placement
    losses = run_ranks(losses_of, 2, [tree], timeout=200)[0][0]
    assert all(0 < loss < 1e3 for loss in losses)


def test_refused_computations(tmp_path: Path) -> None:
    def loaded(name: str, **keys: Any) -> None:
        config = tiny_config(name, SIZES)
        for key, value in keys.items():
            setattr(config, key, value)
        config.save_pretrained(tmp_path)
        load_config(tmp_path)

    for name, keys, message in (
        ("mpnet", {"pad_token_id": 0}, r"pad_token_id=0, .* for MPNet; expected 1$"),
        (
            "mpnet",
            {"relative_attention_num_buckets": 16},
            "relative_attention_num_buckets=16, which is not supported",
        ),
        (
            "esm",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key', .* expected 'absolute' or 'rotary'",
        ),
    ):
        with pytest.raises(DataError, match=message):
            loaded(name, **keys)
    with pytest.raises(ConfigError, match=r"num_attention_heads=16 gives heads of an odd size"):
        student_config(
            tiny_config("esm", SIZES), num_layers=2, hidden_size=48, num_attention_heads=16
        )
