"""Architectures: where each keeps its blocks and projections, and how its models are built.

Inputs: model configs of transformers. Outputs: a table row per architecture, encoders with random
weights. Not handled here: checking a config's values (`models.configs`), loading weights
(`models.teacher`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from scaledistill.errors import SettingError, SourceError, near_miss


@dataclass(frozen=True)
class Architecture:
    """Where an architecture keeps its parts, and how it differs from BERT.

    The paths are relative to a block, except `blocks`, `final_norm`, `dropped` and `rotary`.
    """

    title: str = "BERT"
    blocks: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    fused: str | None = None  # one projection instead of three; its output is in `fused_order`
    fused_order: str = "qkv"
    fused_by_head: bool = False  # that order holds within each head
    # Added to the parts of the fused output; they are parameters of the block.
    fused_biases: Mapping[str, str] = field(default_factory=dict)
    # Further projections whose outputs are the heads side by side.
    by_head: tuple[str, ...] = ()
    attention_output: str = "attention.output.dense"  # reads the heads side by side
    head_norms: tuple[str, ...] = ()  # of the components of each query and key
    # A linear layer of the FFN whose output is two halves that are multiplied.
    gated_halves: str | None = None
    # A table of embeddings that the model multiplies by the square root of their width.
    scaled_embeddings: str | None = None
    input_norm: str | None = None  # pre-norm models: applied before the projections
    # Pre-norm models: follows the last block; must not be applied to Q, K and V.
    final_norm: str | None = None
    # Follows the first block; must not be applied to Q, K and V either.
    after_first: str | None = None
    # There is one block, and this module runs it `num_hidden_layers` times.
    repeats_block: str | None = None
    # Children that the encoder's forward does not need; they are left out of models and exports.
    dropped: tuple[str, ...] = ("pooler",)
    # Position ids start after pad_token_id (fairseq's convention).
    positions_follow_padding: bool = False
    rotary: str | None = None  # computes the rotary embedding of positions
    # Dropout of attention where it is a number, not a module: the path of that attribute.
    attention_dropout: str | None = None
    block_returns_tuple: bool = False
    # transformers has no other attention for it than its own, which keeps the scores.
    eager_only: bool = False
    # Some layers attend within a window only: `layer_types` and `sliding_window` of the config.
    windowed: bool = False
    one_window: bool = False  # all layers do, if the config has a `sliding_window`
    causal: bool = False  # tokens attend to no later ones, unless the config says otherwise
    keeps_hidden_states: bool = False  # all of them live until the end of a forward
    # Embeddings are projected even if they are as wide as the model.
    always_projects: bool = False
    embeddings_read_mask: bool = False  # the padding mask must keep its shape [B, T]
    no_documents: str | None = None  # why attention cannot be kept within documents
    # Names in the config.
    ffn_width: str = "intermediate_size"
    ffn_factor: float = 4  # of a student's FFN width, by default, to its width
    activation: str | None = "hidden_act"
    least_blocks: int = 1  # of a student, for all of its weights to get gradients
    shape: tuple[str, ...] = ()  # further keys that one model must share to start from another
    # Keys without a default in the config class: of older files, or read by the model's code.
    older_keys: tuple[str, ...] = ()
    # Of a student whose teacher is of another family, where the published models' values are not
    # the defaults of the config class.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    idle_keys: tuple[str, ...] = ()  # keys that mean another computation elsewhere, but not here
    older_names: Mapping[str, str] = field(default_factory=dict)  # of keys, in older files
    # Keys that the config class drops, with the values that mean what it computes.
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # The only values with which the computation is supported, by key.
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # Weights of older files that the encoder does not use.
    unused_weights: tuple[str, ...] = ()
    # How names in files, where they are others than the model's, become the model's: patterns and
    # replacements, in order.
    stored_names: tuple[tuple[str, str], ...] = ()
    # In files, one weight of a block that holds the rows of query, key and value.
    stored_fused: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """The paths of the query, key and value projections, or that of the fused one."""
        return (self.fused,) if self.fused else (self.query, self.key, self.value)

    def block_path(self, layer: int) -> str:
        """Return the path of block `layer`, counted from 1.

        The only place where a layer number becomes an index from 0.
        """
        return f"{self.blocks}.{0 if self.repeats_block else layer - 1}"

    def rotates(self, config: PreTrainedConfig) -> bool:
        """Return whether queries and keys are rotated by their positions after the projections."""
        return self.rotary is not None

    def is_causal(self, config: PreTrainedConfig) -> bool:
        """Return whether tokens attend to themselves and earlier tokens only."""
        return self.causal and bool(getattr(config, "is_causal", True))

    def reach(self, config: PreTrainedConfig) -> int | None:
        """Return how many tokens away layers with a window see; None if there are none."""
        if not (self.windowed or self.one_window) or config.sliding_window is None:
            return None
        # A causal window counts the token itself.
        return config.sliding_window - 1 if self.is_causal(config) else config.sliding_window

    def set_head_size(self, config: PreTrainedConfig, size: int) -> None:
        """Set the size of a head, where the config has a key for it."""
        if hasattr(config, "head_dim"):
            config.head_dim = size


class _Esm(Architecture):
    """ESM-1b has a table of positions, ESM-2 rotates."""

    def rotates(self, config: PreTrainedConfig) -> bool:
        return config.position_embedding_type == "rotary"


class _Gemma3(Architecture):
    """Has keys of its own for both directions of attention and for the scale of its scores."""

    def is_causal(self, config: PreTrainedConfig) -> bool:
        return not config.use_bidirectional_attention

    def reach(self, config: PreTrainedConfig) -> int | None:
        return config.sliding_window - 1  # in both directions

    def set_head_size(self, config: PreTrainedConfig, size: int) -> None:
        scalar = config.query_pre_attn_scalar * size / config.head_dim
        config.query_pre_attn_scalar = max(1, round(scalar))
        config.head_dim = size


_BERT = Architecture()
_ROBERTA = Architecture("RoBERTa", positions_follow_padding=True)
_LLAMA = Architecture(
    "Llama",
    blocks="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    input_norm="input_layernorm",
    final_norm="norm",
    dropped=(),
    rotary="rotary_emb",
    attention_dropout="self_attn.attention_dropout",
    causal=True,
    shape=("rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters", "is_causal"),
    older_keys=("rope_theta", "rope_scaling", "is_causal"),
)
_DEBERTA = Architecture(
    "DeBERTa v2 and v3",
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    by_head=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    after_first="encoder.conv",
    dropped=(),
    block_returns_tuple=True,
    eager_only=True,
    keeps_hidden_states=True,
    embeddings_read_mask=True,
    no_documents="its embeddings read the mask of padding, not one of documents",
    least_blocks=2,  # the first one reads the relative embeddings
    shape=(
        "relative_attention",
        "pos_att_type",
        "max_relative_positions",
        "position_biased_input",
        "position_buckets",
        "share_att_key",
        "norm_rel_ebd",
        "conv_kernel_size",
        "conv_act",
    ),
    older_keys=(
        "position_buckets",
        "share_att_key",
        "norm_rel_ebd",
        "conv_kernel_size",
        "conv_groups",
        "conv_act",
        "embedding_size",
        "attention_head_size",
    ),
    defaults={
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 256,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    only={"conv_groups": (1, None)},
    unused_weights=("embeddings.position_embeddings.weight",),
)
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "electra": replace(_BERT, title="ELECTRA"),
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, title="XLM-R"),
    "camembert": replace(_ROBERTA, title="CamemBERT"),
    "data2vec-text": replace(_ROBERTA, title="Data2Vec-text"),
    "ernie": replace(_BERT, title="ERNIE", shape=("use_task_id", "task_type_vocab_size")),
    "xlm-roberta-xl": replace(
        _ROBERTA,
        title="XLM-RoBERTa-XL",
        input_norm="attention.self_attn_layer_norm",
        final_norm="encoder.LayerNorm",
    ),
    "roberta-prelayernorm": replace(
        _ROBERTA,
        title="RoBERTa pre-norm",
        input_norm="attention.LayerNorm",
        final_norm="LayerNorm",
    ),
    "megatron-bert": replace(
        _BERT,
        title="MegatronBERT",
        input_norm="attention.ln",
        final_norm="encoder.ln",
        block_returns_tuple=True,
        eager_only=True,
    ),
    "deberta-v2": _DEBERTA,
    "deberta": replace(
        _DEBERTA,
        title="DeBERTa v1",
        fused="attention.self.in_proj",
        fused_by_head=True,
        fused_biases={"q": "attention.self.q_bias", "v": "attention.self.v_bias"},
        by_head=("attention.self.pos_proj", "attention.self.pos_q_proj"),
        after_first=None,
        shape=(
            "relative_attention",
            "pos_att_type",
            "max_relative_positions",
            "position_biased_input",
        ),
        older_keys=("talking_head", "embedding_size"),
        defaults={
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
        },
        only={"talking_head": (False, None)},
    ),
    "albert": Architecture(
        "ALBERT",
        blocks="encoder.albert_layer_groups.0.albert_layers",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_output="attention.dense",
        repeats_block="encoder",
        always_projects=True,
        only={"num_hidden_groups": (1,), "inner_group_num": (1,)},
    ),
    "distilbert": Architecture(
        "DistilBERT",
        blocks="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        dropped=(),
        ffn_width="hidden_dim",
        activation="activation",
        shape=("hidden_dim", "activation"),
    ),
    "mpnet": Architecture(
        "MPNet",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        positions_follow_padding=True,
        block_returns_tuple=True,
        eager_only=True,
        least_blocks=2,  # the first one reads the relative attention bias
        # transformers' MPNet has these numbers in its code.
        only={"pad_token_id": (1,), "relative_attention_num_buckets": (32,)},
    ),
    "esm": _Esm(
        "ESM",
        input_norm="attention.LayerNorm",
        final_norm="encoder.emb_layer_norm_after",
        dropped=("pooler", "contact_head"),
        positions_follow_padding=True,
        rotary="rotary_embeddings",
        attention_dropout="attention.self.dropout",
        embeddings_read_mask=True,
        no_documents="its embeddings read the mask of padding, not one of documents",
        activation=None,
        defaults={"position_embedding_type": "rotary"},
        shape=("position_embedding_type", "emb_layer_norm_before", "token_dropout", "rope_theta"),
        only={
            "position_embedding_type": ("absolute", "rotary"),
            "is_folding_model": (False, None),
        },
        unused_weights=("embeddings.position_embeddings.weight",),
    ),
    "modernbert": Architecture(
        "ModernBERT",
        blocks="layers",
        fused="attn.Wqkv",
        attention_output="attn.Wo",
        gated_halves="mlp.Wi",
        input_norm="attn_norm",
        final_norm="final_norm",
        dropped=(),
        rotary="rotary_emb",
        attention_dropout="attn.attention_dropout",
        windowed=True,
        ffn_factor=1.5,
        activation="hidden_activation",
        shape=(
            "hidden_activation",
            "norm_eps",
            "norm_bias",
            "attention_bias",
            "mlp_bias",
            "layer_types",
            "local_attention",
            "rope_parameters",
        ),
        older_keys=(
            "global_attn_every_n_layers",
            "global_rope_theta",
            "local_rope_theta",
            "rope_scaling",
        ),
        idle_keys=("position_embedding_type",),
    ),
    "nomic_bert": Architecture(
        "NomicBERT",
        blocks="layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_output="self_attn.o_proj",
        rotary="rotary_emb",
        attention_dropout="self_attn.attention_dropout",
        shape=("rope_parameters",),
        older_keys=("rope_theta", "rope_scaling"),
        older_names={
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_inner": "intermediate_size",
            "n_positions": "max_position_embeddings",
            "layer_norm_epsilon": "layer_norm_eps",
            "resid_pdrop": "hidden_dropout_prob",
            "attn_pdrop": "attention_probs_dropout_prob",
            "rotary_emb_base": "rope_theta",
        },
        neutral={
            "activation_function": ("swiglu",),
            "prenorm": (False,),
            "parallel_block": (False,),
            "causal": (False,),
            "qkv_proj_bias": (False,),
            "mlp_fc1_bias": (False,),
            "mlp_fc2_bias": (False,),
            "rotary_emb_fraction": (1.0,),
            "rotary_emb_interleaved": (False,),
            "rotary_emb_scale_base": (None,),
            "rotary_scaling_factor": (None,),
            "use_rms_norm": (False, None),
            "num_experts": (0, None),
            "moe_every_n_layers": (0, None),
        },
        stored_names=(
            (r"^encoder\.layers\.", "layers."),
            (r"^emb_ln\.", "embeddings.LayerNorm."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.fc11\.", ".up_proj."),
            (r"\.fc12\.", ".gate_proj."),
            (r"\.fc2\.", ".down_proj."),
            (r"\.norm1\.", ".post_attention_layernorm."),
            (r"\.norm2\.", ".post_mlp_layernorm."),
        ),
        stored_fused="attn.Wqkv",
    ),
    "eurobert": Architecture(
        "EuroBERT",
        blocks="layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_output="self_attn.o_proj",
        input_norm="input_layernorm",
        final_norm="norm",
        dropped=(),
        rotary="rotary_emb",
        attention_dropout="self_attn.attention_dropout",
        shape=("rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters"),
        older_keys=("rope_theta", "rope_scaling"),
        idle_keys=("position_embedding_type",),
    ),
    "llama": _LLAMA,
    "mistral": replace(
        _LLAMA,
        title="Mistral",
        one_window=True,
        shape=("rms_norm_eps", "rope_parameters", "is_causal", "sliding_window"),
    ),
    "qwen2": replace(
        _LLAMA,
        title="Qwen2",
        windowed=True,
        shape=("rms_norm_eps", "rope_parameters", "is_causal", "layer_types", "sliding_window"),
        older_keys=(*_LLAMA.older_keys, "head_dim"),
    ),
    "qwen3": replace(
        _LLAMA,
        title="Qwen3",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        windowed=True,
        shape=(*_LLAMA.shape, "layer_types", "sliding_window"),
    ),
    "gemma3_text": _Gemma3(
        "Gemma 3",
        blocks="layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_output="self_attn.o_proj",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        scaled_embeddings="embed_tokens.weight",
        input_norm="input_layernorm",
        final_norm="norm",
        dropped=(),
        rotary="rotary_emb",
        attention_dropout="self_attn.attention_dropout",
        windowed=True,
        causal=True,
        activation="hidden_activation",
        shape=(
            "hidden_activation",
            "rms_norm_eps",
            "attention_bias",
            "rope_parameters",
            "query_pre_attn_scalar",
            "layer_types",
            "sliding_window",
            "use_bidirectional_attention",
        ),
        older_keys=(
            "rope_theta",
            "rope_scaling",
            "rope_local_base_freq",
            "sliding_window_pattern",
        ),
        neutral={"is_causal": (True, None)},
    ),
}


SUPPORTED = (
    f"{', '.join(sorted(ARCHITECTURES))}; CONTRIBUTING.md has the recipe for adding an architecture"
)


def default_config(architecture: str) -> PreTrainedConfig:
    """Return the default config of an architecture, given by its `model_type`.

    Raises:
        SettingError: it is not in the table.
    """
    if row := ARCHITECTURES.get(architecture):
        return AutoConfig.for_model(architecture, **row.defaults)
    near = near_miss(architecture.lower(), ARCHITECTURES)
    raise SettingError(
        "architecture",
        architecture,
        "is not supported",
        f"{f'did you mean {near!r}? Use' if near else 'use'} {SUPPORTED}",
    )


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the table row of a model.

    Raises:
        SettingError: its `model_type` is not in the table.
    """
    if row := ARCHITECTURES.get(config.model_type):
        return row
    raise SettingError(
        "config",
        expected=f"is of type {config.model_type!r}, which is not supported",
        remedy=f"use a model of type {SUPPORTED}",
    )


def base_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder inside a task model, or the model itself if it is one."""
    return cast(PreTrainedModel, model.base_model)


def head_size(config: PreTrainedConfig) -> int:
    """Return the number of components of a query, key or value of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(config: PreTrainedConfig) -> int:
    """Return the number of heads of keys and values; each serves a group of query heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def qkv_widths(config: PreTrainedConfig) -> dict[str, int]:
    """Return the widths of q, k and v: of all heads side by side."""
    size, key_value = head_size(config), key_value_heads(config) * head_size(config)
    return {"q": config.num_attention_heads * size, "k": key_value, "v": key_value}


def check_layer(layer: int, num_layers: int) -> None:
    """Raise SettingError unless the 1-based `layer` exists in a model of `num_layers` blocks."""
    if not 1 <= layer <= num_layers:
        where = "beyond" if layer > num_layers else "below"
        raise SettingError(
            "layer",
            layer,
            f"is {where} the model's {num_layers} layers",
            f"use 1 to {num_layers}",
        )


def max_sequence_length(config: PreTrainedConfig) -> int:
    """Return the most tokens a sequence may have: the usable rows of the position table."""
    return config.max_position_embeddings - first_position(config)


def first_position(config: PreTrainedConfig) -> int:
    """Return the position id of a sequence's first token."""
    return config.pad_token_id + 1 if architecture_of(config).positions_follow_padding else 0


def settle_padding(config: PreTrainedConfig) -> None:
    """Set `pad_token_id` to None if it is not a token id and positions do not depend on it.

    Raises:
        SourceError: positions depend on it.
    """
    row, found = ARCHITECTURES.get(config.model_type), config.pad_token_id
    if row is None or (found is not None and 0 <= found < config.vocab_size):
        return
    if row.positions_follow_padding:
        raise SourceError(
            "model",
            expected=f": its config.json has pad_token_id={json.dumps(found)}, but models of type "
            f"{config.model_type!r} count their positions from it",
            remedy="set it to the padding token's id in the tokenizer (1 in RoBERTa and XLM-R)",
        )
    config.pad_token_id = None


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that `AutoModel` builds for `config` from transformers' own code."""
    return cast(type[PreTrainedModel], MODEL_MAPPING[type(config)])


def takes_token_types(config: PreTrainedConfig) -> bool:
    """Return whether a model distinguishes token types, and so takes `token_type_ids`."""
    # None for a model with code of its own.
    known = cast(type[PreTrainedModel] | None, MODEL_MAPPING.get(type(config), None))
    if known and "token_type_ids" not in inspect.signature(known.forward).parameters:
        return False
    return getattr(config, "type_vocab_size", 2) > 1


def encoder_options(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the constructor arguments that leave out the pooler, if the architecture has one."""
    signature = inspect.signature(encoder_class(config).__init__)
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature.parameters else {}


def build_encoder(config: PreTrainedConfig, *, device: str = "cpu") -> PreTrainedModel:
    """Build the fp32 encoder of `config` with random weights and without pooler.

    On the "meta" device this costs nothing.
    """
    with torch.device(device):
        return encoder_only(
            AutoModel.from_config(config, dtype=torch.float32, **encoder_options(config))
        )


def encoder_only(encoder: PreTrainedModel) -> PreTrainedModel:
    """Return `encoder`, without the parts that its architecture can do without.

    Its state then has parameters only: buffers, which the model computes itself, are not saved.
    """
    row = ARCHITECTURES.get(encoder.config.model_type)
    if row and type(encoder) is MODEL_MAPPING.get(type(encoder.config), None):
        encoder._modules.update({name: None for name in row.dropped if name in encoder._modules})
        for module in encoder.modules():
            module._non_persistent_buffers_set.update(module._buffers)
    return encoder


def set_depth(config: PreTrainedConfig, num_layers: int) -> None:
    """Set the number of a config's layers; which kind each is continues the config's pattern."""
    if kinds := getattr(config, "layer_types", None):
        period = next(
            period
            for period in range(1, len(kinds) + 1)
            if all(kind == kinds[i % period] for i, kind in enumerate(kinds))
        )
        config.layer_types = [kinds[i % period] for i in range(num_layers)]
    config.num_hidden_layers = num_layers
