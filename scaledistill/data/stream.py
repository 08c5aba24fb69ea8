"""Rows of shards as micro-batches: `ShardStream` for training, `iter_validation` in file order.

Enters: a `ShardReader` and the order of its samples. Leaves: `Batch`es with the cursor of a checkpoint.
Left to others: reading and checking blocks (`data.reader`), moving tensors to a device.

Legend: B sequences of a micro-batch, T tokens, N rows, L lanes, P places of rows in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from scaledistill.data.manifest import count_tokens
from scaledistill.data.order import SampleOrder
from scaledistill.data.reader import ShardReader
from scaledistill.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids_BT: Tensor  # int64
    mask_BT: Tensor | None  # bool, True on real tokens; None when every token is real
    samples_B: np.ndarray  # int64 sample numbers; in validation, row numbers in file order
    documents: np.ndarray | None  # int64 [n, 3]: row of this batch, start, end; None unless asked for
    cursor: int  # the first sample that no completed step has used, once this micro-batch is done
    weight: int  # rows that count: B, or 0 for a filler that only keeps ranks in step


@dataclass
class _Rows:
    """Rows as they were read; `documents` has the (start, end) pairs of rows with padding, or of all rows on demand."""

    ids_NT: np.ndarray  # u16 or u32
    padded_N: np.ndarray  # bool
    documents: dict[int, np.ndarray]

    def batches(
        self, samples_N: np.ndarray, size: int, with_documents: bool, before: int, after: int
    ) -> Iterator[Batch]:
        """Cut into micro-batches, views of one tensor, with the cursor `after` on the last and `before` on the rest."""
        ids_NT = torch.from_numpy(self.ids_NT.astype(np.int64))
        num_rows = len(ids_NT)
        for first in range(0, num_rows, size):
            part = slice(first, first + size)
            yield Batch(
                input_ids_BT=ids_NT[part],
                mask_BT=self._mask(part) if self.padded_N[part].any() else None,
                samples_B=samples_N[part],
                documents=self._triples(part) if with_documents else None,
                cursor=after if first + size >= num_rows else before,
                weight=len(samples_N[part]),
            )

    def _mask(self, part: slice) -> Tensor:
        mask_BT = torch.ones(self.ids_NT[part].shape, dtype=torch.bool)
        for row in np.flatnonzero(self.padded_N[part]).tolist():
            mask_BT[row] = False
            for start, end in self.documents[part.start + row].tolist():
                mask_BT[row, start:end] = True
        return mask_BT

    def _triples(self, part: slice) -> np.ndarray:
        pairs = [self.documents[row] for row in range(len(self.ids_NT))[part]]
        row = np.repeat(np.arange(len(pairs)), [len(pair) for pair in pairs])
        return np.column_stack([row, np.concatenate(pairs).astype(np.int64)])


class _Windows:
    """Each lane's current window of rows, in one array; read block by block when its rows are first needed."""

    def __init__(self, shards: ShardReader, order: SampleOrder) -> None:
        self._shards, self._order = shards, order
        self._size = min(order.window_rows, order.rows_per_lane)
        places = order.num_lanes * self._size  # a place: lane × size + offset in the window, in file order
        self._ids_PT = np.empty((places, shards.manifest.sequence_length), shards.manifest.ids_dtype)
        self._place_P = np.empty(places, np.int32 if places < 2**31 else np.int64)  # by lane × size + shuffled offset
        self._loaded_P = np.zeros(places, bool)
        self._padded_P = np.zeros(places, bool)
        self._documents_P3 = np.empty((places, 3), np.int32)  # (number in the lane's list below, first, end)
        self._documents: list[list[np.ndarray]] = [[] for _ in range(order.num_lanes)]
        self._window_L = np.full(order.num_lanes, -1, np.int64)
        self._spans = [(0, 0, 0)] * order.num_lanes  # (epoch, first place in the epoch, rows)

    def gather(self, samples_N: np.ndarray, with_documents: bool) -> _Rows:
        """Read ascending samples, int64 [N]."""
        lane_N, window_N, offset_N = self._order.split(samples_N)
        rows = _Rows(
            np.empty((len(samples_N), self._ids_PT.shape[1]), self._ids_PT.dtype), np.zeros(len(samples_N), bool), {}
        )
        pending = np.arange(len(samples_N))
        while len(pending):
            lanes, windows = lane_N[pending], window_N[pending]
            ready = self._window_L[lanes] == windows
            if not ready.all():  # samples ascend: the first pending one of each lane tells its next window
                for lane, at in zip(*np.unique(lanes, return_index=True), strict=True):
                    if self._window_L[lane] != windows[at]:
                        self._enter(int(lane), int(windows[at]))
                ready = self._window_L[lanes] == windows
            self._take(rows, pending[ready], lanes[ready], offset_N[pending[ready]], with_documents)
            pending = pending[~ready]
        return rows

    def _enter(self, lane: int, window: int) -> None:
        epoch, first, offsets = self._order.window(lane, window)
        own = slice(lane * self._size, lane * self._size + len(offsets))
        self._place_P[own] = own.start + offsets
        self._loaded_P[own] = False
        self._documents[lane] = []
        self._window_L[lane], self._spans[lane] = window, (epoch, first, len(offsets))

    def _take(self, rows: _Rows, at: np.ndarray, lanes: np.ndarray, offsets: np.ndarray, with_documents: bool) -> None:
        places = self._place_P[lanes * self._size + offsets]
        missing = places[~self._loaded_P[places]]
        while len(missing):
            self._load(int(missing[0]))
            missing = missing[~self._loaded_P[missing]]
        rows.ids_NT[at] = self._ids_PT[places]
        rows.padded_N[at] = padded = self._padded_P[places]
        for i in range(len(at)) if with_documents else np.flatnonzero(padded):
            number, first, end = self._documents_P3[places[i]]
            rows.documents[int(at[i])] = self._documents[lanes[i]][number][first:end]

    def _load(self, place: int) -> None:
        """Read the block of one place and some around it; keep those of their rows that lie in the window."""
        lane, offset = divmod(place, self._size)
        epoch, first, length = self._spans[lane]
        shard, row = (int(value) for value in self._order.place(epoch, np.int64(first + offset)))
        begin = row - offset  # of the window, in rows of this shard: negative where it began in the shard before
        blocks = self._shards.blocks_around(shard, row, begin, begin + length)
        for block_row, ids_NT, documents in self._shards.read(shard, blocks):
            low, high = max(block_row, begin), min(block_row + len(ids_NT), begin + length)
            inside = slice(low - block_row, high - block_row)
            here = slice(place - row + low, place - row + high)
            bounds = np.searchsorted(documents[:, 0], np.arange(inside.start, inside.stop + 1))
            self._ids_PT[here] = ids_NT[inside]
            self._padded_P[here] = count_tokens(documents, len(ids_NT))[inside] < ids_NT.shape[1]
            self._documents_P3[here, 0] = len(self._documents[lane])
            self._documents_P3[here, 1], self._documents_P3[here, 2] = bounds[:-1], bounds[1:]
            self._documents[lane].append(documents[:, 1:].copy())
            self._loaded_P[here] = True


class ShardStream:
    """Iterate over one rank's micro-batches without end, read ahead by one thread; a context manager.

    Step s uses samples [sB, (s+1)B) of the order; rank r of W takes slots r::W of them, cut in order into
    micro-batches: the same global batches for every W, and an exact resume at `first_sample`, the cursor of the last
    batch of a step. Memory of a process: num_lanes × window_rows × T × 2 bytes (4 with u32 ids), which is 0.13 GB at
    the defaults with T = 128 and 0.54 GB with T = 512; less where an epoch is smaller or ranks share out the lanes (the
    number of ranks divides num_lanes, and num_lanes divides B). Bookkeeping and documents add 20 to 40 bytes a row.
    What the thread raises, DataError for a damaged block above all, is raised again by `next`.

    Raises: ConfigError naming train.global_batch_size where it does not divide, data.cache_bytes where it is too small.
    """

    def __init__(
        self,
        shards: ShardReader,
        order: SampleOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        first_sample: int = 0,
        prefetch_batches: int = 4,
        with_documents: bool = False,
        pin_memory: bool = False,
    ) -> None:
        unit = world_size * micro_batch_size
        if unit < 1 or global_batch_size < 1 or global_batch_size % unit:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is not a multiple of {world_size} ranks × "
                f"train.micro_batch_size={micro_batch_size}; use {global_batch_size // max(unit, 1) * unit + unit}"
            )
        if first_sample % global_batch_size or first_sample < 0:
            raise ConfigError(
                f"the data cursor {first_sample} is not a multiple of train.global_batch_size={global_batch_size}; "
                "resume with the batch size that the checkpoint was made with"
            )
        if order.num_rows != shards.manifest.rows:
            raise ValueError(f"an order of {order.num_rows} rows for shards with {shards.manifest.rows}")
        shards.check_cache(order.num_lanes)
        windows = _Windows(shards, order)

        def produce() -> Iterator[Batch]:
            for first in itertools.count(first_sample, global_batch_size):
                samples_N = np.arange(first + rank, first + global_batch_size, world_size)
                rows = windows.gather(samples_N, with_documents)
                batches = rows.batches(samples_N, micro_batch_size, with_documents, first, first + global_batch_size)
                yield from map(_pinned, batches) if pin_memory else batches

        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(max(1, prefetch_batches))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(produce(), self._ready, self._stop), name="shard-stream", daemon=True
        )
        weakref.finalize(self, self._stop.set)  # the thread holds no reference to self
        self._thread.start()

    def __iter__(self) -> ShardStream:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("this ShardStream is closed")
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """End the reading thread."""
        self._stop.set()
        self._thread.join(timeout=10)  # a daemon: it may hang in a download

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pinned(batch: Batch) -> Batch:
    """Move a batch to memory that a GPU copies from on its own."""
    mask_BT = None if batch.mask_BT is None else batch.mask_BT.pin_memory()
    return replace(batch, input_ids_BT=batch.input_ids_BT.pin_memory(), mask_BT=mask_BT)


def _fill(batches: Iterator[Batch], ready: queue.Queue[Batch | BaseException], stop: threading.Event) -> None:
    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    try:
        while not stop.is_set():
            put(next(batches))
    except BaseException as error:  # noqa: BLE001 - raised again where the batches are used
        put(error)


def iter_validation(
    shards: ShardReader,
    *,
    rows: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    with_documents: bool = False,
) -> Iterator[Batch]:
    """Iterate once over the first `rows` rows (all, if there are fewer) in file order, as many batches on every rank.

    The last batches may be smaller; a rank without rows left gets one row with weight 0. With each batch's loss a mean
    over its rows, Σ weight × loss / Σ weight over batches and ranks is the mean over rows, whatever the world size.
    """
    total = min(rows, shards.manifest.rows)
    read = lru_cache(maxsize=1)(shards.read)
    shard_ends = np.cumsum([shard.rows for shard in shards.manifest.shards])

    def read_row(number: int) -> tuple[np.ndarray, np.ndarray]:
        shard = int(np.searchsorted(shard_ends, number, side="right"))
        row = number - int(shard_ends[shard]) + shards.manifest.shards[shard].rows
        blocks = read(shard, shards.blocks_around(shard, row))
        first, ids_NT, documents = blocks[bisect_right([first for first, _, _ in blocks], row) - 1]
        return ids_NT[row - first], documents[documents[:, 0] == row - first, 1:]

    for first in range(0, total, micro_batch_size * world_size):
        own = first + rank * micro_batch_size
        numbers_N = np.arange(own, min(own + micro_batch_size, total)) if own < total else np.array([first])
        ids, pairs = zip(*(read_row(row) for row in numbers_N.tolist()), strict=True)
        ids_NT = np.stack(ids)
        padded_N = np.array([np.diff(pair.astype(np.int64)).sum() < ids_NT.shape[1] for pair in pairs])
        (batch,) = _Rows(ids_NT, padded_N, dict(enumerate(pairs))).batches(
            numbers_N, len(numbers_N), with_documents, 0, 0
        )
        yield batch if own < total else replace(batch, weight=0)
