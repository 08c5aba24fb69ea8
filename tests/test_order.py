from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from scaledistill.data.order import SampleOrder
from scaledistill.data.stream import ShardReader, ShardStream
from scaledistill.errors import ConfigError

SHAPES = [
    ([100, 37, 64, 11], 4, 7),
    ([5], 5, 16_384),
    ([1000] * 7, 32, 10),
    ([3] * 50, 7, 1),
    ([300, 400], 3, 1000),
    ([64] * 4, 32, 3),
    ([1] * 40, 8, 5),
]


def epoch_rows(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    samples_N = np.arange(epoch * order.rows_per_epoch, (epoch + 1) * order.rows_per_epoch)
    return list(zip(*(values.tolist() for values in order.locate(samples_N)), strict=True))


@pytest.mark.parametrize(("shard_rows", "num_lanes", "window_rows"), SHAPES)
def test_no_row_repeats_in_an_epoch_and_dropped_rows_are_counted(
    shard_rows: list[int], num_lanes: int, window_rows: int
) -> None:
    order = SampleOrder(shard_rows, seed=3, num_lanes=num_lanes, window_rows=window_rows)
    everything = {(shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows)}
    for epoch in range(3):
        rows = epoch_rows(order, epoch)
        assert len(set(rows)) == len(rows)
        assert len(everything - set(rows)) == order.dropped_rows_per_epoch < num_lanes
        assert set(rows) <= everything


def test_order_is_pinned() -> None:
    """A change of these values breaks every checkpoint: raise ORDER_VERSION with it."""
    order = SampleOrder([30, 20, 50], seed=7, num_lanes=4, window_rows=8)
    shard_N, row_N = order.locate(np.array([0, 1, 2, 3, 4, 99, 100, 12_345]))
    assert list(zip(shard_N.tolist(), row_N.tolist(), strict=True)) == [
        (1, 1),
        (2, 5),
        (2, 33),
        (0, 7),
        (1, 0),
        (0, 29),
        (2, 1),
        (2, 34),
    ]
    assert SampleOrder([300] * 9, seed=2**63 - 1).locate(np.array([10**12])) == (0, 75)


def test_random_access_equals_reading_in_order() -> None:
    order = SampleOrder([40, 60, 33], seed=1, num_lanes=4, window_rows=6)
    samples_N = np.arange(5 * order.rows_per_epoch)
    shard_N, row_N = order.locate(samples_N)
    shuffled_N = np.random.default_rng(0).permutation(samples_N)
    np.testing.assert_array_equal(
        order.locate(shuffled_N), (shard_N[shuffled_N], row_N[shuffled_N])
    )


def test_epochs_and_seeds_differ() -> None:
    orders = [SampleOrder([50, 50], seed=seed, num_lanes=2, window_rows=25) for seed in (0, 0, 1)]
    assert epoch_rows(orders[0], 0) == epoch_rows(orders[1], 0)
    assert epoch_rows(orders[0], 0) != epoch_rows(orders[2], 0)
    assert epoch_rows(orders[0], 0) != epoch_rows(orders[0], 1)


def test_a_lane_reads_one_window_of_consecutive_places_at_a_time() -> None:
    order = SampleOrder([500], seed=0, num_lanes=4, window_rows=16)
    _, row_N = order.locate(np.arange(order.rows_per_epoch))
    for lane in range(4):
        rows = row_N[lane::4]
        assert (rows // 125 == lane).all()
        # The first window has (lane + 1) / 4 of 16 rows.
        ends = [0, *range(4 * (lane + 1), 125, 16), 125]
        for first, end in pairwise(ends):
            assert sorted(rows[first:end]) == list(range(lane * 125 + first, lane * 125 + end))


def test_windows_begin_at_different_steps() -> None:
    order = SampleOrder([32_000], seed=0, num_lanes=32, window_rows=64)
    samples_N = np.arange(order.rows_per_epoch)
    _, window_N, _ = order.split(samples_N)
    changes_SL = np.diff(window_N.reshape(-1, 32), axis=0) != 0
    assert changes_SL.sum(axis=1).max() <= 1


def test_every_window_has_a_permutation_of_its_own() -> None:
    order = SampleOrder([10_000], seed=0, num_lanes=10, window_rows=100)
    seen = {
        order.window(lane, epoch * order.windows_per_lane + number)[2].tobytes()
        for lane in range(10)
        for epoch in range(3)
        for number in range(1, 10)
    }
    assert len(seen) == 10 * 3 * 9


def test_order_mixes_about_as_well_as_uniform_sampling() -> None:
    """Batches of 256 out of 64 shards: the number of distinct shards in a batch, against drawing
    rows uniformly.
    """
    order = SampleOrder([4096] * 64, seed=0)
    shard_N, _ = order.locate(np.arange(256 * 200))
    ours = np.mean([len(set(batch)) for batch in shard_N.reshape(-1, 256).tolist()])
    uniform = 64 * (1 - (63 / 64) ** 256)
    assert ours > 0.98 * uniform


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seed": -1}, ConfigError, "^seed=-1; expected 0 to 2"),
        ({"seed": 2**63}, ConfigError, "^seed=9223372036854775808"),
        ({"seed": 0, "num_lanes": 0}, ConfigError, "^num_lanes=0"),
        ({"seed": 0, "window_rows": 0}, ConfigError, "window_rows=0; expected at least 1"),
        (
            {"seed": 0, "num_lanes": 11},
            ConfigError,
            "num_lanes=11 is more than the 10 rows of the data; use at most 10, or add data",
        ),
    ],
)
def test_bad_settings(settings: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SampleOrder([4, 6], **settings)


def test_fingerprint_tells_orders_apart() -> None:
    base: dict[str, int] = {"seed": 0, "num_lanes": 2, "window_rows": 4}
    orders = [
        SampleOrder([8, 8], **base),
        *(SampleOrder([8, 8], **{**base, key: value + 1}) for key, value in base.items()),
        SampleOrder([8, 9], **base),
        SampleOrder([8, 8], identity="other", **base),
    ]
    fingerprints = [tuple(order.fingerprint().items()) for order in orders]
    assert len(set(fingerprints)) == len(orders)
    assert SampleOrder([8, 8], **base).fingerprint() == orders[0].fingerprint()
    assert orders[0].fingerprint()["order_version"] == 1


def test_1024_ranks_take_the_batches_of_one() -> None:
    """100 steps over several epochs, each rank asking for its own slots alone, as on a machine of
    its own.
    """
    B, W, steps = 2048, 1024, 100
    shard_rows = [501, 733, 640] * 20
    order = SampleOrder(shard_rows, seed=5, num_lanes=32, window_rows=512)
    assert steps * B > 5 * order.rows_per_epoch
    one_SB = np.stack(order.locate(np.arange(steps * B))).reshape(2, steps, B)
    for rank in range(W):
        slots_SK = np.arange(steps)[:, None] * B + np.arange(rank, B, W)
        own_SK = np.stack(order.locate(slots_SK.ravel())).reshape(2, *slots_SK.shape)
        np.testing.assert_array_equal(own_SK, one_SB[:, :, rank::W])
    slots = np.concatenate([np.arange(rank, B, W) for rank in range(W)])
    assert sorted(slots.tolist()) == list(range(B))


@pytest.mark.parametrize("rank", [0, 1, 511, 1023])
def test_a_stream_of_1024_ranks_has_the_slots_of_its_rank(rank: int, tiny_shards: Path) -> None:
    B, W, steps = 2048, 1024, 3
    reader = ShardReader(tiny_shards / "train")
    order = reader.order(seed=2, num_lanes=4, window_rows=32)

    def batches(own: int, world_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        micro = B // world_size
        with ShardStream(
            reader,
            order,
            global_batch_size=B,
            micro_batch_size=micro,
            rank=own,
            world_size=world_size,
        ) as stream:
            return [
                (batch.samples_B, batch.input_ids_BT.numpy()) for batch in islice(stream, steps)
            ]

    for (own_N, own_ids), (all_N, all_ids) in zip(batches(rank, W), batches(0, 1), strict=True):
        np.testing.assert_array_equal(own_N, all_N[rank::W])
        np.testing.assert_array_equal(own_ids, all_ids[rank::W])


@pytest.mark.parametrize(("shard_rows", "num_lanes", "window_rows"), SHAPES)
def test_the_shards_of_a_window_and_the_next_are_those_that_are_read(
    shard_rows: list[int], num_lanes: int, window_rows: int
) -> None:
    order = SampleOrder(shard_rows, seed=3, num_lanes=num_lanes, window_rows=window_rows)
    for lane in range(num_lanes):
        # In the order of the places: what a lane reads, over two epochs and a bit.
        places = [
            (epoch, place)
            for epoch in range(3)
            for place in range(lane * order.rows_per_lane, (lane + 1) * order.rows_per_lane)
        ]
        read = [int(order.place(epoch, np.int64(place))[0]) for epoch, place in places]
        samples_N = np.arange(lane, 2 * order.rows_per_epoch, num_lanes)
        for window in np.unique(order.split(samples_N)[1]).tolist():
            epoch, first, offsets = order.window(lane, window)
            at = places.index((epoch, first))
            end = at + len(offsets)
            due, following = order.shards_around(lane, epoch, first, len(offsets))
            assert list(dict.fromkeys(read[at:end])) == due
            last = read[end - 1]
            rest = [
                place
                for place in range(end, len(places))
                if read[place] != last or places[place][0] != epoch
            ]
            assert read[rest[0]] == following
