"""Write rows of token ids as a data set of shards (`ShardWriter`), and `verify` one.

Inputs: rows of ids [N, T] and the documents in them. Outputs: tars and a `Manifest`
(`data.manifest` describes the format). Not handled here: text (`data.prepare.text`), fast reading
(`data.stream`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np

from scaledistill.data.blocks import (
    block_span,
    count_in_text,
    count_tokens,
    decode_block,
    document_problem,
)
from scaledistill.data.manifest import (
    DOCUMENTS_DTYPE,
    IDS_DTYPES,
    MANIFEST_FILE,
    MANIFEST_FILES,
    MAX_BLOCK_ROWS,
    MAX_SEQUENCE_LENGTH,
    PARTIAL,
    TAR_BLOCK,
    Manifest,
    Shard,
    ids_offset_after,
    manifest_path,
)
from scaledistill.data.sizes import ROWS_PER_BLOCK, ROWS_PER_SHARD
from scaledistill.errors import ConfigError, DataError, Field
from scaledistill.storage.files import flush, lock, sync


class _HashedFile:
    """A new file that counts and hashes what is written to it; the sink of `TarWriter`."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.flush()
        flush(self.file.fileno())
        self.file.close()


class ShardWriter:
    """Write rows as shards into `folder`.

    The same rows give the same bytes, however they are split over calls of `write`. Use it as a
    context manager: leaving it commits (`close`); leaving it by an error removes the written files
    and the folders created for them. Until the commit every file has a `.partial-` name, and the
    manifest is written last, so an interrupted run leaves nothing that looks finished.

    Raises: ConfigError on settings that don't fit; DataError if the folder already holds shards and
    `overwrite` is off.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sequence_length: int,
        vocab_size: int,
        tokenizer: Mapping[str, object],
        pad_token_id: int,
        source: Mapping[str, object] | None = None,
        rows_per_block: int = ROWS_PER_BLOCK,
        rows_per_shard: int = ROWS_PER_SHARD,
        overwrite: bool = False,
    ) -> None:
        if not 1 <= sequence_length <= MAX_SEQUENCE_LENGTH:
            raise ConfigError(
                f"sequence_length={sequence_length}; expected 1 to {MAX_SEQUENCE_LENGTH}"
            )
        if (
            not 1 <= rows_per_block <= MAX_BLOCK_ROWS
            or rows_per_shard < 1
            or rows_per_shard % rows_per_block
        ):
            found = f"rows_per_block={rows_per_block}, rows_per_shard={rows_per_shard}"
            raise ConfigError(
                f"{found}; expected blocks of 1 to {MAX_BLOCK_ROWS} rows and a whole number of "
                "blocks per shard"
            )
        if not 0 <= pad_token_id < vocab_size <= 2**32:
            raise ConfigError(
                f"pad_token_id={pad_token_id}, vocab_size={vocab_size}; expected 0 <= pad < "
                "vocabulary <= 2^32"
            )
        if missing := {"name", "sha256"} - set(tokenizer):
            raise ConfigError(
                f"tokenizer lacks {sorted(missing)}; expected a mapping with at least name and "
                "sha256"
            )
        self._folder = Path(folder)
        self._rows_per_shard = rows_per_shard
        self._dtype: Literal["u16", "u32"] = "u16" if vocab_size <= 2**16 else "u32"
        self._header: dict[str, Any] = {
            "sequence_length": sequence_length,
            "dtype": self._dtype,
            "vocab_size": vocab_size,
            "tokenizer": json.loads(json.dumps(dict(tokenizer))),
            "pad_token_id": pad_token_id,
            # A round trip through JSON, here and above, makes bad values fail now, not at the end.
            "source": json.loads(json.dumps(dict(source or {}))),
        }
        self.tokenizer_facts = self._header["tokenizer"]
        """The manifest's facts about the tokenizer; callers may add more until the commit."""
        self._vocab_size = vocab_size
        self._overwrite = overwrite
        self._prepared: Manifest | None = None
        self._manifest: Manifest | None = None
        self._totals = {"largest_id": 0, "rows": 0, "tokens": 0, "documents": 0, "padded_rows": 0}
        self._shards: list[Shard] = []
        self._blocks: list[dict[str, int]] = []  # of the open shard
        self._num_blocks = 0
        self._block_NT = np.empty((rows_per_block, sequence_length), IDS_DTYPES[self._dtype])
        self._filled = 0
        self._documents: list[np.ndarray] = []
        self._sink: _HashedFile | None = None
        self._open_folder()

    def _refuse_older_files(self) -> None:
        if not self._overwrite and (old := [path.name for path in self._finished_files()]):
            raise DataError(
                f"{self._folder} holds {old[0]} already; name another folder, or use ",
                Field("overwrite", True),
            )

    def _open_folder(self) -> None:
        self._refuse_older_files()
        self._made = [
            folder for folder in (self._folder, *self._folder.parents) if not folder.exists()
        ]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / f"{PARTIAL}lock").open("wb")
        if lock(self._lock.fileno()) == "in use":
            self._lock.close()
            raise DataError(
                f"another run is writing shards to {self._folder}; wait for it or name another "
                "folder"
            )
        try:
            self._refuse_older_files()  # another run's, which ended meanwhile
        except DataError:
            self._unlock()
            raise
        for leftover in self._folder.glob(f"{PARTIAL}*.tar"):
            leftover.unlink()

    def _finished_files(self) -> list[Path]:
        manifests = [self._folder / name for name in MANIFEST_FILES]
        return [
            *(path for path in manifests if path.exists()),
            *sorted(self._folder.glob("shard-[0-9]*.tar")),
        ]

    def write(self, ids_NT: np.ndarray, documents: np.ndarray) -> None:
        """Add rows: integer ids [N, T], and the documents in them, int [n, 3].

        A document is (row of this call, start, end); documents ascend.

        Raises: DataError on a wrong shape, an id outside the vocabulary or documents that don't
        fit.
        """
        T = self._block_NT.shape[1]
        ids_NT, documents = np.asarray(ids_NT), np.asarray(documents).astype(np.int64)
        if ids_NT.ndim != 2 or ids_NT.shape[1] != T or ids_NT.dtype.kind not in "iu":
            raise DataError(
                f"rows of shape {ids_NT.shape} and dtype {ids_NT.dtype}; expected integers [N, {T}]"
            )
        if documents.ndim != 2 or documents.shape[1] != 3:
            raise DataError(
                f"documents of shape {documents.shape}; expected [n, 3]: row, start, end"
            )
        num_rows = len(ids_NT)
        if num_rows and not 0 <= ids_NT.min() <= ids_NT.max() < self._vocab_size:
            found = f"ids from {ids_NT.min()} to {ids_NT.max()}"
            raise DataError(
                f"{found}; expected 0 to {self._vocab_size - 1}: is vocab_size that of the "
                "tokenizer?"
            )
        if problem := document_problem(documents, num_rows, T):
            raise DataError(problem)
        done = 0
        while done < num_rows:
            take = min(len(self._block_NT) - self._filled, num_rows - done)
            self._block_NT[self._filled : self._filled + take] = ids_NT[done : done + take]
            first, last = np.searchsorted(documents[:, 0], [done, done + take])
            self._documents.append(documents[first:last] + np.array([self._filled - done, 0, 0]))
            self._filled += take
            done += take
            if self._filled == len(self._block_NT):
                self._write_block()

    def _write_block(self) -> None:
        if self._sink is None:
            # It imports torch, which takes seconds that readers and workers need not spend.
            from webdataset.writer import TarWriter

            self._sink = _HashedFile(self._folder / f"{PARTIAL}{self._shard_file}")
            self._tar = TarWriter(self._sink, encoder=False, mtime=0)
        ids_NT, documents = self._block_NT[: self._filled], np.concatenate(self._documents)
        members = {
            "documents.u16": documents.astype(DOCUMENTS_DTYPE).tobytes(),
            self._dtype: ids_NT.tobytes(),
        }
        # TarWriter sorts the members, so documents come first.
        documents_offset = self._tar.tarstream.offset + TAR_BLOCK
        documents_bytes = len(members["documents.u16"])
        self._tar.write({"__key__": f"{self._num_blocks:09d}", **members})
        self._blocks.append(
            {
                "block_rows": self._filled,
                "ids_offset": ids_offset_after(documents_offset, documents_bytes),
                "ids_crc32": zlib.crc32(members[self._dtype]),
                "documents_offset": documents_offset,
                "documents_bytes": documents_bytes,
                "documents_crc32": zlib.crc32(members["documents.u16"]),
            }
        )
        tokens_N = count_tokens(documents, self._filled)
        totals = self._totals
        totals["largest_id"] = max(totals["largest_id"], int(ids_NT.max()))
        totals["rows"] += self._filled
        totals["tokens"] += int(tokens_N.sum())
        totals["documents"] += len(documents)
        totals["padded_rows"] += int((tokens_N < ids_NT.shape[1]).sum())
        self._num_blocks += 1
        self._filled, self._documents = 0, []
        if sum(block["block_rows"] for block in self._blocks) >= self._rows_per_shard:
            self._finish_shard()

    @property
    def _shard_file(self) -> str:
        return f"shard-{len(self._shards):06d}.tar"

    def _finish_shard(self) -> None:
        if self._sink is None:
            return
        self._tar.close()
        self._sink.close()
        blocks = {
            name: np.array([block[name] for block in self._blocks]) for name in self._blocks[0]
        }
        sha256, rows = self._sink.sha256.hexdigest(), int(blocks["block_rows"].sum())
        self._shards.append(
            Shard(file=self._shard_file, bytes=self._sink.bytes, sha256=sha256, rows=rows, **blocks)
        )
        self._sink, self._blocks = None, []

    def prepare(self) -> Manifest:
        """Write all files of the data set under temporary names; `close` then only renames them.

        A further call only returns the manifest.

        Raises: DataError if no row was written.
        """
        if self._prepared is None:
            if self._filled:
                self._write_block()
            self._finish_shard()
            if not self._shards:
                raise DataError(
                    f"no rows for {self._folder}: the source is empty or every document was "
                    "dropped; check its path"
                )
            content = {**self._header, **self._totals, "shards": tuple(self._shards)}
            manifest = Manifest.model_validate(content)
            sink = _HashedFile(self._folder / f"{PARTIAL}{MANIFEST_FILE}")
            sink.write(manifest.dump())
            sink.close()
            self._prepared = manifest
        return self._prepared

    def remove_old_manifest(self) -> None:
        """Remove the manifest that will be replaced; a folder without one is no data set."""
        for name in MANIFEST_FILES:
            (self._folder / name).unlink(missing_ok=True)
        sync(self._folder)

    def close(self) -> Manifest:
        """Commit and return the manifest; a further call returns it again.

        The commit finishes the last shard, gives the files their names and writes the manifest.

        Raises: DataError if no row was written.
        """
        if self._manifest is None:
            try:
                self._manifest = self._commit(self.prepare())
            except BaseException:
                self._remove()
                raise
        return self._manifest

    def _commit(self, manifest: Manifest) -> Manifest:
        # Empty unless overwrite. The old manifest goes first.
        for old in self._finished_files():
            old.unlink()
        for shard in manifest.shards:
            (self._folder / f"{PARTIAL}{shard.file}").rename(self._folder / shard.file)
        (self._folder / f"{PARTIAL}{MANIFEST_FILE}").rename(self._folder / MANIFEST_FILE)
        self._unlock()
        return manifest

    def _unlock(self) -> None:
        (self._folder / f"{PARTIAL}lock").unlink(missing_ok=True)
        self._lock.close()
        sync(self._folder)

    def _remove(self) -> None:
        if self._sink is not None:
            with contextlib.suppress(OSError):  # on a full disk
                self._tar.close()
            with contextlib.suppress(OSError):
                self._sink.file.close()
        for partial in [
            *self._folder.glob(f"{PARTIAL}*.tar"),
            self._folder / f"{PARTIAL}{MANIFEST_FILE}",
        ]:
            partial.unlink(missing_ok=True)
        self._unlock()
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty: others have put files there
                folder.rmdir()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._manifest is None:
            self._remove()


def verify(
    folder: Path, manifest: Manifest | None = None, *, on_shard: Callable[[], object] | None = None
) -> Iterator[str]:
    """Check every byte of a local data set against its manifest; yield every problem.

    A problem names its shard and block. One shard at a time is held in memory; `on_shard` is called
    after each.

    Raises: DataError if the manifest itself can't be used.
    """
    manifest = manifest or Manifest.load(folder)
    names = {shard.sha256: shard.file for shard in manifest.shards}
    found = {"largest_id": 0, "tokens": 0, "padded_rows": 0, "unknown_tokens": 0}
    sound, first_block = True, 0
    for shard in manifest.shards:
        for problem in _verify_shard(
            folder / shard.file, shard, manifest, first_block, names, found
        ):
            sound = False
            yield problem
        first_block += len(shard.block_rows)
        if on_shard:
            on_shard()
    listing = manifest_path(folder).name
    for name, value in found.items() if sound else ():
        stated = getattr(manifest, name)
        if stated is not None and value != stated:
            yield f"{listing}: {name} is {stated}, but the shards give {value}"
    if sound and (unknown := manifest.unknown_problem()):
        yield f"{listing}: {unknown}"
    for extra in sorted({path.name for path in folder.glob("*.tar")} - set(names.values())):
        yield (
            f"{extra}: is in the folder but not in {listing}; a reader that lists the folder "
            "would read it"
        )


def _verify_shard(
    path: Path,
    shard: Shard,
    manifest: Manifest,
    first_block: int,
    names: Mapping[str, str],
    found: dict[str, int],
) -> Iterator[str]:
    """Yield a shard's problems; add its counts to `found`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        yield f"{shard.file}: can't be read: {error}"
        return
    if len(data) != shard.bytes:
        yield f"{shard.file}: {len(data)} bytes, expected {shard.bytes}"
        return
    if (sha256 := hashlib.sha256(data).hexdigest()) != shard.sha256:
        what = f"a copy of {names[sha256]}" if sha256 in names else f"sha256 {sha256}"
        yield f"{shard.file}: {what}, expected sha256 {shard.sha256}"
    expected = [
        member
        for block, offsets in enumerate(
            np.stack([shard.documents_offset, shard.ids_offset], 1).tolist(), first_block
        )
        for member in zip(
            (f"{block:09d}.documents.u16", f"{block:09d}.{manifest.dtype}"), offsets, strict=True
        )
    ]
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = [(member.name, member.offset_data) for member in tar]
    except tarfile.TarError as error:
        yield f"{shard.file}: not a tar file: {error}"
        return
    for number, (member, wanted) in enumerate(itertools.zip_longest(members, expected)):
        if member != wanted:
            yield (
                f"{shard.file}, block {number // 2}: tar member {number} is {member}, expected "
                f"{wanted}"
            )
            break
    for block in range(len(shard.block_rows)):
        first, size = block_span(manifest, shard, block)
        try:
            ids_NT, documents = decode_block(manifest, shard, block, data[first : first + size])
        except DataError as error:
            yield str(error)
            continue
        if problem := document_problem(
            documents.astype(np.int64), len(ids_NT), manifest.sequence_length
        ):
            yield f"{shard.file}, block {block}: {problem}"
            continue
        if ids_NT.max() >= manifest.vocab_size:
            yield (
                f"{shard.file}, block {block}: id {ids_NT.max()} in a vocabulary of "
                f"{manifest.vocab_size}"
            )
        tokens_N = count_tokens(documents, len(ids_NT))
        found["largest_id"] = max(found["largest_id"], int(ids_NT.max()))
        found["tokens"] += int(tokens_N.sum())
        found["padded_rows"] += int((tokens_N < manifest.sequence_length).sum())
        if isinstance(unknown := manifest.tokenizer.get("unk_token_id"), int):
            found["unknown_tokens"] += count_in_text(ids_NT, documents, unknown)
