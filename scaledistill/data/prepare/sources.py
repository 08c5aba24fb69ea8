"""Read documents from text files, WebDataset text shards and `datasets`.

Inputs: paths or names. Outputs: iterators of documents (`str`), in an order that depends on the
input only. A source either yields every document, empty ones included, or raises a `DataError` that
names file and line. Not handled here: tokenising (`data.prepare.text`), the docstrings of installed
packages (`data.prepare.docstrings`).
"""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from scaledistill.data.prepare.archives import count_files
from scaledistill.data.prepare.compression import (
    COMPRESSIONS,
    ReadProgress,
    StoredError,
    decompressed,
    open_stored,
    seekable,
)
from scaledistill.data.prepare.content import (
    HEAD_BYTES,
    LZMA,
    PARQUET,
    TAR,
    Content,
    binary_content,
    content_of,
    json_form,
)
from scaledistill.data.prepare.longtext import LARGEST_DOCUMENT_BYTES, placed, too_long
from scaledistill.data.prepare.paths import PARQUET_SUFFIXES, check_inputs, first_few
from scaledistill.errors import DataError, counted

logger = logging.getLogger(__name__)

SplitBy = Literal["blank-line", "line", "file"]

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TAR = (".tar", ".tgz")
_TEXT = (".txt", ".text", ".md", "")
_TABLES = (".csv", ".tsv", ".arrow")
"""Read by `datasets` only."""
_LINES_AT_ONCE = 4096
# What `datasets` takes for data in a local folder, and names that hold none.
_OF_DATASETS = (".txt", *_JSON_LINES, *PARQUET_SUFFIXES, *_TABLES)
_NO_DATA = ("LICENSE", "LICENCE", "NOTICE", "README", "REQUIREMENTS")
_SETTINGS = ("config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip")


def expand(patterns: Sequence[str]) -> list[Path]:
    """Return the files named by paths and glob patterns (`**` too).

    They come in the given order, sorted within a glob.

    Raises:
        DataError: a pattern matches nothing, or names a folder, a URL or a special file, or a file
            is empty or given twice.
    """
    paths: list[Path] = []
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise DataError(
                f"input {pattern!r} is a URL or a command; expected a local file: download it first"
            )
        is_plain = os.path.lexists(pattern) or not glob.has_magic(pattern)
        found = [
            Path(name)
            for name in ([pattern] if is_plain else sorted(glob.glob(pattern, recursive=True)))
        ]
        files = found if is_plain else [path for path in found if not os.path.isdir(path)]
        if not files:
            raise DataError(
                f"input pattern {pattern!r} matches no file in {Path.cwd()}; check the pattern"
            )
        if is_plain and os.path.isdir(pattern):
            raise DataError(
                f"input {pattern!r} is a folder; give files or a pattern such as "
                f"'{found[0]}/**/*.txt'"
            )
        paths += files
    check_inputs(paths)
    return paths


def file_documents(
    paths: Sequence[Path],
    *,
    column: str = "text",
    split_by: SplitBy = "blank-line",
    progress: ReadProgress | None = None,
) -> Iterator[str]:
    """Yield the documents of text, JSON-lines and Parquet files, plain or compressed.

    The suffix determines the format. A file without one is read as JSON lines if it holds them,
    else as text.

    Args:
        column: the key or column that holds the text in JSON lines and Parquet.
        split_by: what a document is in a text file: a group of lines between blank ones, a line, or
            the file.

    Raises:
        DataError: a file is missing, damaged, empty, not UTF-8, lacks the column or does not hold
            what its suffix says. An unknown suffix is refused before any file is read.
    """
    for path in paths:
        _check_kind(path)
    has_said = False

    def documents(path: Path, stream: io.BufferedReader) -> Iterator[str]:
        nonlocal has_said
        kind = _kind(path)
        head = stream.peek(HEAD_BYTES)
        if kind in PARQUET_SUFFIXES:
            _check_content(path, head, PARQUET)
            return _parquet_documents(path, stream, column)
        _check_content(path, head, None)
        form = json_form(head)
        is_json = kind in _JSON_LINES or (not kind and form == "lines")
        if form in ("array", "object") or (form == "lines" and not is_json):
            raise DataError(_json_in_another_form(path, form, column))
        if is_json and not kind and not has_said:
            logger.info(
                "%s holds JSON lines: the text is column %r, here and in other files like it",
                path,
                column,
            )
            has_said = True
        return (
            _json_documents(path, stream, column)
            if is_json
            else _text_documents(path, stream, split_by)
        )

    return _documents_of_files(paths, documents, progress)


def webdataset_documents(
    paths: Sequence[Path], *, column: str = "text", progress: ReadProgress | None = None
) -> Iterator[str]:
    """Yield the text of every sample of WebDataset tars.

    The text is the sample's `.txt` member, else key `column` of its `.json` member. Each archive is
    walked to its end mark first, because webdataset silently stops at a damaged header or a cut.

    Raises:
        DataError: an archive is damaged or cut, or a sample has no such text.
    """

    def documents(path: Path, stream: io.BufferedReader) -> Iterator[str]:
        _check_content(path, stream.peek(HEAD_BYTES), TAR)
        return _tar_documents(path, stream, column)

    return _documents_of_files(paths, documents, progress)


def dataset_documents(
    name: str, *, config: str | None, split: str, column: str = "text"
) -> Iterator[str]:
    """Yield one column of a `datasets` data set (a Hub name or a local folder), streamed.

    Raises:
        DataError: the data set, configuration, split or column is not available.
    """
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    datasets.disable_progress_bars()
    _read_every_byte()
    label = f"data set {name!r}, config {config!r}, split {split!r}"
    number = 0
    try:
        if not os.path.isdir(name):
            _offline_unless_reachable(name)
        if os.path.isdir(name) and any(
            os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")
        ):
            raise DataError(
                f"data set {name!r} was written by save_to_disk, perhaps with cached copies; write "
                "it as Parquet (load_from_disk(FOLDER).to_parquet(FILE)) and give that file"
            )
        builder = datasets.load_dataset_builder(name, config)
        if os.path.isdir(name):
            _check_all_chosen(name, builder.config.data_files or {})
        if hasattr(builder.config, "fragment_scan_options"):  # of Parquet
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(
                page_checksum_verification=True
            )
        rows = builder.as_streaming_dataset(split=split)
        if column in (rows.column_names or []):
            rows = rows.select_columns([column])  # Parquet then reads nothing else
        if rows.info.builder_name == "text":
            logger.warning(
                "%s: each line of its text files is a document; for documents of several lines, "
                "give the files instead of --dataset, such as '%s/**/*.txt'",
                *(label, name),
            )
        for number, row in enumerate(rows, 1):
            where = f"{label}, row {number}"
            yield placed(_column_of(row, column, where), where)
    except DataError:
        raise
    except ConnectionError as error:
        if number:
            raise DataError(
                f"{label}: the connection was lost after {counted(number, 'row')} ({error}); run "
                "the command again, or fetch the data set first and give its folder"
            ) from error
        raise DataError(
            f"{label} is neither a local folder nor cached, and the Hub cannot be reached; correct "
            "--dataset, or fetch it where there is a network and give its folder"
        ) from error
    except StoredError as error:
        raise DataError(f"{label}: one of its files {error}") from error
    except TypeError as error:  # other types in a later file, perhaps in a column that is not read
        reason = " ".join(str(error).split())
        raise DataError(
            f"{label}, row {number + 1} cannot be read: {reason}; give its files instead of "
            "--dataset, then --column alone is read"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{label} cannot be read: {error}; check --dataset, --dataset-config and --split"
        ) from error


def _check_all_chosen(folder: str, chosen: Mapping[str, Iterable[str]]) -> None:
    """Raise DataError if `datasets` would leave out data files of a local folder.

    It reads files of the most frequent kind only, and if there are names with `train` or `test` in
    them, those only. What a README.md or .huggingface.yaml chooses is not checked.

    Args:
        folder: the folder.
        chosen: the files that it reads, by split.
    """
    from huggingface_hub import metadata_load

    readme, settings = Path(folder, "README.md"), Path(folder, ".huggingface.yaml")
    if settings.is_file() or (readme.is_file() and "configs" in (metadata_load(readme) or {})):
        return
    read = {os.path.realpath(path) for paths in chosen.values() for path in paths}
    left_out = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        left_out += [
            path
            for name in sorted(names)
            if not name.startswith((".", "_"))
            and name not in _SETTINGS
            and _kind(path := Path(place, name)) in _OF_DATASETS
            and path.stem.partition(".")[0].upper() not in _NO_DATA
            and os.path.realpath(path) not in read
        ]
    if left_out:
        raise DataError(
            f"data set {folder!r}: {counted(len(read), 'file')} would be read, but not "
            f"{first_few(left_out)}: `datasets` reads one kind of file, and prefers "
            "names such as train; give the files instead of --dataset, or move these elsewhere"
        )


def _read_every_byte() -> None:
    """Make `datasets` decompress with this package's readers, for the whole process.

    fsspec's own readers silently stop after a damaged or a first stream. fsspec registers readers
    process-wide; these read everything that its own can.
    """
    from fsspec.compression import register_compression

    for name, suffix in (("gzip", "gz"), ("xz", "xz"), ("zstd", "zst"), ("bz2", "bz2")):
        form = "bzip2" if name == "bz2" else name

        def reader(stored: IO[bytes], mode: str = "rb", form: str = form, **_: object) -> IO[bytes]:
            return decompressed(stored, form)

        register_compression(name, reader, suffix, force=True)


def _offline_unless_reachable(name: str) -> None:
    """Switch `datasets` to its cache if the Hub cannot be reached.

    `load_dataset` would retry for half a minute before it looks into the cache.
    """
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, repo_type="dataset", allow_patterns="README.md")
    except LocalEntryNotFoundError:
        datasets.config.HF_HUB_OFFLINE = True
    except (HfHubHTTPError, HFValidationError):
        pass  # load_dataset has the better message


# --- files ---


def _documents_of_files(
    paths: Sequence[Path],
    documents: Callable[[Path, io.BufferedReader], Iterator[str]],
    progress: ReadProgress | None,
) -> Iterator[str]:
    """Chain the documents of the files; turn errors of damaged files into `DataError`."""
    progress = progress or ReadProgress()
    progress.total_bytes = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    for path in paths:
        is_empty = True
        bytes_before = progress.done_bytes
        try:
            with open_stored(path, progress) as stream:
                for document in documents(path, stream):
                    is_empty = False
                    yield document
            progress.done_bytes = bytes_before + os.path.getsize(path)
        except StoredError as error:
            raise DataError(f"{path} {error}") from error
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}; check the file and the disk"
            ) from error
        if is_empty:
            raise DataError(f"{path} contains no text; remove it from the inputs, or make it again")


def _kind(path: Path) -> str:
    """Return the suffix that determines the format: the last one that is not a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_text(path: Path) -> bool:
    """Return whether a file's name says that it is text, without keys or columns."""
    return _kind(path) in _TEXT[:-1]


def _check_kind(path: Path) -> None:
    """Raise DataError for a file that can be refused by its suffix."""
    kind = _kind(path)
    if kind in _TAR:
        raise DataError(f"{path} is a tar archive; read WebDataset text shards with --wds")
    if kind == ".lzma":
        raise DataError(f"{path} has the suffix of {LZMA.name}, which is not read; {LZMA.remedy}")
    if kind in _TABLES:
        raise DataError(
            f"{path} is a table; read the tables in a folder with --dataset FOLDER --column NAME"
        )
    if kind not in (*_TEXT, *_JSON_LINES, *PARQUET_SUFFIXES):
        raise DataError(
            f"{path}: unknown suffix {kind!r}; expected {', '.join(filter(None, _TEXT))} or none "
            f"(text), {', '.join(_JSON_LINES)} (JSON lines) or {', '.join(PARQUET_SUFFIXES)}, each "
            f"plain or {', '.join(COMPRESSIONS)}; convert it, or name it .txt if it is plain text"
        )


def _check_content(path: Path, head: bytes, expected: Content | None) -> None:
    """Raise DataError if the first bytes are known to be of another kind.

    `expected` None means text or JSON lines.
    """
    found = content_of(head)
    if found is None and expected is None:
        found = binary_content(head)
    if found is not None and found != expected:
        wanted = f"not {expected.name}" if expected else "not text"
        raise DataError(f"{path} holds {found.name}, {wanted}; {found.remedy}")


def _json_in_another_form(path: Path, form: str | None, column: str) -> str:
    if form == "lines":
        return (
            f"{path} holds JSON lines, not text; name it .jsonl, so that its column {column!r} is "
            "read"
        )
    expression = ".[]" if form == "array" else "."
    return (
        f"{path} holds one JSON {form} that spans lines, not one JSON object a line; convert it "
        f"to JSON lines (jq -c '{expression}')"
    )


# --- formats ---


def _decode(data: bytes, where: str, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the text "
            "first (iconv -t utf-8), or decompress it: .gz, .xz, .zst and .bz2 are known"
        ) from error


def _lines(path: Path, stream: IO[bytes]) -> Iterator[str]:
    lines = iter(lambda: stream.readline(LARGEST_DOCUMENT_BYTES + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > LARGEST_DOCUMENT_BYTES:
            raise too_long(f"{path}, line {number}")
        text = _decode(line, str(path), number).rstrip("\r\n")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _text_documents(path: Path, stream: IO[bytes], split_by: SplitBy) -> Iterator[str]:
    if split_by == "line":
        for number, line in enumerate(_lines(path, stream), 1):
            yield placed(line, f"{path}, line {number}")
    elif split_by == "file":
        data = stream.read(LARGEST_DOCUMENT_BYTES + 1)
        if len(data) > LARGEST_DOCUMENT_BYTES:
            raise too_long(str(path))
        if data:
            yield placed(_decode(data, str(path)).removeprefix("\ufeff"), str(path))
    else:
        yield from _groups_of_lines(path, stream)


def _groups_of_lines(path: Path, stream: IO[bytes]) -> Iterator[str]:
    """Yield groups of lines between blank lines.

    A group of millions of lines is joined bit by bit, to save memory.
    """
    joined: list[str] = []
    group: list[str] = []
    first = num_characters = 0
    for number, line in enumerate(_lines(path, stream), 1):
        if line.strip():
            first = first if group or joined else number
            group.append(line)
            if len(group) == _LINES_AT_ONCE:
                joined.append("\n".join(group))
                group = []
                num_characters += len(joined[-1])
                if num_characters > LARGEST_DOCUMENT_BYTES:
                    raise too_long(f"{path}, line {first}")
        elif group or joined:
            yield placed("\n".join([*joined, *group]), f"{path}, line {first}")
            joined, group, num_characters = [], [], 0
    if group or joined:
        yield placed("\n".join([*joined, *group]), f"{path}, line {first}")


def _json_documents(path: Path, stream: IO[bytes], column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path, stream), 1):
        where = f"{path}, line {number}"
        yield placed(_json_document(line, column, where), where) if line.strip() else ""


def _json_document(text: str, column: str, where: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: of JSON, or a very long number
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: found a JSON {type(record).__name__}; expected an object with the key "
            f"{column!r}; an array becomes lines with jq -c '.[]'"
        )
    return _column_of(record, column, where)


def _column_of(record: dict[str, Any], column: str, where: str) -> str:
    if column not in record:
        raise DataError(
            f"{where}: no column {column!r} among {sorted(record)}; name the text with --column"
        )
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: column {column!r} holds {type(text).__name__}, not text; choose another "
            "--column"
        )
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
            table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            if column not in table.schema_arrow.names:
                names = sorted(table.schema_arrow.names)
                raise DataError(
                    f"{path}: no column {column!r} among {names}; name the text with --column"
                )
            first = 1
            # Small batches, because a row may be a whole book.
            for batch in table.iter_batches(batch_size=128, columns=[column]):
                for number, text in enumerate(batch.column(0).to_pylist(), first):
                    where = f"{path}, row {number}"
                    yield placed(_column_of({column: text}, column, where), where)
                first += len(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} is damaged or not Parquet: {error}; fetch or make it again"
            ) from error


def _tar_documents(path: Path, stream: IO[bytes], column: str) -> Iterator[str]:
    # Set before the import, which reads it: webdataset must not open files or run commands itself.
    os.environ["WDS_SECURE"] = "1"
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with seekable(path, stream) as file:
        num_members = count_files(path, file)
        file.seek(0)
        seen: set[str] = set()
        try:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                members = {name for name in sample if not name.startswith("__")}
                num_members -= len(members)
                where = f"{path}, sample {sample['__key__']!r}"
                if sample["__key__"] in seen:
                    raise DataError(
                        f"{where}: its members do not follow each other; make the archive again "
                        "with tar --sort=name"
                    )
                seen.add(sample["__key__"])
                if "txt" in members:
                    yield placed(_decode(sample["txt"], where).removeprefix("\ufeff"), where)
                elif "json" in members:
                    yield placed(
                        _json_document(_decode(sample["json"], where), column, where), where
                    )
                else:
                    raise DataError(
                        f"{where}: found {sorted(members)}; expected a .txt or .json member"
                    )
        except (tarfile.TarError, ValueError) as error:
            raise DataError(
                f"{path} is damaged or not a WebDataset: {error.args[0]}; fetch or make it again"
            ) from error
    if num_members:
        raise DataError(
            f"{path}: {num_members} members are not named key.extension, as in a WebDataset; "
            "rename them"
        )
