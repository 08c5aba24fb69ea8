"""Every architecture as teacher and student: cuts, documents, a run's first steps, its export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES as SIZES
from conftest import tiny_tree
from encoders import NAMES, tiny_config
from ranks import run_ranks
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
)

from scaledistill.config.load import parse_config
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError, DataError
from scaledistill.metrics.recorder import read_rows
from scaledistill.models.architectures import (
    ARCHITECTURES,
    architecture_of,
    build_encoder,
    head_size,
    key_value_heads,
)
from scaledistill.models.export import export_student
from scaledistill.models.loss import StudentLoss
from scaledistill.models.student import (
    build_student,
    check_init,
    even_layer_map,
    exported,
    of_equal_kinds,
    set_dropout,
    student_config,
)
from scaledistill.models.teacher import encoder_on_meta, load_config, load_encoder
from scaledistill.models.view import capture_view
from scaledistill.preflight.checks import plan_run
from scaledistill.training.exports import export_checkpoint

# `test_student` and `test_documents` have the others.
OLD = ("bert", "electra", "electra-wide", "roberta", "xlm-roberta", "camembert")
NEW = [name for name in NAMES if name not in OLD]
RUN = [name for name in NEW if name != "qwen2"]  # its tokenizers are of a class of their own
OFTEN_RUN = ("modernbert", "deberta-v2", "albert", "qwen3", "gemma3_text")
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
    layers = None if row.repeats_block else [2, 4]
    student = build_student(
        teacher, student_config(teacher.config, **HALF), init="teacher", layer_map=layers
    )
    in_head, size = [*range(8)], 12
    if row.rotates(teacher.config):
        in_head = [0, 1, 3, 4, 6, 7, 9, 10]
    if head_size(teacher.config) == 16:  # as many in the student, though it is narrower
        in_head, size = [*range(16)], 16
    heads = [start + i for start in (0, size) for i in in_head]
    # Two query heads of the teacher, and so of the student, share a key and value head.
    groups = heads if key_value_heads(student.config) == 2 else heads[: len(in_head)]
    source = teacher.get_submodule(row.block_path(4))
    block = student.get_submodule(row.block_path(2))
    modules = dict(source.named_modules())
    for path in (*row.projections, *(path for path in row.by_head if path in modules)):
        theirs, ours = source.get_submodule(path), block.get_submodule(path)
        rows = heads if path in (row.query, *row.by_head) else groups
        if path == row.fused:
            rows = [third * 48 + i for third in range(3) for i in heads]
            if row.fused_by_head:
                starts = [start + third * 12 for start in (0, 36) for third in range(3)]
                rows = [start + i for start in starts for i in in_head]
        assert torch.equal(ours.weight, theirs.weight[rows][:, :16])
        assert ours.bias is None or torch.equal(ours.bias, theirs.bias[rows])
    for path in row.fused_biases.values():
        assert torch.equal(block.get_parameter(path), source.get_parameter(path)[heads])
    path = f"{row.attention_output}.weight"
    assert torch.equal(block.get_parameter(path), source.get_parameter(path)[:16][:, heads])
    for path in row.head_norms:
        name = f"{path}.weight"
        assert torch.equal(block.get_parameter(name), source.get_parameter(name)[in_head])
    output = capture_view(student, 2)(TokenInputs(IDS_BT, RIGHT))
    assert all(each.isfinite().all() for each in output)


@pytest.mark.parametrize("name", NEW)
def test_padding_does_not_reach_the_loss(name: str) -> None:
    """On the left, on the right and within: neither its tokens nor, on the right, its number."""
    teacher = teacher_of(name)
    student = build_student(None, student_config(teacher.config, **HALF))
    views = [capture_view(teacher, 3), capture_view(student.eval(), 2)]

    relation = StudentLoss(2, {"qq": 1.0, "kk": 1.0, "vv": 1.0}, "reference")

    def loss(tokens: TokenInputs) -> Tensor:
        return relation(*(view(tokens) for view in views), tokens).total

    mask_BT = torch.ones(3, 17, dtype=torch.bool)
    mask_BT[0, :4] = mask_BT[1, 9:] = mask_BT[2, 6:8] = False
    with torch.no_grad():
        found = [loss(TokenInputs(IDS_BT.masked_fill(~mask_BT, x), mask_BT)) for x in (7, 8)]
        torch.testing.assert_close(*found)
        row_BT = IDS_BT[1:2, :9]
        shorter = loss(TokenInputs(row_BT))
        padded_BT = torch.cat([row_BT, torch.full((1, 8), teacher.config.pad_token_id)], 1)
        torch.testing.assert_close(loss(TokenInputs(padded_BT, mask_BT[1:2])), shorter)


@pytest.mark.parametrize("name", NEW)
def test_dropout_is_for_training_only(name: str) -> None:
    config = student_config(tiny_config(name, SIZES), **SAME)
    student = build_student(None, config)
    hidden = student(input_ids=IDS_BT).last_hidden_state
    assert torch.equal(hidden, student.eval()(input_ids=IDS_BT).last_hidden_state)
    set_dropout(student.train(), 0.5)
    assert not torch.equal(hidden, student(input_ids=IDS_BT).last_hidden_state)


def test_modernbert_drops_the_output_of_attention_too() -> None:
    student = build_student(None, student_config(tiny_config("modernbert", SIZES), **SAME))
    assert student.config.attention_dropout == 0
    set_dropout(student, 0.5)
    assert [block.attn.out_drop.p for block in student.layers] == [0.5] * SAME["num_layers"]
    set_dropout(student, 0.0)
    assert not any(module.p for module in student.modules() if isinstance(module, nn.Dropout))


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
    implementations = ("eager",) if row.eager_only else ("sdpa", "eager")
    if row.no_documents:
        with pytest.raises(ConfigError, match=r"^segment_ids_BT: attention within .* \"row\"$"):
            packed(name, implementations[0])
        return
    for attention in implementations:
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
    tokenizer = tiny_teacher
    if name == "qwen2":  # transformers reads every tokenizer of such a model as this class
        tokenizer = tmp_path / "tokenizer"
        Qwen2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]).save_pretrained(
            tokenizer
        )
    folder = export_student(
        tmp_path / "l2",
        student.config,
        student.state_dict(),
        tokenizer_source=tokenizer,
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
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert classifier(input_ids=IDS_BT).logits.shape == (3, 2)
    assert "FFN 24" in (folder / "README.md").read_text()


def modernbert(**keys: Any) -> PreTrainedConfig:
    return tiny_config("modernbert", {**SIZES, "num_hidden_layers": 7, **keys})


def test_modernbert_keeps_its_pattern_of_global_layers() -> None:
    full, near = "full_attention", "sliding_attention"
    teacher = modernbert()
    assert teacher.layer_types == [full, near, near] * 2 + [full]
    for num_layers in (1, 2, 4, 7, 9):
        student = student_config(teacher, **SAME | {"num_layers": num_layers})
        assert student.layer_types == ([full, near, near] * 3)[:num_layers]
        build_student(None, student)
    tapped = student_config(teacher, **SAME | {"num_layers": 3}, tap="extra")
    assert tapped.layer_types == [full, near, near, full]
    config, _ = exported(tapped, {}, 3)
    assert config.layer_types == [full, near, near]
    assert (
        student_config(
            teacher, num_layers=3, hidden_size=32, num_attention_heads=4
        ).intermediate_size
        == 48
    )


def test_copied_layers_are_of_the_same_kind() -> None:
    full, near = "full_attention", "sliding_attention"
    kinds = [full, near, near] * 7 + [full]
    for num_layers, last in ((6, 21), (6, 22), (3, 7), (21, 21), (12, 22)):
        even = even_layer_map(num_layers, last)
        found = of_equal_kinds(even, kinds[:num_layers], kinds, last)
        assert found == sorted(set(found))
        assert found[-1] <= last
        different = [i for i in range(num_layers) if kinds[found[i] - 1] != kinds[i]]
        assert len(different) <= (num_layers > 7)
        assert max(abs(x - y) for x, y in zip(found, even, strict=True)) <= 4
    assert of_equal_kinds([4, 7, 11, 14, 18, 21], kinds[:6], kinds, 21) == [4, 8, 11, 13, 18, 21]
    assert of_equal_kinds([1, 2, 3], [full, near, near], [full] * 3, 3) == [1, 2, 3]


@pytest.mark.parametrize("last", [3, 4])
def test_the_projection_of_tap_extra_starts_from_the_captured_layer(last: int) -> None:
    teacher = tiny_config("modernbert", SIZES)
    assert len(set(teacher.layer_types[:4])) == 2
    sizes = SAME | {"num_layers": 2}
    student = student_config(teacher, **sizes, tap="extra")
    layers = check_init("teacher", student, teacher, capture_layer=last, tap="extra")
    assert (len(layers), layers[-1]) == (3, last)
    assert layers == sorted(set(layers))


def test_modernbert_cut() -> None:
    """The halves of the gated FFN match, and a rotated pair keeps its frequency."""
    teacher = teacher_of("modernbert")
    config = student_config(teacher.config, **SAME | {"intermediate_size": 24, "hidden_size": 24})
    student = build_student(teacher, config, init="teacher")
    for theirs, ours in zip(teacher.layers, student.layers, strict=True):
        halves = theirs.mlp.Wi.weight.chunk(2)
        expected = torch.cat([half[:24, :24] for half in halves])
        assert torch.equal(ours.mlp.Wi.weight, expected)
        assert torch.equal(ours.mlp.Wo.weight, theirs.mlp.Wo.weight[:24, :24])
    for kind in ("full_attention", "sliding_attention"):
        frequencies = [getattr(each.rotary_emb, f"{kind}_inv_freq") for each in (teacher, student)]
        torch.testing.assert_close(frequencies[1], frequencies[0][[0, 2, 4]])
    shallow = student_config(teacher.config, **SAME | {"num_layers": 2})
    student = build_student(teacher, shallow, init="teacher", layer_map=[3, 1])
    # Layer 1 has no norm of its input, so that of the student's layer 2 starts as 1.
    assert torch.equal(student.layers[1].attn_norm.weight, torch.ones(48))
    assert torch.equal(student.layers[0].attn.Wqkv.weight, teacher.layers[2].attn.Wqkv.weight)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_modernbert_sees_its_window_only(attention: str) -> None:
    """A change of the last token reaches 4 tokens to its left by a local layer, all by a global."""
    other = IDS_BT.clone()
    other[:, -1] = 5 + (IDS_BT[:, -1] - 4) % 92
    for kind, seen in (("sliding_attention", 5), ("full_attention", 17)):
        config = modernbert(layer_types=[kind] * 7)
        config._attn_implementation = attention
        view = capture_view(build_encoder(config).eval(), 2)
        for mask_BT in (None, torch.ones_like(IDS_BT, dtype=torch.bool)):
            outputs = [torch.cat(view(TokenInputs(ids, mask_BT)), -1) for ids in (IDS_BT, other)]
            changed_T = (outputs[0] != outputs[1]).any(-1).any(0)
            assert changed_T.nonzero().flatten().tolist() == [*range(17 - seen, 17)]


def test_config_files_of_before_transformers_5(tmp_path: Path) -> None:
    """The keys in which published ModernBERTs and EuroBERTs give their layers and rotations."""
    old = {
        "model_type": "modernbert",
        "num_hidden_layers": 4,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 5000.0,
        "local_attention": 64,
        "position_embedding_type": "sans_pos",
        "reference_compile": True,
        "repad_logits_with_grad": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = load_config(tmp_path)
    assert config.layer_types == ["full_attention", "sliding_attention"] * 2
    thetas = {kind: each["rope_theta"] for kind, each in config.rope_parameters.items()}
    assert thetas == {"full_attention": 160000.0, "sliding_attention": 5000.0}
    assert config.sliding_window == 32
    assert not hasattr(config, "reference_compile")
    old = {"model_type": "eurobert", "rope_theta": 250000, "num_key_value_heads": 12}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_config(tmp_path).rope_parameters["rope_theta"] == 250000
    old = {"model_type": "nomic_bert", "n_embd": 96, "n_head": 4, "n_layer": 2, "n_inner": 128}
    old |= {"rotary_emb_base": 500, "activation_function": "swiglu", "prenorm": False}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = load_config(tmp_path)
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (96, 24, 128)
    assert config.rope_parameters["rope_theta"] == 500
    (tmp_path / "config.json").write_text(json.dumps({**old, "rotary_emb_interleaved": True}))
    with pytest.raises(DataError, match="rotary_emb_interleaved=True, which transformers' Nomic"):
        load_config(tmp_path)
    old = {"model_type": "distilbert", "hidden_size": 96, "num_attention_heads": 4, "n_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = load_config(tmp_path)
    assert (config.dim, config.n_heads, config.num_hidden_layers) == (96, 4, 2)


def test_weight_files_of_published_esm_models(tmp_path: Path) -> None:
    """Frequencies by layer, and an unused table of positions."""
    model = AutoModelForMaskedLM.from_config(tiny_config("esm", SIZES))
    model.save_pretrained(tmp_path)
    weights = {key: x for key, x in model.state_dict().items() if "decoder" not in key}
    frequencies = weights.pop("esm.rotary_embeddings.inv_freq")
    for i in range(4):
        attention = f"esm.encoder.layer.{i}.attention.self"
        weights[f"{attention}.rotary_embeddings.inv_freq"] = frequencies.clone()
    weights["esm.embeddings.position_embeddings.weight"] = torch.zeros(40, 48)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(tmp_path, num_layers=3)
    _, stored = encoder_on_meta(tmp_path, num_layers=3)
    assert list(stored) == sorted(encoder.state_dict())
    found = capture_view(encoder, 3)(TokenInputs(IDS_BT))
    assert all(map(torch.equal, found, capture_view(model.eval(), 3)(TokenInputs(IDS_BT))))


def test_a_fused_projection_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder(modernbert()).eval()
    q, k, v = capture_view(encoder, 3)(TokenInputs(IDS_BT))
    row = replace(ARCHITECTURES["modernbert"], fused_order="kvq")
    monkeypatch.setitem(ARCHITECTURES, "modernbert", row)
    found = capture_view(encoder, 3)(TokenInputs(IDS_BT))
    assert all(map(torch.equal, found, (v, q, k)))


def test_albert_repeats_one_block() -> None:
    """A student's passes are free, and a map of layers has no meaning."""
    teacher = teacher_of("albert")
    for num_layers, tap in ((1, "last"), (6, "last"), (2, "extra")):
        config = student_config(teacher.config, **SAME | {"num_layers": num_layers}, tap=tap)
        student = build_student(teacher, config, init="teacher", capture_layer=3, tap=tap)
        states = (each.state_dict().values() for each in (student, teacher))
        assert all(map(torch.equal, *states))
        view = capture_view(student, config.num_hidden_layers)
        assert len(view.blocks) == 1
        found = view(TokenInputs(IDS_BT))
        with torch.no_grad():
            hidden = student.eval()(input_ids=IDS_BT, output_hidden_states=True).hidden_states
        attention = student.get_submodule(ARCHITECTURES["albert"].block_path(1)).attention
        assert torch.equal(found.q, attention.query(hidden[config.num_hidden_layers - 1]))
        found.k.sum().backward()
        graded = {name for name, each in view.module.named_parameters() if each.grad is not None}
        assert len(graded) >= len(list(view.module.parameters())) - 4  # not the last Q and V
    with pytest.raises(ConfigError, match=r"^layer_map has no meaning for ALBERT: .*; remove it"):
        build_student(teacher, config, init="teacher", layer_map=[1, 2])
    with pytest.raises(ConfigError, match="layer=5 is beyond the model's 4 layers"):
        capture_view(teacher, 5)
    grouped = tiny_config("albert", {**SIZES, "num_hidden_groups": 2})
    with pytest.raises(DataError, match="num_hidden_groups=2, which is not supported for ALBERT"):
        student_config(grouped, **HALF)


def test_deberta_configs_as_published(tmp_path: Path) -> None:
    """Keys that transformers' config class takes without declaring them are kept."""
    published = {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "max_relative_positions": -1,
        "position_biased_input": False,
        "attention_head_size": 64,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "hidden_size": 1536,
        "num_attention_heads": 24,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = load_config(tmp_path)
    expected = published | {"pos_att_type": ["p2c", "c2p"]}
    assert {key: getattr(config, key) for key in published} == expected
    student = student_config(config, num_layers=6, hidden_size=384, num_attention_heads=12)
    assert student.attention_head_size == 32
    for keys, message in (
        ({"attention_head_size": 32}, "attention_head_size=32 with 24 .* expected 64"),
        ({"conv_groups": 2}, "conv_groups=2, which is not supported for DeBERTa v2 and v3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(published | keys))
        with pytest.raises(DataError, match=message):
            load_config(tmp_path)


def test_a_convolution_after_a_captured_first_block_is_left_out() -> None:
    encoder = teacher_of("deberta-v2-conv")
    view = capture_view(encoder, 1)
    assert not [name for name, _ in view.module.named_parameters() if ".conv." in name]
    assert encoder.encoder.conv is not None
    assert [
        name for name, _ in capture_view(encoder, 2).module.named_parameters() if "conv" in name
    ]


def test_start_from_a_folder_of_the_same_shape(tmp_path: Path) -> None:
    config = student_config(modernbert(), **HALF)
    first = build_student(None, config, seed=3)
    first.save_pretrained(tmp_path)
    second = build_student(None, config, init=str(tmp_path))
    assert all(map(torch.equal, second.state_dict().values(), first.state_dict().values()))
    config.local_attention = 64
    with pytest.raises(ConfigError, match=r"has local_attention=8, .* local_attention=64"):
        build_student(None, config, init=str(tmp_path))


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


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in RUN if name in OFTEN_RUN], id="some"),
        pytest.param(
            [name for name in RUN if name not in OFTEN_RUN], id="others", marks=pytest.mark.full
        ),
    ],
)
def test_three_steps_and_an_export(
    names: list[str], tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    """A run of each architecture, on one rank; within documents where it allows that."""
    trees = [run_of(name, tmp_path, tiny_teacher, tiny_shards) for name in names]
    for name, losses in zip(names, run_ranks(losses_of, 1, trees, timeout=400)[0], strict=True):
        assert len(losses) == 3, name
        assert all(0 < loss < 1e3 for loss in losses), name
        (export,) = (tmp_path / f"run-{name}/export").iterdir()
        model = AutoModel.from_pretrained(export).eval()
        again = load_encoder(export)
        assert torch.equal(
            model(input_ids=IDS_BT).last_hidden_state, again(input_ids=IDS_BT).last_hidden_state
        )


def test_more_blocks_than_the_captured_layer(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    """The kinds of layers continue the whole teacher's, not those up to the captured one."""
    tree = run_of("modernbert", tmp_path, tiny_teacher, tiny_shards)
    tree["teacher"]["layer"] = 2
    tree["students"]["l2"] |= {"num_layers": 6, "init": "random"}
    run_ranks(losses_of, 1, [tree])
    (export,) = (tmp_path / "run-modernbert/export").iterdir()
    (later,) = export_checkpoint(parse_config(tree), "newest")
    kinds = [AutoModel.from_pretrained(each).config.layer_types for each in (export, later)]
    assert kinds == [["full_attention", *["sliding_attention"] * 2] * 2] * 2


def test_a_tokenizer_that_an_export_could_not_keep(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    """It is said before the run: transformers reads every tokenizer of Qwen2 as its own."""
    tree = run_of("llama", tmp_path, tiny_teacher, tiny_shards)
    tree["data"]["attention"] = "row"
    tree["students"]["l2"] |= {"architecture": "qwen2", "init": "random"}
    with pytest.raises(
        ConfigError,
        match=r"^students\.l2\.architecture: transformers does not read the tokenizer of .* of "
        r"type 'qwen2' \(it makes a Qwen2Tokenizer\); the student needs another architecture$",
    ):
        plan_run(parse_config(tree), 1, torch.device("cpu"))


def test_documents_are_refused_before_the_run(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    tree = run_of("esm", tmp_path, tiny_teacher, tiny_shards)
    tree["data"]["attention"] = "document"
    with pytest.raises(ConfigError, match=r'^data.attention="document" is not .* ESM: .* "row"$'):
        plan_run(parse_config(tree), 1, torch.device("cpu"))


@pytest.mark.full
@pytest.mark.parametrize("name", RUN)
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
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    for keys, message in (
        ({"num_key_value_heads": 3}, "num_key_value_heads=3, which does not divide num_att.*=4"),
        ({"rope_parameters": dynamic}, "rotary positions of rope_type='dynamic', which depend on"),
    ):
        with pytest.raises(DataError, match=message):
            loaded("eurobert", **keys)
    grouped = tiny_config("eurobert", {**SIZES, "num_key_value_heads": 3})
    with pytest.raises(DataError, match=r"^teacher_config: its config has num_key_value_heads=3"):
        student_config(grouped, **HALF)
    one = SAME | {"num_layers": 1}
    mpnet = tiny_config("mpnet", SIZES)
    with pytest.raises(ConfigError, match=r"num_layers=1 is too few for MPNet: .* use 2 or more"):
        student_config(mpnet, **one)
    assert student_config(mpnet, **one, tap="extra").num_hidden_layers == 2
    with pytest.raises(ConfigError, match=r"num_attention_heads=16 gives heads of an odd size"):
        student_config(
            tiny_config("esm", SIZES), num_layers=2, hidden_size=48, num_attention_heads=16
        )
