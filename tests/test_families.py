"""Students of another architecture than the teacher's, with its vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES as SIZES
from conftest import tiny_tree
from encoders import tiny_config
from ranks import run_ranks
from transformers import AutoModel, AutoTokenizer

from scaledistill.config.load import parse_config
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError, DataError
from scaledistill.metrics.recorder import read_rows
from scaledistill.models.architectures import (
    ARCHITECTURES,
    build_encoder,
    max_sequence_length,
    takes_token_types,
)
from scaledistill.models.student import build_student, student_config
from scaledistill.models.teacher import load_config
from scaledistill.models.view import capture_view, model_inputs
from scaledistill.preflight.checks import plan_run, student_shape
from scaledistill.preflight.report import plan_table, start_summary
from scaledistill.training.exports import export_checkpoint

SMALL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
FAMILY = {
    "same": SMALL,
    "rotary": {**SMALL, "architecture": "modernbert", "tap": "extra"},
    "shifted": {**SMALL, "architecture": "roberta", "intermediate_size": 24},
}
CPU = torch.device("cpu")


def planned(tree: dict[str, Any]) -> Any:
    return plan_run(parse_config(tree), 1, CPU)


@pytest.mark.parametrize("family", ["roberta", pytest.param("modernbert", marks=pytest.mark.full)])
def test_every_architecture_reads_the_teachers_rows(family: str) -> None:
    teacher = tiny_config(family, SIZES)
    teacher.pad_token_id = 1
    for architecture in ARCHITECTURES:
        config = student_config(teacher, **SMALL, architecture=architecture)
        assert config.model_type == architecture
        assert (config.vocab_size, config.pad_token_id) == (97, 1)
        assert max_sequence_length(config) == max_sequence_length(teacher)
        assert config.architectures[0].endswith("Model")
        for key in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
            assert getattr(config, key, None) == getattr(teacher, key, None) or not hasattr(
                config, key
            )
        student = build_student(None, config)
        length = max_sequence_length(teacher)
        qkv = capture_view(student, 2)(TokenInputs(torch.full((1, length), 5)))
        assert qkv.q.shape == (1, length, 16)


def test_defaults_are_those_of_the_published_models() -> None:
    teacher = tiny_config("bert", {**SIZES, "hidden_act": "relu", "layer_norm_eps": 0.1})
    config = student_config(
        teacher, num_layers=7, hidden_size=32, num_attention_heads=4, architecture="modernbert"
    )
    assert (config.hidden_activation, config.norm_eps, config.intermediate_size) == (
        "gelu",
        1e-5,
        48,
    )
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.layer_types == (kinds * 3)[:7]
    deberta = student_config(teacher, **SMALL, architecture="deberta-v2")
    assert deberta.share_att_key
    assert deberta.position_buckets == 256
    assert student_config(teacher, **SMALL, architecture="esm").position_embedding_type == "rotary"
    same = student_config(teacher, **SMALL, architecture="bert")
    assert (same.hidden_act, same.layer_norm_eps) == ("relu", 0.1)


def test_each_model_gets_its_own_inputs() -> None:
    """Positions after the padding id for RoBERTa only; token types where a model has them."""
    teacher = build_encoder(tiny_config("bert", SIZES)).config
    positions_BT = torch.arange(4)[None]
    tokens = TokenInputs(
        torch.full((1, 4), 5), None, torch.zeros(1, 4, dtype=torch.int32), positions_BT
    )
    student = build_student(None, student_config(teacher, **SMALL, architecture="roberta")).config
    assert torch.equal(model_inputs(teacher, tokens)["position_ids"], positions_BT)
    assert torch.equal(model_inputs(student, tokens)["position_ids"], positions_BT + 1)
    with_types = {
        name
        for name in ARCHITECTURES
        if takes_token_types(
            student_config(tiny_config("mpnet", SIZES), **SMALL, architecture=name)
        )
    }
    without = {"modernbert", "eurobert", "distilbert", "mpnet", "esm", "deberta", "deberta-v2"}
    decoders = {name for name, row in ARCHITECTURES.items() if row.causal} | {"gemma3_text"}
    assert with_types == ARCHITECTURES.keys() - without - decoders - {"xlm-roberta-xl"}


def states_of(trees: list[dict[str, Any]]) -> list[str]:
    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.loop import distill

    with process_group(60):
        return [distill(parse_config(tree)).state for tree in trees]


def losses_of(tree: dict[str, Any], name: str) -> list[float]:
    rows = read_rows(Path(tree["run"]["folder"]) / "metrics.jsonl")
    return [row[f"loss/{name}/qq"] for row in rows if f"loss/{name}/qq" in row]


def test_a_run_with_students_of_three_families(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    """Within documents; the plan, the exports, and a start from one of them."""
    tree = tiny_tree(
        tmp_path,
        tiny_teacher,
        tiny_shards,
        students=FAMILY,
        data={"attention": "document"},
        train={"max_steps": 3, "warmup_steps": 1},
    )
    del tree["students"]["l2"]
    plan = planned(tree)
    summary = "\n".join(start_summary(plan, "cpu", step=0, last_step=3))
    assert "student rotary: modernbert, " in summary
    assert any("shifted: roberta, " in str(cell) for cell in plan_table(plan).columns[1].cells)
    second = json.loads(json.dumps(tree))
    second["run"]["folder"] = str(tmp_path / "again")
    export = str(Path(tree["run"]["folder"]) / "export/rotary")
    second["students"] = {"rotary": {**FAMILY["rotary"], "tap": "last", "init": export}}
    assert run_ranks(states_of, 1, [tree, second], timeout=200)[0] == ["done", "done"]
    for name in FAMILY:
        losses = losses_of(tree, name)
        assert len(losses) == 3
        assert all(0 < loss < 1e3 for loss in losses)
        folder = Path(tree["run"]["folder"]) / "export" / name
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == FAMILY[name].get("architecture", "bert")
        batch = tokenizer(["w000 w001", "w002"], padding=True, return_tensors="pt")
        assert ("token_type_ids" in batch) == takes_token_types(model.config)
        assert model(**batch).last_hidden_state.shape == (2, 4, 16)
    assert "A modernbert encoder of 2 layers" in (Path(export) / "README.md").read_text()
    moved = load_config(tmp_path / "again/export/rotary")
    assert moved.layer_types == load_config(export).layer_types
    (first, *_), (continued, *_) = losses_of(tree, "rotary"), losses_of(second, "rotary")
    assert continued != first
    assert len(export_checkpoint(parse_config(tree), 3)) == 3
    # Resume is refused with another architecture.
    tree["students"]["shifted"]["architecture"] = "electra"
    with pytest.raises(ConfigError, match=r'shifted\.architecture: "roberta" -> "electra"'):
        planned(tree)


@pytest.mark.parametrize(
    ("student", "data", "message"),
    [
        (
            {"architecture": "modernbert", "init": "teacher"},
            {},
            r"^students\.l2\.init='teacher' cuts the weights of a teacher of type 'bert', but the "
            "student is of type 'modernbert'; use 'random' or the folder of a model",
        ),
        (
            {"architecture": "ModernBert", "init": "random"},
            {},
            r"^students\.l2\.architecture='ModernBert' is not supported; did you mean "
            "'modernbert'. Use albert, bert",
        ),
        (
            {"architecture": "deberta-v2", "init": "random"},
            {"attention": "document"},
            '^data.attention="document" is not supported for DeBERTa v2 and v3: .*; use "row"$',
        ),
        (
            {"architecture": "mpnet", "init": "random"},
            {},
            r"^students\.l2\.architecture='mpnet': its config has pad_token_id=0, .* expected 1$",
        ),
        (
            {"architecture": "esm", "init": "random", "num_attention_heads": 16},
            {},
            r"^students\.l2\.num_attention_heads=16 gives heads of an odd size .* ESM rotates",
        ),
    ],
)
def test_refusals(
    student: dict[str, Any],
    data: dict[str, Any],
    message: str,
    tmp_path: Path,
    tiny_teacher: Path,
    tiny_shards: Path,
) -> None:
    tree = tiny_tree(
        tmp_path, tiny_teacher, tiny_shards, students={"l2": {**SMALL, **student}}, data=data
    )
    with pytest.raises((ConfigError, DataError), match=message):
        planned(tree)


def test_folders_that_do_not_fit(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> None:
    teacher = load_config(tiny_teacher)
    folder = tmp_path / "start"
    config = student_config(teacher, **SMALL, architecture="modernbert")
    config.local_attention = 8
    build_student(None, config).save_pretrained(folder)
    student = {**SMALL, "architecture": "modernbert", "init": str(folder)}
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, students={"l2": student})
    # What no setting names is the folder's.
    assert student_shape(parse_config(tree), "l2", teacher).local_attention == 8
    planned(tree)
    for other, message in (
        ({"architecture": "roberta"}, "init=.* is a model of type 'modernbert'; correct it or .*"),
        ({"num_layers": 3}, "init=.* has num_hidden_layers=2, .*but .* num_hidden_layers=3"),
    ):
        tree["students"]["l2"] = {**student, **other}
        with pytest.raises(ConfigError, match=message):
            planned(tree)
    tree["students"]["l2"] = student
    config.vocab_size = 201
    build_student(None, config).save_pretrained(folder)
    with pytest.raises(ConfigError, match="has vocab_size=201, but the student has vocab_size=200"):
        planned(tree)


def test_positions_need_a_padding_token() -> None:
    teacher = tiny_config("bert", SIZES)
    teacher.pad_token_id = None
    with pytest.raises(ConfigError, match="architecture='roberta' counts positions from pad_token"):
        student_config(teacher, **SMALL, architecture="roberta")
    student_config(teacher, **SMALL, architecture="distilbert")
