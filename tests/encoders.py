"""A tiny config of every supported architecture, for tests that run once for each."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from scaledistill.models.architectures import ARCHITECTURES

LAYERS_2_AND_3_SLIDE = {
    "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
    "sliding_window": 5,
    "use_sliding_window": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 32},
    "electra-wide": {"embedding_size": 48},
    "ernie": {"use_task_id": True},
    # As v3: shared keys, normalised relative embeddings in buckets, no absolute positions.
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
    },
    "deberta-v2-conv": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "attention_head_size": 12,
        "embedding_size": 32,
        "type_vocab_size": 2,
    },
    "deberta": {"relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0},
    "albert": {"embedding_size": 16, "hidden_act": "gelu"},
    "esm": {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4},
    "modernbert": {"local_attention": 8},  # tokens see 4 to each side, in layers 2 and 3
    "modernbert-biased": {
        "local_attention": 8,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "eurobert-grouped": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "llama-bidirectional": {"is_causal": False},
    "mistral": {"num_key_value_heads": 2},
    "mistral-windowed": {"num_key_value_heads": 1, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2, **LAYERS_2_AND_3_SLIDE},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen3-windowed": {"num_key_value_heads": 2, "head_dim": 16, **LAYERS_2_AND_3_SLIDE},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, **LAYERS_2_AND_3_SLIDE},
    "gemma3_text-bidirectional": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "use_bidirectional_attention": True,
        **LAYERS_2_AND_3_SLIDE,
    },
    "esm-absolute": {"emb_layer_norm_before": True, "mask_token_id": 4},
}
NO_PADDING = ("modernbert", "eurobert", "llama", "mistral", "qwen2", "qwen3")
PADDING = {"esm": 1, **dict.fromkeys(NO_PADDING, 0)}  # no default, or one beyond tiny vocabularies
NAMES = tuple(dict.fromkeys((*ARCHITECTURES, *VARIANTS)))


def model_type_of(name: str) -> str:
    """Return the `model_type` of a name of `NAMES`."""
    return name if name in ARCHITECTURES else name.rpartition("-")[0]


def tiny_config(name: str, sizes: dict[str, Any]) -> PreTrainedConfig:
    """Return a config of `sizes`, named as BERT's."""
    model_type = model_type_of(name)
    row = ARCHITECTURES[model_type]
    own = {row.ffn_width if key == "intermediate_size" else key: x for key, x in sizes.items()}
    if model_type in PADDING:
        own["pad_token_id"] = PADDING[model_type]
    return AutoConfig.for_model(model_type, **own, **VARIANTS.get(name, {}))
