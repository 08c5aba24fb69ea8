"""The tokens of a micro-batch, as models and losses take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenInputs(NamedTuple):
    """Token ids [B, T] and which of them belong together, on one device.

    Documents are described by segment ids and position ids together, or not at all.
    """

    input_ids_BT: Tensor
    """int64."""
    mask_BT: Tensor | None = None
    """bool, true on real tokens; None if there is no padding."""
    segment_ids_BT: Tensor | None = None
    """Integer, equal within a document, -1 on padding."""
    position_ids_BT: Tensor | None = None
    """int64, from 0 in each document."""
    cu_seqlens: Tensor | None = None
    """int32, see `Batch`; only `use_varlen_attention` needs it."""
