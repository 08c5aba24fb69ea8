"""Numbers in messages."""

from __future__ import annotations

import pytest

from scaledistill.errors import counted


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
