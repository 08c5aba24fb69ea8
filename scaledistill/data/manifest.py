"""The shard format: what a data set's manifest says, loaded and checked; a block's bytes, checked and seen as arrays.

A data set is a folder of plain WebDataset tars beside one manifest.json. One WebDataset sample is one block of rows:
key `000000123`, numbered over the whole data set, with two members:
- `000000123.u16` (or `.u32`): token ids, row-major, little-endian, [rows, T];
- `000000123.documents.u16`: [n, 3] little-endian uint16 triples (row in the block, start, end) of all documents,
  ascending, `end` exclusive. Positions outside every document are padding.
The manifest holds offsets and crc32 of every member and the sha256 of every tar, so that a reader needs no tar parser
and trusts no byte unchecked. It is written last: a folder without it is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from scaledistill.data import remote
from scaledistill.errors import DataError

MANIFEST_FILE = "manifest.json"
PARTIAL = ".partial-"
MAX_SEQUENCE_LENGTH = 65_535
IDS_DTYPES: dict[str, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
DOCUMENTS_DTYPE = np.dtype("<u2")
DOCUMENT_BYTES = 3 * DOCUMENTS_DTYPE.itemsize
MAX_UNKNOWN_FRACTION = 0.05

TAR_BLOCK = 512
MAX_BLOCK_ROWS = 65_535

Count = Annotated[int, Field(ge=0)]
Counts = tuple[Count, ...]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def ids_offset_after(documents_offset: int, documents_bytes: int) -> int:
    """Tell where a block's ids begin in the tar: its documents come first, filled up, then comes the ids' header."""
    return documents_offset + -(-documents_bytes // TAR_BLOCK) * TAR_BLOCK + TAR_BLOCK


def too_many_unknown(unknown: int, tokens: int, bound: float) -> bool:
    """Say whether more than a share `bound` of tokens is unknown, by more than chance makes of few tokens.

    One standard error is allowed: 0.6 points for 1,000 tokens at a bound of 5 %, 0.02 points for a million.
    """
    return tokens > 0 and unknown / tokens > bound + math.sqrt(bound * (1 - bound) / tokens)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Shard(_Strict):
    """One tar; the tuples have one entry per block, offsets and sizes are in bytes of the tar."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")]
    bytes: Count
    sha256: Sha256
    rows: Count
    block_rows: Counts
    ids_offset: Counts
    ids_crc32: Counts
    documents_offset: Counts
    documents_bytes: Counts
    documents_crc32: Counts

    def problem(self, row_bytes: int) -> str | None:
        """Say what contradicts itself here, if anything."""
        blocks = (self.block_rows, self.ids_offset, self.documents_offset, self.documents_bytes)
        lengths = {len(values) for values in (*blocks, self.ids_crc32, self.documents_crc32)}
        if len(lengths) != 1 or lengths == {0}:
            return f"its lists of blocks have lengths {sorted(lengths)}; expected one length above 0"
        if not 1 <= min(self.block_rows) <= max(self.block_rows) <= MAX_BLOCK_ROWS:
            return f"blocks of {min(self.block_rows)} to {max(self.block_rows)} rows; expected 1 to {MAX_BLOCK_ROWS}"
        if sum(self.block_rows) != self.rows:
            return f"rows is {self.rows}, but its blocks hold {sum(self.block_rows)}"
        end = 0
        for rows, ids, documents, size in zip(*blocks, strict=True):
            if size % DOCUMENT_BYTES or documents < end + TAR_BLOCK or ids != ids_offset_after(documents, size):
                return f"its members overlap or are out of order near byte {documents}"
            end = ids + rows * row_bytes
        return f"its last block ends at byte {end}, beyond its {self.bytes} bytes" if end > self.bytes else None


class Manifest(_Strict):
    """What a data set holds; `tokens` counts real tokens, `padded_rows` the rows with at least one padding position."""

    format: Literal["scaledistill-shards"] = "scaledistill-shards"
    version: Literal[1] = 1
    sequence_length: Annotated[int, Field(ge=1, le=MAX_SEQUENCE_LENGTH)]
    dtype: Literal["u16", "u32"]
    vocab_size: Annotated[int, Field(ge=1)]
    largest_id: Count
    rows: Annotated[int, Field(ge=1)]
    tokens: Count
    documents: Count
    padded_rows: Count
    tokenizer: dict[str, JsonValue]
    pad_token_id: Count
    source: dict[str, JsonValue]
    shards: tuple[Shard, ...]

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        return IDS_DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.sequence_length * self.ids_dtype.itemsize

    @property
    def unknown_tokens(self) -> int | None:
        """How many tokens of the text are unknown; None where the set was made before this was counted."""
        count = self.tokenizer.get("unknown_tokens")
        return count if isinstance(count, int) else None

    @property
    def unknown_fraction(self) -> float | None:
        """The share of the text's tokens, without [CLS] and [SEP], that are unknown; None where it was not counted."""
        text = self.tokens - 2 * self.documents
        return None if self.unknown_tokens is None else self.unknown_tokens / max(1, text)

    def unknown_problem(self, bound: float | None = None) -> str | None:
        """Say whether a larger share of tokens than `bound` is unknown; None is what was accepted at the making."""
        if bound is None:
            accepted = self.source.get("max_unknown_fraction")
            bound = accepted if isinstance(accepted, (int, float)) else MAX_UNKNOWN_FRACTION
        text = self.tokens - 2 * self.documents
        if self.unknown_tokens is None or not too_many_unknown(self.unknown_tokens, text, bound):
            return None
        return (
            f"{self.unknown_fraction:.1%} of its tokens are unknown to the tokenizer, more than {bound:.1%}: the "
            "tokenizer does not fit the text; make the shards again with the teacher's own"
        )

    @cached_property
    def sha256(self) -> str:
        """Identity of the data: the hash of the manifest's content, wherever the folder lies."""
        return _content_sha256(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for name in ("file", "sha256"):
            seen: dict[str, str] = {}
            for shard in self.shards:
                if (value := getattr(shard, name)) in seen:
                    raise ValueError(
                        f"two equal shards, {seen[value]} and {shard.file} (same {name}): rows would repeat"
                    )
                seen[value] = shard.file
        for shard in self.shards:
            if problem := shard.problem(self.row_bytes):
                raise ValueError(f"{shard.file}: {problem}")
        documents = sum(sum(shard.documents_bytes) for shard in self.shards) // DOCUMENT_BYTES
        for name, total in {"rows": sum(shard.rows for shard in self.shards), "documents": documents}.items():
            if total != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but the shards hold {total}")
        padding = self.rows * self.sequence_length - self.tokens
        if not self.padded_rows <= padding <= self.padded_rows * self.sequence_length or self.padded_rows > self.rows:
            raise ValueError(f"{padding} positions of padding cannot lie in padded_rows={self.padded_rows} rows")
        if missing := {"name", "sha256"} - set(self.tokenizer):
            raise ValueError(f"tokenizer lacks {sorted(missing)}")
        for name in ("largest_id", "pad_token_id"):
            if getattr(self, name) >= min(self.vocab_size, 2 ** (8 * self.ids_dtype.itemsize)):
                raise ValueError(f"{name}={getattr(self, name)} is not below vocab_size={self.vocab_size}")
        return self

    def dump(self) -> bytes:
        """Return the content of manifest.json, which carries its own hash."""
        content = self.model_dump(mode="json")
        return json.dumps({"sha256": self.sha256, **content}).encode() + b"\n"

    @classmethod
    def load(cls, location: str | Path) -> Manifest:
        """Read and check the manifest of a folder or an fsspec URL.

        Raises: DataError if it is missing, of another version, changed since it was written or inconsistent.
        """
        where = f"{location}/{MANIFEST_FILE}"
        if remote.is_url(str(location)):
            text = remote.read_bytes(where)
        else:
            try:
                text = Path(where).read_bytes()
            except FileNotFoundError as error:
                raise DataError(_why_missing(Path(location))) from error
            except OSError as error:
                raise DataError(
                    f"{where} can't be read: {error}; expected a folder made by tools/make_shards.py"
                ) from error
        again = "make the shards again with tools/make_shards.py, or copy the whole folder again"
        try:
            content = json.loads(text)
            found = {name: content.get(name) for name in ("format", "version")}
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{where} is not a JSON object ({error}); {again}") from error
        expected = {"format": cls.model_fields["format"].default, "version": cls.model_fields["version"].default}
        if found != expected:
            raise DataError(f"{where}: found {found}, this version of scaledistill reads {expected}; {again}")
        stated = content.pop("sha256", None)
        if stated != _content_sha256(content):
            raise DataError(f"{where} was changed or damaged after it was written: its sha256 does not match; {again}")
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise DataError(f"{where}: {name + ': ' if name else ''}{first['msg']}; {again}") from error


def _content_sha256(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _why_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"no such folder: {folder}; expected a folder made by tools/make_shards.py"
    if inside := sorted(path.parent for path in folder.glob(f"*/{MANIFEST_FILE}")):
        return f"{folder} has no {MANIFEST_FILE}, but folders in it do; did you mean {' or '.join(map(str, inside))}?"
    if any(folder.glob(f"{PARTIAL}*")):
        return f"{folder} has no {MANIFEST_FILE} but unfinished files: make_shards was interrupted; run it again"
    return (
        f"{folder} has no {MANIFEST_FILE}: not (or not completely copied) shards; make them with tools/make_shards.py"
    )


def document_problem(documents: np.ndarray, num_rows: int, sequence_length: int) -> str | None:
    """Say what is wrong with int triples [n, 3] (row, start, end); None if they ascend, lie apart and in [rows, T]."""
    row, start, end = documents.T
    if not ((row >= 0) & (row < num_rows) & (start >= 0) & (start < end) & (end <= sequence_length)).all():
        return f"a document lies outside the {num_rows} rows of {sequence_length} positions, or is empty"
    if not ((np.diff(row) > 0) | ((np.diff(row) == 0) & (start[1:] >= end[:-1]))).all():
        return "documents overlap or don't ascend by (row, start)"
    return None


def count_tokens(documents: np.ndarray, num_rows: int) -> np.ndarray:
    """Count the real tokens of each row, int64 [num_rows], from triples [n, 3]."""
    length = documents[:, 2].astype(np.int64) - documents[:, 1]
    return np.bincount(documents[:, 0], weights=length, minlength=num_rows).astype(np.int64)


def count_in_text(ids_NT: np.ndarray, documents: np.ndarray, token_id: int) -> int:
    """Count an id in the text of triples [n, 3], which begin and end with a token that is not text."""
    hits = np.flatnonzero(ids_NT.ravel() == token_id)
    row, start, end = documents.astype(np.int64).T
    first = row * ids_NT.shape[1]
    return int((np.searchsorted(hits, first + end - 1) - np.searchsorted(hits, first + start + 1)).sum())


def block_span(manifest: Manifest, shard: Shard, block: int) -> tuple[int, int]:
    """Return the first byte in the tar and the number of bytes that `decode_block` needs: both members of one block."""
    first = shard.documents_offset[block]
    ids_bytes = shard.block_rows[block] * manifest.row_bytes
    return first, shard.ids_offset[block] + ids_bytes - first


def decode_block(
    manifest: Manifest, shard: Shard, block: int, data: bytes | memoryview
) -> tuple[np.ndarray, np.ndarray]:
    """Check the bytes of `block_span` and view them as ids [rows, T] (u16 or u32) and documents [n, 3] (uint16).

    Raises: DataError naming shard and block if the bytes are too few or a crc32 differs.
    """
    first, size = block_span(manifest, shard, block)
    where = f"{shard.file}, block {block}"
    if len(data) != size:
        raise DataError(f"{where}: the file ends early: {len(data)} of {size} bytes at byte {first}")
    ids = memoryview(data)[shard.ids_offset[block] - first :]
    documents = memoryview(data)[: shard.documents_bytes[block]]
    for name, member, expected in (
        ("token ids", ids, shard.ids_crc32[block]),
        ("document boundaries", documents, shard.documents_crc32[block]),
    ):
        if (found := zlib.crc32(member)) != expected:
            raise DataError(f"{where}: its {name} are damaged: crc32 {found:08x}, expected {expected:08x}")
    ids_NT = np.frombuffer(ids, manifest.ids_dtype).reshape(-1, manifest.sequence_length)
    return ids_NT, np.frombuffer(documents, DOCUMENTS_DTYPE).reshape(-1, 3)
