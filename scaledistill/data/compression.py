"""Open a stored file: its bytes decompressed by suffix (.gz, .xz, .zst), what is read counted, a cut file an error."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

COMPRESSIONS = (".gz", ".xz", ".zst")
READ_BYTES = 1 << 20
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # what damaged files raise


@dataclass
class ReadProgress:
    """Bytes of the input files (as stored, compressed or not) read so far, for a display."""

    done_bytes: int = 0
    total_bytes: int = 0


class _CountedFile(io.FileIO):
    """A file that adds what is read to a `ReadProgress`."""

    def __init__(self, path: Path, progress: ReadProgress) -> None:
        super().__init__(path)
        self._progress = progress

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self._progress.done_bytes += count
        return count


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of zstd frames; unlike zstandard's reader it raises when the last frame is cut."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._stream.read(READ_BYTES // 8)
            if not self._compressed:
                if self._in_frame:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._in_frame = not self._frame.eof
            self._compressed = b"" if self._in_frame else self._frame.unused_data
            if not self._in_frame:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextlib.contextmanager
def open_stored(path: Path, progress: ReadProgress) -> Iterator[IO[bytes]]:
    """Open for reading, decompressed by suffix."""
    with (
        io.BufferedReader(_CountedFile(path, progress), READ_BYTES) as stored,
        _decompressed(stored, path.suffix.lower()) as stream,
    ):
        yield stream


def _decompressed(stored: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix in (".gz", ".tgz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stored))
    if suffix == ".xz":
        return lzma.LZMAFile(stored)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(stored), READ_BYTES)
    return stored


@contextlib.contextmanager
def seekable(path: Path, stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """The stream itself, or its decompressed copy on disk where going back would decompress again."""
    if path.suffix.lower() not in (*COMPRESSIONS, ".tgz"):
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        while piece := stream.read(READ_BYTES):
            copy.write(piece)
        copy.seek(0)
        yield copy
