"""Numbers and suggestions in messages."""

from __future__ import annotations

import pytest

from scaledistill.errors import counted, did_you_mean, near_miss, near_misses


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "rank", "0 ranks"),
        (1, "rank", "1 rank"),
        (1024, "rank", "1,024 ranks"),
        (2, "micro-batch", "2 micro-batches"),
    ],
)
def test_counted(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    ("found", "near", "end"),
    [
        ("trian", "train", "; did you mean train?"),
        ("train", "train", "; did you mean train?"),
        ("xyz", None, ""),
    ],
)
def test_near_miss(found: str, near: str | None, end: str) -> None:
    known = {"train": 1, "data": 2, "trains": 3}
    assert near_miss(found, known) == near
    assert did_you_mean(near_miss(found, known)) == end


def test_near_misses_are_sorted_by_likeness() -> None:
    known = ["gelu_new", "gelu", "silu", "tanh"]
    assert near_misses("gelu", known, at_most=2) == ["gelu", "gelu_new"]
    assert near_misses("gelu", known, at_most=3, cutoff=0.9) == ["gelu"]
