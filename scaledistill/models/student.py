"""Choose a student's shape and its first weights, within the teacher's architecture.

Inputs: the teacher's config, the wanted sizes (any depth, width, heads and FFN width) and, to start
from the teacher's weights, its blocks up to the captured layer. Outputs: a full fp32 model without
pooler. Not handled here: reading the settings, training and export.

A student trains as a view cut at its last block's Q, K and V; the weights that are not in that view
keep their first values. With tap "extra" the last block is one more than the student should have,
and `exported` drops it.

A teacher's weight is made narrower by keeping, for q, k, v and the attention output's input, the
first heads and the first components of each, and for every other axis (hidden, FFN, embedding) the
first components. So all layers, embeddings and LayerNorms keep the same hidden components, and
equal sizes give an exact copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from scaledistill.errors import Field, SettingError, named
from scaledistill.models.architectures import (
    architecture_of,
    base_encoder,
    build_encoder,
    check_layer,
    encoder_class,
)
from scaledistill.models.configs import plain_config
from scaledistill.models.teacher import load_config, load_encoder

# The config fields that must be equal for one model to start from another's weights.
SHAPE = (
    "model_type",
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "embedding_size",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
    "hidden_act",
    "layer_norm_eps",
)


def student_config(
    teacher_config: PreTrainedConfig,
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    intermediate_size: int | None = None,
    tap: str = "last",
) -> PreTrainedConfig:
    """Return a student's config: the teacher's, vocabulary and dropout included, with new sizes.

    `intermediate_size` defaults to 4 × `hidden_size`. With tap "extra" there is one block more,
    which is tapped. ELECTRA's embeddings are as wide as the student if the teacher's are as wide as
    the teacher; projected ones keep their width.

    Raises:
        SettingError: the architecture is not supported, or the heads do not divide the width.
    """
    with named(config="teacher_config"):
        architecture_of(teacher_config)
    if hidden_size % num_attention_heads:
        divisors = [heads for heads in range(1, hidden_size + 1) if hidden_size % heads == 0]
        nearest = sorted(sorted(divisors, key=lambda heads: abs(heads - num_attention_heads))[:2])
        raise SettingError(
            "num_attention_heads",
            num_attention_heads,
            ("does not divide ", Field("hidden_size", hidden_size)),
            f"use {' or '.join(map(str, nearest))}",
        )
    config = copy.deepcopy(plain_config(teacher_config))
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = hidden_size
    config.num_hidden_layers = num_layers + (tap == "extra")
    config.hidden_size = hidden_size
    config.num_attention_heads = num_attention_heads
    config.intermediate_size = intermediate_size or 4 * hidden_size
    config.architectures = [encoder_class(config).__name__]
    config.dtype = torch.float32
    config.name_or_path = ""
    if hasattr(config, "auto_map"):  # refers to code that the export does not contain
        del config.auto_map
    return config


def build_student(
    teacher: PreTrainedModel | None,
    config: PreTrainedConfig,
    *,
    init: str = "random",
    layer_map: Sequence[int] | None = None,
    capture_layer: int | None = None,
    seed: int = 0,
    dropout: float | None = 0.0,
    tap: str = "last",
    stored: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """Build a student: fp32, on the CPU, in training mode, without pooler.

    The global random state is not changed.

    Args:
        teacher: whole blocks up to the captured layer at least, as from `load_encoder`; read only
            for "teacher".
        config: from `student_config`.
        init: "random", "teacher" (its weights, cut as the module's docstring describes) or the
            folder of a model of these sizes.
        layer_map: for "teacher": the teacher's layer (from 1) for each of the student's, without
            that of tap "extra"; evenly spaced by default.
        capture_layer: for "teacher": the captured layer (from 1), where an even map ends; by
            default the last.
        seed: of the random weights.
        dropout: for training; the config, and so the export, keeps its own values for fine-tuning.
            None: train with those of the config.
        tap: "last", or "extra": the last of `config`'s blocks is the projection, which a folder's
            model lacks.
        stored: for "teacher": the weights of a `teacher` on the meta device; see
            `encoder_on_meta`.

    Raises:
        SettingError: see `check_init`.
        SourceError: the folder's model cannot be loaded.
    """
    teacher_config = None if teacher is None else base_encoder(teacher).config
    layers = check_init(
        init,
        config,
        teacher_config,
        layer_map=layer_map,
        capture_layer=capture_layer,
        tap=tap,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too
        student = build_encoder(config)
    if init == "teacher" and teacher is not None:
        encoder = base_encoder(teacher)
        student.load_state_dict(
            _cut_weights(encoder.config, stored or encoder.state_dict(), student, layers)
        )
    elif init != "random":
        with named(model="init"):
            weights = load_encoder(init).state_dict()
        student.load_state_dict(student.state_dict() | weights)
    if dropout is not None:
        set_dropout(student, dropout)
    return student.train()


def check_init(
    init: str,
    config: PreTrainedConfig,
    teacher_config: PreTrainedConfig | None,
    *,
    layer_map: Sequence[int] | None = None,
    capture_layer: int | None = None,
    tap: str = "last",
) -> list[int]:
    """Check, without weights, that a student can start from `init`; return its layer map.

    The map is empty unless `init` is "teacher".

    Raises:
        SettingError: the teacher is too small to be cut to this shape, the layer map does not fit,
            or the folder's model has another shape.
        SourceError: the folder holds no model.
    """
    if init == "random":
        return []
    if init != "teacher":
        _check_folder(init, config, tap)
        return []
    if teacher_config is None:
        raise SettingError(
            "init", init, "needs the teacher's weights", "pass the teacher, or use 'random'"
        )
    _check_cut(config, teacher_config)
    extra, last = int(tap == "extra"), capture_layer or teacher_config.num_hidden_layers
    num_layers = config.num_hidden_layers - extra
    if layer_map is None:
        if num_layers > last - extra:
            raise SettingError(
                "config.num_layers",
                num_layers,
                f"is more than the {last - extra} teacher layers to start from",
                (
                    f"use {last - extra} or fewer, set ",
                    Field("layer_map"),
                    ", or ",
                    Field("init", "random"),
                ),
            )
        return even_layer_map(num_layers + extra, last)
    if len(layer_map) != num_layers:
        raise SettingError(
            "layer_map",
            expected=(
                f"names {len(layer_map)} teacher layers, expected ",
                Field("config.num_layers", num_layers),
                " of them",
            ),
        )
    with named(layer="layer_map"):
        for layer in layer_map:
            check_layer(layer, last)
    return [*layer_map, last] if extra else list(layer_map)


def exported(
    config: PreTrainedConfig, state: Mapping[str, Tensor], num_layers: int
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Return a student's config and state (or named parameters) as exported.

    The block that tap "extra" adds above `num_layers` is left out.
    """
    blocks = f"{architecture_of(config).blocks}."
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    return config, {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith(blocks)
        or int(key.removeprefix(blocks).partition(".")[0]) < num_layers
    }


def even_layer_map(num_layers: int, capture_layer: int) -> list[int]:
    """Spread `num_layers` evenly over the teacher's layers 1 to `capture_layer`, ending there.

    Layer i (from 1) gets i · capture_layer / num_layers, halves rounded up: 6 layers captured at 21
    get 4, 7, 11, 14, 18, 21.
    """
    return [
        (2 * i * capture_layer + num_layers) // (2 * num_layers) for i in range(1, num_layers + 1)
    ]


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of `model`, that of attention included.

    Its config, which an export writes, is not changed.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _check_folder(folder: str, config: PreTrainedConfig, tap: str) -> None:
    with named(model="init"):
        found = load_config(folder)
    if tap == "extra":
        config = copy.deepcopy(config)
        config.num_hidden_layers -= 1
    differing = [key for key in SHAPE if getattr(found, key, None) != getattr(config, key, None)]
    if differing:
        raise SettingError(
            "init",
            folder,
            f"has {_values(found, differing)}, but the student has {_values(config, differing)}",
            ("give a model of the same shape or change ", Field("config")),
        )


def _values(config: PreTrainedConfig, keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={getattr(config, key, None)!r}" for key in keys)


def _check_cut(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    for key, found, most in (
        ("hidden_size", config.hidden_size, teacher.hidden_size),
        ("num_attention_heads", config.num_attention_heads, teacher.num_attention_heads),
        ("hidden_size / num_attention_heads", _head_size(config), _head_size(teacher)),
        ("intermediate_size", config.intermediate_size, teacher.intermediate_size),
    ):
        if found > most:
            raise SettingError(
                f"config.{key}",
                found,
                f"is more than the teacher's {most}, from which it would be cut",
                (f"use at most {most}, or ", Field("init", "random")),
            )
    embedding_size = getattr(teacher, "embedding_size", teacher.hidden_size)
    if embedding_size != teacher.hidden_size and embedding_size == config.hidden_size:
        raise SettingError(
            "config.hidden_size",
            config.hidden_size,
            "is the width of the teacher's embeddings, so the student cannot take over their "
            "projection",
            ("use another width, or ", Field("init", "random")),
        )


def _head_size(config: PreTrainedConfig) -> int:
    return config.hidden_size // config.num_attention_heads


def _cut_weights(
    teacher: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    student: PreTrainedModel,
    layers: Sequence[int],
) -> dict[str, Tensor]:
    """Return the student's state dict, cut from the teacher's weights.

    Block i of the student comes from the teacher's layer `layers[i]`.
    """
    row = architecture_of(teacher)
    head_axes = {f"{path}.{kind}": 0 for path in row.projections for kind in ("weight", "bias")}
    head_axes[f"{row.attention_output}.weight"] = 1
    head_size = torch.arange(_head_size(student.config))
    starts = torch.arange(student.config.num_attention_heads) * _head_size(teacher)
    heads = (starts[:, None] + head_size).flatten()  # the first components of the first heads
    cut = {}
    for key, target in student.state_dict().items():
        source, head_axis = key, None
        if key.startswith(f"{row.blocks}."):
            index, part = key.removeprefix(f"{row.blocks}.").split(".", 1)
            source, head_axis = f"{row.block_path(layers[int(index)])}.{part}", head_axes.get(part)
        tensor = weights[source]
        for axis, size in enumerate(target.shape):
            kept = heads if axis == head_axis else torch.arange(size)
            tensor = tensor.index_select(axis, kept.to(tensor.device))
        cut[key] = tensor
    return cut
