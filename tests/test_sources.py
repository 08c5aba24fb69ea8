"""Text sources: every format and compression gives the same documents; damage is an error that
names file and line.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from scaledistill.data.prepare.archives import count_files
from scaledistill.data.prepare.compression import ReadProgress
from scaledistill.data.prepare.docstrings import installed_docs
from scaledistill.data.prepare.sources import (
    dataset_documents,
    expand,
    file_documents,
    webdataset_documents,
)
from scaledistill.errors import DataError

DOCUMENTS = ["first line\nsecond — line", "日本語", "last"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
}


def parquet_bytes(columns: dict[str, list[object]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def json_lines(documents: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in documents).encode()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- what is read
#


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "tar"])
def test_every_format_and_compression(tmp_path: Path, kind: str, compression: str) -> None:
    data = {
        "txt": "\n\n".join(DOCUMENTS).encode(),
        "jsonl": json_lines(DOCUMENTS),
        "parquet": parquet_bytes({"id": [1, 2, 3], "text": list(DOCUMENTS)}),
        "tar": tar_bytes({f"{i}.txt": text.encode() for i, text in enumerate(DOCUMENTS)}),
    }[kind]
    path = write(tmp_path / f"input.{kind}{compression}", COMPRESS[compression](data))
    progress = ReadProgress()
    read = webdataset_documents if kind == "tar" else file_documents
    assert list(read([path, path], progress=progress)) == DOCUMENTS * 2
    assert progress.done_bytes == progress.total_bytes == 2 * path.stat().st_size


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst", ".bz2"])
def test_concatenated_streams_are_read_to_the_end(tmp_path: Path, compression: str) -> None:
    text = "".join(f"line {i}\n" for i in range(50_000))
    data = COMPRESS[compression](text.encode()) + COMPRESS[compression](b"the end\n")
    path = write(tmp_path / f"input.txt{compression}", data)
    assert list(file_documents([path], split_by="line")) == [*text.splitlines(), "the end"]


def test_what_a_document_is_in_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path / "input.txt", "\ufeff\n\na\r\nb\n \t\n\n\nc\n".encode())
    assert list(file_documents([path])) == ["a\nb", "c"]
    assert list(file_documents([path], split_by="line")) == ["", "", "a", "b", " \t", "", "", "c"]
    assert list(file_documents([path], split_by="file")) == ["\n\na\r\nb\n \t\n\n\nc\n"]


def test_columns_and_empty_values(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", b'{"body": "one"}\n{"body": null}\n\n{"body": ""}\n')
    table = write(tmp_path / "b.parquet", parquet_bytes({"body": ["one", None, ""]}))
    assert list(file_documents([lines], column="body")) == ["one", "", "", ""]
    assert list(file_documents([table], column="body")) == ["one", "", ""]


def test_webdataset_members(tmp_path: Path) -> None:
    members = {
        "__meta__": b"x",
        "a.txt": b"\xef\xbb\xbfone",
        "a.json": b"{}",
        "b.JSON": b'{"body": "two"}',
        "c/d.cls": b"1",
    }
    path = write(tmp_path / "a.tar", tar_bytes({**members, "c/d.txt": b"three"}))
    assert list(webdataset_documents([path], column="body")) == ["one", "two", "three"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_datasets_folder(tmp_path: Path, kind: str) -> None:
    data = {
        "jsonl": json_lines(DOCUMENTS, "body"),
        "parquet": parquet_bytes({"body": list(DOCUMENTS)}),
    }[kind]
    write(tmp_path / f"train.{kind}", data)
    assert (
        list(dataset_documents(str(tmp_path), config=None, split="train", column="body"))
        == DOCUMENTS
    )
    with pytest.raises(
        DataError, match=r"row 1: no column 'text' among .*'body'.*; name the text with --column"
    ):
        list(dataset_documents(str(tmp_path), config=None, split="train"))
    with pytest.raises(
        DataError, match=r"split 'test' cannot be read: .*; check --dataset, --dataset-config"
    ):
        list(dataset_documents(str(tmp_path), config=None, split="test"))


def test_a_datasets_folder_of_text_is_read_by_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.txt", b"one\ntwo\n")
    assert list(dataset_documents(str(tmp_path), config=None, split="train")) == ["one", "two"]
    assert "each line of its text files is a document; for documents of several" in caplog.text


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        ({"a.jsonl": "one", "b.parquet": "two"}, "a.jsonl"),
        ({"training_notes.jsonl": "one", "books.jsonl": "two"}, "books.jsonl"),
        ({"a.jsonl.gz": "one", "train/b.jsonl": "two"}, "a.jsonl.gz"),
        ({"a.jsonl": "one", "b.jsonl": "two", "c.txt": "three"}, "c.txt"),
    ],
)
def test_no_file_of_a_datasets_folder_is_left_out_silently(
    tmp_path: Path, files: dict[str, str], left_out: str
) -> None:
    def put(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table = name.endswith(".parquet")
        data = parquet_bytes({"text": [text]}) if table else json_lines([text])
        write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)

    for name, text in files.items():
        put(name, text)
    fails(
        dataset_documents(str(tmp_path), config=None, split="train"),
        rf"would be read, but not {tmp_path}/{left_out}: `datasets` reads one kind of file",
    )
    (tmp_path / left_out).unlink()
    write(tmp_path / "LICENSE.txt", b"Do as you like.")
    for name in ("config.json", "dataset_infos.json"):
        write(tmp_path / name, b"{}")
    rest = [text for name, text in files.items() if name != left_out]
    assert list(dataset_documents(str(tmp_path), config=None, split="train")) == rest


def test_a_readme_chooses_the_files_of_a_datasets_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", json_lines([name]))
    write(
        tmp_path / "README.md",
        b"---\nconfigs:\n- config_name: default\n  data_files: b.jsonl\n---\n",
    )
    assert list(dataset_documents(str(tmp_path), config=None, split="train")) == ["b"]


def test_what_save_to_disk_wrote_is_refused(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        fails(
            dataset_documents(str(tmp_path / name), config=None, split="train"),
            r"was written by save_to_disk, .*; write it as Parquet",
        )


def test_other_types_in_a_later_file_of_a_datasets_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "one", "meta": {"x": 1}}\n')
    write(tmp_path / "b.jsonl", b'{"text": "two", "meta": "s"}\n')
    fails(
        dataset_documents(str(tmp_path), config=None, split="train"),
        r"row 2 cannot be read: .*; give its files instead of --dataset, then --column alone",
    )


@pytest.mark.parametrize("by_datasets", [False, True])
def test_checksums_of_parquet_pages_are_compared(tmp_path: Path, by_datasets: bool) -> None:
    path, buffer = tmp_path / "train.parquet", io.BytesIO()
    table = pyarrow.table({"text": [f"document {number}" for number in range(50)]})
    options = {"compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(table, buffer, write_page_checksum=True, **options)
    damaged = buffer.getvalue().replace(b"document 17", b"documend 17")

    if by_datasets:
        from datasets.packaged_modules.parquet.parquet import ParquetConfig

        if not hasattr(ParquetConfig, "fragment_scan_options"):
            pytest.skip("datasets before 4.2 compares none")

    def documents() -> Iterator[str]:
        if by_datasets:
            return dataset_documents(str(tmp_path), config=None, split="train")
        return file_documents([path])

    write(path, damaged)
    fails(documents(), r"(is damaged or not Parquet|cannot be read): .*CRC checksum")
    pyarrow.parquet.write_table(table, path, write_page_checksum=False, **options)
    assert len(list(documents())) == 50


def test_progress_of_archives_counts_each_byte_once(tmp_path: Path) -> None:
    texts = {f"{number}.txt": b"text " * 1000 for number in range(1000)}
    paths = [write(tmp_path / name, tar_bytes(texts)) for name in ("a.tar", "b.tar")]
    progress, size = ReadProgress(), paths[0].stat().st_size
    done = [progress.done_bytes / size for _ in webdataset_documents(paths, progress=progress)]
    assert done[0] < 0.5
    assert done[999] <= 1 + 1e-6 < done[1001] < 1.5
    assert done == sorted(done)
    assert progress.done_bytes == progress.total_bytes == 2 * size


def test_the_members_of_an_archive_take_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tar_bytes({f"{number}.txt": b"x" for number in range(10_000)}))
    tracemalloc.start()
    with path.open("rb") as file:
        assert count_files(path, file) == 10_000
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2_000_000, "tarfile keeps half a kilobyte for each"


def test_no_room_for_a_decompressed_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar.gz", gzip.compress(tar_bytes({"a.txt": b"x"})))

    class Full(io.BufferedRandom):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full() -> Full:
        return Full(io.FileIO(tmp_path / "copy", "w+"))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    fails(
        webdataset_documents([path]),
        rf"a.tar.gz: its decompressed copy does not fit in {tempfile.gettempdir()} \(No space left "
        r"on device, after 0 bytes\); free space there, set TMPDIR",
    )


def test_a_connection_lost_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Rows:
        column_names = None
        info = datasets.DatasetInfo()

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ConnectionError("Server Disconnected")

    builder = SimpleNamespace(
        config=SimpleNamespace(data_files=None), as_streaming_dataset=lambda split: Rows()
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    fails(
        dataset_documents(str(tmp_path), config=None, split="train"),
        r"the connection was lost after 1 row \(Server Disconnected\); run the command again",
    )


def test_a_missing_dataset() -> None:
    with pytest.raises(
        DataError, match=r"data set './nowhere', config 'en', split 'train' cannot be read"
    ):
        list(dataset_documents("./nowhere", config="en", split="train"))


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # put back afterwards
    with pytest.raises(
        DataError,
        match=r"'wikitextt', .* is neither a local folder nor cached, and the Hub cannot be",
    ):
        list(dataset_documents("wikitextt", config=None, split="train"))


def test_installed_docs(tmp_path: Path) -> None:
    first = "The first docstring, long enough to be taken for English text."
    second = "The second docstring, which stands in a class inside a class."
    third = "The third one documents a method, and stands in two modules."
    files = {
        "b/z.py": (
            f'"""{first}"""\nclass A:\n class B:\n  """{second}"""\n  async def c(self):\n   '
            f'"""{third}"""\n'
        ),
        "b/a.py": (
            f'def f():\n  """{third}"""\n  x = """{first} No docstring."""\n  def g():\n    '
            f'"""{second}"""\n'
        ),
        "b/short.py": '"""Too short."""\n',
        "b/table.py": '"""1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"""\n',
        "b/german.py": '"""Größere Änderungen gehören üblicherweise ins Änderungsprotokoll."""\n',
        "b/broken.py": '"""Not Python at all, though it begins like that."""\nthis is not\n',
        "b/surrogate.py": f'"""{first} With \\ud800, half a pair."""\n',
        "b/tests/d.py": f'"""{first} In a test."""\n',
        "b/test_e.py": f'"""{first} In a test too."""\n',
        "a/escape.py": f'"""{first} Here with \\d, an invalid escape."""\n',
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "b" / "gone.py").symlink_to("nowhere.py")
    expected = [f"{first} Here with \\d, an invalid escape.", third, f"{first}\n\n{second}"]
    assert list(installed_docs(folders=[tmp_path])) == expected
    assert list(installed_docs(folders=[tmp_path, tmp_path])) == expected


def test_installed_docs_finds_the_packages_here() -> None:
    documents = installed_docs()
    assert all(len(next(documents)) >= 40 for _ in range(20))


def test_json_lines_without_a_suffix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "AA").mkdir()
    paths = [
        write(tmp_path / "AA" / f"wiki_0{number}{compression}", compress(json_lines(DOCUMENTS)))
        for number, (compression, compress) in enumerate(COMPRESS.items())
    ]
    paths.append(write(tmp_path / "part-00000", "\ufeff\n".encode() + json_lines(["one"])))
    assert list(file_documents(paths)) == DOCUMENTS * len(COMPRESS) + ["", "one"]
    assert (
        caplog.text.count(
            "wiki_00 holds JSON lines: the text is column 'text', here and in other files"
        )
        == 1
    )
    assert len(caplog.records) == 1
    fails(
        file_documents(paths, column="body"),
        r"wiki_00, line 1: no column 'body' among \['id', 'text'\]; name the",
    )
    damaged = json_lines(["one", "two", "three"]).replace(b'two"', b"two")
    fails(file_documents([write(tmp_path / "part-00001", damaged)]), "part-00001, line 2: not JSON")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst", ".bz2"])
def test_a_datasets_folder_of_compressed_files(tmp_path: Path, compression: str) -> None:
    """fsspec's readers would stop, without a word, at padding, damage or a cut."""
    first, second = (
        COMPRESS[compression](json_lines(documents)) for documents in (DOCUMENTS, DOCUMENTS[::-1])
    )
    padding = bytes(4) if compression in (".gz", ".xz") else b""
    path = write(tmp_path / f"train.jsonl{compression}", first + padding + second)
    assert (
        list(dataset_documents(str(tmp_path), config=None, split="train"))
        == DOCUMENTS + DOCUMENTS[::-1]
    )
    for bad in (first + b"X" + second[1:], first + second[:-1], first + b"garbage"):
        path.write_bytes(bad)
        fails(
            dataset_documents(str(tmp_path), config=None, split="train"),
            r"data set .* split 'train': one of its files is damaged or cut short: .*; fetch or "
            r"compress it again",
        )


# --- what is refused
# ------------------------------------------------------------------------------------------------


def fails(documents: Iterator[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(documents)


def test_expanding_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c[1].txt", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(path) for path in expand(["sub/d.txt", "[ab].txt"])] == [
        "sub/d.txt",
        "a.txt",
        "b.txt",
    ]
    assert [str(path) for path in expand(["**/d*", "c[1].txt"])] == ["sub/d.txt", "c[1].txt"]
    (tmp_path / "gone.txt").symlink_to("nowhere")
    for patterns, message in (
        (
            ["nowhere.txt"],
            r"input file 'nowhere.txt' does not exist \(looked in .*\); check the path",
        ),
        (["*.md"], r"input pattern '\*.md' matches no file"),
        (
            ["[ab].*", "gone.txt"],
            r"input file 'gone.txt' is a link to 'nowhere', which does not exist",
        ),
        (
            ["*.txt"],
            r"input file 'gone.txt' is a link to 'nowhere', which does not exist; mend or remove "
            r"the link",
        ),
        (["sub"], r"input 'sub' is a folder; give files or a pattern such as 'sub/\*\*/\*.txt'"),
        (["a.txt", "./a.txt"], r"input file a.txt is given twice"),
        (
            ["pipe:cat a.txt"],
            r"input 'pipe:cat a.txt' is a URL or a command; expected a local file",
        ),
        (["s3://b/a.txt"], r"is a URL or a command"),
    ):
        with pytest.raises(DataError, match=message):
            expand(patterns)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.txt",
            json_lines(DOCUMENTS),
            "a.txt holds JSON lines, not text; name it .jsonl, so that its column 'text' is",
        ),
        ("a.md", json_lines(["one"], "body"), "a.md holds JSON lines, not text; name it .jsonl"),
        (
            "a",
            b'[\n {\n  "text": "one"\n }\n]\n',
            r"a holds one JSON array that spans lines, .* \(jq -c '.\[\]'\)",
        ),
        (
            "a.json",
            b'[{"text": "one"}, {"text": "two"}]',
            r"a.json holds one JSON array .* \(jq -c '.\[\]'\)",
        ),
        (
            "a.jsonl",
            b'{\n "text": "one"\n}\n',
            r"a.jsonl holds one JSON object that spans lines, .* \(jq -c '.'\)",
        ),
        (
            "a.json",
            b"<!DOCTYPE html>",
            "a.json holds an HTML page, not text; extract its text first; if it should be",
        ),
        ("a.txt", b'<?xml version="1.0"?>', "a.txt holds XML, not text; extract its text first"),
        (
            "wiki_00",
            b'<doc id="1" url="',
            "wiki_00 holds the <doc> form of wikiextractor, not text; run wikiextractor",
        ),
        (
            "a",
            parquet_bytes({"text": ["one"]}),
            "a holds a Parquet table, not text; name it .parquet",
        ),
        (
            "a.jsonl",
            parquet_bytes({"text": ["one"]}),
            "a.jsonl holds a Parquet table, not text; name it .parquet",
        ),
        (
            "a.txt",
            tar_bytes({"a.txt": b"one"}),
            "a.txt holds a tar archive, not text; read WebDataset text shards with",
        ),
        (
            "a.parquet",
            tar_bytes({"a.txt": b"one"}),
            "a.parquet holds a tar archive, not a Parquet table; read WebD",
        ),
        ("a", b"%PDF-1.4", "a holds a PDF document, not text; extract its text first"),
        (
            "a",
            b"text\0\1\2",
            "a holds 1 NUL bytes among its first 7, like binary data or UTF-16 text, not text; "
            "conv",
        ),
        (
            "a.txt",
            "text".encode("utf-16"),
            "a.txt holds UTF-16 text, not text; convert it first .iconv -f utf-16",
        ),
        (
            "a.txt",
            gzip.compress(b"text", mtime=0),
            "a.txt holds gzip data, which its suffix does not say; give it the suffix .gz",
        ),
        (
            "a",
            lzma.compress(b"a", lzma.FORMAT_ALONE),
            "a holds data in the legacy .lzma format, not text; it cannot be",
        ),
    ],
)
def test_content_that_is_not_what_the_name_says(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    fails(file_documents([write(tmp_path / name, data)]), message)
    if not data.startswith(b"\x1f\x8b"):
        fails(
            file_documents([write(tmp_path / f"{name}.xz", lzma.compress(data))]),
            message.replace(name, f"{name}.xz", 1),
        )


def test_archives_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", gzip.compress(tar_bytes({"a.txt": b"one"})))
    fails(
        webdataset_documents([path]),
        "a.tar holds gzip data, which its suffix does not say; give it the suffix .gz",
    )
    write(path, parquet_bytes({"text": ["one"]}))
    fails(
        webdataset_documents([path]),
        "a.tar holds a Parquet table, not a tar archive; name it .parquet",
    )
    tgz = write(tmp_path / "a.tgz", gzip.compress(tar_bytes({"a.txt": b"one"})) + b"garbage")
    fails(
        webdataset_documents([tgz]),
        "a.tgz is damaged or cut short: b'garbag' follows gzip member 1",
    )


def test_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come whole, whatever the number of their lines, and know their line; the longest are
    refused.
    """
    monkeypatch.setattr("scaledistill.data.prepare.sources._LINES_AT_ONCE", 7)
    for count in (6, 7, 8, 20, 21):
        lines = [f"line {i}" for i in range(count)]
        path = write(tmp_path / "a.txt", ("\n\n" + "\n".join(lines) + "\n\nlast").encode())
        assert list(file_documents([path])) == ["\n".join(lines), "last"]
    monkeypatch.setattr("scaledistill.data.prepare.longtext.LONG_CHARACTERS", 20)
    found = list(
        file_documents([path, write(tmp_path / "b.jsonl", json_lines(["short", "long " * 20]))])
    )
    assert [getattr(document, "where", None) for document in found] == [
        f"{path}, line 3",
        None,
        None,
        f"{tmp_path}/b.jsonl, line 2",
    ]
    monkeypatch.setattr("scaledistill.data.prepare.sources.LARGEST_DOCUMENT_BYTES", 60)
    message = (
        "one document of more than the limit of 1,024 MiB; if each line of the file is a "
        "document, use --documents line"
    )
    fails(file_documents([path]), f"a.txt, line 3: {message}")
    fails(file_documents([path], split_by="file"), f"a.txt: {message}")
    fails(
        file_documents([write(tmp_path / "c.jsonl", json_lines(["one", "long " * 20]))]),
        f"c.jsonl, line 2: {message}",
    )
    assert len(list(file_documents([path], split_by="line"))) == 25


def test_bad_utf8_names_the_line(tmp_path: Path) -> None:
    bad = b"good\n\ngoed\n" + "schön\n".encode("latin-1")
    message = r"bad.*, line 4: byte 0xf6 is not UTF-8; convert the text first"
    for path in (
        write(tmp_path / "bad.txt", bad),
        write(tmp_path / "bad.txt.gz", gzip.compress(bad)),
    ):
        fails(file_documents([path]), message)
        fails(file_documents([path], split_by="file"), message)
    fails(
        file_documents([write(tmp_path / "bad.jsonl", b'{"text": "\xff"}')]),
        r"bad.jsonl, line 1: byte 0xff",
    )
    tar = write(tmp_path / "bad.tar", tar_bytes({"7.txt": b"a\n\xff"}))
    fails(webdataset_documents([tar]), r"bad.tar, sample '7', line 2: byte 0xff is not UTF-8")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst", ".bz2"])
def test_broken_compression(tmp_path: Path, compression: str) -> None:
    text = "".join(f"line {i * i}\n" for i in range(30_000)).encode()
    data = COMPRESS[compression](text)
    message = r"is damaged or cut short: .*; fetch or compress it again"
    for bad in (data[:-1], data[: len(data) // 2], data[:1]):
        fails(file_documents([write(tmp_path / f"a.txt{compression}", bad)]), message)
    misnamed = write(tmp_path / f"a.txt{compression}", b"plain text, misnamed")
    fails(
        file_documents([misnamed]),
        r"is not a \w+ file: it begins with b'plain text, misn'; fetch it again, or correct its",
    )
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0x10
    if compression != ".zst":  # zstd's checksum is optional, and off in this file
        fails(
            file_documents([write(tmp_path / f"b.txt{compression}", bytes(flipped))]),
            rf"{message}|is not UTF-8",
        )


def test_empty_and_wrong_files(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.txt", b"")
    for split_by in ("blank-line", "line", "file"):
        fails(
            file_documents([empty], split_by=split_by),
            r"empty.txt contains no text; remove it from the inputs",
        )
    fails(file_documents([write(tmp_path / "blank.txt", b"\n \n")]), "blank.txt contains no text")
    fails(
        file_documents([write(tmp_path / "no.parquet", parquet_bytes({"text": []}))]),
        "contains no text",
    )
    fails(webdataset_documents([write(tmp_path / "no.tar", tar_bytes({}))]), "contains no text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar.gz", "a.tar.gz is a tar archive; read WebDataset text shards with --wds"),
        (
            "a.doc",
            r"a.doc: unknown suffix '.doc'; expected .txt, .text, .md or none \(text\), .jsonl, .* "
            r"name it .txt if",
        ),
        ("a.csv.xz", r"a.csv.xz is a table; .* --dataset FOLDER --column NAME"),
        ("a.doc.xz", r"a.doc.xz: unknown suffix '.doc'"),
        ("a.txt.lz4", r"unknown suffix '.lz4'; .* each plain or .gz, .xz, .zst, .bz2"),
        (
            "a.txt.lzma",
            r"a.txt.lzma has the suffix of data in the legacy .lzma format, which is not read; "
            r".* xz -dc FILE \|",
        ),
    ],
)
def test_unknown_kinds_are_refused_at_once(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        file_documents([tmp_path / name])
    for kind in ("README", "a.TEXT", "b.md"):
        assert list(file_documents([write(tmp_path / kind, b"one")])) == ["one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a.jsonl, line 2: not JSON \(.*\); expected one JSON object"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"a.jsonl, line 2: not JSON \(Exceeds the"),
        (
            b'["text"]',
            r"line 2: found a JSON list; expected an object with the key 'text'; an array becomes "
            r"lines with",
        ),
        (
            b'{"body": 1, "id": 2}',
            r"line 2: no column 'text' among \['body', 'id'\]; name the text with --column",
        ),
        (b'{"text": 7}', r"line 2: column 'text' holds int, not text; choose another --column"),
        (b'{"text": "\\ud800"}', r"line 2: column 'text' holds half a surrogate pair at 0"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: bytes, message: str) -> None:
    fails(
        file_documents([write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")]), message
    )
    sample = write(tmp_path / "a.tar", tar_bytes({"k.json": line}))
    fails(
        webdataset_documents([sample]),
        message.replace("a.jsonl, ", "").replace("line 2", "a.tar, sample 'k'"),
    )


def test_bad_parquet(tmp_path: Path) -> None:
    tables = [{"text": ["one"]}, {"text": []}, {"text": []}]
    paths = [
        write(tmp_path / f"{number}.parquet", parquet_bytes(table))
        for number, table in enumerate(tables)
    ]
    with pytest.raises(
        DataError, match=r"^2 input files are empty, of 3: .*1.parquet, .*2.parquet;"
    ):
        expand(list(map(str, paths)))
    good = parquet_bytes({"body": ["x" * 1000], "id": [1]})
    path = write(tmp_path / "a.parquet", good)
    fails(
        file_documents([path]),
        r"a.parquet: no column 'text' among \['body', 'id'\]; name the text with --column",
    )
    fails(file_documents([path], column="id"), r"a.parquet, row 1: column 'id' holds int, not text")
    for bad in (b"", b"text", good[:-20], good[:40] + bytes(20) + good[60:]):
        fails(
            file_documents([write(path, bad)], column="body"),
            r"a.parquet is damaged or not Parquet: ",
        )


def test_samples_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    fails(
        webdataset_documents([write(path, tar_bytes({"a.txt": b"x", "b.cls": b"1"}))]),
        r"a.tar, sample 'b': found \['cls'\]; expected a .txt or .json member",
    )
    fails(
        webdataset_documents([write(path, tar_bytes({"a.txt": b"x", "README": b"1"}))]),
        r"a.tar: 1 members are not named key.extension, as in a WebDataset",
    )
    fails(
        webdataset_documents([write(path, tar_bytes({"a.txt": b"x"}) * 2)]),
        "another archive, at byte 1024, after 1",
    )
    by_kind = {"a.txt": b"x", "b.txt": b"y", "a.json": b"{}", "b.json": b"{}"}
    fails(
        webdataset_documents([write(path, tar_bytes(by_kind))]),
        r"a.tar, sample 'a': its members do not follow each other; make the archive again with",
    )
    members = tar_bytes({"a.txt": b"x", "b.txt": b"y"}).replace(b"b.txt", b"a.txt")
    fails(webdataset_documents([write(path, members)]), r"a.tar: .*damaged|a.tar is damaged")


def test_damaged_tars_are_never_read_in_part(tmp_path: Path) -> None:
    """Cut at every block, and one bit of every header flipped: webdataset alone would end quietly
    at most of them.
    """
    texts = [f"document {i} ".encode() * 60 for i in range(6)]
    data = tar_bytes({f"{i}.txt": text for i, text in enumerate(texts)})
    end = data.rindex(b"document") // 512 * 512 + 512
    path = tmp_path / "a.tar"
    for cut in [*range(0, end + 1024, 512), 5, 700, end - 1]:
        fails(webdataset_documents([write(path, data[:cut])]), r"a.tar (is|holds)|a.tar: ")
    headers = [at for at in range(0, end, 512) if data[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == len(texts)
    for at in headers:
        flipped = bytearray(data)
        flipped[at + 124 + 9] ^= 1  # a digit of the size
        fails(webdataset_documents([write(path, bytes(flipped))]), r"a.tar(:| is) .*damaged")
    assert len(list(webdataset_documents([write(path, data)]))) == len(texts)
