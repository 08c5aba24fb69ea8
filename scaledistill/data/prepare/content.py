"""Recognise the content of a file by its first bytes, for suffixes that are missing or wrong.

Inputs: the first bytes of a file. Outputs: its kind with a remedy, or its form of JSON. Not handled
here: the decision to refuse a file; readers compare the kind with what they expect.
"""

from __future__ import annotations

import json
import re
from typing import Literal, NamedTuple

HEAD_BYTES = 1 << 20
"""In most files this many bytes contain whole lines of JSON."""

_LINES_LOOKED_AT = 100
_MOST_NULS = 1 / 1000  # of the bytes; text from old scanners has a few

_KEY = r'"(?:[^"\\\n]|\\.){0,200}"\s*:'
_OBJECT_START = re.compile(r"\s*\{[ \t]*" + _KEY)
_DOCUMENT_START = re.compile(r"(?:\[\s*)?\{\s*" + _KEY)


class Content(NamedTuple):
    """A kind of content, and the remedy for a user who expected another one."""

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
    (b"SQLite format 3\0", Content("an SQLite database", _CONVERT)),
    (b"\x89HDF\r\n", Content("an HDF5 file", _CONVERT)),
    (b"\x93NUMPY", Content("a NumPy array", "this tool makes token ids from text only")),
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
# Stricter than the magic bytes, because a text may begin with BZh too.
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)")
_MARKUP = (
    (re.compile(rb"<!doctype\s+html|<html[\s>]", re.IGNORECASE), HTML),
    (re.compile(rb"<\?xml\s|<mediawiki[\s>]"), XML),
    (re.compile(rb'<doc id="'), WIKI),
)


def content_of(head: bytes) -> Content | None:
    """Return the kind of content that starts with `head`; None for text, JSON and unknown kinds."""
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
    """Return a kind for bytes with too many NULs to be text, else None."""
    num_nuls = head.count(0)
    if not num_nuls or num_nuls < _MOST_NULS * len(head):
        return None
    return Content(
        f"{num_nuls} NUL bytes among its first {len(head)}, like binary data or UTF-16 text",
        "convert it to UTF-8 text, or leave it out",
    )


def json_form(head: bytes) -> Literal["lines", "array", "object"] | None:
    """Tell JSON lines from one JSON array or object over several lines; None if neither.

    A text may quote JSON or begin with a JSON header. So it is JSON lines only if most lines begin
    like objects, and one JSON value only if no text follows it.
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
    except (ValueError, RecursionError):  # cut off at the end of the head, or damaged
        end = len(text)
    rest = text[end:].lstrip(" \t\r\n,")
    if rest and rest[0] not in "{[":
        return None
    return "array" if text.startswith("[") else "object"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
