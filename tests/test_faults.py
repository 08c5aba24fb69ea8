"""The short form of `make test-faults`."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.common import Place
from faults.suite import KINDS, run_kind


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_shards: Path) -> Place:
    return Place(tmp_path_factory.mktemp("faults"), tiny_teacher, tiny_shards, seed=1, short=True)


# Killed runs have tests of their own in test_train and test_students.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.full if kind == "kill" else ()) for kind in KINDS],
)
def test_nothing_is_lost(kind: str, place: Place) -> None:
    tally = run_kind(kind, place)
    assert tally.failures == []
    assert (tally.survived, tally.lost) == (tally.tried, 0)
    if not tally.tried:
        pytest.skip(tally.notes[-1])
