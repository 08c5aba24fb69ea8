"""Architectures: where each keeps its blocks and projections, and how its models are built.

Inputs: model configs of transformers. Outputs: a table row per architecture, encoders with random
weights. Not handled here: checking a config's values (`models.configs`), loading weights
(`models.teacher`).
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import cast

import torch
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from scaledistill.errors import SettingError, SourceError


@dataclass(frozen=True)
class Architecture:
    """Where an architecture keeps its parts.

    The paths are relative to a block, except `blocks`, `final_norm` and `dropped`.
    """

    blocks: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"  # reads the heads side by side
    input_norm: str | None = None  # pre-norm models: applied before the projections
    # Pre-norm models: follows the last block; must not be applied to Q, K and V.
    final_norm: str | None = None
    dropped: tuple[str, ...] = ("pooler",)  # children that the encoder's forward does not need
    # Position ids start after pad_token_id (fairseq's convention).
    positions_follow_padding: bool = False

    @property
    def projections(self) -> tuple[str, str, str]:
        """The paths of the query, key and value projections."""
        return self.query, self.key, self.value

    def block_path(self, layer: int) -> str:
        """Return the path of block `layer`, counted from 1.

        The only place where a layer number becomes an index from 0.
        """
        return f"{self.blocks}.{layer - 1}"


_BERT = Architecture()
_ROBERTA = Architecture(positions_follow_padding=True)
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "electra": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the table row of a model.

    Raises:
        SettingError: its `model_type` is not in the table.
    """
    try:
        return ARCHITECTURES[config.model_type]
    except KeyError:
        raise SettingError(
            "config",
            expected=f"is of type {config.model_type!r}, which is not supported",
            remedy=f"use a model of type {', '.join(sorted(ARCHITECTURES))}",
        ) from None


def base_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder inside a task model, or the model itself if it is one."""
    return cast(PreTrainedModel, model.base_model)


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


def encoder_options(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the constructor arguments that leave out the pooler, if the architecture has one."""
    signature = inspect.signature(encoder_class(config).__init__)
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature.parameters else {}


def build_encoder(config: PreTrainedConfig, *, device: str = "cpu") -> PreTrainedModel:
    """Build the fp32 encoder of `config` with random weights and without pooler.

    On the "meta" device this costs nothing.
    """
    with torch.device(device):
        return AutoModel.from_config(config, dtype=torch.float32, **encoder_options(config))
