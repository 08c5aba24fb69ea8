"""Read blocks of a data set from a folder or, through a local cache, from a URL.

Inputs: a folder or fsspec URL of shards. Outputs: numpy views of blocks, every byte checked. Not
handled here: the order of rows (`data.order`), tensors (`data.stream`).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from scaledistill.config.schema import NUM_LANES, WINDOW_ROWS
from scaledistill.data.ahead import FetchAhead
from scaledistill.data.blocks import block_span, decode_block
from scaledistill.data.manifest import Manifest
from scaledistill.data.order import SampleOrder
from scaledistill.errors import DataError, Field, SettingError
from scaledistill.storage import remote

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
"""Adjacent blocks are read together up to about this size; one by one they would wait for the disk
too often."""


class ShardReader:
    """Read blocks of a data set and check every byte against the manifest.

    `location`: a folder, or a URL whose shards are kept in `cache`. The presence and size of every
    shard are checked here (over HTTP: when the shard is read), unless `check_sizes` is off because
    another process does so. Errors name the host and `rank`, because nodes may see different disks.

    Raises: ConfigError for a URL that is not allowed; DataError for a bad manifest, a missing shard
    or a wrong size.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        cache: remote.ShardCache | None = None,
        rank: int | None = None,
        check_sizes: bool = True,
    ) -> None:
        self.location = str(location).rstrip("/")
        self.manifest = Manifest.load(self.location)
        self._rank = rank
        self._where = f"host {socket.gethostname()}" + ("" if rank is None else f", rank {rank}")
        self._cache = (cache or remote.ShardCache()) if remote.is_url(self.location) else None
        if self._cache is not None:
            self._cache.folder  # noqa: B018 - created now, so that a bad one fails before the run
        largest = (
            max(int(shard.block_rows.max()) for shard in self.manifest.shards)
            * self.manifest.row_bytes
        )
        self._block_starts = lru_cache(maxsize=1024)(self._starts_of)
        self._blocks_per_read = max(1, READ_BYTES // largest)
        if check_sizes:
            self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise DataError if a shard is missing or has a wrong size."""
        if self._cache is None:
            sizes = self._local_sizes()
        elif (listing := remote.sizes(self.location)) is not None:
            sizes = listing
        else:
            return
        for shard in self.manifest.shards:
            if shard.file not in sizes:
                raise DataError(self._message(f"{shard.file} is missing"))
            if sizes[shard.file] != shard.bytes:
                raise DataError(
                    self._message(
                        f"{shard.file} has {sizes[shard.file]} bytes, expected {shard.bytes}"
                    )
                )

    def _local_sizes(self) -> dict[str, int]:
        """Return the sizes of the shards that are there; other files may be of any kind."""
        shards = {shard.file for shard in self.manifest.shards}
        sizes = {}
        try:
            with os.scandir(self.location) as entries:
                for entry in entries:
                    if entry.name in shards:
                        with suppress(FileNotFoundError):  # a link to nothing
                            sizes[entry.name] = entry.stat().st_size
        except OSError as error:
            raise DataError(self._message(f"its files can't be listed: {error}")) from error
        return sizes

    def _message(self, problem: str) -> str:
        shown = remote.without_credentials(str(self.location))
        remedy = "nothing of it was used; copy it again and run `scaledistill shards check` on "
        remedy += f"{shown}" if self._cache is None else "the copy before you upload it"
        return f"shards {shown} ({self._where}): {problem}; {remedy}"

    def blocks_around(self, shard: int, row: int, low: int = 0, high: int | None = None) -> range:
        """Choose the blocks to read together for a row of a shard.

        They are its own block and neighbours that have rows in [low, high).
        """
        starts = self._block_starts(shard)
        group = (
            int(np.searchsorted(starts, row, side="right") - 1)
            // self._blocks_per_read
            * self._blocks_per_read
        )
        first = max(group, int(np.searchsorted(starts, low, side="right")) - 1)
        end = min(group + self._blocks_per_read, len(starts) - 1)
        return range(first, end if high is None else min(end, int(np.searchsorted(starts, high))))

    def read(self, shard: int, blocks: range) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Read adjacent blocks; return each one's first row, ids and documents.

        Ids are [rows, T] of u16 or u32, documents [n, 3] of uint16.

        Raises: DataError naming shard and block if one can't be read, is cut off or fails its
        crc32.
        """
        entry = self.manifest.shards[shard]
        spans = [block_span(self.manifest, entry, block) for block in blocks]
        start, end = spans[0][0], sum(spans[-1])
        try:
            descriptor = self._open(shard)
            try:
                data = memoryview(_read_fully(descriptor, end - start, start))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(
                self._message(f"{entry.file}, block {blocks[0]} can't be read: {error}")
            ) from error
        starts = self._block_starts(shard)
        try:
            return [
                (int(starts[block]), *decode_block(self.manifest, entry, block, data[at:][:size]))
                for block, (at, size) in zip(
                    blocks, ((first - start, size) for first, size in spans), strict=True
                )
            ]
        except DataError as error:
            kept = (
                f" (the cached copy {self._cache.path(entry.sha256)}: delete it)"
                if self._cache
                else ""
            )
            raise DataError(self._message(f"{error}{kept}")) from error

    def _starts_of(self, shard: int) -> np.ndarray:
        """Return each block's first row, and the end, int64.

        Computed only for the shards in use, of possibly thousands.
        """
        return np.concatenate(
            ([0], np.cumsum(self.manifest.shards[shard].block_rows, dtype=np.int64))
        )

    def _open(self, shard: int) -> int:
        entry = self.manifest.shards[shard]
        if self._cache is None:
            return os.open(f"{self.location}/{entry.file}", os.O_RDONLY)
        return self._cache.open(
            f"{self.location}/{entry.file}", num_bytes=entry.bytes, sha256=entry.sha256
        )

    def fetch_ahead(self, stop: threading.Event) -> FetchAhead | None:
        """Return a `FetchAhead` that works until `stop` is set; None for a local folder."""
        return None if self._cache is None else FetchAhead(self._fetch, stop)

    def keep(self, shards: Iterable[int]) -> None:
        """Tell the cache which shards are in use or will be, so that it evicts others first."""
        if self._cache:
            kept = (self.manifest.shards[shard].sha256 for shard in shards)
            self._cache.keep_for(id(self), kept)

    def _fetch(self, shard: int) -> None:
        entry = self.manifest.shards[shard]
        if self._cache:
            self._cache.fetch(
                f"{self.location}/{entry.file}", num_bytes=entry.bytes, sha256=entry.sha256
            )

    def order(
        self, *, seed: int, num_lanes: int = NUM_LANES, window_rows: int = WINDOW_ROWS
    ) -> SampleOrder:
        """Return the order of this data set's samples, identified by its manifest."""
        rows = [shard.rows for shard in self.manifest.shards]
        return SampleOrder(
            rows,
            seed=seed,
            num_lanes=num_lanes,
            window_rows=window_rows,
            identity=self.manifest.sha256,
        )

    def _bytes_at_once(self, num_shards: int) -> int:
        """Return the bytes of the `num_shards` largest shards, or of all if there are fewer."""
        return sum(
            sorted((shard.bytes for shard in self.manifest.shards), reverse=True)[:num_shards]
        )


def check_cache(readers: Sequence[ShardReader], num_lanes: int, *, warns: bool = False) -> None:
    """Check that the cache, which the readers share, holds what all their lanes read at once.

    Args:
        warns: log a warning, on rank 0, if it does not hold the next shards of all lanes too.

    Raises: ConfigError if it is too small.
    """
    remote_ones = [reader for reader in readers if reader._cache]
    if not remote_ones:
        return
    limit = min(reader._cache.limit_bytes for reader in remote_ones if reader._cache)
    needed = sum(reader._bytes_at_once(num_lanes) for reader in remote_ones)
    if needed > limit:
        raise SettingError(
            "limit_bytes",
            limit,
            (
                f"is less than the {needed} bytes of the shards that ",
                Field("num_lanes", num_lanes),
                " lanes read at the same time, so shards would be fetched again and again",
            ),
            "raise it",
        )
    needed = sum(reader._bytes_at_once(2 * num_lanes) for reader in remote_ones)
    if warns and needed > limit and not remote_ones[0]._rank:
        logger.warning(
            "data.cache_bytes=%d holds the shards that data.num_lanes=%d lanes read at the "
            "same time, but not the next ones too: some are fetched only when they are due, "
            "and steps wait for them; set it to %d or more",
            *(limit, num_lanes, needed),
        )


def _read_fully(descriptor: int, num_bytes: int, offset: int) -> bytes | bytearray:
    """Return `num_bytes` bytes of a file from `offset`, fewer only at the end of the file.

    A single read may return less: on FUSE and some network file systems, after a signal, or above 2
    GiB.
    """
    data: bytes | bytearray = os.pread(descriptor, num_bytes, offset)
    while len(data) < num_bytes and (
        more := os.pread(descriptor, num_bytes - len(data), offset + len(data))
    ):
        data = bytearray(data) if isinstance(data, bytes) else data
        data += more
    return data
