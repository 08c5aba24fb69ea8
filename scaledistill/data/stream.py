"""Turn rows of shards into micro-batches: `ShardStream` to train, `iter_validation` to validate.

Inputs: a `ShardReader` and the order of its samples. Outputs: `Batch`es, each with the data cursor
that a checkpoint stores. Not handled here: reading and checking blocks (`data.reader`).

Legend: B sequences of a micro-batch, T tokens, N rows, L lanes, P places of rows in memory, W bytes
for one bit per token of a row, S stretches. A stretch is a document or a run of padding before,
between or after documents; none crosses rows.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaledistill.data.ahead import FetchAhead
from scaledistill.data.blocks import count_tokens
from scaledistill.data.mixture import Order
from scaledistill.data.order import SampleOrder
from scaledistill.data.reader import ShardReader, check_cache
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError, Field, SettingError


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; fields on documents are None unless requested."""

    input_ids_BT: Tensor  # int64
    mask_BT: Tensor | None  # bool, True on real tokens; None when every token is real
    segment_ids_BT: Tensor | None  # int32, the document's number in its row, from 0; -1 on padding
    position_ids_BT: Tensor | None  # int64, from 0 in each document; 0 on padding
    # int32: where stretches begin in the B · T tokens, filled up with B · T to length 1 + 2^k.
    cu_seqlens: Tensor | None
    samples_B: np.ndarray  # int64 sample numbers; in validation, row numbers in file order
    cursor: int  # the first sample not used by a completed step, after this micro-batch
    weight: int  # rows that count: B, or 0 for a filler that only keeps the ranks in step

    @property
    def tokens(self) -> TokenInputs:
        """The tensors, as models and losses take them."""
        return TokenInputs(
            self.input_ids_BT,
            self.mask_BT,
            self.segment_ids_BT,
            self.position_ids_BT,
            self.cu_seqlens,
        )

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `change` applied to each of its tensors."""
        changed: dict[str, Any] = {
            key: change(value) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


@dataclass
class _Rows:
    """Rows as read from blocks."""

    ids_NT: np.ndarray  # u16 or u32
    padded_N: np.ndarray  # bool
    layout_N2W: np.ndarray  # see _layout

    @classmethod
    def empty(cls, num_rows: int, T: int, dtype: np.dtype[Any]) -> _Rows:
        """Return rows to be filled, with ids of a dtype."""
        return cls(
            np.empty((num_rows, T), dtype),
            np.empty(num_rows, bool),
            np.empty((num_rows, 2, -(-T // 8)), np.uint8),
        )

    def put(self, at: np.ndarray, rows: _Rows) -> None:
        """Copy rows to the places `at`."""
        self.ids_NT[at] = rows.ids_NT
        self.padded_N[at] = rows.padded_N
        self.layout_N2W[at] = rows.layout_N2W

    def batches(
        self, samples_N: np.ndarray, size: int, with_documents: bool, before: int, after: int
    ) -> Iterator[Batch]:
        """Yield micro-batches of `size` rows, views of one tensor.

        The last one has the cursor `after`, the others `before`: the cursor moves once per step.
        """
        ids_NT = torch.from_numpy(self.ids_NT.astype(np.int64))
        num_rows, T = ids_NT.shape
        for first in range(0, num_rows, size):
            part = slice(first, first + size)
            layout_B2W = self.layout_N2W[part]
            segment_ids_BT, position_ids_BT, cu_seqlens = (
                _documents(layout_B2W, T) if with_documents else (None, None, None)
            )
            yield Batch(
                input_ids_BT=ids_NT[part],
                mask_BT=torch.from_numpy(_bits(layout_B2W[:, 0], T))
                if self.padded_N[part].any()
                else None,
                segment_ids_BT=segment_ids_BT,
                position_ids_BT=position_ids_BT,
                cu_seqlens=cu_seqlens,
                samples_B=samples_N[part],
                cursor=after if first + size >= num_rows else before,
                weight=len(samples_N[part]),
            )


def _layout(documents: np.ndarray, num_rows: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows have padding, bool [N], and two bits per token, uint8 [N, 2, W].

    The first bit marks real tokens, the second the first token of each stretch. `documents`: [n, 3]
    of (row, start, end), as in a block.
    """
    first, start, end = documents.T.astype(np.int64)
    first *= T
    padded_N = count_tokens(documents, num_rows) < T
    layout_N2W = np.full((num_rows, 2, -(-T // 8)), 255, np.uint8)
    if padded_N.any():
        # +1 where a document starts and -1 where it ends: the running sum is 1 on real tokens.
        change = np.zeros(num_rows * T + 1, np.int8)
        change[first + start] += 1
        change[first + end] -= 1
        layout_N2W[:, 0] = np.packbits(
            change[:-1].cumsum(dtype=np.int8).reshape(num_rows, T), axis=1
        )
    begins = np.zeros(num_rows * T + 1, bool)
    begins[::T] = begins[first + start] = begins[first + end] = True
    layout_N2W[:, 1] = np.packbits(begins[:-1].reshape(num_rows, T), axis=1)
    return padded_N, layout_N2W


def _bits(packed_NW: np.ndarray, T: int) -> np.ndarray:
    return np.unpackbits(packed_NW, axis=1, count=T).view(bool)


def _documents(layout_B2W: np.ndarray, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's segment ids [B, T], position ids [B, T] and `cu_seqlens`."""
    B = len(layout_B2W)
    real = _bits(layout_B2W[:, 0], T).ravel()
    begin_S = np.flatnonzero(_bits(layout_B2W[:, 1], T))
    length_S = np.diff(begin_S, append=B * T)
    document_S = real[begin_S]
    before_S = document_S.cumsum() - document_S  # documents before this stretch, in all rows
    before_B = before_S[begin_S % T == 0]
    segment_S = np.where(document_S, before_S - before_B[begin_S // T], -1)
    segment_ids = np.repeat(segment_S.astype(np.int32), length_S)
    position_ids = np.arange(B * T)
    position_ids -= np.repeat(begin_S, length_S)
    if not document_S.all():
        position_ids *= real
    # Filled up to 1 + a power of 2, so that compiled blocks see few different shapes.
    cu_seqlens = np.full(1 + (1 << (len(begin_S) - 1).bit_length()), B * T, np.int32)
    cu_seqlens[: len(begin_S)] = begin_S
    return (
        torch.from_numpy(segment_ids).view(B, T),
        torch.from_numpy(position_ids).view(B, T),
        torch.from_numpy(cu_seqlens),
    )


class _Windows:
    """Each lane's current window of rows; a block is read when one of its rows is first needed."""

    def __init__(self, shards: ShardReader, order: SampleOrder, ahead: FetchAhead | None) -> None:
        self._shards, self._order, self._ahead = shards, order, ahead
        # By lane: the shards of its current window and the one after them.
        self._expected: dict[int, list[int]] = {}
        self._size = min(order.window_rows, order.rows_per_lane)
        # A place: lane × size + offset in the window, in file order.
        places = order.num_lanes * self._size
        self._ids_PT = np.empty(
            (places, shards.manifest.sequence_length), shards.manifest.ids_dtype
        )
        # The place of a row, indexed by lane × size + shuffled offset.
        self._place_P = np.empty(places, np.int32 if places < 2**31 else np.int64)
        self._loaded_P = np.zeros(places, bool)
        self._padded_P = np.zeros(places, bool)
        self._layout_P2W = np.empty((places, 2, -(-self._ids_PT.shape[1] // 8)), np.uint8)
        self._window_L = np.full(order.num_lanes, -1, np.int64)
        self._spans = [(0, 0, 0)] * order.num_lanes  # (epoch, first place in the epoch, rows)

    def gather(self, samples_N: np.ndarray) -> _Rows:
        """Return the rows of sample numbers that ascend in each lane, int64 [N]."""
        lane_N, window_N, offset_N = self._order.split(samples_N)
        N = len(samples_N)
        rows = _Rows.empty(N, self._ids_PT.shape[1], self._ids_PT.dtype)
        pending = np.arange(N)
        while len(pending):
            lanes, windows = lane_N[pending], window_N[pending]
            ready = self._window_L[lanes] == windows
            # The first pending sample of each lane gives the lane's next window.
            if not ready.all():
                for lane, at in zip(*np.unique(lanes, return_index=True), strict=True):
                    if self._window_L[lane] != windows[at]:
                        self._enter(int(lane), int(windows[at]))
                ready = self._window_L[lanes] == windows
            self._take(rows, pending[ready], lanes[ready] * self._size + offset_N[pending[ready]])
            pending = pending[~ready]
        return rows

    def _enter(self, lane: int, window: int) -> None:
        """Move a lane to a window and request the shards of it and of the next one."""
        epoch, first, offsets = self._order.window(lane, window)
        own = slice(lane * self._size, lane * self._size + len(offsets))
        self._place_P[own] = own.start + offsets
        self._loaded_P[own] = False
        self._window_L[lane], self._spans[lane] = window, (epoch, first, len(offsets))
        if self._ahead:
            due, following = self._order.shards_around(lane, epoch, first, len(offsets))
            self._expected[lane] = [*due, following]
            self._shards.keep(itertools.chain.from_iterable(self._expected.values()))
            self._ahead.request(due, [following])

    def _take(self, rows: _Rows, at: np.ndarray, shuffled: np.ndarray) -> None:
        """Copy rows from their places, loading the blocks that are missing."""
        places = self._place_P[shuffled]
        missing = places[~self._loaded_P[places]]
        while len(missing):
            self._load(int(missing[0]))
            missing = missing[~self._loaded_P[missing]]
        rows.ids_NT[at] = self._ids_PT[places]
        rows.padded_N[at] = self._padded_P[places]
        rows.layout_N2W[at] = self._layout_P2W[places]

    def _load(self, place: int) -> None:
        """Read the block of a place and some around it; keep their rows that are in the window."""
        lane, offset = divmod(place, self._size)
        epoch, first, length = self._spans[lane]
        shard, row = (int(value) for value in self._order.place(epoch, np.int64(first + offset)))
        # The window's first row, counted in this shard; negative if it began in the shard before.
        begin = row - offset
        blocks = self._shards.blocks_around(shard, row, begin, begin + length)
        if self._ahead:
            self._ahead.wait(shard)
        for block_row, ids_NT, documents in self._shards.read(shard, blocks):
            low, high = max(block_row, begin), min(block_row + len(ids_NT), begin + length)
            inside = slice(low - block_row, high - block_row)
            here = slice(place - row + low, place - row + high)
            padded_N, layout_N2W = _layout(documents, *ids_NT.shape)
            self._ids_PT[here] = ids_NT[inside]
            self._padded_P[here] = padded_N[inside]
            self._layout_P2W[here] = layout_N2W[inside]
            self._loaded_P[here] = True


class _Sources:
    """The windows of every source; for a single one, its own alone."""

    def __init__(
        self, readers: Sequence[ShardReader], order: Order, aheads: Sequence[FetchAhead | None]
    ) -> None:
        self._order = order
        self._windows = [
            _Windows(*each) for each in zip(readers, order.sources, aheads, strict=True)
        ]
        self._T = readers[0].manifest.sequence_length
        self._dtype = max((reader.manifest.ids_dtype for reader in readers), key=_itemsize)

    def gather(self, samples_N: np.ndarray) -> _Rows:
        """Return the rows of ascending sample numbers, int64 [N]."""
        source_N, number_N = self._order.divide(samples_N)
        if len(self._windows) == 1:
            return self._windows[0].gather(number_N)
        rows = _Rows.empty(len(samples_N), self._T, self._dtype)
        for source, windows in enumerate(self._windows):
            at = np.flatnonzero(source_N == source)
            rows.put(at, windows.gather(number_N[at]))
        return rows


def _itemsize(dtype: np.dtype[Any]) -> int:
    return dtype.itemsize


class ShardStream:
    """Iterate endlessly over one rank's micro-batches, read ahead by one thread.

    A context manager. `shards`: one reader for each source of the order, or the only one. If the
    shards are at a URL, further threads fetch each lane's next shard while the lane reads the
    current one.

    Step s uses samples [sB, (s+1)B) of the order. Rank r of W takes slots r::W of them and cuts
    them, in order, into micro-batches. So the global batches are the same for every W, and a resume
    at `first_sample`, the cursor of a step's last batch, is exact.

    Memory of a process, for each source: num_lanes × window_rows × T × 2¼ bytes (4¼ with u32 ids),
    which is 0.15 GB at the defaults with T = 128 and 0.60 GB with T = 512. It is less if an epoch
    is smaller, or if ranks share out the lanes (the number of ranks divides num_lanes, and
    num_lanes divides B).
    Bookkeeping adds 6 bytes per row. `next` re-raises what the thread raises, such as a DataError
    for a damaged block.

    Raises: SettingError if `global_batch_size` does not divide, or the cache is too small.
    """

    def __init__(
        self,
        shards: ShardReader | Sequence[ShardReader],
        order: Order,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        first_sample: int = 0,
        prefetch_batches: int = 4,
        with_documents: bool = False,
        device: torch.device | None = None,
    ) -> None:
        unit = world_size * micro_batch_size
        if unit < 1 or global_batch_size < 1 or global_batch_size % unit:
            raise SettingError(
                "global_batch_size",
                global_batch_size,
                (
                    f"is not a multiple of {world_size} ranks × ",
                    Field("micro_batch_size", micro_batch_size),
                ),
                f"use {global_batch_size // max(unit, 1) * unit + unit}",
            )
        if first_sample % global_batch_size or first_sample < 0:
            raise ConfigError(
                f"the data cursor {first_sample} is not a multiple of ",
                Field("global_batch_size", global_batch_size),
                "; resume with the batch size that the checkpoint was made with",
            )
        readers = [shards] if isinstance(shards, ShardReader) else list(shards)
        for reader, own in zip(readers, order.sources, strict=True):
            if own.num_rows != reader.manifest.rows:
                raise ValueError(
                    f"an order of {own.num_rows} rows for shards with {reader.manifest.rows}"
                )
        check_cache(readers, order.num_lanes, warns=True)
        self._stop = threading.Event()
        self._aheads = [reader.fetch_ahead(self._stop) for reader in readers]
        sources = _Sources(readers, order, self._aheads)

        def produce() -> Iterator[Batch]:
            for first in itertools.count(first_sample, global_batch_size):
                samples_N = np.arange(first + rank, first + global_batch_size, world_size)
                rows = sources.gather(samples_N)
                batches = rows.batches(
                    samples_N, micro_batch_size, with_documents, first, first + global_batch_size
                )
                yield from map(deliver, batches)

        deliver = _copies_to(device) if device and device.type == "cuda" else lambda batch: batch
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(max(1, prefetch_batches))
        self._thread = threading.Thread(
            target=_fill,
            args=(produce(), self._ready, self._stop),
            name="shard-stream",
            daemon=True,
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
        # Allocated on the copy stream: keep its memory until the current stream is done with it.
        if item.input_ids_BT.is_cuda:
            item.with_tensors(_keep_for_current_stream)
        return item

    def close(self) -> None:
        """End the threads."""
        self._stop.set()
        self._thread.join(timeout=10)  # a daemon: it may hang in a download
        for ahead in filter(None, self._aheads):
            ahead.close()

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _copies_to(device: torch.device) -> Callable[[Batch], Batch]:
    """Return a function that copies a batch to a GPU on a CUDA stream of its own.

    The reading thread calls it, so that copies overlap with the current step.
    """
    copies = torch.cuda.Stream(device)

    def copy(batch: Batch) -> Batch:
        # Set for this thread: leaving the stream context would otherwise open a context on GPU 0.
        torch.cuda.set_device(device)
        with torch.cuda.stream(copies):
            copied = batch.with_tensors(
                lambda tensor: tensor.pin_memory().to(device, non_blocking=True)
            )
        copies.synchronize()  # blocks the reading thread only
        return copied

    return copy


def _keep_for_current_stream(tensor: Tensor) -> Tensor:
    tensor.record_stream(torch.cuda.current_stream())
    return tensor


def _fill(
    batches: Iterator[Batch], ready: queue.Queue[Batch | BaseException], stop: threading.Event
) -> None:
    """Put batches, and at last an error, into the queue until `stop` is set."""

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    try:
        while not stop.is_set():
            put(next(batches))
    except BaseException as error:  # noqa: BLE001 - re-raised by ShardStream.__next__
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
    """Iterate once over the first `rows` rows in file order, equally many batches per rank.

    If there are fewer rows, all are used. The last batches may be smaller; a rank that has no rows
    left gets one row with weight 0. If a batch's loss is the mean over its rows, then Σ weight ×
    loss / Σ weight over batches and ranks is the mean over all rows for any world size.
    """
    total = min(rows, shards.manifest.rows)
    shard_ends = np.cumsum([shard.rows for shard in shards.manifest.shards])
    num_shards = int(np.searchsorted(shard_ends, total)) + 1  # the shards that are read
    ahead = shards.fetch_ahead(threading.Event())

    @lru_cache(maxsize=1)
    def read(shard: int, blocks: range) -> list[tuple[int, _Rows]]:
        if ahead:
            expected = range(shard, min(shard + 2, num_shards))
            shards.keep(expected)
            ahead.request(expected[:1], expected[1:])
            ahead.wait(shard)
        return [
            (first, _Rows(ids_NT, *_layout(documents, *ids_NT.shape)))
            for first, ids_NT, documents in shards.read(shard, blocks)
        ]

    def read_row(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard = int(np.searchsorted(shard_ends, number, side="right"))
        row = number - int(shard_ends[shard]) + shards.manifest.shards[shard].rows
        blocks = read(shard, shards.blocks_around(shard, row))
        first, block = blocks[bisect_right([first for first, _ in blocks], row) - 1]
        return block.ids_NT[row - first], block.padded_N[row - first], block.layout_N2W[row - first]

    try:
        for first in range(0, total, micro_batch_size * world_size):
            own = first + rank * micro_batch_size
            numbers_N = (
                np.arange(own, min(own + micro_batch_size, total))
                if own < total
                else np.array([first])
            )
            ids, padded, layout = zip(*(read_row(row) for row in numbers_N.tolist()), strict=True)
            found = _Rows(np.stack(ids), np.stack(padded), np.stack(layout))
            (batch,) = found.batches(numbers_N, len(numbers_N), with_documents, 0, 0)
            yield batch if own < total else replace(batch, weight=0)
    finally:
        if ahead:
            ahead.close()
        shards.keep(())
