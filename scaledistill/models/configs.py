"""Reduce a model's config to what its encoder computes; refuse unsupported computations.

Inputs: the content of a `config.json`, or the config of a loaded model. Outputs: a config with the
shape, the arithmetic and the precision only. Not handled here: finding the file (`models.teacher`).

transformers reads many keys that control the library (outputs, kernels, memory, generation, labels
of a head) and silently drops others, some of which mean that the weights were trained for another
computation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from scaledistill.errors import SourceError, near_misses
from scaledistill.models.architectures import Architecture

# How a model is run, stored or generated from, and the labels of a head: keys that do not change
# what an encoder computes.
STEERING = frozenset(
    [
        "return_dict",
        "use_return_dict",
        "output_hidden_states",
        "output_attentions",
        "output_past",
        "output_scores",
        "torchscript",
        "use_cache",
        "cache_implementation",
        "gradient_checkpointing",
        "chunk_size_feed_forward",
        "use_bfloat16",
        "fp16",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_flash_attn_2_enabled",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "auto_map",
        "transformers_version",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
    ]
)
FREE_TOKEN_IDS = ("bos_token_id", "eos_token_id", "sep_token_id")
FLOATS = ("float16", "bfloat16", "float32", "float64")
# Keys that a config class may not know and then drops, with their neutral values. Any other value
# means another computation.
COMPUTING: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "relative_attention": (None, False),
    "alibi": (None, False),
    "use_alibi": (None, False),
    "use_rotary": (None, False),
    "rotary_value": (None, False),
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}, []),
}
CHANGING_ROTATIONS = ("dynamic", "longrope")
DECODING = ("is_decoder", "add_cross_attention")


def plain_dict(
    found: Mapping[str, Any], known: type[PreTrainedConfig], row: Architecture | None
) -> dict[str, Any]:
    """Return the content of a `config.json` reduced to what its config class should get.

    Args:
        found: the content of the file.
        known: the config class.
        row: of a supported encoder: keys that its class does not have are dropped too.

    Raises:
        SourceError: a key asks for a computation that this transformers, or no encoder, supports.
    """
    defaults = known().to_dict()
    renamed = {**known.attribute_map, **(row.older_names if row else {})}
    own_names = {renamed.get(key, key): key for key in found}
    found = {name: found[name if name in found else key] for name, key in own_names.items()}
    idle, own_neutral = (row.idle_keys, row.neutral) if row else ((), {})
    if found.get("quantization_config") or found.get("compression_config"):
        raise SourceError(
            "model",
            expected="is quantised (quantization_config in its config.json), which is not "
            "supported",
            remedy="give the model before quantisation, in fp32, bf16 or fp16",
        )
    for key, neutral in {**COMPUTING, **own_neutral}.items():
        if key in found and key not in (*defaults, *idle) and found[key] not in neutral:
            does_not = "no longer computes" if key in COMPUTING else "does not compute"
            raise SourceError(
                "model",
                expected=f": its config.json has {key}={found[key]!r}, which transformers' "
                f"{known.__name__} {does_not}, so the model would give other results",
                remedy="give a model without it",
            )
    plain = {
        key: value
        for key, value in found.items()
        if key not in STEERING and not _is_code(known, key)
    }
    plain |= _dtype(plain.pop("torch_dtype", None), plain.pop("dtype", None))
    for key in plain.keys() & defaults.keys():
        plain[key] = _number(plain[key], defaults[key])
    if isinstance(plain.get("architectures"), str):
        plain["architectures"] = [plain["architectures"]]
    return _plain_encoder(plain, defaults, row) if row else plain


def _plain_encoder(
    plain: dict[str, Any], defaults: Mapping[str, Any], row: Architecture
) -> dict[str, Any]:
    """Keep the keys of an encoder's config class; free token ids are dropped unless integers.

    Raises:
        SourceError: the model is a decoder, or its activation is unknown.
    """
    for key in DECODING:
        if plain.get(key) and not (row.causal and key == "is_decoder"):
            raise SourceError(
                "model",
                expected=f": its config.json has {key}={plain[key]!r}, which makes it a decoder",
                remedy="expected an encoder, whose tokens attend to the whole row: if it is one, "
                f"set {key} to false",
            )
    name = row.activation
    if name and (activation := plain.get(name, defaults[name])) not in ACT2FN:
        near = near_misses(str(activation).lower(), ACT2FN, at_most=3) or [
            "gelu",
            "gelu_new",
            "relu",
        ]
        raise SourceError(
            "model",
            expected=f": its config.json has {name}={activation!r}, which transformers does "
            "not have",
            remedy=f"set the one that it was trained with: {', '.join(near)}, …",
        )
    free = {
        "is_encoder_decoder",
        *(key for key in FREE_TOKEN_IDS if not isinstance(plain.get(key), int)),
    }
    kept = (defaults.keys() - free) | set(row.older_keys)
    return {key: value for key, value in plain.items() if key in kept}


def check_computation(config: PreTrainedConfig, row: Architecture) -> None:
    """Refuse a supported architecture's config if its values ask for an unsupported computation.

    Raises:
        SourceError: naming the key.
    """
    for key, supported in row.only.items():
        if (found := getattr(config, key, None)) not in supported:
            raise SourceError(
                "model",
                expected=f": its config has {key}={found!r}, which is not supported for "
                f"{row.title}",
                remedy=f"expected {' or '.join(map(repr, supported))}",
            )
    heads = config.num_attention_heads
    if (groups := getattr(config, "num_key_value_heads", None)) and heads % groups:
        raise SourceError(
            "model",
            expected=f": its config has num_key_value_heads={groups}, which does not divide "
            f"num_attention_heads={heads}",
            remedy="fetch the model again",
        )
    size = getattr(config, "attention_head_size", None)
    if size not in (None, config.hidden_size // heads):
        raise SourceError(
            "model",
            expected=f": its config has attention_head_size={size} with {heads} attention heads "
            f"and hidden_size={config.hidden_size}",
            remedy=f"expected {config.hidden_size // heads}",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if (kind := each.get("rope_type")) in CHANGING_ROTATIONS:
            raise SourceError(
                "model",
                expected=f": its config has rotary positions of rope_type={kind!r}, which depend "
                "on the length of each batch and are not supported",
                remedy="give a model with another rope_type: default, linear, yarn",
            )


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a loaded model's config with the defaults for what its forward returns.

    If nothing differs, as for every config from `plain_dict`, the same object is returned.
    """
    wanted = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
    if all(getattr(config, key, value) == value for key, value in wanted.items()):
        return config
    config = copy.deepcopy(config)
    for key, value in wanted.items():
        setattr(config, key, value)
    return config


def _is_code(known: type[PreTrainedConfig], key: str) -> bool:
    """Return whether a key names a method of the class, or a property without a setter.

    Setting such a key would hide the method, or fail.
    """
    attribute = getattr(known, key, None)
    return callable(attribute) or (isinstance(attribute, property) and attribute.fset is None)


def _dtype(old: Any, new: Any) -> dict[str, str]:
    """Return the entry for the precision of the weights; empty if the config leaves it to them.

    Older files call it `torch_dtype`.
    """
    key, value = ("torch_dtype", old) if new is None else ("dtype", new)
    if value is None or value == "auto":
        return {}
    name = str(value).removeprefix("torch.")
    name = {
        "fp16": "float16",
        "half": "float16",
        "bf16": "bfloat16",
        "fp32": "float32",
        "float": "float32",
    }.get(name, name)
    if name not in FLOATS:
        raise SourceError(
            "model",
            expected=f": its config.json has {key}={value!r}",
            remedy=f"expected {', '.join(FLOATS)}, or no such key, to use the weights' own "
            "precision",
        )
    return {"dtype": name}


def _number(value: Any, default: Any) -> Any:
    """Return a number in the type of its default; leave anything else to the config class."""
    if isinstance(value, bool) or isinstance(default, bool) or not isinstance(default, int | float):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    if isinstance(default, float):
        return number
    return int(number) if number.is_integer() else value
