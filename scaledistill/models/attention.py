"""Attention that stays within documents of packed rows: a block mask, or `varlen_attn` on GPUs that
have it.

Enters: what a `Batch` knows of its documents. Leaves: arguments for a transformers model, and an
attention implementation of transformers, `VARLEN`, that works through the documents one by one
instead of masking whole rows. Position ids and all other arguments are left to `models.capture`.

Legend: B sequences, T tokens, H attention heads, E width of a head, S documents and stretches of
padding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from scaledistill.errors import ConfigError

VARLEN = "scaledistill_varlen"


def varlen_attention_available(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Tell whether `varlen_attn` runs there, forward and backward: CUDA from Ampere on, 16 bits, E
    8, 16, … 128.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= 128
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def use_varlen_attention(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, *, dropout: float = 0.0
) -> bool:
    """Make models of `config` attend by `varlen_attn` to documents, if they can; return whether
    they do from now on.

    Rows without documents go on as under "sdpa". What is saved of the config does not change.

    Args:
        device: where the model runs.
        dtype: of its queries, keys and values.
        dropout: of attention while it trains, which `varlen_attn` does not have.
    """
    head_size = config.hidden_size // config.num_attention_heads
    if dropout or not varlen_attention_available(device, dtype, head_size):
        return False
    config._attn_implementation = VARLEN
    return True


def document_attention(
    config: PreTrainedConfig, segment_ids_BT: Tensor, cu_seqlens: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the arguments that make a model attend within documents only; padding attends to
    padding of its row.

    No value is looked at: on a GPU nothing waits.

    Args:
        segment_ids_BT: integer, equal within a document, -1 on padding.
        cu_seqlens: int32 [S + 1 or more], where documents and stretches of padding begin in the
            rows laid end to end, filled up with B · T; only `VARLEN` reads it, and takes the block
            mask without it.

    Raises:
        ConfigError: the model attends by something else than sdpa or eager attention.
    """
    implementation = config._attn_implementation
    if implementation == VARLEN and cu_seqlens is not None:
        return {"cu_seqlens": cu_seqlens}
    visible_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    if implementation in ("sdpa", VARLEN):
        return {"attention_mask": visible_B1TT}
    if implementation == "eager":
        # An integer, so that adding it leaves the scores in the model's dtype, whichever that is;
        # exp(-32768) is 0.
        return {
            "attention_mask": torch.where(visible_B1TT, 0, torch.iinfo(torch.int16).min).to(
                torch.int16
            )
        }
    raise ConfigError(
        "data.attention='document' works with the attention implementations sdpa and eager, found "
        f"{implementation!r}; leave attn_implementation out of the model's config.json"
    )


def _varlen_attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks its implementations to; return [B, T, H, E].

    Shapes are those of the batch, whatever its documents: the longest counts as T, so that compiled
    blocks stay valid.
    """
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query_BHTE, key_BHTE, value_BHTE, attention_mask, scaling=scaling, **kwargs
        )
    B, _, T, _ = query_BHTE.shape
    query, key, value = (
        x_BHTE.transpose(1, 2).flatten(0, 1) for x_BHTE in (query_BHTE, key_BHTE, value_BHTE)
    )
    attended = cast(
        Tensor, varlen_attn(query, key, value, cu_seqlens, cu_seqlens, T, T, scale=scaling)
    )
    return attended.unflatten(0, (B, T)), None


# Without a mask function of this name transformers hands on masks that are ready and makes none of
# its own.
AttentionInterface.register(VARLEN, _varlen_attention)
