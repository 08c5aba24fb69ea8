"""Compressed files: every byte of every stream is read, or the file is refused with the stream and
the byte.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from scaledistill.data.prepare.compression import StoredError, open_stored
from scaledistill.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
}
PADDING = {".gz": 1, ".xz": 4}
FIRST, SECOND = b"the first stream\n" * 40_000, random.Random(0).randbytes(200_000)


def read(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    with open_stored(path) as stream:
        return stream.read()


def skippable(content: bytes, number: int = 0) -> bytes:
    """A zstd frame that is not to be decompressed, such as the table at the end of the seekable
    format.
    """
    return (
        (0x184D2A50 + number).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content
    )


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_stream_is_read(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    path = tmp_path / f"a{suffix}"
    first, second, nothing = compress(FIRST), compress(SECOND), compress(b"")
    assert read(path, first + nothing + second + nothing) == FIRST + SECOND
    assert read(path, b"".join(compress(b"%d\n" % i) for i in range(500))) == b"".join(
        b"%d\n" % i for i in range(500)
    )
    assert read(path, nothing) == b""
    # A few kilobytes, which are not decompressed at once.
    assert len(read(path, compress(bytes(1 << 23)))) == 1 << 23


@pytest.mark.parametrize("suffix", COMPRESS)
def test_padding_is_read_where_the_format_allows_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    first, second = map(COMPRESS[suffix], (FIRST, SECOND))
    unit = PADDING.get(suffix)
    for size in (1, 3, 4, 8, 300_000):
        for content in (first + bytes(size) + second, first + second + bytes(size)):
            if unit and size % unit == 0:
                assert read(path, content) == FIRST + SECOND
            else:
                message = (
                    r"\d zero bytes follow xz stream \d"
                    if suffix == ".xz"
                    else r"b'\\x00.* follows "
                )
                with pytest.raises(StoredError, match=f"is damaged or cut short: {message}"):
                    read(path, content)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_no_stream_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    first, second = map(COMPRESS[suffix], (FIRST, SECOND))
    at = (
        rf"from byte 0, at byte {len(first)}, where the file should end or another \w+ begin; "
        r"fetch or compress it"
    )
    for behind in (b"garbage", b"X" + second[1:], second[8:], b"\n"):
        with pytest.raises(StoredError, match=rf"follows \w+ (member|stream|frame) 1, {at}"):
            read(path, first + behind)
    if suffix in PADDING:
        with pytest.raises(
            StoredError, match=rf"b['\"]X.* follows .* 1, from byte 0, at byte {len(first) + 4}"
        ):
            read(path, first + bytes(4) + b"X" + second[1:])
    for cut in (1, 2, 7, len(second) // 2, len(second) - 1):
        with pytest.raises(
            StoredError,
            match=rf"ends inside (it|the first bytes of a \w+, at byte {len(first)}); fetch",
        ):
            read(path, first + second[:cut])
    if suffix != ".zst":  # whose checksum is optional
        flipped = bytearray(first + second)
        flipped[len(first) + len(second) // 2] ^= 8
        with pytest.raises(
            StoredError, match=rf"damaged or cut short: \w+ \w+ 2, from byte {len(first)}: "
        ):
            read(path, bytes(flipped))


def test_zstd_frames_of_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    # Without the size of its content.
    streamed = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    second = streamed.compress(SECOND) + streamed.flush()
    content = (
        skippable(b"first", 15)
        + zstandard.compress(FIRST)
        + skippable(b"")
        + second
        + skippable(bytes(3000))
    )
    assert read(path, content) == FIRST + SECOND
    with pytest.raises(StoredError, match=r"zstd frame 5, from byte .*: the file ends inside it"):
        read(path, content[:-1])
    flipped = bytearray(content)
    flipped[-3500] ^= 1
    with pytest.raises(StoredError, match=r"zstd frame 4, from byte \d+: .*checksum"):
        read(path, bytes(flipped))


def test_zstd_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    long = bytearray(zstandard.ZstdCompressor(write_content_size=False).compressobj().flush())
    assert not long[4] & 0x20  # the window is stated
    long[5] = 21 << 3  # 2 GiB, as zstd --long=31 writes
    assert read(path, bytes(long) + zstandard.compress(FIRST)) == FIRST
    long[5] = 22 << 3
    with pytest.raises(
        StoredError,
        match=r"cannot be decompressed: a zstd window of 4,096 MiB is more than zstd reads",
    ):
        read(path, bytes(long))


def test_suffix_and_content_disagree(tmp_path: Path) -> None:
    names = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
    for found, compress in COMPRESS.items():
        for suffix in ("", ".txt", *COMPRESS):
            if suffix == found:
                continue
            wanted = (
                f"not the {names[suffix]} data of its suffix"
                if suffix in names
                else "which its suffix does not say"
            )
            with pytest.raises(
                DataError,
                match=f"a{suffix} holds {names[found]} data, {wanted}; give it the .*{found}",
            ):
                read(tmp_path / f"a{suffix}", compress(b"text"))
    with pytest.raises(
        DataError,
        match=r"holds data in the legacy .lzma format, not the xz data of its suffix; it cannot",
    ):
        read(tmp_path / "a.xz", lzma.compress(b"text", lzma.FORMAT_ALONE))
    with pytest.raises(
        DataError,
        match=r"a.gz holds an HTML page, not the gzip data of its suffix; .* fetch it again",
    ):
        read(tmp_path / "a.gz", b"<!DOCTYPE html>\n<title>404</title>")
    with pytest.raises(
        DataError,
        match=r"a.zst is not a zstd file: it begins with b'some text'; fetch it again, or correct",
    ):
        read(tmp_path / "a.zst", b"some text")
    assert read(tmp_path / "a.txt", b"BZhang wrote this") == b"BZhang wrote this"
