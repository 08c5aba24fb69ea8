"""What a relation loss is asked to compute, and the checks on it.

In: the settings `relations.num_heads` and `relations.pairs`, widths or Q/K/V tensors. Out: a `RelationSpec` that a
backend can trust, or a `ValueError` that names the setting. The mathematics is the backends' affair.

Legend: B sequences, T tokens, D width (q, k and v of a model may differ in it, and so may teacher and student).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class QKV(NamedTuple):
    """Queries, keys and values of one transformer block, each `[B, T, D]`, heads side by side in `D`."""

    q: Tensor
    k: Tensor
    v: Tensor


class RelationSpec(NamedTuple):
    """A checked request: which relations of which tokens.

    `pairs` holds (name, weight), e.g. ("qk", 1.0); `mask_BT` is bool, true on real tokens; `segment_ids_BT` are
    integers, equal within a document; `dtype` is that of scores, softmax and losses: float64 where an input is float64,
    float32 otherwise.
    """

    num_heads: int
    pairs: tuple[tuple[str, float], ...]
    mask_BT: Tensor | None
    segment_ids_BT: Tensor | None
    causal: bool
    dtype: torch.dtype

    @property
    def letters(self) -> list[str]:
        """The tensors that the pairs use, a subset of q, k, v."""
        return letters_of(name for name, _ in self.pairs)


def letters_of(pairs: Iterable[str]) -> list[str]:
    """List which of q, k and v the named pairs use."""
    used = set("".join(pairs))
    return [letter for letter in QKV._fields if letter in used]


def normalise_pairs(pairs: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Check the setting `relations.pairs` and return it as (name, weight) tuples in the given order.

    Raises:
        ValueError: no pair; a name that is not two of q, k, v; a negative or non-finite weight; only zero weights.
    """
    if not pairs:
        raise ValueError('relations.pairs is empty; name at least one pair, e.g. {"qq": 1.0, "kk": 1.0, "vv": 1.0}')
    for name, weight in pairs.items():
        if len(name) != 2 or not set(name) <= set(QKV._fields):
            raise ValueError(
                f"relations.pairs has '{name}'; a pair is two of the letters q, k and v, e.g. 'qq' or 'qk'"
            )
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"relations.pairs.{name}={weight}; a weight is a finite number, 0 or more")
    if not any(pairs.values()):
        raise ValueError("relations.pairs has only zero weights; give at least one pair a weight above 0")
    return tuple((name, float(weight)) for name, weight in pairs.items())


def check_relation_heads(
    num_heads: int,
    widths: Mapping[str, int | Mapping[str, int]],
    pairs: Iterable[str] = ("qq", "kk", "vv"),
    setting: str = "relations.num_heads",
) -> None:
    """Check, without tensors, that every width that the pairs use can be cut into `num_heads` relation heads.

    `widths` maps a model's name for messages ("teacher", "student l6") to the width of its q, k and v, or to
    {"q": …, "k": …, "v": …} where they differ (grouped-query attention).

    Raises:
        ValueError: `num_heads` does not divide a used width, or a pair joins tensors of unequal width.
    """
    pairs = list(pairs)
    letters = letters_of(pairs)
    used = {name: {x: w if isinstance(w, int) else w[x] for x in letters} for name, w in widths.items()}
    for name, model in used.items():
        for pair in pairs:
            a, b = tuple(pair)
            if model[a] != model[b]:
                raise ValueError(
                    f"relations.pairs: '{pair}' needs {a} and {b} of equal width, "
                    f"but the {name}'s are {model[a]} and {model[b]}; leave '{pair}' out"
                )
        for letter, width in model.items():
            if num_heads < 1 or width % num_heads:
                which = "width" if len(set(model.values())) == 1 else f"{letter} width"
                common = math.gcd(*(w for other in used.values() for w in other.values()))
                divisors = [d for d in range(1, common + 1) if common % d == 0]
                nearest = [*[d for d in divisors if d < num_heads][-1:], *[d for d in divisors if d > num_heads][:1]]
                raise ValueError(
                    f"{setting}={num_heads} does not divide the {name}'s {which} {width}; "
                    f"use {' or '.join(map(str, nearest))}"
                )


def check_request(
    teacher: QKV,
    student: QKV,
    num_heads: int,
    pairs: Mapping[str, float],
    mask_BT: Tensor | None,
    segment_ids_BT: Tensor | None,
    causal: bool,
) -> RelationSpec:
    """Check settings and tensors against each other.

    Raises:
        ValueError: as `normalise_pairs` and `check_relation_heads`; tensors that differ in B, T or device or are not
            floating; a mask or segment ids of another shape or device or of floating dtype.
    """
    weighted = normalise_pairs(pairs)
    names = [name for name, _ in weighted]
    letters = letters_of(names)
    tensors = {
        f"{who}.{x}": getattr(qkv, x) for who, qkv in (("teacher", teacher), ("student", student)) for x in letters
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
                f"{name} is {x.dtype} on {x.device}; expected a floating dtype on {first.device}, where {first_name} is"
            )
    for name, ids in (("mask_BT", mask_BT), ("segment_ids_BT", segment_ids_BT)):
        if ids is None:
            continue
        if ids.shape != first.shape[:2] or ids.dtype.is_floating_point or ids.device != first.device:
            raise ValueError(
                f"{name} is {ids.dtype} of shape {list(ids.shape)} on {ids.device}; "
                f"expected {'bool or ' if name == 'mask_BT' else ''}integers "
                f"of shape {list(first.shape[:2])} on {first.device}"
            )
    widths = {
        who: {x: getattr(qkv, x).shape[2] for x in letters} for who, qkv in (("teacher", teacher), ("student", student))
    }
    check_relation_heads(num_heads, widths, names)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
    return RelationSpec(num_heads, weighted, None if mask_BT is None else mask_BT.bool(), segment_ids_BT, causal, dtype)
