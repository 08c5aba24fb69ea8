"""What a student has learned: its relation maps beside the teacher's, and KL per relation head.

Inputs: Q, K and V of teacher and student for the same tokens. Outputs: `maps.json` in a run's
folder, from which a page can be made without the models. Not handled here: where the models and
tokens come from (`training.maps`).

Legend: B sequences, T tokens, D width, R relation heads, E width per relation head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import DataError
from scaledistill.relations import QKV
from scaledistill.relations.reference import log_relations, relation_kl
from scaledistill.relations.spec import letters_of, make_spec
from scaledistill.report.names import MAPS_FILE
from scaledistill.storage.files import write_bytes

NUM_SENTENCES = 3
SENTENCE_TOKENS = 20
KL_ROWS = 16
"""At most this many rows are compared: the oracle holds whole maps, one row at a time."""
CHOSEN = ("the closest", "a third from the closest", "a third from the farthest", "the farthest")
"""The heads whose maps are shown, by their KL."""


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one relation head."""

    head: int
    kl: float
    """In nats: the mean over tokens."""
    place: str
    """Among the heads of its pair, by KL: one of `CHOSEN`, or a number."""
    teacher: list[list[int]]
    """By sentence: `[T · T]` probabilities in thousandths, row by row."""
    student: list[list[int]]


@dataclass(frozen=True)
class StudentMaps:
    """What is shown of one student."""

    num_rows: int
    """That KL was measured on."""
    kl: dict[str, list[float]]
    """By pair, for each relation head: nats, the mean over tokens."""
    maps: dict[str, list[HeadMaps]]
    """By pair."""


def kl_per_head(
    teacher: QKV,
    student: QKV,
    tokens: TokenInputs,
    num_heads: int,
    pairs: Mapping[str, float],
    *,
    causal: bool = False,
) -> dict[str, Tensor]:
    """Return the KL of each relation head: `[R]` by pair, float32, on the CPU.

    Their mean over heads is the pair's loss on the first `KL_ROWS` rows.
    """
    B = min(KL_ROWS, teacher.q.shape[0])
    sums = {pair: torch.zeros(num_heads) for pair in pairs}
    for row in range(B):
        one = slice(row, row + 1)
        target, own = _rows(teacher, one), _rows(student, one)
        mask_BT, segment_ids_BT = (
            None if values is None else values[one]
            for values in (tokens.mask_BT, tokens.segment_ids_BT)
        )
        for head in range(num_heads):  # the maps of all heads of a long row would not fit
            heads = _head(target, head, num_heads, pairs), _head(own, head, num_heads, pairs)
            spec = make_spec(*heads, 1, pairs, mask_BT, segment_ids_BT, causal=causal)
            for pair in pairs:
                kl_BRT = relation_kl(*heads, pair, spec) * spec.share_BT[:, None]
                sums[pair][head] += kl_BRT.sum().float().cpu() / B
    return sums


def _head(qkv: QKV, head: int, num_heads: int, pairs: Mapping[str, float]) -> QKV:
    """Return one relation head of the tensors that the pairs use, `[B, T, E]` each."""
    used = letters_of(pairs)
    return QKV(
        *(
            x_BTD.unflatten(-1, (num_heads, -1))[:, :, head] if letter in used else x_BTD
            for letter, x_BTD in zip(QKV._fields, qkv, strict=True)
        )
    )


def student_maps(
    kl: Mapping[str, Tensor],
    teacher: QKV,
    student: QKV,
    lengths: Sequence[int],
    pairs: Mapping[str, float],
    num_rows: int,
    *,
    causal: bool = False,
) -> StudentMaps:
    """Return the maps of a few heads, from the closest to the teacher to the farthest.

    Args:
        kl: from `kl_per_head`.
        teacher, student: for the sentences, `[B, T, D]`.
        lengths: of the sentences, in tokens; what follows is padding.

    Raises:
        DataError: `kl` is not finite.
    """
    if not all(kl_R.isfinite().all() for kl_R in kl.values()):
        raise DataError("relations of the teacher or of a student are not finite on these rows")
    maps: dict[str, list[HeadMaps]] = {pair: [] for pair in pairs}
    for pair, kl_R in kl.items():
        order, R = kl_R.argsort().tolist(), len(kl_R)
        # Fewer than four if there are so few heads.
        chosen = dict.fromkeys(order[round(place * (R - 1) / 3)] for place in range(4))
        relations = []
        for qkv in (teacher, student):
            by_sentence = []
            for number, length in enumerate(lengths):
                cut = QKV(*(x_BTD[number : number + 1, :length] for x_BTD in qkv))
                spec = make_spec(cut, cut, R, pairs, None, None, causal=causal)
                by_sentence.append(log_relations(cut, pair, spec)[0].exp())
            relations.append(by_sentence)
        places = CHOSEN if len(chosen) == len(CHOSEN) else [f"number {n + 1}" for n in range(R)]
        for place, head in zip(places, chosen, strict=False):
            own, other = (
                [_thousandths(map_RTT[head]) for map_RTT in by_sentence]
                for by_sentence in relations
            )
            maps[pair].append(HeadMaps(head, float(kl_R[head]), place, own, other))
    rounded = {pair: [round(x, 6) for x in kl_R.tolist()] for pair, kl_R in kl.items()}
    return StudentMaps(num_rows, rounded, maps)


def write_maps(
    folder: Path,
    step: int,
    source: str,
    sentences: Sequence[Sequence[str]],
    students: Mapping[str, StudentMaps],
) -> None:
    """Write `maps.json` into a run's folder.

    Args:
        source: where the rows are from.
        sentences: the tokens of each, as text.
    """
    content: dict[str, Any] = {
        "step": step,
        "source": source,
        "sentences": [list(tokens) for tokens in sentences],
        "students": dict(students),
    }
    # On one line: most of it are the numbers of the maps.
    text = json.dumps(content, default=vars, allow_nan=False)
    write_bytes(folder / MAPS_FILE, text.encode())


def _rows(qkv: QKV, rows: slice) -> QKV:
    return QKV(*(x_BTD[rows].float() for x_BTD in qkv))


def _thousandths(map_TT: Tensor) -> list[int]:
    return (map_TT.float() * 1000).round().int().flatten().tolist()
