"""Decoders as teachers and students: causal relations, grouped-query heads, their settings.

Legend: B sequences, T tokens, R relation heads, G key and value heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES as SIZES
from encoders import tiny_config
from test_architectures import HALF, IDS_BT, SAME, run_of, teacher_of
from torch import Tensor

from scaledistill.config.load import parse_config
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError, DataError
from scaledistill.models.architectures import build_encoder, head_size, qkv_widths
from scaledistill.models.loss import StudentLoss, causal_relations
from scaledistill.models.student import build_student, student_config
from scaledistill.models.teacher import load_config
from scaledistill.models.view import capture_view
from scaledistill.preflight.checks import plan_run
from scaledistill.relations import QKV

PAIRS = {"qq": 1.0, "kk": 0.5, "vv": 2.0}
NUM_HEADS, SHARED = 4, 9  # relation heads; tokens that two batches share
DECODERS = ("llama", "mistral-windowed", "qwen2", "qwen3", "gemma3_text")


def row_losses(teacher: QKV, student: QKV, causal: bool) -> Tensor:
    """Return the loss of each token's row, [B, T], before the mean over rows."""

    def log_relations(x_BTD: Tensor) -> Tensor:
        x_BRTE = x_BTD.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
        scores_BRTT = x_BRTE @ x_BRTE.mT / x_BRTE.shape[-1] ** 0.5
        if causal:
            later_TT = torch.ones_like(scores_BRTT[0, 0]).triu(1).bool()
            scores_BRTT = scores_BRTT.masked_fill(later_TT, -1e9)
        return scores_BRTT.log_softmax(-1)

    losses_BT = torch.zeros(teacher.q.shape[:2])
    for pair, weight in PAIRS.items():
        theirs, ours = (log_relations(getattr(qkv, pair[0])) for qkv in (teacher, student))
        losses_BT += weight * (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
    return losses_BT


def futures() -> tuple[Tensor, Tensor]:
    """Return ids that differ after the first `SHARED` tokens."""
    other_BT = IDS_BT.clone()
    other_BT[:, SHARED:] = 5 + (IDS_BT[:, SHARED:] - 4) % 92
    return IDS_BT, other_BT


@torch.no_grad()
def rows_and_total(
    name: str, ids_BT: Tensor, backend: str, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return each row's loss by the formula, and a run's loss of the batch."""
    config = tiny_config(name, {**SIZES, "initializer_range": 0.3})
    torch.manual_seed(0)
    teacher = capture_view(build_encoder(config).eval(), 4)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 2}
    student = capture_view(build_student(None, student_config(config, **sizes)).eval(), 2)
    causal = causal_relations(teacher.config, student.config)
    tokens = TokenInputs(ids_BT.to(device))
    for view in (teacher, student):
        view.module.to(device)
    outputs = teacher(tokens), student(tokens)
    total = StudentLoss(NUM_HEADS, PAIRS, backend, causal)(*outputs, tokens).total
    return row_losses(*(QKV(*(x.cpu() for x in qkv)) for qkv in outputs), causal), total.cpu()


def check_later_tokens_are_not_seen(name: str, backend: str, device: str = "cpu") -> None:
    """Check that they leave the loss of earlier rows, and that a run's loss is the mean of rows.

    `test_triton` does so too.
    """
    rows, totals = zip(
        *(rows_and_total(name, ids_BT, backend, device) for ids_BT in futures()), strict=True
    )
    torch.testing.assert_close(rows[0][:, :SHARED], rows[1][:, :SHARED], rtol=1e-4, atol=1e-6)
    assert (rows[0] - rows[1])[:, SHARED:].abs().amin() > 1e-5
    for row_loss, total in zip(rows, totals, strict=True):
        torch.testing.assert_close(total, row_loss.mean(), rtol=1e-4, atol=1e-6)
    # The shared tokens alone have these losses too.
    _, alone = rows_and_total(name, IDS_BT[:, :SHARED], backend, device)
    torch.testing.assert_close(alone, rows[0][:, :SHARED].mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_later_tokens_leave_the_loss_of_earlier_rows(name: str, backend: str) -> None:
    check_later_tokens_are_not_seen(name, backend)


@pytest.mark.parametrize("name", ["llama-bidirectional", "gemma3_text-bidirectional"])
def test_bidirectional_ones_see_later_tokens(name: str) -> None:
    rows, totals = zip(*(rows_and_total(name, ids, "sdpa") for ids in futures()), strict=True)
    assert (rows[0] - rows[1])[:, :SHARED].abs().amin() > 1e-5
    torch.testing.assert_close(totals[0], rows[0].mean(), rtol=1e-4, atol=1e-6)


def test_both_models_are_causal_or_none() -> None:
    llama, bert = tiny_config("llama", SIZES), tiny_config("bert", SIZES)
    both_ways = tiny_config("llama-bidirectional", SIZES)
    assert causal_relations(llama, tiny_config("qwen3", SIZES))
    assert not causal_relations(bert, both_ways)
    for pair, message in (
        ((llama, bert), "tokens of the teacher attend to earlier ones only, those of the student"),
        ((both_ways, llama), "tokens of the student attend to .* those of the teacher to"),
    ):
        with pytest.raises(ConfigError, match=rf"^student: {message} .* models that are causal"):
            causal_relations(*pair)


def test_query_heads_stay_with_their_keys() -> None:
    """Of 2 groups of 2 query heads, a student with 2 groups of 1 keeps query heads 0 and 2."""
    teacher = teacher_of("llama")
    sizes = {"num_layers": 1, "hidden_size": 24, "intermediate_size": 24}
    config = student_config(teacher.config, **sizes, num_attention_heads=2, num_key_value_heads=2)
    student = build_student(teacher, config, init="teacher", layer_map=[3])
    theirs, ours = teacher.layers[2].self_attn, student.layers[0].self_attn
    queries = [*range(12), *range(24, 36)]
    assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[queries][:, :24])
    assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight[:24][:, queries])
    for name in ("k_proj", "v_proj"):
        assert torch.equal(getattr(ours, name).weight, getattr(theirs, name).weight[:24, :24])
    for name in ("gate_proj", "up_proj"):  # the same components of both halves of the FFN
        expected = getattr(teacher.layers[2].mlp, name).weight[:24, :24]
        assert torch.equal(getattr(student.layers[0].mlp, name).weight, expected)


def test_gemma_cut() -> None:
    """Scaled embeddings stay, norms of queries and keys and the scale of scores follow a head."""
    teacher = teacher_of("gemma3_text")
    config = student_config(teacher.config, **HALF, head_dim=8)
    assert config.query_pre_attn_scalar == teacher.config.query_pre_attn_scalar // 2
    student = build_student(teacher, config, init="teacher", layer_map=[2, 4])
    embedded = [model.embed_tokens(IDS_BT) for model in (student, teacher)]
    torch.testing.assert_close(embedded[0], embedded[1][..., :16])
    layer = teacher.layers[1].self_attn
    kept = [0, 2, 4, 6, 8, 10, 12, 14]
    assert torch.equal(student.layers[0].self_attn.k_norm.weight, layer.k_norm.weight[kept])
    torch.testing.assert_close(
        student.rotary_emb.full_attention_inv_freq,
        teacher.rotary_emb.full_attention_inv_freq[[0, 2, 4, 6]],
    )


def test_default_sizes_of_students() -> None:
    def heads(name: str, **sizes: int) -> tuple[int, int, int]:
        student = student_config(tiny_config(name, SIZES), **{**HALF, **sizes})
        return student.num_attention_heads, student.num_key_value_heads, head_size(student)

    assert heads("llama") == (2, 1, 8)
    assert heads("llama", num_attention_heads=1) == (1, 1, 16)
    assert heads("llama", num_attention_heads=8) == (8, 4, 2)
    assert heads("llama", num_attention_heads=8, num_key_value_heads=8) == (8, 8, 2)
    assert heads("mistral-windowed", num_attention_heads=8) == (8, 2, 2)
    assert heads("qwen3") == (2, 1, 16)  # the teacher's 4 heads are 16 wide, not 12
    assert heads("qwen3", head_dim=32) == (2, 1, 32)
    assert heads("eurobert") == (2, 2, 8)
    assert qkv_widths(tiny_config("qwen3", SIZES)) == {"q": 64, "k": 32, "v": 32}
    bert = tiny_config("bert", SIZES)
    assert student_config(bert, **HALF, num_key_value_heads=2, head_dim=8).num_attention_heads == 2


def test_refused_sizes_of_students() -> None:
    for name, sizes, message in (
        (
            "llama",
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            r"^num_key_value_heads=3 does not divide num_attention_heads=4; use one of 1, 2, 4$",
        ),
        (
            "bert",
            {"num_key_value_heads": 1},
            "^num_key_value_heads=1 cannot be chosen for BERT, in which every head .*; leave it",
        ),
        ("qwen2", {"num_attention_heads": 16}, r"gives heads of an odd size with hidden_size=16"),
        ("qwen3", {"head_dim": 7}, "^num_attention_heads=2 gives heads of an odd size with head_"),
        ("bert", {"head_dim": 16}, "^head_dim=16 cannot be chosen for BERT, .* here 8; leave it"),
    ):
        with pytest.raises(ConfigError, match=message):
            student_config(tiny_config(name, SIZES), **{**HALF, **sizes})
    for name, sizes, message in (
        ("llama", {"num_key_value_heads": 4}, r"^config.num_key_value_heads=4 is more than .* 2,"),
        (
            "llama",
            {"num_key_value_heads": 1},
            r"^config.num_attention_heads / num_key_value_heads=4 is more than the teacher's 2,",
        ),
        ("qwen3", {"head_dim": 32}, r"^config.head_dim=32 is more than the teacher's 16, from"),
    ):
        teacher = teacher_of(name)
        with pytest.raises(ConfigError, match=message):
            build_student(teacher, student_config(teacher.config, **SAME, **sizes), init="teacher")


def test_relation_heads_divide_each_width(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    """The teacher's queries are 64 wide, its keys and values 32, the student's 32 and 16."""
    tree = run_of("qwen3", tmp_path, tiny_teacher, tiny_shards)

    def plan(**relations: Any) -> None:
        plan_run(parse_config({**tree, "relations": relations}), 1, torch.device("cpu"))

    plan(num_heads=16)
    with pytest.raises(
        ConfigError,
        match=r"^relations.num_heads=32 does not divide the student l2's k width 16; use 16$",
    ):
        plan(num_heads=32)
    plan(num_heads=32, pairs={"qq": 1})
    with pytest.raises(
        ConfigError, match=r"^relations.pairs: 'qk' needs q and k of equal width, .* are 64 and 32"
    ):
        plan(num_heads=4, pairs={"qk": 1, "vv": 1})


def test_config_files_of_published_decoders(tmp_path: Path) -> None:
    def loaded(**keys: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(keys))
        return load_config(tmp_path)

    llama3 = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = loaded(model_type="llama", rope_theta=500000.0, rope_scaling=llama3, use_cache=True)
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.rope_parameters["factor"] == 32.0
    assert causal_relations(config, config)
    config = loaded(model_type="llama", is_causal=False)
    assert not causal_relations(config, config)
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path).is_causal is False
    config = loaded(
        model_type="qwen3",
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_hidden_layers=28,
        max_window_layers=28,
        sliding_window=None,
        rope_theta=1000000,
    )
    assert qkv_widths(config) == {"q": 2048, "k": 1024, "v": 1024}
    assert config.layer_types == ["full_attention"] * 28
    config = loaded(
        model_type="gemma3_text",
        num_hidden_layers=26,
        rope_local_base_freq=5000,
        rope_theta=2000000,
        sliding_window=512,
        sliding_window_pattern=3,
    )
    assert config.layer_types[:6] == [*["sliding_attention"] * 2, "full_attention"] * 2
    thetas = {kind: each["rope_theta"] for kind, each in config.rope_parameters.items()}
    assert thetas == {"full_attention": 2000000, "sliding_attention": 5000}
    assert config.sliding_window == 512
    assert not hasattr(loaded(model_type="llama", is_decoder=True), "is_decoder")
    for keys, message in (
        ({"model_type": "llama", "add_cross_attention": True}, "add_cross_attention=True, which"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder=True, which makes it a decoder"),
        ({"model_type": "gemma3_text", "is_causal": False}, "is_causal=False, which transformers'"),
    ):
        with pytest.raises(DataError, match=message):
            loaded(**keys)


def test_an_encoder_as_decoder_is_still_refused() -> None:
    bert = build_encoder(tiny_config("bert", SIZES))
    bert.config.is_decoder = True
    with pytest.raises(ConfigError, match=r"^model has is_decoder=true in its config"):
        capture_view(bert, 1)


def test_views_keep_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a cache was made")

    for name in DECODERS:
        encoder = build_encoder(tiny_config(name, SIZES))
        monkeypatch.setattr(f"{type(encoder).__module__}.DynamicCache", refuse)
        capture_view(encoder, 2)(TokenInputs(IDS_BT))
        with pytest.raises(AssertionError, match="a cache was made"):
            encoder(input_ids=IDS_BT)
