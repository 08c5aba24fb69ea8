"""Open a stored file, decompress it by suffix (.gz, .xz, .zst, .bz2) and count what is read.

Inputs: a path. Outputs: every byte that the file holds, or an error. A file may hold several
streams (gzip calls them members, zstd frames), with padding between them if the format allows it,
and nothing else. The readers of the standard library and of zstandard silently ignore some of what
may follow the first stream. Not handled here: the meaning of the bytes (`data.prepare.sources`).
"""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import zstandard

from scaledistill.data.prepare.content import content_of
from scaledistill.errors import DataError

READ_BYTES = 1 << 20
LARGEST_WINDOW_BYTES = 1 << 31
"""The limit of zstd itself, reached with `zstd --long=31`."""

_OUTPUT_BYTES = 1 << 20  # decompressed at a time: a few bytes may expand to gigabytes
# Input given to zstd at a time, for the same reason: its output cannot be limited.
_ZSTD_PIECE_BYTES = 1 << 13


class StoredError(Exception):
    """Compressed data cannot be read.

    The message continues a sentence that begins with the file's name: "is damaged …".
    """


def _damaged(reason: str) -> StoredError:
    return StoredError(f"is damaged or cut short: {reason}; fetch or compress it again")


@dataclass
class ReadProgress:
    """Bytes of the input files read so far, as stored, compressed or not; for a display."""

    done_bytes: int = 0
    total_bytes: int = 0


class _CountedFile(io.FileIO):
    """A file whose position counts towards a `ReadProgress`."""

    def __init__(self, path: Path, progress: ReadProgress) -> None:
        super().__init__(path)
        self._progress = progress

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self._progress.done_bytes += count
        return count

    def seek(self, offset: int, whence: int = 0, /) -> int:
        before = self.tell()
        after = super().seek(offset, whence)
        self._progress.done_bytes += after - before
        return after


# --- one stream ---


class _Decompressor(Protocol):
    """The decompressor of one stream; the interface of `lzma.LZMADecompressor`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipMember:
    """zlib's decompressor with the buffering that the other decompressors do themselves."""

    def __init__(self) -> None:
        # 16: expect gzip's header and checksum.
        self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        output = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        self.needs_input = len(output) < max_length and not self._inflate.unconsumed_tail
        return output


class _ZstdFrame:
    """zstandard's decompressor, fed in small pieces because it returns all output at once."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(
            max_window_size=LARGEST_WINDOW_BYTES
        ).decompressobj()
        self._left = b""
        self._header = b""

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def needs_input(self) -> bool:
        return not self._left

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + self._left

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._header = (self._header + data)[:18]  # the longest header
        data = self._left + data
        data, self._left = data[:_ZSTD_PIECE_BYTES], data[_ZSTD_PIECE_BYTES:]
        try:
            return self._frame.decompress(data)
        except zstandard.ZstdError as error:
            if "memory" not in str(error):
                raise
            window_bytes = _zstd_window_bytes(self._header)
            limit = (
                "more than zstd reads"
                if window_bytes > LARGEST_WINDOW_BYTES
                else "more than memory holds"
            )
            raise StoredError(
                f"cannot be decompressed: a zstd window of {window_bytes >> 20:,} MiB is {limit}; "
                "unpack it elsewhere and compress it with "
                f"--long={25 if limit.endswith('holds') else 31} or less"
            ) from error


def _zstd_window_bytes(header: bytes) -> int:
    """Return the window size of a frame (RFC 8878, section 3.1.1.1).

    zstandard reports it only for frames that it can read.
    """
    descriptor = header[4]
    if not descriptor & 0x20:
        exponent, mantissa = header[5] >> 3, header[5] & 7
        return (8 + mantissa) << (10 + exponent) >> 3
    # A single-segment frame has no window field: its window is the content size, which follows the
    # dictionary id.
    first = 5 + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(header[first : first + (1, 2, 4, 8)[descriptor >> 6]], "little")


# --- all streams of a file ---


@dataclass(frozen=True)
class _Format:
    name: str
    stream: str
    """The format's name for one stream."""
    magics: tuple[bytes, ...]
    start: Callable[[], _Decompressor]
    padding: int = 0
    """Zero bytes may follow a stream in multiples of this; 0 allows none."""


_GZIP = _Format("gzip", "member", (b"\x1f\x8b",), _GzipMember, padding=1)
_XZ = _Format(
    "xz", "stream", (b"\xfd7zXZ\0",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4
)
_SKIPPABLE = tuple(bytes([byte]) + b"\x2a\x4d\x18" for byte in range(0x50, 0x60))
_ZSTD = _Format("zstd", "frame", (b"\x28\xb5\x2f\xfd", *_SKIPPABLE), _ZstdFrame)
_BZIP2 = _Format("bzip2", "stream", (b"BZh",), bz2.BZ2Decompressor)
_FORMATS = {".gz": _GZIP, ".tgz": _GZIP, ".xz": _XZ, ".zst": _ZSTD, ".bz2": _BZIP2}
COMPRESSIONS = tuple(suffix for suffix in _FORMATS if suffix != ".tgz")
_MAGIC_BYTES = 6  # the length of the longest magic


class _Streams(io.RawIOBase):
    """The decompressed bytes of all streams of a file.

    Raises:
        StoredError: a stream is damaged or cut, or something else follows it.
    """

    def __init__(self, stored: IO[bytes], form: _Format) -> None:
        self._stored, self._format = stored, form
        self._stream: _Decompressor | None = None
        self._number = 0
        # Positions in the file: the first byte of the stream, the bytes read so far.
        self._first_byte = self._read_bytes = 0
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        filled = 0
        while filled < len(buffer):
            if not self._ready and not self._decompress():
                break
            count = min(len(buffer) - filled, len(self._ready))
            buffer[filled : filled + count] = self._ready[:count]
            self._ready = self._ready[count:]
            filled += count
        return filled

    def _decompress(self) -> bool:
        """Make some bytes ready; return False at the end of the file."""
        while not self._ready:
            self._stream = self._stream or self._next_stream()
            if self._stream is None:
                return False
            is_end = self._stream.needs_input and not self._compressed and not self._read()
            try:
                output = self._stream.decompress(self._compressed, _OUTPUT_BYTES)
            except MemoryError as error:
                raise _damaged(f"{self._where()}: it needs more memory than there is") from error
            # bz2 raises OSError.
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
                raise _damaged(f"{self._where()}: {error}") from error
            self._compressed = b""
            self._ready = memoryview(output)
            if self._stream.eof:
                self._compressed = self._stream.unused_data
                self._stream = None
            elif is_end and not output:
                raise _damaged(f"{self._where()}: the file ends inside it")
        return True

    def _next_stream(self) -> _Decompressor | None:
        """Skip padding and start the next stream; return None at the end of the file."""
        num_zeros = 0
        while self._compressed or self._read():
            if not self._format.padding or not self._number or self._compressed[0]:
                break
            content = self._compressed.lstrip(b"\0")
            num_zeros += len(self._compressed) - len(content)
            self._compressed = content
        if num_zeros and num_zeros % self._format.padding:
            raise _damaged(
                f"{num_zeros} zero bytes follow {self._where()}; {self._format.name} allows "
                f"multiples of {self._format.padding}"
            )
        while len(self._compressed) < _MAGIC_BYTES and self._read():
            pass
        if not self._compressed:
            return None
        first_byte = self._read_bytes - len(self._compressed)
        if not self._compressed.startswith(self._format.magics):
            raise _damaged(self._not_a_stream(first_byte))
        self._number += 1
        self._first_byte = first_byte
        return self._format.start()

    def _not_a_stream(self, first_byte: int) -> str:
        found = self._compressed[:_MAGIC_BYTES]
        if any(magic.startswith(found) for magic in self._format.magics):
            return (
                f"the file ends inside the first bytes of a {self._format.stream}, at byte "
                f"{first_byte}"
            )
        if not self._number:
            return f"it begins with {found!r}, unlike any {self._format.name} file"
        return (
            f"{found!r} follows {self._where()}, at byte {first_byte}, where the file should end "
            f"or another {self._format.stream} begin"
        )

    def _where(self) -> str:
        return (
            f"{self._format.name} {self._format.stream} {self._number}, from byte "
            f"{self._first_byte}"
        )

    def _read(self) -> bool:
        """Append a piece of the file to the compressed input; return False at the end."""
        piece = self._stored.read(READ_BYTES // 8)
        self._compressed += piece
        self._read_bytes += len(piece)
        return bool(piece)


# --- files ---


@contextlib.contextmanager
def open_stored(
    path: Path, progress: ReadProgress | None = None
) -> Iterator[io.BufferedReader[Any]]:
    """Open a file for reading, decompressed by suffix.

    Raises:
        DataError: the file's compression is not the one of its suffix.
        StoredError: (while reading) the compressed data are damaged, cut short, or followed by
            something else.
    """
    with io.BufferedReader(_CountedFile(path, progress or ReadProgress()), READ_BYTES) as stored:
        form = _FORMATS.get(path.suffix.lower())
        _check_suffix(path, stored.peek(_MAGIC_BYTES * 8), form)
        if form is None:
            yield stored
        else:
            with decompressed(stored, form.name) as stream:
                yield stream


def decompressed(stored: IO[bytes], format_name: str) -> io.BufferedReader:
    """Return the decompressed bytes of a file of "gzip", "xz", "zstd" or "bzip2" data.

    Raises:
        StoredError: (while reading) the data are damaged, cut short, or followed by something else.
    """
    form = next(form for form in _FORMATS.values() if form.name == format_name)
    return io.BufferedReader(_Streams(stored, form), READ_BYTES)


def _check_suffix(path: Path, head: bytes, form: _Format | None) -> None:
    """Raise DataError if the first bytes contradict the suffix."""
    if form is not None and (not head or head.startswith(form.magics)):
        return
    found = content_of(head)
    if form is None:
        if found is not None and found.name in {
            f"{known.name} data" for known in _FORMATS.values()
        }:
            raise DataError(
                f"{path} holds {found.name}, which its suffix does not say; {found.remedy}"
            )
    elif found is not None:
        raise DataError(
            f"{path} holds {found.name}, not the {form.name} data of its suffix; {found.remedy}"
        )
    elif not any(magic.startswith(head[:_MAGIC_BYTES]) for magic in form.magics):
        raise DataError(
            f"{path} is not a {form.name} file: it begins with {head[:16]!r}; fetch it again, or "
            "correct its suffix (.txt if it is plain text)"
        )


@contextlib.contextmanager
def seekable(path: Path, stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the stream itself, or a decompressed copy on disk if it is compressed.

    Seeking back in a compressed stream would decompress it again.
    """
    if path.suffix.lower() not in _FORMATS:
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        while piece := stream.read(READ_BYTES):
            try:
                copy.write(piece)
                copy.flush()
            except OSError as error:
                written = os.fstat(copy.fileno()).st_size
                os.ftruncate(copy.fileno(), 0)  # closing the file writes what is buffered
                raise DataError(
                    f"{path}: its decompressed copy does not fit in {tempfile.gettempdir()} "
                    f"({error.strerror}, after {written:,} bytes); free space there, set TMPDIR "
                    "to a folder on a larger disk, or decompress the file"
                ) from error
        copy.seek(0)
        yield copy
