from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaledistill.data import reader
from scaledistill.data.shards import ShardWriter
from scaledistill.data.stream import Batch, ShardReader, ShardStream, iter_validation
from scaledistill.errors import ConfigError, DataError

T = 8
ROWS = 500
B = 48
IDS_NT = np.arange(ROWS * T).reshape(ROWS, T)


def documents_of(row: int) -> list[tuple[int, int]]:
    """One or two documents; in every fiftieth row padding behind, in front and between, or nothing
    else.
    """
    if row % 50 == 3:
        return [[(0, 2), (2, 6)], [(1, 3), (4, 6)], [(5, 6)], []][row // 50 % 4]
    return [(0, 2), (2, T)] if row % 3 else [(0, T)]


def described(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Segment ids, position ids and the beginnings of stretches of rows, token by token."""
    segments = torch.full((len(rows), T), -1, dtype=torch.int32)
    positions = torch.zeros(len(rows), T, dtype=torch.int64)
    for place, row in enumerate(rows):
        for number, (start, end) in enumerate(documents_of(row)):
            segments[place, start:end] = number
            positions[place, start:end] = torch.arange(end - start)
    flat = segments.flatten().tolist()
    return (
        segments,
        positions,
        [at for at in range(len(flat)) if at % T == 0 or flat[at] != flat[at - 1]],
    )


def write(folder: Path, vocab_size: int = 5000) -> Path:
    documents = [(row, *span) for row in range(ROWS) for span in documents_of(row)]
    with ShardWriter(
        folder,
        sequence_length=T,
        vocab_size=vocab_size,
        tokenizer={"name": "test", "sha256": "0" * 64},
        pad_token_id=0,
        rows_per_block=10,
        rows_per_shard=80,
    ) as writer:
        writer.write(IDS_NT, np.array(documents))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "READ_BYTES", 3 * 10 * T * 2)  # three blocks at once


def take(
    shards: ShardReader,
    steps: int,
    *,
    seed: int = 5,
    num_lanes: int = 6,
    window_rows: int = 32,
    micro_batch_size: int = 1,
    world_size: int = 1,
    **settings: Any,
) -> list[Batch]:
    order = shards.order(seed=seed, num_lanes=num_lanes, window_rows=window_rows)
    sizes = {"global_batch_size": B, "micro_batch_size": micro_batch_size, "world_size": world_size}
    with ShardStream(shards, order, **sizes, **settings) as stream:
        return [next(stream) for _ in range(steps * B // (micro_batch_size * world_size))]


def rows_of(batches: list[Batch]) -> list[int]:
    """The row numbers in the data set, told by the ids, which must be whole."""
    ids_NT = torch.cat([batch.input_ids_BT for batch in batches]).numpy()
    rows = ids_NT[:, 0] // T
    np.testing.assert_array_equal(ids_NT, IDS_NT[rows])
    return rows.tolist()


def expected_rows(shards: ShardReader, first: int, count: int, **settings: int) -> list[int]:
    order = shards.order(**{"seed": 5, "num_lanes": 6, "window_rows": 32, **settings})
    shard_N, row_N = order.locate(np.arange(first, first + count))
    return (shard_N * 80 + row_N).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_global_batches_are_the_same_for_all_numbers_of_ranks(
    folder: Path, world_size: int
) -> None:
    steps = 25  # two epochs and a bit: 10.3 steps each
    share = B // world_size
    global_SB = np.empty((steps, B), np.int64)
    for rank in range(world_size):
        micro = 2 if share % 2 == 0 and rank % 2 else 1  # the micro-batch changes nothing either
        batches = take(
            ShardReader(folder), steps, rank=rank, world_size=world_size, micro_batch_size=micro
        )
        global_SB[:, rank::world_size] = np.reshape(rows_of(batches), (steps, share))
        samples_N = np.concatenate([batch.samples_B for batch in batches])
        np.testing.assert_array_equal(
            samples_N.reshape(steps, share),
            np.arange(steps * B).reshape(steps, B)[:, rank::world_size],
        )
    assert global_SB.ravel().tolist() == expected_rows(ShardReader(folder), 0, steps * B)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (5, 6)])
def test_resume_is_exact_at_every_step_of_an_epoch(
    folder: Path, rank: int, world_size: int
) -> None:
    shards = ShardReader(folder)
    ranks = {"rank": rank, "world_size": world_size, "micro_batch_size": 4}
    through = take(shards, 14, **ranks)
    per_step = len(through) // 14
    for step in range(12):
        cursor = through[step * per_step - 1].cursor if step else 0
        resumed = take(shards, 2, first_sample=cursor, **ranks)
        assert rows_of(resumed) == rows_of(through[step * per_step : (step + 2) * per_step])
        assert [batch.cursor for batch in resumed] == [
            batch.cursor for batch in through[step * per_step :][: len(resumed)]
        ]


def test_cursor_moves_on_with_the_last_micro_batch_of_a_step(folder: Path) -> None:
    batches = take(ShardReader(folder), 2, micro_batch_size=16, first_sample=10 * B)
    assert [batch.cursor for batch in batches] == [10 * B, 10 * B, 11 * B, 11 * B, 11 * B, 12 * B]
    assert {batch.weight for batch in batches} == {16}


def test_an_epoch_repeats_no_row(folder: Path) -> None:
    shards = ShardReader(folder)
    order = shards.order(seed=5, num_lanes=6, window_rows=32)
    assert (order.rows_per_epoch, order.dropped_rows_per_epoch) == (498, 2)
    rows = rows_of(take(shards, 21))
    assert len(set(rows[:498])) == len(set(rows[498:996])) == 498
    assert rows[:498] != rows[498:996]


@pytest.mark.parametrize(
    ("num_lanes", "window_rows"),
    [(1, 1), (1, 10_000), (5, 7), (32, 3), (48, 16_384), (100, 1), (250, 16_384), (500, 16_384)],
)
def test_any_lanes_and_windows(folder: Path, num_lanes: int, window_rows: int) -> None:
    shards = ShardReader(folder)
    settings = {"num_lanes": num_lanes, "window_rows": window_rows}
    assert rows_of(take(shards, 22, **settings)) == expected_rows(shards, 0, 22 * B, **settings)


def test_large_vocabularies(tmp_path: Path) -> None:
    shards = ShardReader(write(tmp_path, vocab_size=70_000))
    assert shards.manifest.dtype == "u32"
    assert rows_of(take(shards, 11)) == expected_rows(shards, 0, 11 * B)


def test_masks_and_documents(folder: Path) -> None:
    masked = 0
    lengths = set()
    for batch in take(ShardReader(folder), 11, micro_batch_size=12, with_documents=True):
        segments, positions, beginnings = described(rows_of([batch]))
        if batch.mask_BT is None:
            assert (segments >= 0).all()
        else:
            assert torch.equal(batch.mask_BT, segments >= 0)
            masked += 1
        assert batch.segment_ids_BT is not None
        assert batch.position_ids_BT is not None
        assert batch.cu_seqlens is not None
        assert torch.equal(batch.segment_ids_BT, segments)
        assert torch.equal(batch.position_ids_BT, positions)
        lengths.add(len(batch.cu_seqlens) - 1)
        found = batch.cu_seqlens.tolist()
        assert found == beginnings + [12 * T] * (len(found) - len(beginnings))
        kinds = (batch.segment_ids_BT.dtype, batch.position_ids_BT.dtype, batch.cu_seqlens.dtype)
        assert kinds == (torch.int32, torch.int64, torch.int32)
        assert batch.input_ids_BT.dtype == torch.int64
    assert lengths <= {16, 32}
    assert 5 <= masked <= 10
    plain = take(ShardReader(folder), 11, micro_batch_size=12)
    assert sum(batch.mask_BT is not None for batch in plain) == masked
    assert {(batch.segment_ids_BT, batch.position_ids_BT, batch.cu_seqlens) for batch in plain} == {
        (None, None, None)
    }


def test_with_tensors_changes_every_tensor_and_nothing_else(folder: Path) -> None:
    batch = take(ShardReader(folder), 1, micro_batch_size=B, with_documents=True)[0]
    assert batch.mask_BT is not None
    moved = batch.with_tensors(lambda tensor: tensor.to("meta"))
    tensors = {
        name
        for name, value in vars(moved).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    }
    assert tensors == {"input_ids_BT", "mask_BT", "segment_ids_BT", "position_ids_BT", "cu_seqlens"}
    assert moved.samples_B is batch.samples_B
    assert (moved.cursor, moved.weight) == (B, B)


@pytest.mark.parametrize(("rows", "micro_batch_size"), [(100, 8), (37, 5), (10_000, 32), (1, 4)])
def test_validation_does_not_depend_on_world_size(
    folder: Path, rows: int, micro_batch_size: int
) -> None:
    shards = ShardReader(folder)
    total = min(rows, ROWS)
    mean = IDS_NT[:total].mean(axis=1).mean()
    for world_size in (1, 2, 3, 8):
        settings: dict[str, Any] = {
            "rows": rows,
            "micro_batch_size": micro_batch_size,
            "world_size": world_size,
        }
        ranks = [list(iter_validation(shards, rank=rank, **settings)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert rows_of([batch for batch in batches if batch.weight]) == list(range(total))
        assert all(batch.weight in (0, len(batch.input_ids_BT)) for batch in batches)
        weighted = sum(batch.weight * batch.input_ids_BT.double().mean() for batch in batches)
        torch.testing.assert_close(
            weighted / sum(batch.weight for batch in batches), torch.tensor(mean).double()
        )


def test_validation_masks_and_documents(folder: Path) -> None:
    for number, batch in enumerate(
        iter_validation(ShardReader(folder), rows=210, micro_batch_size=5, with_documents=True)
    ):
        segments, positions, beginnings = described(list(range(5 * number, 5 * number + 5)))
        assert (batch.mask_BT is None) == bool((segments >= 0).all())
        assert batch.mask_BT is None or torch.equal(batch.mask_BT, segments >= 0)
        assert batch.segment_ids_BT is not None
        assert batch.position_ids_BT is not None
        assert batch.cu_seqlens is not None
        assert torch.equal(batch.segment_ids_BT, segments)
        assert torch.equal(batch.position_ids_BT, positions)
        assert batch.cu_seqlens[: len(beginnings)].tolist() == beginnings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"micro_batch_size": 5},
            "global_batch_size=48 is not a multiple of 1 ranks × micro_batch_size=5; use 50",
        ),
        ({"world_size": 5}, "global_batch_size=48 is not a multiple of 5 ranks"),
        ({"first_sample": 50}, "data cursor 50 is not a multiple of global_batch_size=48"),
    ],
)
def test_bad_settings(folder: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take(ShardReader(folder), 1, **settings)


def test_order_of_other_shards(folder: Path) -> None:
    shards = ShardReader(folder)
    other = reader.SampleOrder([400], seed=0)
    with pytest.raises(ValueError, match="an order of 400 rows for shards with 500"):
        ShardStream(shards, other, global_batch_size=8, micro_batch_size=8)


def test_reads_that_come_short_are_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FUSE, some network file systems and reads above 2 GiB do."""
    shards, pread = ShardReader(folder), os.pread
    monkeypatch.setattr(
        os, "pread", lambda descriptor, size, at: pread(descriptor, -(-size // 3), at)
    )
    assert rows_of(take(shards, 11)) == expected_rows(shards, 0, 11 * B)


def test_closing_ends_the_thread(folder: Path) -> None:
    before = threading.active_count()
    shards = ShardReader(folder)
    order = shards.order(seed=0, num_lanes=4)
    stream = ShardStream(shards, order, global_batch_size=8, micro_batch_size=8)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    forgotten = ShardStream(shards, order, global_batch_size=8, micro_batch_size=8)
    next(forgotten)
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


BROKEN_AT_OPEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), r"\(host .*, rank 3\): shard-000004.tar is missing"),
    "truncated": (lambda path: os.truncate(path, 512), "shard-000004.tar has 512 bytes, expected"),
    "zero bytes": (lambda path: os.truncate(path, 0), "shard-000004.tar has 0 bytes"),
    "not a tar": (lambda path: path.write_text("text"), "shard-000004.tar has 4 bytes"),
}


@pytest.mark.parametrize("case", BROKEN_AT_OPEN)
def test_broken_shards_are_found_at_open(tmp_path: Path, case: str) -> None:
    damage, message = BROKEN_AT_OPEN[case]
    damage(write(tmp_path) / "shard-000004.tar")
    with pytest.raises(DataError, match=message + ".*run `scaledistill shards check` on"):
        ShardReader(tmp_path, rank=3)


BROKEN_LATER: dict[str, tuple[Callable[[Path, Any], object], str]] = {
    "ids": (
        lambda path, shard: flip(path, shard.ids_offset[6] + 9),
        "block 6: its token ids are damaged",
    ),
    "documents": (
        lambda path, shard: flip(path, shard.documents_offset[6]),
        "block 6: its document boundaries are damaged",
    ),
    "truncated": (
        lambda path, shard: os.truncate(path, shard.ids_offset[6]),
        "block 6: the file ends early",
    ),
    "not a tar": (
        lambda path, shard: path.write_bytes(b"x" * shard.bytes),
        "block [0-7]: its token ids are damaged",
    ),
    "missing": (lambda path, _: path.unlink(), "block [0-7] can't be read"),
    "copy": (
        lambda path, _: path.write_bytes(path.with_name("shard-000000.tar").read_bytes()),
        "token ids are damaged",
    ),
}


@pytest.mark.parametrize("case", BROKEN_LATER)
def test_blocks_that_break_during_the_run_are_found_and_not_handed_out(
    tmp_path: Path, case: str
) -> None:
    shards = ShardReader(write(tmp_path), rank=1)
    damage, message = BROKEN_LATER[case]
    damage(tmp_path / "shard-000002.tar", shards.manifest.shards[2])
    bad = range(160, 240) if "0-7" in message or case == "copy" else range(220, 230)
    order = shards.order(seed=5, num_lanes=1, window_rows=64)
    seen: list[Batch] = []
    with ShardStream(shards, order, global_batch_size=8, micro_batch_size=8) as stream:
        wanted = rf"rank 1\): shard-000002.tar, .*{message}.*nothing of it was used; copy it again"
        with pytest.raises(DataError, match=wanted):
            seen.extend(islice(stream, ROWS // 8))
    assert not set(rows_of(seen)) & set(bad)


def test_a_rank_that_leaves_the_look_at_the_files_to_another(
    tiny_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_shards / "train", tmp_path / "train")
    (tmp_path / "train" / "shard-000000.tar").unlink()
    reader = ShardReader(tmp_path / "train", check_sizes=False)
    with pytest.raises(DataError, match=r"shard-000000\.tar, block 0 can't be read"):
        reader.read(0, range(1))
