"""The shard format: load and check the manifest of a data set.

Inputs: a folder or URL. Outputs: a `Manifest`. Not handled here: a block's bytes (`data.blocks`).

A data set is a folder of plain WebDataset tars beside one `shards.manifest`, a JSON file. One
WebDataset sample is one block of rows: key `000000123`, numbered over the whole data set, with two
members:

- `000000123.u16` (or `.u32`): token ids, row-major, little-endian, [rows, T];
- `000000123.documents.u16`: [n, 3] little-endian uint16 triples (row in the block, start, end) of
  all documents, ascending, `end` exclusive. Positions outside every document are padding.

The manifest holds offsets and crc32 of every member and the sha256 of every tar, so that a reader
needs no tar parser and uses no unchecked byte. It is written last: a folder without it is not a
data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from scaledistill.data.manifest_text import (
    COLUMNS,
    SHARD_FILE,
    SHARDS_AT_ONCE,
    canonical,
    compact,
    read_as_written,
    sha256_by_shards,
)
from scaledistill.errors import DataError
from scaledistill.storage import remote

MANIFEST_FILE = "shards.manifest"
"""JSON without the suffix: `datasets.load_dataset` would take a .json file beside a tar as data."""
OLD_MANIFEST_FILE = "manifest.json"
"""Its name in data sets made by earlier versions; the format is the same."""
MANIFEST_FILES = (MANIFEST_FILE, OLD_MANIFEST_FILE)
PARTIAL = ".partial-"
MAX_SEQUENCE_LENGTH = 65_535
IDS_DTYPES: dict[str, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
DOCUMENTS_DTYPE = np.dtype("<u2")
DOCUMENT_BYTES = 3 * DOCUMENTS_DTYPE.itemsize
MAX_UNKNOWN_FRACTION = 0.05

TAR_BLOCK = 512
MAX_BLOCK_ROWS = 65_535

AGAIN = "make the shards again with `scaledistill shards make`, or copy the whole folder again"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _counts(values: object) -> np.ndarray:
    """Turn a list of non-negative integers into an array.

    As Python objects they would take 40 bytes each, and there may be 25 million.
    """
    if isinstance(values, np.ndarray):
        return values
    if not isinstance(values, list | tuple) or not all(
        type(value) is int and 0 <= value < 2**63 for value in values
    ):
        raise ValueError("expected a list of whole numbers from 0 to 2^63 - 1")
    return compact(np.array(values, np.int64))


Offsets = TypeVar("Offsets", int, np.ndarray)
Counts = Annotated[np.ndarray, PlainValidator(_counts)]


def ids_offset_after(documents_offset: Offsets, documents_bytes: Offsets) -> Offsets:
    """Return where a block's ids begin in the tar, in bytes.

    A block's documents, filled up to whole tar blocks, are followed by the ids' header.
    """
    return documents_offset + -(-documents_bytes // TAR_BLOCK) * TAR_BLOCK + TAR_BLOCK


def too_many_unknown(unknown: int, tokens: int, bound: float) -> bool:
    """Return whether the unknown fraction exceeds `bound` by more than chance.

    One standard error is allowed: 0.6 points for 1,000 tokens at a bound of 5 %, 0.02 points for a
    million.
    """
    return tokens > 0 and unknown / tokens > bound + math.sqrt(bound * (1 - bound) / tokens)


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True
    )


class Shard(_Strict):
    """One tar; arrays are int with one entry per block, offsets and sizes are bytes of the tar."""

    file: Annotated[str, Field(pattern=f"^{SHARD_FILE}$")]
    bytes: Count
    sha256: Sha256
    rows: Count
    block_rows: Counts
    ids_offset: Counts
    ids_crc32: Counts
    documents_offset: Counts
    documents_bytes: Counts
    documents_crc32: Counts

    def content(self) -> dict[str, object]:
        """Return the shard's fields as plain Python values."""
        return {
            name: value.tolist() if isinstance(value := getattr(self, name), np.ndarray) else value
            for name in type(self).model_fields
        }

    def problem(self, row_bytes: int) -> str | None:
        """Return what is inconsistent in this shard, or None."""
        lengths = {len(getattr(self, name)) for name in COLUMNS}
        if len(lengths) != 1 or lengths == {0}:
            return (
                f"its lists of blocks have lengths {sorted(lengths)}; expected one length above 0"
            )
        if not 1 <= self.block_rows.min() <= self.block_rows.max() <= MAX_BLOCK_ROWS:
            found = f"blocks of {self.block_rows.min()} to {self.block_rows.max()} rows"
            return f"{found}; expected 1 to {MAX_BLOCK_ROWS}"
        block_rows = self.block_rows.tolist()  # Python integers do not overflow
        if sum(block_rows) != self.rows:
            return f"rows is {self.rows}, but its blocks hold {sum(block_rows)}"
        offsets = (
            self.ids_offset.tolist(),
            self.documents_offset.tolist(),
            self.documents_bytes.tolist(),
        )
        end = 0
        for rows, ids, documents, size in zip(block_rows, *offsets, strict=True):
            if (
                size % DOCUMENT_BYTES
                or documents < end + TAR_BLOCK
                or ids != ids_offset_after(documents, size)
            ):
                return f"its members overlap or are out of order near byte {documents}"
            end = ids + rows * row_bytes
        return (
            f"its last block ends at byte {end}, beyond its {self.bytes} bytes"
            if end > self.bytes
            else None
        )


def _are_sound(shards: Sequence[Shard], row_bytes: int) -> bool:
    """Check many shards at once, as `Shard.problem` does for one.

    A data set may have millions of blocks, too many for a loop in Python.
    """
    lengths = np.array([[len(getattr(shard, name)) for name in COLUMNS] for shard in shards])
    if (lengths == 0).any() or (lengths != lengths[:, :1]).any():
        return False
    block_rows, ids, documents, size = (
        np.concatenate([getattr(shard, name) for shard in shards]).astype(np.int64)
        for name in ("block_rows", "ids_offset", "documents_offset", "documents_bytes")
    )
    # Sums of larger numbers could overflow.
    if max(values.max() for values in (block_rows, ids, documents, size)) >= 2**61:
        return False
    ends = lengths[:, 0].cumsum()
    firsts = ends - lengths[:, 0]
    end = ids + block_rows * row_bytes
    end_before = np.roll(end, 1)
    end_before[firsts] = 0
    return bool(
        (block_rows >= 1).all()
        and (block_rows <= MAX_BLOCK_ROWS).all()
        and (size % DOCUMENT_BYTES == 0).all()
        and (documents >= end_before + TAR_BLOCK).all()
        and (ids == ids_offset_after(documents, size)).all()
        and all(
            total == shard.rows
            for total, shard in zip(np.add.reduceat(block_rows, firsts), shards, strict=True)
        )
        and all(last <= shard.bytes for last, shard in zip(end[ends - 1], shards, strict=True))
    )


class Manifest(_Strict):
    """The description of a data set.

    `tokens` counts real tokens, `padded_rows` the rows with at least one padding position.
    """

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
    _checked_sha256: str | None = PrivateAttr(None)  # of the text that it was loaded from

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the token ids."""
        return IDS_DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row of token ids."""
        return self.sequence_length * self.ids_dtype.itemsize

    @property
    def unknown_tokens(self) -> int | None:
        """The number of unknown tokens in the text; None if the data set predates the count."""
        count = self.tokenizer.get("unknown_tokens")
        return count if isinstance(count, int) else None

    @property
    def unknown_fraction(self) -> float | None:
        """The unknown share of the text's tokens without [CLS] and [SEP]; None if not counted."""
        text = self.tokens - 2 * self.documents
        return None if self.unknown_tokens is None else self.unknown_tokens / max(1, text)

    def unknown_problem(self, bound: float | None = None) -> str | None:
        """Return a message if the unknown fraction exceeds `bound`, else None.

        By default `bound` is the one that was accepted when the shards were made.
        """
        if bound is None:
            accepted = self.source.get("max_unknown_fraction")
            bound = accepted if isinstance(accepted, (int, float)) else MAX_UNKNOWN_FRACTION
        text = self.tokens - 2 * self.documents
        if self.unknown_tokens is None or not too_many_unknown(self.unknown_tokens, text, bound):
            return None
        return (
            f"{self.unknown_fraction:.1%} of its tokens are unknown to the tokenizer, more than "
            f"{bound:.1%}: the tokenizer does not fit the text; make the shards again with the "
            "teacher's own"
        )

    @cached_property
    def sha256(self) -> str:
        """The identity of the data: the hash of the manifest's content, wherever the folder is."""
        return self._checked_sha256 or sha256_by_shards(
            self._header(), (canonical(shard.content()) for shard in self.shards)
        )

    def _header(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude={"shards"})

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for name in ("file", "sha256"):
            seen: dict[str, str] = {}
            for shard in self.shards:
                if (value := getattr(shard, name)) in seen:
                    raise ValueError(
                        f"two equal shards, {seen[value]} and {shard.file} (same {name}): rows "
                        "would repeat"
                    )
                seen[value] = shard.file
        for first in range(0, len(self.shards), SHARDS_AT_ONCE):
            group = self.shards[first : first + SHARDS_AT_ONCE]
            for shard in () if _are_sound(group, self.row_bytes) else group:
                if problem := shard.problem(self.row_bytes):
                    raise ValueError(f"{shard.file}: {problem}")
        documents = (
            sum(int(shard.documents_bytes.sum(dtype=np.int64)) for shard in self.shards)
            // DOCUMENT_BYTES
        )
        for name, total in {
            "rows": sum(shard.rows for shard in self.shards),
            "documents": documents,
        }.items():
            if total != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but the shards hold {total}")
        padding = self.rows * self.sequence_length - self.tokens
        if (
            not self.padded_rows <= padding <= self.padded_rows * self.sequence_length
            or self.padded_rows > self.rows
        ):
            raise ValueError(
                f"{padding} positions of padding cannot lie in padded_rows={self.padded_rows} rows"
            )
        if missing := {"name", "sha256"} - set(self.tokenizer):
            raise ValueError(f"tokenizer lacks {sorted(missing)}")
        for name in ("largest_id", "pad_token_id"):
            if getattr(self, name) >= min(self.vocab_size, 2 ** (8 * self.ids_dtype.itemsize)):
                raise ValueError(
                    f"{name}={getattr(self, name)} is not below vocab_size={self.vocab_size}"
                )
        return self

    def dump(self) -> bytes:
        """Return the manifest as a file's content, which carries its own hash."""
        head = json.dumps({"sha256": self.sha256, **self._header(), "shards": []}).encode()
        # One shard at a time, to save memory.
        shards = b", ".join(json.dumps(shard.content()).encode() for shard in self.shards)
        return head[: -len(b"]}")] + shards + b"]}\n"

    @classmethod
    def load(cls, location: str | Path) -> Manifest:
        """Read and check the manifest of a folder or an fsspec URL.

        Raises: DataError if it is missing, of another version, changed since it was written or
        inconsistent.
        """
        where, file = _open_manifest(str(location))
        with file:
            try:
                content, sha256 = _read_as_written(file) or _read_json(file)
                found = {name: content.get(name) for name in ("format", "version")}
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not a JSON object ({error}); {AGAIN}") from error
            except OSError as error:
                raise _unreadable(where, error) from error
        expected = {
            "format": cls.model_fields["format"].default,
            "version": cls.model_fields["version"].default,
        }
        if found != expected:
            raise DataError(
                f"{where}: found {found}, this version of scaledistill reads {expected}; {AGAIN}"
            )
        if sha256 is None:
            raise DataError(
                f"{where} was changed or damaged after it was written: its sha256 does not match; "
                f"{AGAIN}"
            )
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{where}: {name + ': ' if name else ''}{first['msg']}; {AGAIN}"
            ) from error
        manifest._checked_sha256 = sha256
        return manifest


def manifest_path(folder: Path) -> Path:
    """Return the path of a folder's manifest, whether it exists or not."""
    old = folder / OLD_MANIFEST_FILE
    return old if old.exists() and not (folder / MANIFEST_FILE).exists() else folder / MANIFEST_FILE


def _open_manifest(location: str) -> tuple[str, BinaryIO]:
    """Open the manifest of a folder or URL; return its path or URL and the file."""
    if remote.is_url(location):
        where, data = remote.read_first([f"{location}/{name}" for name in MANIFEST_FILES])
        return where, io.BytesIO(data)
    path = manifest_path(Path(location))
    try:
        return str(path), path.open("rb")
    except FileNotFoundError as error:
        raise DataError(_why_missing(Path(location))) from error
    except OSError as error:
        raise _unreadable(str(path), error) from error


def _unreadable(where: str, error: OSError) -> DataError:
    return DataError(
        f"{where} can't be read: {error}; expected a folder made by `scaledistill shards make`"
    )


def _read_as_written(file: BinaryIO) -> tuple[dict[str, Any], str] | None:
    """Return the content and sha256 of a manifest in the form that `Manifest.dump` writes.

    None if it has any other form.
    """
    if (found := read_as_written(file)) is None:
        return None
    header, shards, sha256 = found
    return {**header, "shards": tuple(Shard.model_construct(**shard) for shard in shards)}, sha256


def _read_json(file: BinaryIO) -> tuple[dict[str, Any], str | None]:
    """Return the content of any manifest, and its stated sha256 if that is correct.

    Raises: ValueError, RecursionError if it is not a JSON object.
    """
    file.seek(0)
    content = json.loads(file.read())
    if not isinstance(content, dict):
        raise ValueError(f"found a {type(content).__name__}")
    stated = content.pop("sha256", None)
    is_right = stated == _content_sha256(content)
    if isinstance(shards := content.get("shards"), list):
        content["shards"] = tuple(shards)
    return content, stated if is_right else None


def _content_sha256(content: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()


def _why_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"no such folder: {folder}; expected a folder made by `scaledistill shards make`"
    found = (path for name in MANIFEST_FILES for path in folder.glob(f"*/{name}"))
    if inside := sorted({path.parent for path in found}):
        return (
            f"{folder} has no {MANIFEST_FILE}, but folders in it do; did you mean "
            f"{' or '.join(map(str, inside))}?"
        )
    if any(folder.glob(f"{PARTIAL}*")):
        return (
            f"{folder} has unfinished files but no {MANIFEST_FILE}: make_shards was interrupted; "
            "run it again"
        )
    return (
        f"{folder} has no {MANIFEST_FILE}: it holds no shards, or an incomplete copy; make them "
        "with `scaledistill shards make`"
    )
