"""Choose a student's shape and its first weights.

Inputs: the teacher's config, the wanted sizes (any depth, width, heads and FFN width), another
architecture than the teacher's if that is wanted, and, to start from the teacher's weights, its
blocks up to the captured layer. Outputs: a full fp32 model without
pooler. Not handled here: reading the settings, training and export.

A student trains as a view cut at its last block's Q, K and V; the weights that are not in that view
keep their first values. With tap "extra" the last block is one more than the student should have,
and `exported` drops it.

A teacher's weight is made narrower by keeping, for q, k, v and the attention output's input, the
first heads and the first components of each, and for every other axis (hidden, FFN, embedding) the
first components. So all layers, embeddings and LayerNorms keep the same hidden components, and
equal sizes give an exact copy. Where queries and keys are rotated, the kept components of a head
are evenly spaced pairs instead, because pair i of n rotates by base^(-i/n) per token; norms of
queries and keys are cut likewise. Query heads that share a key and value head are cut in whole
groups: the first groups, and the first query heads of each. The halves of a gated FFN are cut
alike. Embeddings that the model multiplies by √width are scaled, so that the product is the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from scaledistill.config.schema import INIT_WORDS
from scaledistill.errors import Field, SettingError, SourceError, named, near_miss
from scaledistill.models.architectures import (
    Architecture,
    architecture_of,
    base_encoder,
    build_encoder,
    check_layer,
    default_config,
    encoder_class,
    first_position,
    head_size,
    key_value_heads,
    max_sequence_length,
    set_depth,
)
from scaledistill.models.configs import check_computation, plain_config
from scaledistill.models.teacher import load_config, load_encoder

# The config fields that must be equal for one model to start from another's weights, with those of
# `Architecture.shape`.
TOKEN_IDS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "cls_token_id",
    "sep_token_id",
    "mask_token_id",
)
SHAPE = (
    "model_type",
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
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
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    tap: str = "last",
    architecture: str | None = None,
    init: str = "random",
    start: PreTrainedConfig | None = None,
) -> PreTrainedConfig:
    """Return a student's config: the teacher's, vocabulary and dropout included, with new sizes.

    By default as many query heads share a key and value head as in the teacher, or the next larger
    number that divides them. Heads are `hidden_size` / `num_attention_heads` wide by default, or as
    wide as the teacher's if its own are of another size. `intermediate_size` defaults to 4 ×
    `hidden_size` (ModernBERT: 1.5 ×). With tap "extra" there is one block more, which is tapped.
    ELECTRA's embeddings are as wide as the student if the teacher's are as wide as the teacher;
    projected ones keep their width.

    Args:
        architecture: the student's `model_type`, if not the teacher's: then only the vocabulary,
            the special tokens and the length are the teacher's, and all else is the default of
            that architecture.
        init: of the student; a folder's config then takes the place of these defaults.
        start: this config, if it is known; by default it is read from the folder.

    Raises:
        SettingError: an architecture is not supported, the heads do not divide the width, the key
            and value heads do not divide the heads, heads of an odd size would be rotated, or there
            are too few layers.
        SourceError: the teacher's config asks for an unsupported computation, or the folder of
            `init` holds no model.
    """
    with named(config="teacher_config", model="teacher_config"):
        check_computation(teacher_config, architecture_of(teacher_config))
    if architecture in (None, teacher_config.model_type):
        config = copy.deepcopy(plain_config(teacher_config))
    else:
        config = _of_another_family(architecture, teacher_config, init, start)
    row = architecture_of(config)
    if hidden_size % num_attention_heads:
        divisors = [heads for heads in range(1, hidden_size + 1) if hidden_size % heads == 0]
        if init == "teacher" and head_dim is None:  # whose heads are cut
            most = head_size(teacher_config)
            most_heads = teacher_config.num_attention_heads
            fitting = [n for n in divisors if n <= most_heads and hidden_size // n <= most]
            divisors = fitting or divisors
        nearest = sorted(sorted(divisors, key=lambda heads: abs(heads - num_attention_heads))[:2])
        raise SettingError(
            "num_attention_heads",
            num_attention_heads,
            ("does not divide ", Field("hidden_size", hidden_size)),
            f"use {' or '.join(map(str, nearest))}",
        )
    num_blocks = num_layers + (tap == "extra")
    if num_blocks < row.least_blocks:
        raise SettingError(
            "num_layers",
            num_layers,
            f"is too few for {row.title}: some weights would get no gradient",
            (f"use {row.least_blocks} or more, or ", Field("tap", "extra")),
        )
    size = _head_size(config, hidden_size, num_attention_heads, head_dim)
    if size % 2 and row.rotates(config):
        width = Field("hidden_size", hidden_size) if head_dim is None else Field("head_dim", size)
        raise SettingError(
            "num_attention_heads",
            num_attention_heads,
            ("gives heads of an odd size with ", width),
            f"use heads of an even size: {row.title} rotates pairs of their components",
        )
    groups = _key_value_heads(config, num_attention_heads, num_key_value_heads)
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = hidden_size
    set_depth(config, num_blocks)
    config.hidden_size = hidden_size
    config.num_attention_heads = num_attention_heads
    row.set_head_size(config, size)
    for key, value in (
        ("num_key_value_heads", groups),
        ("attention_head_size", size),
        ("pooler_hidden_size", hidden_size),  # of the heads for fine-tuning
    ):
        if hasattr(config, key):
            setattr(config, key, value)
    setattr(config, row.ffn_width, intermediate_size or int(row.ffn_factor * hidden_size))
    config.architectures = [encoder_class(config).__name__]
    config.dtype = torch.float32
    config.name_or_path = ""
    if hasattr(config, "auto_map"):  # refers to code that the export does not contain
        del config.auto_map
    return config


def _head_size(
    teacher: PreTrainedConfig, hidden_size: int, num_attention_heads: int, wanted: int | None
) -> int:
    """Return the size of a student's heads; `wanted` if that is not None.

    Raises:
        SettingError: the architecture leaves no choice.
    """
    usual = hidden_size // num_attention_heads
    has_key = hasattr(teacher, "head_dim")
    if wanted not in (None, usual) and not has_key:
        raise SettingError(
            "head_dim",
            wanted,
            f"cannot be chosen for {architecture_of(teacher).title}, whose heads are as wide as "
            f"hidden_size / num_attention_heads, here {usual}",
            "leave it out",
        )
    own = head_size(teacher)
    return wanted or (usual if own * teacher.num_attention_heads == teacher.hidden_size else own)


def _key_value_heads(
    teacher: PreTrainedConfig, num_attention_heads: int, wanted: int | None
) -> int:
    """Return the number of a student's key and value heads; `wanted` if that is not None.

    Raises:
        SettingError: it does not divide the heads, or the architecture leaves no choice.
    """
    divisors = [n for n in range(1, num_attention_heads + 1) if num_attention_heads % n == 0]
    if wanted not in (None, num_attention_heads) and not hasattr(teacher, "num_key_value_heads"):
        raise SettingError(
            "num_key_value_heads",
            wanted,
            f"cannot be chosen for {architecture_of(teacher).title}, in which every head has keys "
            "and values of its own",
            "leave it out",
        )
    if wanted is not None and wanted not in divisors:
        raise SettingError(
            "num_key_value_heads",
            wanted,
            ("does not divide ", Field("num_attention_heads", num_attention_heads)),
            f"use one of {', '.join(map(str, divisors))}",
        )
    most = num_attention_heads * key_value_heads(teacher) / teacher.num_attention_heads
    return wanted or max((n for n in divisors if n <= most), default=1)


def _of_another_family(
    architecture: str, teacher: PreTrainedConfig, init: str, start: PreTrainedConfig | None
) -> PreTrainedConfig:
    """Return a config of any size that reads the teacher's token ids, as many in a row.

    Raises:
        SettingError: the architecture is not supported, cannot read these ids, or is not that of
            the folder `init`.
        SourceError: the folder holds no model.
    """
    config = default_config(architecture)
    if init not in INIT_WORDS:
        config = copy.deepcopy(start or _config_of(init))
        if config.model_type != architecture:
            raise SettingError(
                "init",
                init,
                f"is a model of type {config.model_type!r}",
                ("correct it or ", Field("architecture", architecture)),
            )
    config.vocab_size = teacher.vocab_size
    for key in TOKEN_IDS:
        found = getattr(teacher, key, None)
        # EuroBERT's config needs a mask token, which its encoder does not read.
        if hasattr(config, key) and (found is not None or key != "mask_token_id"):
            setattr(config, key, found)
    row = architecture_of(config)
    if row.positions_follow_padding and config.pad_token_id is None:
        raise SettingError(
            "architecture",
            architecture,
            "counts positions from pad_token_id, which the teacher's config lacks",
            "choose another architecture, or set it in the teacher's config.json",
        )
    if init in INIT_WORDS:
        config.max_position_embeddings = max_sequence_length(teacher) + first_position(config)
        # Heads that are not as wide as usual go with the default sizes.
        row.set_head_size(config, config.hidden_size // config.num_attention_heads)
    with named(model=Field("architecture", architecture)):
        check_computation(config, row)
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
    if config.model_type != teacher_config.model_type:
        raise SettingError(
            "init",
            init,
            f"cuts the weights of a teacher of type {teacher_config.model_type!r}, but the student "
            f"is of type {config.model_type!r}",
            "use 'random' or the folder of a model of the student's type",
        )
    _check_cut(config, teacher_config)
    row = architecture_of(config)
    if row.repeats_block:
        if layer_map is not None:
            raise SettingError(
                "layer_map",
                expected=f"has no meaning for {row.title}: one block makes all layers",
                remedy="remove it",
            )
        return [1]
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
        even = even_layer_map(num_layers + extra, last)
        if not row.windowed:
            return even
        # The block that tap "extra" adds only projects: it has no kind.
        kinds = config.layer_types[:num_layers]
        chosen = of_equal_kinds(even[:num_layers], kinds, teacher_config.layer_types, last - extra)
        return [*chosen, last] if extra else chosen
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
    set_depth(config, num_layers)
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


def of_equal_kinds(
    layers: Sequence[int], student: Sequence[str], teacher: Sequence[str], last: int
) -> list[int]:
    """Replace teacher layers in a map by the nearest of the same kind as the student's layers.

    Args:
        layers: the teacher's layer (from 1) for each of the student's, increasing.
        student: the kind of each of its layers, "full_attention" or "sliding_attention".
        teacher: the same for the teacher.
        last: the last teacher layer that may be used.

    Returns:
        An increasing map; a layer stays as it is if none of its kind is left between its
        neighbours.
    """
    found: list[int] = []
    for i, layer in enumerate(layers):
        lowest = found[-1] + 1 if found else 1
        highest = last - (len(layers) - 1 - i)  # leaves one for each further layer
        fitting = [each for each in range(lowest, highest + 1) if teacher[each - 1] == student[i]]
        nearest = min(fitting, key=lambda each: (abs(each - layer), -each), default=layer)
        found.append(min(max(nearest, lowest), highest))
    return found


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of `model`, an encoder or its view, that of attention included.

    Its config, which an export writes, is not changed.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    row = architecture_of(cast(PreTrainedConfig, model.config))
    if row.attention_dropout is None:
        return
    path, _, attribute = row.attention_dropout.rpartition(".")
    for block in model.get_submodule(row.blocks).children():
        attention = block.get_submodule(path)
        if hasattr(attention, attribute):  # the last block of a view has projections only
            setattr(attention, attribute, probability)
        # ModernBERT makes none for its attention's output if its config says 0.
        if probability and isinstance(getattr(attention, "out_drop", None), nn.Identity):
            attention.out_drop = nn.Dropout(probability)


def _check_folder(folder: str, config: PreTrainedConfig, tap: str) -> None:
    found = _config_of(folder)
    if tap == "extra":
        config = copy.deepcopy(config)
        set_depth(config, config.num_hidden_layers - 1)
    keys = (*SHAPE, *architecture_of(config).shape)
    differing = [key for key in keys if getattr(found, key, None) != getattr(config, key, None)]
    if differing:
        raise SettingError(
            "init",
            folder,
            f"has {_values(found, differing)}, but the student has {_values(config, differing)}",
            ("give a model of the same shape or change ", Field("config")),
        )


def _config_of(init: str) -> PreTrainedConfig:
    """Return the config of the model that a student starts from."""
    try:
        with named(model="init"):
            return load_config(init)
    except SourceError as error:
        if near := near_miss(init, INIT_WORDS, cutoff=0.85):
            raise SettingError(
                "init", init, "is neither a folder nor a hub name", f"did you mean {near!r}?"
            ) from error
        raise


def _values(config: PreTrainedConfig, keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={getattr(config, key, None)!r}" for key in keys)


def _check_cut(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    row, heads = architecture_of(config), config.num_attention_heads
    usual = head_size(config) * heads == config.hidden_size
    for key, found, most in (
        ("hidden_size", config.hidden_size, teacher.hidden_size),
        ("num_attention_heads", heads, teacher.num_attention_heads),
        ("num_key_value_heads", key_value_heads(config), key_value_heads(teacher)),
        ("num_attention_heads / num_key_value_heads", _group(config), _group(teacher)),
        (
            "hidden_size / num_attention_heads" if usual else "head_dim",
            head_size(config),
            head_size(teacher),
        ),
        ("intermediate_size", getattr(config, row.ffn_width), getattr(teacher, row.ffn_width)),
    ):
        if found > most:
            remedy = f"use at most {most}"
            if key == "hidden_size / num_attention_heads":
                least = -(-config.hidden_size // most)
                while config.hidden_size % least:
                    least += 1
                remedy = f"use {least} or more heads"
            raise SettingError(
                f"config.{key}",
                found,
                f"is more than the teacher's {most}, from which it would be cut",
                (f"{remedy}, or ", Field("init", "random")),
            )
    embedding_size = getattr(teacher, "embedding_size", teacher.hidden_size)
    projects = embedding_size != teacher.hidden_size
    if projects and embedding_size == config.hidden_size and not row.always_projects:
        raise SettingError(
            "config.hidden_size",
            config.hidden_size,
            "is the width of the teacher's embeddings, so the student cannot take over their "
            "projection",
            ("use another width, or ", Field("init", "random")),
        )


def _group(config: PreTrainedConfig) -> int:
    """Return how many query heads share a key and value head."""
    return config.num_attention_heads // key_value_heads(config)


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
    axes = _cut_axes(row, teacher, student.config)
    cut = {}
    for key, target in student.state_dict().items():
        source, kept_by_axis = key, {}
        if key.startswith(f"{row.blocks}."):
            index, part = key.removeprefix(f"{row.blocks}.").split(".", 1)
            source = f"{row.block_path(layers[int(index)])}.{part}"
            kept_by_axis = axes.get(part, {})
            if row.input_norm and part.startswith(f"{row.input_norm}.") and source not in weights:
                cut[key] = target  # ModernBERT's first block has no such norm
                continue
        tensor = weights[source]
        for axis, size in enumerate(target.shape):
            kept = kept_by_axis.get(axis, torch.arange(size))
            tensor = tensor.index_select(axis, kept.to(tensor.device))
        if key == row.scaled_embeddings:
            tensor = tensor * math.sqrt(teacher.hidden_size / student.config.hidden_size)
        cut[key] = tensor
    return cut


def _cut_axes(
    row: Architecture, teacher: PreTrainedConfig, student: PreTrainedConfig
) -> dict[str, dict[int, Tensor]]:
    """Return what a student keeps of a teacher's block, by parameter and axis.

    Of an axis that is not named it keeps the first components.
    """
    size, old_size = head_size(student), head_size(teacher)
    in_head = torch.arange(size)
    if row.rotates(teacher):  # component i of a head is rotated with component i + size / 2
        pairs = torch.arange(size // 2) * old_size // size
        in_head = torch.cat([pairs, pairs + old_size // 2])
    groups_G = torch.arange(key_value_heads(student))
    heads_H = (groups_G[:, None] * _group(teacher) + torch.arange(_group(student))).flatten()
    queries, keys = ((kept[:, None] * old_size + in_head).flatten() for kept in (heads_H, groups_G))
    outputs = {row.query: queries, row.key: keys, row.value: keys}
    if row.fused and row.fused_by_head:
        thirds = heads_H[:, None] * 3 * old_size + torch.arange(3) * old_size
        outputs = {row.fused: (thirds[..., None] + in_head).flatten()}
    elif row.fused:
        outputs = {row.fused: torch.cat([queries + n * teacher.hidden_size for n in range(3)])}
    outputs |= dict.fromkeys(row.by_head, queries) | dict.fromkeys(row.head_norms, in_head)
    if row.gated_halves:
        first = torch.arange(getattr(student, row.ffn_width))
        outputs[row.gated_halves] = torch.cat([first, first + getattr(teacher, row.ffn_width)])
    axes = {
        f"{path}.{kind}": {0: kept} for path, kept in outputs.items() for kind in ("weight", "bias")
    }
    axes |= {path: {0: queries} for path in row.fused_biases.values()}
    return axes | {f"{row.attention_output}.weight": {1: queries}}
