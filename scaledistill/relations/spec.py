"""Check the request for a relation loss.

Inputs: the number of relation heads, the pairs, widths or Q/K/V tensors. Outputs: a `RelationSpec`
that a backend can trust, or a `ValueError` that names the parameter. Not handled here: the
mathematics (the backends).

Legend: B sequences, T tokens, D width (q, k and v of a model may differ in it, and so may teacher
and student).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from scaledistill.errors import SettingError

MAX_HEAD_WIDTH = 128
"""The widest heads of `triton`: for wider ones in float32, even tiles of 32 tokens spill registers
and take over 100 KiB of a multiprocessor."""


class QKV(NamedTuple):
    """Queries, keys and values of one transformer block, each `[B, T, D]`.

    The heads are side by side in `D`.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class RelationSpec(NamedTuple):
    """A checked request: which relations of which tokens.

    `pairs` holds (name, weight), e.g. ("qk", 1.0). `keys_BT` is int32: tokens of a row attend to
    each other if their keys are equal; -1 is padding; None: every token attends to its whole row.
    `share_BT` is the weight in the loss of a token's row, summed over heads, before the division by
    R: 1 / (n · B); 0 on padding. `dtype` is that of scores, softmax, shares and losses: float64 if
    an input is float64, else float32.
    """

    num_heads: int
    pairs: tuple[tuple[str, float], ...]
    keys_BT: Tensor | None
    share_BT: Tensor
    causal: bool
    dtype: torch.dtype

    @property
    def letters(self) -> list[str]:
        """The tensors that the pairs use, a subset of q, k, v."""
        return letters_of(name for name, _ in self.pairs)


def letters_of(pairs: Iterable[str]) -> list[str]:
    """Return which of q, k and v the named pairs use."""
    used = set("".join(pairs))
    return [letter for letter in QKV._fields if letter in used]


def normalise_pairs(pairs: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Check the pairs' weights and return them as (name, weight) tuples in the given order.

    Raises:
        SettingError: no pair; a name that is not two of q, k, v; a negative or non-finite weight;
            only zero weights.
    """
    if not pairs:
        raise SettingError(
            "pairs",
            expected="is empty",
            remedy='name at least one pair, e.g. {"qq": 1.0, "kk": 1.0, "vv": 1.0}',
        )
    for name, weight in pairs.items():
        if len(name) != 2 or not set(name) <= set(QKV._fields):
            raise SettingError(
                "pairs",
                expected=f"has '{name}'",
                remedy="a pair is two of the letters q, k and v, e.g. 'qq' or 'qk'",
            )
        if not math.isfinite(weight) or weight < 0:
            raise SettingError(
                f"pairs.{name}", weight, remedy="a weight is a finite number, 0 or more"
            )
    if not any(pairs.values()):
        raise SettingError(
            "pairs",
            expected="has only zero weights",
            remedy="give at least one pair a weight above 0",
        )
    return tuple((name, float(weight)) for name, weight in pairs.items())


def check_relation_heads(
    num_heads: int,
    widths: Mapping[str, int | Mapping[str, int]],
    pairs: Iterable[str] = ("qq", "kk", "vv"),
) -> None:
    """Check, without tensors, that `num_heads` divides every width that the pairs use.

    `widths` maps a model's name for messages ("teacher", "student l6") to the width of its q, k and
    v, or to {"q": …, "k": …, "v": …} if they differ (grouped-query attention).

    Raises:
        SettingError: `num_heads` does not divide a used width, or a pair joins tensors of unequal
            width.
    """
    pairs = list(pairs)
    letters = letters_of(pairs)
    used = {
        name: {x: w if isinstance(w, int) else w[x] for x in letters} for name, w in widths.items()
    }
    for name, model in used.items():
        for pair in pairs:
            a, b = tuple(pair)
            if model[a] != model[b]:
                raise SettingError(
                    "pairs",
                    expected=f": '{pair}' needs {a} and {b} of equal width, but the {name}'s are "
                    f"{model[a]} and {model[b]}",
                    remedy=f"leave '{pair}' out",
                )
        for letter, width in model.items():
            if num_heads < 1 or width % num_heads:
                which = "width" if len(set(model.values())) == 1 else f"{letter} width"
                common = math.gcd(*(w for other in used.values() for w in other.values()))
                divisors = [d for d in range(1, common + 1) if common % d == 0]
                nearest = [
                    *[d for d in divisors if d < num_heads][-1:],
                    *[d for d in divisors if d > num_heads][:1],
                ]
                raise SettingError(
                    "num_heads",
                    num_heads,
                    f"does not divide the {name}'s {which} {width}",
                    f"use {' or '.join(map(str, nearest))}",
                )


def make_spec(
    teacher: QKV,
    student: QKV,
    num_heads: int,
    pairs: Mapping[str, float],
    mask_BT: Tensor | None,
    segment_ids_BT: Tensor | None,
    causal: bool,
) -> RelationSpec:
    """Check settings and tensors against each other and return the request.

    It never waits for a GPU.

    Raises:
        ValueError: as `normalise_pairs` and `check_relation_heads`; tensors that differ in B, T or
            device or are not floating; a mask or segment ids of another shape or device or of
            floating dtype.
    """
    weighted = normalise_pairs(pairs)
    names = [name for name, _ in weighted]
    letters = letters_of(names)
    tensors = {
        f"{who}.{x}": getattr(qkv, x)
        for who, qkv in (("teacher", teacher), ("student", student))
        for x in letters
    }
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.dim() != 3 or x.shape[:2] != first.shape[:2] or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)}, {first_name} has {list(first.shape)}; "
                "expected [B, T, D] with equal B and T, none of them 0"
            )
        if not x.dtype.is_floating_point or x.device != first.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}; expected a floating dtype on {first.device}, "
                f"where {first_name} is"
            )
    for name, ids in (("mask_BT", mask_BT), ("segment_ids_BT", segment_ids_BT)):
        if ids is None:
            continue
        if (
            ids.shape != first.shape[:2]
            or ids.dtype.is_floating_point
            or ids.device != first.device
        ):
            raise ValueError(
                f"{name} is {ids.dtype} of shape {list(ids.shape)} on {ids.device}; "
                f"expected {'bool or ' if name == 'mask_BT' else ''}integers "
                f"of shape {list(first.shape[:2])} on {first.device}"
            )
    widths = {
        who: {x: getattr(qkv, x).shape[2] for x in letters}
        for who, qkv in (("teacher", teacher), ("student", student))
    }
    check_relation_heads(num_heads, widths, names)
    dtype = (
        torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
    )
    keys_BT, share_BT = _keys_and_shares(mask_BT, segment_ids_BT, first, dtype)
    return RelationSpec(num_heads, weighted, keys_BT, share_BT, causal, dtype)


def _keys_and_shares(
    mask_BT: Tensor | None, segment_ids_BT: Tensor | None, first: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Return the keys and shares of `RelationSpec`."""
    B, T, _ = first.shape
    keys_BT = None
    if segment_ids_BT is not None:
        keys_BT = (segment_ids_BT - segment_ids_BT.amin()).to(torch.int32)
    if mask_BT is None:
        return keys_BT, torch.full((B, T), 1 / (T * B), dtype=dtype, device=first.device)
    real_BT = mask_BT.bool()
    if keys_BT is None:
        keys_BT = torch.zeros_like(real_BT, dtype=torch.int32)
    share_BT = real_BT / (real_BT.sum(1, keepdim=True, dtype=dtype).clamp(min=1) * B)
    return keys_BT.masked_fill(~real_BT, -1), share_BT
