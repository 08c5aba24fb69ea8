"""Keys of config.json that change nothing must not matter; those that change the encoder are
refused by name.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    CamembertConfig,
    ElectraConfig,
    ElectraForPreTraining,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
)

from scaledistill.config.load import load_config as load_run
from scaledistill.config.naming import teacher_names
from scaledistill.config.schema import TeacherSettings
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import DataError, named
from scaledistill.glue.finetune import _load_model
from scaledistill.glue.tasks import TASKS
from scaledistill.models.architectures import architecture_of, max_sequence_length
from scaledistill.models.student import student_config
from scaledistill.models.teacher import (
    Teacher,
    check_weight_files,
    encoder_on_meta,
    load_config,
    load_encoder,
)
from scaledistill.preflight.checks import student_shape
from scaledistill.preflight.estimate import estimate
from scaledistill.preflight.resolve import resolve
from scaledistill.storage.files import set_default_mode

IDS_BT = torch.arange(5, 21)[None]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**ENCODER_SIZES)).save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, keys: dict, weights: dict | None = None) -> Path:
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    save_file(
        load_file(source / "model.safetensors") | (weights or {}), folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    "keys",
    [
        {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "torchscript": True,
        },
        {"gradient_checkpointing": True, "use_cache": False, "use_return_dict": True, "to_dict": 1},
        {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"},
        {
            "chunk_size_feed_forward": 3,
            "layer_norm_eps": "1e-12",
            "hidden_size": 48.0,
            "embedding_size": 7,
        },
        {"problem_type": "ner", "id2label": {"0": "a"}, "num_labels": 9, "architectures": None},
        {
            "transformers_version": 4,
            "pad_token_id": -1,
            "torch_dtype": "torch.float32",
            "dtype": None,
        },
    ],
)
def test_keys_that_change_nothing(keys: dict, bert: Path, tmp_path: Path) -> None:
    expected = Teacher(load_encoder(bert), 3)(TokenInputs(IDS_BT))
    encoder = load_encoder(changed(bert, tmp_path, keys))
    assert all(map(torch.equal, Teacher(encoder, 3)(TokenInputs(IDS_BT)), expected))
    student = student_config(
        encoder.config, num_layers=1, hidden_size=8, num_attention_heads=2
    ).to_dict()
    assert student["return_dict"]
    assert not {"gradient_checkpointing", "torchscript", "embedding_size", "problem_type"} & {
        key for key, value in student.items() if value
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key', which .* no longer",
        ),
        ({"is_decoder": True}, "is_decoder=True, which makes it a decoder"),
        ({"hidden_act": "GELU2"}, "hidden_act='GELU2', which transformers does not have; .* gelu"),
        ({"quantization_config": {"bits": 4}}, "is quantised .quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        (
            {"dtype": None, "torch_dtype": "float8_e4m3fn"},
            "torch_dtype='float8_e4m3fn'; expected float16",
        ),
    ],
)
def test_keys_that_change_the_encoder(keys: dict, message: str, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_config(changed(bert, tmp_path, keys))


def test_roberta_counts_from_its_padding_token(tmp_path: Path) -> None:
    RobertaModel(RobertaConfig(**ENCODER_SIZES)).save_pretrained(tmp_path)
    with pytest.raises(
        DataError,
        match="pad_token_id=null, but models of type 'roberta' count their positions from",
    ):
        load_config(changed(tmp_path, tmp_path, {"pad_token_id": None}))


@pytest.mark.parametrize("load", [load_encoder, encoder_on_meta])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert.encoder.layer.0.attention.self.distance_embedding.weight", "has relative positions"),
        (
            "bert.encoder.layer.3.attention.self.query.lora_A.default.weight",
            "has adapters that are not merged",
        ),
        ("prefix_encoder.embedding.weight", "has adapters that are not merged"),
        ("bert.encoder.layer.1.output.dense.weight_scale", "is quantised"),
        (
            "bert.encoder.layer.4.output.dense.weight",
            "no place for: bert.encoder.layer.4.output.dense.weight",
        ),
        ("bert.embeddings.extra.weight", "no place for: bert.embeddings.extra.weight"),
    ],
)
def test_weights_that_the_encoder_does_not_read(
    load, name: str, message: str, bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load(changed(bert, tmp_path, {}, {name: torch.ones(3, 3)}))


@pytest.mark.parametrize("load", [load_encoder, encoder_on_meta])
def test_heads_and_old_buffers_are_no_fault(load, bert: Path, tmp_path: Path) -> None:
    extra = {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "bert.pooler.dense.bias": torch.ones(48),
    }
    load(
        changed(
            bert,
            tmp_path,
            {},
            extra | {"cls.seq_relationship.bias": torch.ones(2), "linear.weight": torch.ones(3)},
        )
    )
    ElectraForPreTraining(ElectraConfig(**ENCODER_SIZES, embedding_size=24)).save_pretrained(
        tmp_path
    )
    load(tmp_path, num_layers=2)


@pytest.mark.parametrize("load", [load_encoder, encoder_on_meta])
@pytest.mark.parametrize(
    "prefix", ["model.", "base_model.model.", "module.", "_orig_mod.", "module._orig_mod."]
)
def test_weights_saved_inside_a_wrapper(load, prefix: str, bert: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    changed(bert, tmp_path, {})
    save_file(
        {f"{prefix}{name}": tensor for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
    )
    message = (
        f"the names of its weights begin with '{prefix}'; save the model inside it with "
        "save_pretrained: model.mo"
    )
    with pytest.raises(DataError, match=f"was saved inside a wrapper: {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
def test_blocks_in_a_wrapper(wrapper: str, bert: Path, tmp_path: Path) -> None:
    changed(bert, tmp_path, {})
    weights = {
        name.replace("layer.2.", f"layer.2.{wrapper}."): tensor
        for name, tensor in load_file(bert / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        DataError, match=f"was saved inside a wrapper: bert.encoder.layer.2.{wrapper}"
    ):
        load_encoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_integers_and_fp8_are_quantised(dtype: torch.dtype, bert: Path, tmp_path: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    weight = load_file(bert / "model.safetensors")[name].to(dtype)
    with pytest.raises(
        DataError, match=f"is quantised: {name} is stored as .*8.*; give the model before"
    ):
        load_encoder(changed(bert, tmp_path, {}, {name: weight}))


SIZES = {**ENCODER_SIZES, "pad_token_id": 1}
TASK_MODELS = [
    *((RobertaConfig, auto) for auto in (AutoModelForMaskedLM, AutoModelForSequenceClassification)),
    *((XLMRobertaConfig, auto) for auto in (AutoModelForMaskedLM, AutoModelForQuestionAnswering)),
    *((CamembertConfig, auto) for auto in (AutoModelForMaskedLM, AutoModelForTokenClassification)),
    *((ElectraConfig, auto) for auto in (AutoModelForPreTraining, AutoModelForMaskedLM)),
    *((BertConfig, auto) for auto in (AutoModelForPreTraining, AutoModelForQuestionAnswering)),
]


@pytest.mark.parametrize(("config", "auto"), TASK_MODELS)
def test_heads_of_task_models_are_no_fault(config: Any, auto: Any, tmp_path: Path) -> None:
    auto.from_config(config(**SIZES)).save_pretrained(tmp_path)
    expected = Teacher(load_encoder(tmp_path), 3).sha256
    assert len(encoder_on_meta(tmp_path, num_layers=3)[1]) > 0
    assert Teacher(load_encoder(tmp_path, num_layers=3), 3).sha256 == expected


def test_the_names_of_the_first_bert(bert: Path, tmp_path: Path) -> None:
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(bert / "model.safetensors").items()
    }
    weights |= {f"cls.seq_relationship.{name}": torch.ones(2, 48) for name in ("weight", "bias")}
    weights |= {
        "cls.predictions.decoder.weight": torch.ones(97, 48),
        "bert.pooler.dense.weight": torch.ones(48, 48),
    }
    changed(bert, tmp_path, {})
    save_file(weights, tmp_path / "model.safetensors")
    assert Teacher(load_encoder(tmp_path), 3).sha256 == Teacher(load_encoder(bert), 3).sha256
    encoder_on_meta(tmp_path)


def test_an_adapter_without_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(
        {"base_model.model.a.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(
        DataError, match=r"is an adapter without its model \(adapter_config.json\), .*; merge it"
    ):
        load_config(tmp_path)
    with pytest.raises(DataError, match="is an adapter without its model"):
        check_weight_files(tmp_path)


def test_an_adapter_beside_the_weights(bert: Path, tmp_path: Path) -> None:
    (changed(bert, tmp_path, {}) / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"has an adapter beside its weights .* merge it"):
        load_encoder(tmp_path)


def test_weights_that_are_not_finite(bert: Path, tmp_path: Path) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    weight = load_file(bert / "model.safetensors")[f"bert.{name}"]
    weight[0, 0] = float("nan")
    changed(bert, tmp_path, {}, {f"bert.{name}": weight})
    with pytest.raises(DataError, match=f"its weight {name} has values that are not finite"):
        load_encoder(tmp_path)
    with pytest.raises(DataError, match=f"its weight {name} has values that are not finite"):
        dict(encoder_on_meta(tmp_path)[1])
    with pytest.raises(
        DataError, match=f"^model m: its weight bert.{name} has values that are not finite"
    ):
        _load_model(tmp_path, TASKS["rte"], "m")


def test_weights_that_overflow_in_the_dtype_of_the_teacher(bert: Path, tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.output.dense.bias"
    folder = changed(bert, tmp_path, {}, {name: torch.full((48,), 1e5)})
    problem = r"output.dense.bias is finite in float32, but not in float16, whose maximum is 65504"
    with pytest.raises(DataError, match=f"^model: its weight .*{problem}; set dtype to"):
        Teacher(load_encoder(folder), 3, dtype=torch.float16)
    encoder, stored = encoder_on_meta(folder)
    names = teacher_names(TeacherSettings(model="bert", layer=3))
    message = f"^teacher.model='bert': its weight .*{problem}; set teacher.dtype to"
    with pytest.raises(DataError, match=message), named(**names):
        Teacher(
            encoder,
            3,
            dtype=torch.float16,
            stored=stored,
            shard=lambda view, weights: (dict(weights), view.module)[1],
        )
    Teacher(load_encoder(folder), 3, dtype=torch.bfloat16)


def test_a_private_file_gets_the_mode_of_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    set_default_mode(tmp_path / "weights")
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "new").stat().st_mode
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "weights"]


PUBLISHED: dict[str, dict] = {
    "modernbert_to_l6": {
        "model_type": "modernbert",
        "vocab_size": 50368,
        "hidden_size": 1024,
        "intermediate_size": 2624,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "pad_token_id": 50283,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    },
    "deberta_v3_large_to_l6": {
        "model_type": "deberta-v2",
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "max_position_embeddings": 512,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "layer_norm_eps": 1e-7,
        "max_relative_positions": -1,
        "position_biased_input": False,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "type_vocab_size": 0,
        "vocab_size": 128100,
    },
    "xlmr_large_to_l12": {
        "model_type": "xlm-roberta",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1,
        "vocab_size": 250002,
    },
}


@pytest.mark.parametrize(
    ("name", "teacher_millions", "student_millions"),
    [
        ("modernbert_to_l6", 349, 27),
        ("deberta_v3_large_to_l6", 387, 60),
        ("xlmr_large_to_l12", 486, 117),
    ],
)
def test_shipped_runs_fit_the_published_models(
    name: str, teacher_millions: int, student_millions: int, tmp_path: Path
) -> None:
    """Planned on eight ranks, with a teacher of the published config.json."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    teacher = load_config(tmp_path)
    path = Path(__file__).parent.parent / "configs" / f"{name}.json"
    config = load_run(path, [f"teacher.model={tmp_path}", "train.precision=fp32"])
    assert config.data.attention == "row" or not architecture_of(teacher).no_documents
    assert config.data.sequence_length <= max_sequence_length(teacher)
    kinds = getattr(teacher, "layer_types", ["full_attention"] * 28)
    assert kinds[config.teacher.layer - 1] == "full_attention"
    run = resolve(config, 8, torch.device("cpu"))
    (student,) = config.students
    facts = estimate(run, teacher, {student: student_shape(config, student, teacher)})
    assert round(facts.teacher_parameters / 1e6) == teacher_millions
    assert round(facts.student_parameters / 1e6) == student_millions
