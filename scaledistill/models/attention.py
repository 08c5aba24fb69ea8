"""Attend within documents of packed rows: a block mask, or `varlen_attn` on GPUs that have it.

Inputs: a `Batch`'s description of its documents. Outputs: arguments for a transformers model, and a
transformers attention implementation, `VARLEN`, that handles documents one by one instead of
masking whole rows. Not handled here: position ids and all other arguments (`models.view`).

Legend: B sequences, T tokens, H attention heads, E width of a head, S documents and stretches of
padding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from scaledistill.errors import SettingError
from scaledistill.models.architectures import architecture_of, head_size

VARLEN = "scaledistill_varlen"
LAYER_KINDS = ("full_attention", "sliding_attention")  # as transformers' configs name them


def varlen_attention_available(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether `varlen_attn` runs forward and backward on a device.

    It needs CUDA from Ampere on, a 16-bit dtype and a head size of 8, 16, … 128.
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
    """Make models of `config` use `varlen_attn` within documents; return whether they can.

    Rows without documents are handled as by "sdpa". The saved form of the config does not change.

    Args:
        device: where the model runs.
        dtype: of its queries, keys and values.
        dropout: of attention in training, which `varlen_attn` does not have.
    """
    row = architecture_of(config)
    # transformers passes windows to kernels as if they ended a token earlier than in its masks.
    other_window = row.causal and not row.is_causal(config) and row.reach(config) is not None
    if row.eager_only or other_window:
        return False
    if dropout or not varlen_attention_available(device, dtype, head_size(config)):
        return False
    config._attn_implementation = VARLEN
    return True


def row_attention(
    config: PreTrainedConfig, input_ids_BT: Tensor, mask_BT: Tensor | None
) -> dict[str, Any]:
    """Return the arguments that make a model attend to the tokens of `mask_BT`, or to whole rows.

    Without a mask attention is not masked, which allows the fastest kernels. Masks are passed in
    their final form: otherwise transformers would read their values, and the host would wait for
    the device in every forward.
    """
    row, implementation = architecture_of(config), config._attn_implementation
    if row.embeddings_read_mask:
        if mask_BT is not None:
            return {"attention_mask": mask_BT.long()}
        # Without a mask DeBERTa makes one, and reads the ids to warn of padding.
        return {"attention_mask": torch.ones_like(input_ids_BT)} if row.eager_only else {}
    masked_here = ("sdpa", VARLEN, "eager") if row.eager_only else ("sdpa", VARLEN)
    if implementation not in masked_here:  # transformers makes the mask
        return {} if mask_BT is None else {"attention_mask": mask_BT}
    if mask_BT is not None:
        return _masks(config, mask_BT.bool()[:, None, None, :])
    if row.eager_only:  # transformers would make a mask of ones, and read it
        return _masks(config, input_ids_BT.new_ones(1, 1, 1, 1, dtype=torch.bool))
    needed = row.is_causal(config) or row.reach(config) is not None
    return _masks(config, None, input_ids_BT) if needed else {}


def document_attention(
    config: PreTrainedConfig, segment_ids_BT: Tensor, cu_seqlens: Tensor | None = None
) -> dict[str, Any]:
    """Return the arguments that make a model attend within documents only.

    Padding attends to padding of its row. No tensor value is read, so the host never waits for a
    GPU.

    Args:
        segment_ids_BT: integer, equal within a document, -1 on padding.
        cu_seqlens: int32 [S + 1 or more], where documents and stretches of padding begin in the
            rows laid end to end, filled up with B · T. Only `VARLEN` reads it, and uses the block
            mask without it.

    Raises:
        SettingError: the model uses another attention implementation than sdpa or eager.
    """
    row, implementation = architecture_of(config), config._attn_implementation
    if row.no_documents:
        raise SettingError(
            "segment_ids_BT",
            expected=f": attention within documents is not supported for {row.title}: "
            f"{row.no_documents}",
            remedy='use attention "row"',
        )
    if implementation == VARLEN and cu_seqlens is not None:
        unmasked = {"attention_mask": dict.fromkeys(LAYER_KINDS)} if row.windowed else {}
        return {"cu_seqlens": cu_seqlens, **unmasked}
    if implementation not in ("sdpa", VARLEN, "eager"):
        raise SettingError(
            "segment_ids_BT",
            expected="works with the attention implementations sdpa and eager, found "
            f"{implementation!r}",
            remedy="leave attn_implementation out of the model's config.json",
        )
    return _masks(config, (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None])


def _masks(
    config: PreTrainedConfig, visible: Tensor | None, input_ids_BT: Tensor | None = None
) -> dict[str, Any]:
    """Return the attention mask, by kind of layer if some attend within a window only.

    Causality and windows are added to `visible`.

    Args:
        visible: bool [B or 1, 1, T or 1, T], where a query sees a key; None: everywhere.
        input_ids_BT: any tensor of the batch's length and device, needed without `visible`.
    """
    row = architecture_of(config)
    causal, reach = row.is_causal(config), row.reach(config)
    final = _additive if config._attn_implementation == "eager" else _boolean
    if not causal and reach is None and not row.windowed:
        return {"attention_mask": final(cast(Tensor, visible))}
    shaped = cast(Tensor, input_ids_BT if visible is None else visible)
    positions_T = torch.arange(shaped.shape[-1], device=shaped.device)
    back_TT = positions_T[:, None] - positions_T  # how far a key is before the query
    seen_TT = back_TT >= 0 if causal else torch.ones_like(back_TT, dtype=torch.bool)
    full = visible if visible is None or not causal else visible & seen_TT
    near = full
    if reach is not None and reach < len(positions_T) - 1:
        near_TT = seen_TT & (back_TT.abs() <= reach)
        near = near_TT[None, None] if visible is None else visible & near_TT
    if row.windowed:  # without a mask, attention is causal by itself
        masks = zip(LAYER_KINDS, (full, near), strict=True)
        return {"attention_mask": {kind: x if x is None else final(x) for kind, x in masks}}
    # Without any mask, transformers would read the positions to look for documents.
    mask = near if near is not None else seen_TT[None, None]
    return {"attention_mask": final(mask)}


def _boolean(visible: Tensor) -> Tensor:
    return visible


def _additive(visible: Tensor) -> Tensor:
    """Return a mask to add to scores.

    It has integers, because adding it keeps the scores in the model's dtype, whichever that is;
    exp(-32768) is 0.
    """
    return torch.where(visible, 0, torch.iinfo(torch.int16).min).to(torch.int16)


def _varlen_attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by transformers' interface for attention implementations; return [B, T, H, E].

    `sliding_window` is one more than the distance that tokens see, as transformers passes it.
    `is_causal` is by default that of `module`. Keys and values may have fewer heads than queries.
    Shapes depend only on the batch, not on its documents: T stands for the longest document, so
    that compiled blocks stay valid.
    """
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module,
            query_BHTE,
            key_BHTE,
            value_BHTE,
            attention_mask,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    B, H, T, _ = query_BHTE.shape
    key_BHTE, value_BHTE = (repeat_kv(x, H // x.shape[1]) for x in (key_BHTE, value_BHTE))
    query, key, value = (
        x_BHTE.transpose(1, 2).flatten(0, 1) for x_BHTE in (query_BHTE, key_BHTE, value_BHTE)
    )
    before = -1 if sliding_window is None else sliding_window - 1  # -1: any distance
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (before, 0 if causal else before)
    attended = cast(
        Tensor,
        varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, T, T, scale=scaling, window_size=window
        ),
    )
    return attended.unflatten(0, (B, T)), None


# No mask function is registered under this name, so transformers passes masks through and makes
# none.
AttentionInterface.register(VARLEN, _varlen_attention)
