"""Text sources: files, WebDataset text shards and `datasets`.

In: paths or names. Out: iterators of documents (`str`), in an order that depends on the input alone. A source either
gives every document, empty ones included, or raises a `DataError` that names file and line. Tokenising is left to
`data.text`; the docstrings of installed packages are a source of their own, `data.docstrings`.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from scaledistill.data.compression import BROKEN, COMPRESSIONS, READ_BYTES, ReadProgress, open_stored, seekable
from scaledistill.errors import DataError

SplitBy = Literal["blank-line", "line", "file"]

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet", ".pq")
_TAR = (".tar", ".tgz")
_TEXT = (".txt", ".text", ".md", "")


def expand(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the paths and glob patterns (`**` too) name: in the given order, sorted within a glob.

    Raises:
        DataError: a pattern names nothing, a folder or a URL, or a file comes twice.
    """
    paths: list[Path] = []
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise DataError(f"input {pattern!r} is a URL or a command; expected a local file: download it first")
        is_plain = os.path.lexists(pattern) or not glob.has_magic(pattern)
        found = [Path(name) for name in ([pattern] if is_plain else sorted(glob.glob(pattern, recursive=True)))]
        files = found if is_plain else [path for path in found if not path.is_dir()]
        if not files:
            raise DataError(f"input pattern {pattern!r} matches no file in {Path.cwd()}; check the pattern")
        for path in files:
            if path.is_dir():
                raise DataError(f"input {pattern!r} is a folder; give files or a pattern such as '{path}/**/*.txt'")
            if not path.is_file():
                raise DataError(f"input file {pattern!r} does not exist (looked in {Path.cwd()}); check the path")
        paths += files
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise DataError(f"input file {path} is given twice; its documents would count double: name it once")
        seen.add(path.resolve())
    return paths


def file_documents(
    paths: Sequence[Path],
    *,
    column: str = "text",
    split_by: SplitBy = "blank-line",
    progress: ReadProgress | None = None,
) -> Iterator[str]:
    """Yield the documents of text, JSON-lines and Parquet files, told by their suffix, each plain or .gz, .xz, .zst.

    Args:
        column: the key or column that holds the text in JSON lines and Parquet.
        split_by: what a document is in a text file: a group of lines between blank ones, a line, or the file.

    Raises:
        DataError: a file is missing, damaged, empty, not UTF-8, lacks the column or, told at once, is of another kind.
    """
    for path in paths:
        if _kind(path) in _TAR:
            raise DataError(f"{path} is a tar archive; read WebDataset text shards with --wds")
        if _kind(path) not in (*_TEXT, *_JSON_LINES, *_PARQUET):
            raise DataError(
                f"{path}: unknown suffix {_kind(path)!r}; expected {', '.join(filter(None, _TEXT))} or none (text), "
                f"{', '.join(_JSON_LINES)} (JSON lines) or {', '.join(_PARQUET)}, each plain or "
                f"{', '.join(COMPRESSIONS)}; convert it, or name it .txt if it is plain text"
            )

    def documents(path: Path, stream: IO[bytes]) -> Iterator[str]:
        kind = _kind(path)
        if kind in _PARQUET:
            return _parquet_documents(path, stream, column)
        if kind in _JSON_LINES:
            return _json_documents(path, stream, column)
        return _text_documents(path, stream, split_by)

    return _documents_of_files(paths, documents, progress)


def webdataset_documents(
    paths: Sequence[Path], *, column: str = "text", progress: ReadProgress | None = None
) -> Iterator[str]:
    """Yield the text of every sample of WebDataset tars: its `.txt` member, else key `column` of its `.json` member.

    Each archive is walked to its end mark first, because webdataset ends quietly at a damaged header or a cut.

    Raises:
        DataError: an archive is damaged or cut, or a sample has no such text.
    """
    return _documents_of_files(paths, lambda path, stream: _tar_documents(path, stream, column), progress)


def dataset_documents(name: str, *, config: str | None, split: str, column: str = "text") -> Iterator[str]:
    """Yield one column of a `datasets` data set (a Hub name or a local folder), streamed.

    Raises:
        DataError: the data set, configuration, split or column cannot be had.
    """
    import datasets

    datasets.disable_progress_bars()
    label = f"data set {name!r}, config {config!r}, split {split!r}"
    try:
        if not os.path.isdir(name):
            _offline_unless_reachable(name)
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        if column in (rows.column_names or []):
            rows = rows.select_columns([column])  # of Parquet, nothing else is read then
        for number, row in enumerate(rows, 1):
            yield _column_of(row, column, f"{label}, row {number}")
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{label} is neither a local folder nor cached, and the Hub cannot be reached; correct --dataset, or fetch "
            "it where there is a network and give its folder"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{label} cannot be read: {error}; check --dataset, --dataset-config and --split") from error


def _offline_unless_reachable(name: str) -> None:
    """Ask the Hub once: `load_dataset` would try for half a minute before it looks into its cache."""
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, repo_type="dataset", allow_patterns="README.md")
    except LocalEntryNotFoundError:
        datasets.config.HF_HUB_OFFLINE = True
    except (HfHubHTTPError, HFValidationError):
        pass  # load_dataset says it better


# --- files -----------------------------------------------------------------------------------------------------------


def _documents_of_files(
    paths: Sequence[Path],
    documents: Callable[[Path, IO[bytes]], Iterator[str]],
    progress: ReadProgress | None,
) -> Iterator[str]:
    """Chain the documents of the files; turn what a damaged file raises into `DataError`."""
    progress = progress or ReadProgress()
    progress.total_bytes = sum(path.stat().st_size for path in paths)
    for path in paths:
        is_empty = True
        bytes_before = progress.done_bytes
        try:
            with open_stored(path, progress) as stream:
                for document in documents(path, stream):
                    is_empty = False
                    yield document
        except BROKEN as error:
            raise DataError(f"{path} is damaged or cut short: {error}; fetch or compress it again") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}; check the file and the disk") from error
        if is_empty:
            raise DataError(f"{path} holds no document; leave it out, or make it again")
        progress.done_bytes = bytes_before + path.stat().st_size


def _kind(path: Path) -> str:
    """The suffix that tells the format: the last one that is not a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


# --- formats ---------------------------------------------------------------------------------------------------------


def _decode(data: bytes, where: str, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the text first "
            "(iconv -t utf-8), or decompress it: .gz, .xz and .zst are known"
        ) from error


def _lines(path: Path, stream: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        text = _decode(line, str(path), number).rstrip("\r\n")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _text_documents(path: Path, stream: IO[bytes], split_by: SplitBy) -> Iterator[str]:
    if split_by == "line":
        yield from _lines(path, stream)
    elif split_by == "file":
        if data := stream.read():
            yield _decode(data, str(path)).removeprefix("\ufeff")
    else:
        group: list[str] = []
        for line in _lines(path, stream):
            if line.strip():
                group.append(line)
            elif group:
                yield "\n".join(group)
                group = []
        if group:
            yield "\n".join(group)


def _json_documents(path: Path, stream: IO[bytes], column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path, stream), 1):
        yield _json_document(line, column, f"{path}, line {number}") if line.strip() else ""


def _json_document(text: str, column: str, where: str) -> str:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found a JSON {type(record).__name__}; expected an object with the key {column!r}")
    return _column_of(record, column, where)


def _column_of(record: dict[str, Any], column: str, where: str) -> str:
    if column not in record:
        raise DataError(f"{where}: no column {column!r} among {sorted(record)}; name the text with --column")
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: column {column!r} holds {type(text).__name__}, not text; choose another --column")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: column {column!r} holds half a surrogate pair at {error.start}; repair it"
        ) from error
    return text


def _parquet_documents(path: Path, stream: IO[bytes], column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with seekable(path, stream) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if column not in table.schema_arrow.names:
                names = sorted(table.schema_arrow.names)
                raise DataError(f"{path}: no column {column!r} among {names}; name the text with --column")
            first = 1
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for number, text in enumerate(batch.column(0).to_pylist(), first):
                    yield _column_of({column: text}, column, f"{path}, row {number}")
                first += len(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged or not Parquet: {error}; fetch or make it again") from error


def _tar_documents(path: Path, stream: IO[bytes], column: str) -> Iterator[str]:
    os.environ["WDS_SECURE"] = "1"  # before the import, which reads it; ours alone opens files below
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with seekable(path, stream) as file:
        num_members = _check_tar(path, file)
        file.seek(0)
        try:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                members = {name for name in sample if not name.startswith("__")}
                num_members -= len(members)
                where = f"{path}, sample {sample['__key__']!r}"
                if "txt" in members:
                    yield _decode(sample["txt"], where)
                elif "json" in members:
                    yield _json_document(_decode(sample["json"], where), column, where)
                else:
                    raise DataError(f"{where}: found {sorted(members)}; expected a .txt or .json member")
        except (tarfile.TarError, ValueError) as error:
            raise DataError(f"{path} is damaged or no WebDataset: {error.args[0]}; fetch or make it again") from error
    if num_members:
        raise DataError(f"{path}: {num_members} members are not named key.extension, as in a WebDataset; rename them")


def _check_tar(path: Path, file: IO[bytes]) -> int:
    """Walk the archive to its end mark and return how many files webdataset has to give.

    tarfile, and so webdataset, takes a damaged header or a missing end for the end of the archive; so what follows the
    last member must be the end mark: zeros alone, two blocks of them at least.
    """
    num_files = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if problem := _member_problem(member):
                    raise DataError(
                        f"{path}: member {member.name!r} {problem}; expected plain files in folders of the archive, "
                        "make it again from those"
                    )
                # Names between double underscores are webdataset's own.
                num_files += member.isreg() and not member.name.split("/")[0].startswith("__")
            end = archive.offset
    except (tarfile.TarError, MemoryError) as error:  # tarfile reads as many bytes as an extended header declares
        reason = str(error) or "a header declares more than memory holds"
        raise DataError(f"{path} is damaged or not a tar archive: {reason}; fetch or make it again") from error
    file.seek(end)
    rest_bytes = 0
    while piece := file.read(READ_BYTES):
        rest_bytes += len(piece)
        if piece.count(0) != len(piece):
            raise DataError(
                f"{path}: a damaged header, or another archive, at byte {end}, after {num_files} files; make it again"
            )
    if rest_bytes < 2 * tarfile.BLOCKSIZE:
        raise DataError(f"{path} is cut short: no end mark at byte {end}, after {num_files} files; fetch it again")
    return num_files


def _member_problem(member: tarfile.TarInfo) -> str | None:
    """Say why a member is not read, if it isn't: nothing is unpacked here, but webdataset would skip links silently."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "has a name that leaves its folder"
    if member.issparse():  # reads as zeros of any size that it declares
        return "is a sparse file"
    return None if member.isreg() or member.isdir() else "is not a plain file"
