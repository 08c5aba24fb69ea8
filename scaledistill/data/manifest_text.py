"""Parse a manifest of millions of numbers in seconds, without a Python object for each.

Inputs: a JSON file. Outputs: its header, the fields of its shards with numpy arrays for the lists,
and its sha256. Not handled here: JSON in any other form, and the validity of the values
(`data.manifest`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

COLUMNS = (
    "block_rows",
    "ids_offset",
    "ids_crc32",
    "documents_offset",
    "documents_bytes",
    "documents_crc32",
)
"""The fields of a shard that have one number per block."""
SHARD_FILE = "[A-Za-z0-9][A-Za-z0-9._-]*[.]tar"
READ_BYTES = 1 << 22
SHARDS_AT_ONCE = 256

_SHARDS = re.compile(rb'"shards"\s*:\s*\[')
_SPACE = b" \t\r\n"
_SHARD = re.compile(
    (
        f',?{{"file":"({SHARD_FILE})","bytes":([0-9]{{1,18}}),'
        '"sha256":"([0-9a-f]{64})","rows":([0-9]{1,18}),'
    ).encode()
)
_LISTS = [f'{"" if name == COLUMNS[0] else ","}"{name}":['.encode() for name in COLUMNS]
"""The text that precedes each list of a shard."""


class _Text(NamedTuple):
    """A shard as `Manifest.dump` writes it, as pieces of text without white space."""

    file: bytes
    size: bytes
    sha256: bytes
    rows: bytes
    lists: list[bytes]

    def canonical(self) -> bytes:
        """Return the shard as compact JSON with sorted keys."""
        block_rows, ids_offset, ids_crc32, documents_offset, documents_bytes, documents_crc32 = (
            self.lists
        )
        return (
            b'{"block_rows":[%b],"bytes":%b,"documents_bytes":[%b],"documents_crc32":[%b],'
            b'"documents_offset":[%b],"file":"%b","ids_crc32":[%b],"ids_offset":[%b],"rows":%b,"sha256":"%b"}'
        ) % (
            *(block_rows, self.size, documents_bytes, documents_crc32, documents_offset),
            *(self.file, ids_crc32, ids_offset, self.rows, self.sha256),
        )


def _shard_text(text: bytes) -> _Text:
    """Split the text of a shard, without white space and the last brace, into its pieces.

    Raises: ValueError if it has another form.
    """
    if (head := _SHARD.match(text)) is None:
        raise ValueError("a shard of another form")
    *pieces, rest = text[head.end() :].split(b"]")
    if rest or len(pieces) != len(_LISTS) or not all(map(bytes.startswith, pieces, _LISTS)):
        raise ValueError("a shard of another form")
    lists = [piece[len(before) :] for before, piece in zip(_LISTS, pieces, strict=True)]
    return _Text(head[1], head[2], head[3], head[4], lists)


def read_as_written(file: BinaryIO) -> tuple[dict[str, Any], list[dict[str, Any]], str] | None:
    """Return a manifest's header, its shards' fields and its sha256.

    None if the text is not in the form that `Manifest.dump` writes.

    A manifest of 16,000 shards of 65,536 rows has 25 million numbers in 0.2 GB of text. As Python
    objects they would take gigabytes and many seconds. So the text is read piece by piece, numbers
    go from text to arrays directly, and the hash, that of the compact JSON with sorted keys, is
    computed from the text too.
    """
    head, found = b"", None
    while found is None and (piece := file.read(READ_BYTES)):
        head += piece
        found = _SHARDS.search(head)
    if found is None:
        return None
    try:
        content = json.loads(head[: found.end()] + b"]}")
        stated = content.pop("sha256", None)
    except (ValueError, AttributeError, RecursionError):  # e.g. "shards" is not at the top level
        return None
    shards: list[dict[str, Any]] = []
    header = {key: value for key, value in content.items() if key != "shards"}
    try:
        digest = sha256_by_shards(header, _parse_shards(head[found.end() :], file, shards))
    except (ValueError, DeprecationWarning):  # np.fromstring warns on text that is not a number
        return None
    return (header, shards, digest) if digest == stated else None


def _parse_shards(rest: bytes, file: BinaryIO, shards: list[dict[str, Any]]) -> Iterator[bytes]:
    """Append the shards whose text begins with `rest`; yield their canonical JSON.

    Raises: ValueError if anything is not as `Manifest.dump` writes it.
    """
    waiting: list[_Text] = []
    while rest:
        *entries, rest = rest.translate(None, _SPACE).split(b"}")
        for text in entries:
            if text == b"]":  # the end of the list and of the manifest
                if rest or entries[-1] is not text or file.read().translate(None, _SPACE):
                    raise ValueError("something follows the shards")
                shards.extend(_shards_of(waiting))
                return
            if text.startswith(b",") != bool(shards or waiting):
                raise ValueError("a list of another form")
            waiting.append(_shard_text(text))
            yield waiting[-1].canonical()
        if len(waiting) >= SHARDS_AT_ONCE:
            shards.extend(_shards_of(waiting))
            waiting.clear()
        rest += file.read(READ_BYTES)
    raise ValueError("the list of shards does not end")


def _shards_of(texts: Sequence[_Text]) -> Iterator[dict[str, Any]]:
    """Yield the fields of shards, whose arrays are views of shared ones."""
    if not texts:
        return
    lengths = [text.lists[0].count(b",") + 1 for text in texts]
    columns = []
    for column in range(len(COLUMNS)):
        lists = [text.lists[column] for text in texts]
        values = np.fromstring(b",".join(lists), np.int64, sep=",")
        if [numbers.count(b",") + 1 for numbers in lists] != lengths or len(values) != sum(lengths):
            raise ValueError("lists of other lengths")
        if values.min() < 0 or values.max() == 2**63 - 1:  # numpy clips larger numbers to this
            raise ValueError("a number out of range")
        columns.append(compact(values))
    end = 0
    for text, length in zip(texts, lengths, strict=True):
        start, end = end, end + length
        yield {
            "file": text.file.decode(),
            "bytes": int(text.size),
            "sha256": text.sha256.decode(),
            "rows": int(text.rows),
            **{name: values[start:end] for name, values in zip(COLUMNS, columns, strict=True)},
        }


def canonical(content: object) -> bytes:
    """Return compact JSON with sorted keys, the form that is hashed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def sha256_by_shards(header: Mapping[str, object], shards: Iterable[bytes]) -> str:
    """Return the sha256 of the canonical JSON of a header and its shards.

    Each shard is given as canonical JSON.
    """
    # "shards" is hashed in its sorted place among the header's keys, one shard at a time.
    before = canonical({key: value for key, value in header.items() if key < "shards"})[:-1]
    after = canonical({key: value for key, value in header.items() if key > "shards"})[1:]
    digest = hashlib.sha256(before + b',"shards":[')
    for number, shard in enumerate(shards):
        digest.update(b"," + shard if number else shard)
    digest.update(b"]," + after)
    return digest.hexdigest()


def compact(values: np.ndarray) -> np.ndarray:
    """Return non-negative int64 values as uint32 if they fit, else unchanged."""
    return values.astype(np.uint32) if len(values) and values.max() < 2**32 else values
