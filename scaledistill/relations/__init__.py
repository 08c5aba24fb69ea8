"""The MiniLMv2 relation loss between multi-head self-attention relations of two models.

Inputs: `QKV` of one teacher block and one student block. Outputs: `RelationLoss`. A backend
computes it: `reference` (any device, whole maps), `sdpa` (CPU, tiles) or `triton` (GPU, fused
kernels). Not handled here: capturing Q/K/V (`models.view`).

Legend: B sequences, T tokens, D width, P pairs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from scaledistill.errors import SettingError
from scaledistill.relations.reference import reference_loss
from scaledistill.relations.sdpa import sdpa_loss
from scaledistill.relations.spec import (
    QKV,
    RelationSpec,
    check_relation_heads,
    make_spec,
    normalise_pairs,
)

__all__ = [
    "BACKENDS",
    "QKV",
    "RelationLoss",
    "RelationSpec",
    "check_relation_heads",
    "normalise_pairs",
    "relation_loss",
    "resolve_backend",
]


def _triton_loss(teacher: QKV, student: QKV, spec: RelationSpec) -> tuple[Tensor, Tensor]:
    # Imported on use, because Triton may be missing.
    from scaledistill.relations.triton import triton_loss

    return triton_loss(teacher, student, spec)


# A backend takes Q/K/V with any strides and floating dtypes (usually slices of one tensor) and a
# checked request. It computes all pairs and returns the weighted total, differentiable in the
# student, and the unweighted losses `[P]`, detached.
Backend = Callable[[QKV, QKV, RelationSpec], tuple[Tensor, Tensor]]
BACKENDS: dict[str, Backend] = {
    "reference": reference_loss,
    "sdpa": sdpa_loss,
    "triton": _triton_loss,
}


class RelationLoss(NamedTuple):
    """The weighted sum with its gradient, and each pair's unweighted loss, detached.

    All are scalars on the inputs' device.
    """

    total: Tensor
    by_pair: dict[str, Tensor]


def resolve_backend(backend: str, device_type: str) -> str:
    """Return the backend's name, with `auto` resolved for the device ("cpu", "cuda").

    Raises:
        SettingError: no such backend, or it cannot compute on that device.
    """
    if backend == "auto":
        if device_type == "cuda" and _triton_installed() and torch.version.hip is None:
            return "triton"
        return "sdpa" if device_type == "cpu" else "reference"
    if backend not in BACKENDS:
        raise SettingError("backend", backend, remedy=f"expected auto, {', '.join(BACKENDS)}")
    if backend == "sdpa" and device_type != "cpu":
        raise SettingError(
            "backend",
            backend,
            f"computes on the CPU, found {device_type}",
            "use auto or reference",
        )
    if backend == "triton":
        if not _triton_installed():
            raise SettingError(
                "backend", backend, "needs the package triton, which is not installed", "use auto"
            )
        # For tests: Triton's interpreter runs the kernels on the CPU, slowly.
        if device_type != "cuda" and (
            device_type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"
        ):
            raise SettingError(
                "backend", backend, f"computes on CUDA GPUs, found {device_type}", "use auto"
            )
    return backend


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def relation_loss(
    teacher: QKV,
    student: QKV,
    *,
    num_heads: int,
    pairs: Mapping[str, float],
    mask_BT: Tensor | None = None,
    segment_ids_BT: Tensor | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> RelationLoss:
    """Compute the weighted sum over pairs of the relation loss, averaged over sequences.

    The loss of a pair and a sequence of n real tokens is Σ_heads Σ_rows KL(teacher ‖ student) / (R
    · n). A pair "ab" compares softmax(a bᵀ / √E) of both models, head by head and row by row, among
    the real tokens. A sequence without a real token adds 0 to the mean. The teacher gets no
    gradient. Teacher and student may differ in width and dtype.

    Args:
        teacher: `[B, T, D]` each, floating; only the tensors that `pairs` names are read.
        student: likewise, same B, T and device.
        num_heads: R, the relation heads; divides each width used.
        pairs: weights by name: "qq", "kk", "vv", "qk", …
        mask_BT: bool or integer, true on real tokens, in any position.
        segment_ids_BT: integer, less than 2^31 apart; tokens attend only within their segment. n is
            still the number of real tokens in the row.
        causal: tokens attend only to themselves and earlier tokens.
        backend: "auto", "reference", "sdpa" or "triton".

    Returns:
        Float32 losses; float64 if an input is float64.

    Raises:
        ValueError: settings or tensors that don't fit together; the message names the parameter.

    Source: MiniLMv2, arXiv 2012.15828, eq. 5–8.
    """
    spec = make_spec(teacher, student, num_heads, pairs, mask_BT, segment_ids_BT, causal)
    device_type = getattr(student, spec.letters[0]).device.type
    compute = BACKENDS[resolve_backend(backend, device_type)]
    with torch.autocast(device_type, enabled=False):
        total, losses_P = compute(teacher, student, spec)
    return RelationLoss(
        total, dict(zip((name for name, _ in spec.pairs), losses_P.unbind(), strict=True))
    )
