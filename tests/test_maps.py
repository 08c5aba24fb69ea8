from __future__ import annotations

import pytest
import torch

from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import DataError
from scaledistill.relations import QKV, relation_loss
from scaledistill.report.maps import kl_per_head, student_maps

PAIRS = {"qq": 1.0, "kv": 0.5}


def qkv(width: int, seed: int, rows: int = 3, tokens: int = 7) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    return QKV(*torch.randn(3, rows, tokens, width, generator=generator).unbind())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_mean_over_heads_is_the_loss(documents: bool, padded: bool) -> None:
    teacher, student = qkv(24, 1), qkv(12, 2)
    ids_BT = torch.zeros(3, 7, dtype=torch.long)
    mask_BT = torch.arange(7) < torch.tensor([[7], [4], [2]]) if padded else None
    segments_BT = torch.arange(7).div(3, rounding_mode="floor").expand(3, 7) if documents else None
    tokens = TokenInputs(ids_BT, mask_BT, segments_BT)
    kl = kl_per_head(teacher, student, tokens, 4, PAIRS)
    loss = relation_loss(
        teacher,
        student,
        num_heads=4,
        pairs=PAIRS,
        mask_BT=mask_BT,
        segment_ids_BT=segments_BT,
        backend="reference",
    )
    assert {pair: len(heads) for pair, heads in kl.items()} == {"qq": 4, "kv": 4}
    for pair, heads in kl.items():
        torch.testing.assert_close(heads.mean(), loss.by_pair[pair])


def test_maps_of_chosen_heads() -> None:
    teacher, student = qkv(64, 1), qkv(32, 2)
    kl = {"qq": torch.tensor([0.8, 0.1, 0.2, 0.7, 0.3, 0.4, 0.6, 0.5])}
    found = student_maps(kl, teacher, student, [7, 4, 7], {"qq": 1.0}, num_rows=3)
    maps = found.maps["qq"]
    assert [each.head for each in maps] == [1, 4, 6, 0]
    assert [each.place for each in maps] == [
        "the closest",
        "a third from the closest",
        "a third from the farthest",
        "the farthest",
    ]
    assert [len(values) for values in maps[0].student] == [49, 16, 49]
    for each in maps:
        for values in (*each.teacher, *each.student):
            T = round(len(values) ** 0.5)
            sums = torch.tensor(values).view(T, T).sum(1)
            assert bool(((sums - 1000).abs() <= T).all()), "each row is a distribution"
    q = teacher.q[1, :4, 8:16]  # head 1 of the second sentence, without its padding
    expected = ((q @ q.T) / 8**0.5).softmax(-1) * 1000
    torch.testing.assert_close(
        torch.tensor(maps[0].teacher[1]).view(4, 4).float(), expected, atol=0.51, rtol=0
    )


def test_relations_that_are_not_finite() -> None:
    kl = {"qq": torch.tensor([0.2, torch.nan])}
    with pytest.raises(DataError, match="are not finite on these rows"):
        student_maps(kl, qkv(8, 1), qkv(8, 2), [7], {"qq": 1.0}, 3)


def test_a_single_head() -> None:
    kl = {"qq": torch.tensor([0.2])}
    [only] = student_maps(kl, qkv(8, 1), qkv(8, 2), [7], {"qq": 1.0}, 3).maps["qq"]
    assert (only.head, only.place) == (0, "number 1")
