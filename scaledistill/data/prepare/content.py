"""What a file holds, told by its first bytes, where the name says nothing or something else.

In: the first bytes of a file. Out: its kind with a remedy, or the form of JSON in it. Nothing is
decided here: readers compare it with what they expect.
"""

from __future__ import annotations

import json
import re
from typing import Literal, NamedTuple

HEAD_BYTES = 1 << 20
"""So many bytes are enough to see whole lines of JSON in most files."""

_LINES_LOOKED_AT = 100
_MOST_NULS = 1 / 1000  # of the bytes; text from old scanners has one here and there

_KEY = r'"(?:[^"\\\n]|\\.){0,200}"\s*:'
_OBJECT_START = re.compile(r"\s*\{[ \t]*" + _KEY)
_DOCUMENT_START = re.compile(r"(?:\[\s*)?\{\s*" + _KEY)


class Content(NamedTuple):
    """A kind of content, and what a person does about it who expected another one."""

    name: str
    remedy: str


_DECOMPRESS = "decompress it first"
_EXTRACT = "extract its text first"
_CONVERT = "convert it to Parquet or JSON lines first"

PARQUET = Content("a Parquet table", "name it .parquet")
TAR = Content(
    "a tar archive", "read WebDataset text shards with --wds; unpack any other archive first"
)
HTML = Content("an HTML page", f"{_EXTRACT}; if it should be a data file, fetch it again")
XML = Content("XML", _EXTRACT)
WIKI = Content("the <doc> form of wikiextractor", "run wikiextractor with --json")
LZMA = Content(
    "data in the legacy .lzma format",
    "it cannot be checked for damage: convert it, xz -dc FILE | xz > FILE.xz",
)

_MAGICS: tuple[tuple[bytes, Content], ...] = (
    (b"\x1f\x8b\x08", Content("gzip data", "give it the suffix .gz")),
    (b"\xfd7zXZ\0", Content("xz data", "give it the suffix .xz")),
    (b"\x28\xb5\x2f\xfd", Content("zstd data", "give it the suffix .zst")),
    (b"BZh", Content("bzip2 data", "give it the suffix .bz2")),
    (b"\x5d\0\0", LZMA),
    (b"LZIP\x01", Content("lzip data", _DECOMPRESS)),
    (b"\x04\x22\x4d\x18", Content("lz4 data", _DECOMPRESS)),
    (b"\xff\x06\0\0sNaPpY", Content("snappy data", _DECOMPRESS)),
    (b"\x1f\x9d", Content("data of compress (.Z)", _DECOMPRESS)),
    (b"PK\x03\x04", Content("a zip archive or an office document", "unpack it first")),
    (b"7z\xbc\xaf\x27\x1c", Content("a 7z archive", "unpack it first")),
    (b"Rar!\x1a", Content("a rar archive", "unpack it first")),
    (b"PAR1\x15", PARQUET),
    (b"ARROW1\0\0", Content("an Arrow file", _CONVERT)),
    (b"\xff\xff\xff\xff", Content("an Arrow stream", _CONVERT)),
    (b"Obj\x01", Content("an Avro file", _CONVERT)),
    (b"SQLite format 3\0", Content("an SQLite data base", _CONVERT)),
    (b"\x89HDF\r\n", Content("an HDF5 file", _CONVERT)),
    (b"\x93NUMPY", Content("a NumPy array", "this tool makes token ids from text alone")),
    (b"%PDF-", Content("a PDF document", _EXTRACT)),
    (b"{\\rtf", Content("an RTF document", _EXTRACT)),
    (b"WARC/1.", Content("WARC records", _EXTRACT)),
    (b"\x89PNG", Content("a picture", "leave it out")),
    (b"\xff\xd8\xff", Content("a picture", "leave it out")),
    (b"\x7fELF", Content("a program", "leave it out")),
    (b"\xff\xfe\0\0", Content("UTF-32 text", "convert it first (iconv -f utf-32 -t utf-8)")),
    (b"\xff\xfe", Content("UTF-16 text", "convert it first (iconv -f utf-16 -t utf-8)")),
    (b"\xfe\xff", Content("UTF-16 text", "convert it first (iconv -f utf-16 -t utf-8)")),
)
# A text, too, may begin with BZh.
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)")
_MARKUP = (
    (re.compile(rb"<!doctype\s+html|<html[\s>]", re.IGNORECASE), HTML),
    (re.compile(rb"<\?xml\s|<mediawiki[\s>]"), XML),
    (re.compile(rb'<doc id="'), WIKI),
)


def content_of(head: bytes) -> Content | None:
    """Name what the first bytes of a file are known to begin; None for text, JSON and what is not
    known.
    """
    if head[257:262] == b"ustar":
        return TAR
    for magic, content in _MAGICS:
        if head.startswith(magic) and (magic != b"BZh" or _BZIP2.match(head)):
            return content
    start = head[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, content in _MARKUP:
        if pattern.match(start):
            return content
    return None


def binary_content(head: bytes) -> Content | None:
    """Name what cannot be text for its many NUL bytes, if it is such."""
    num_nuls = head.count(0)
    if not num_nuls or num_nuls < _MOST_NULS * len(head):
        return None
    return Content(
        f"{num_nuls} NUL bytes among its first {len(head)}, as binary data or UTF-16 text do",
        "convert it to UTF-8 text, or leave it out",
    )


def json_form(head: bytes) -> Literal["lines", "array", "object"] | None:
    """Tell JSON lines from one JSON array or object that spans lines; None for anything else.

    A text may quote JSON, or begin with a JSON header: it is JSON lines only if most lines begin as
    objects do, and one JSON value only if no text follows it.
    """
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    if not text.startswith(("{", "[")) and "\n{" not in text[:HEAD_BYTES]:
        return None
    lines = [line for line in text.split("\n", 4 * _LINES_LOOKED_AT) if line.strip()][
        :_LINES_LOOKED_AT
    ]
    num_objects = sum(_OBJECT_START.match(line) is not None for line in lines)
    if not text.startswith("[") and num_objects > len(lines) / 2:
        return "lines"
    if not _DOCUMENT_START.match(text) or _is_object(lines[0]):
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (json.JSONDecodeError, RecursionError):  # cut at the end of the head, or damaged
        end = len(text)
    rest = text[end:].lstrip(" \t\r\n,")
    if rest and rest[0] not in "{[":
        return None
    return "array" if text.startswith("[") else "object"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False
