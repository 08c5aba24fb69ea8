from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaledistill.data import manifest, manifest_text
from scaledistill.data.blocks import count_in_text
from scaledistill.data.manifest import (
    COLUMNS,
    _content_sha256,
)
from scaledistill.data.shards import Manifest, ShardWriter, verify
from scaledistill.errors import ConfigError, DataError

T = 16
ROWS = 150
TOKENIZER = {"name": "test", "sha256": "ab" * 32}
SETTINGS: dict[str, Any] = {
    "sequence_length": T,
    "vocab_size": 3000,
    "tokenizer": TOKENIZER,
    "pad_token_id": 0,
    "rows_per_block": 8,
    "rows_per_shard": 64,
}


def make_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows whose content encodes their number; every seventh ends in padding."""
    ids_NT = np.arange(ROWS * T).reshape(ROWS, T) % 2999 + 1
    documents = [
        (row, *span) for row in range(ROWS) for span in ((0, 5), (5, 12 if row % 7 == 0 else T))
    ]
    ids_NT[::7, 12:] = 0
    return ids_NT, np.array(documents)


def write(folder: Path, cuts: tuple[int, ...] = (), **settings: Any) -> Manifest:
    ids_NT, documents = make_rows()
    with ShardWriter(folder, **{**SETTINGS, **settings}) as writer:
        for first, end in zip((0, *cuts), (*cuts, ROWS), strict=True):
            low, high = np.searchsorted(documents[:, 0], [first, end])
            writer.write(ids_NT[first:end], documents[low:high] - [[first, 0, 0]])
    return writer.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards")
    return tmp_path / "shards"


def test_same_rows_give_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", cuts=(1, 1, 9, 80, 149))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == [
        *(f"shard-00000{n}.tar" for n in range(3)),
        "shards.manifest",
    ]
    assert first.sha256 == second.sha256 == Manifest.load(tmp_path / "b").sha256


def test_manifest_counts(shards: Path) -> None:
    manifest = Manifest.load(shards)
    padded = len(range(0, ROWS, 7))
    assert (manifest.rows, manifest.documents, manifest.padded_rows) == (ROWS, 2 * ROWS, padded)
    assert manifest.tokens == ROWS * T - 4 * padded
    assert manifest.largest_id == make_rows()[0].max()
    assert [shard.rows for shard in manifest.shards] == [64, 64, 22]
    assert manifest.shards[2].block_rows.tolist() == [8, 8, 6]
    assert list(verify(shards)) == []


def test_webdataset_reads_the_tars(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    with warnings.catch_warnings():
        # Webdataset leaves the files to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"{block:09d}" for block in range(19)]
    ids_NT = np.concatenate(
        [np.frombuffer(sample["u16"], "<u2").reshape(-1, T) for sample in samples]
    )
    np.testing.assert_array_equal(ids_NT, make_rows()[0])
    documents = np.frombuffer(samples[1]["documents.u16"], "<u2").reshape(-1, 3)
    np.testing.assert_array_equal(documents, make_rows()[1][16:32] - [[8, 0, 0]])


def test_datasets_finds_the_tars_and_not_the_manifest(tmp_path: Path) -> None:
    """One tar a folder: datasets goes by the commonest suffix that it knows, and one .json would be
    as common.
    """
    import datasets

    for name in ("train", "validation"):
        write(tmp_path / name, rows_per_shard=152)
    loaded = datasets.load_dataset(str(tmp_path), streaming=True)
    assert sorted(loaded) == ["train", "validation"]
    blocks = list(loaded["validation"])
    assert [block["__key__"] for block in blocks] == [f"{number:09d}" for number in range(19)]
    ids_NT = np.concatenate([np.frombuffer(block["u16"], "<u2").reshape(-1, T) for block in blocks])
    np.testing.assert_array_equal(ids_NT, make_rows()[0])


def test_large_vocabularies_are_u32(tmp_path: Path) -> None:
    manifest = write(tmp_path, vocab_size=70_000)
    assert manifest.dtype == "u32"
    assert list(verify(tmp_path)) == []


def test_rows_without_documents_are_padding(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, **SETTINGS) as writer:
        writer.write(np.zeros((3, T), np.int64), np.empty((0, 3), np.int64))
    assert (writer.close().tokens, writer.close().padded_rows) == (0, 3)
    assert list(verify(tmp_path)) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        with ShardWriter(folder, **SETTINGS) as writer:
            writer.write(*make_rows())
            raise KeyboardInterrupt

    for folder in (tmp_path, tmp_path / "new" / "train"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(folder)
        assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with ShardWriter(tmp_path / "shards", **SETTINGS) as writer:
        writer.write(*make_rows())
        shutil.copytree(tmp_path / "shards", left)
    assert sorted(contents(left)) == [
        ".partial-lock",
        *(f".partial-shard-00000{n}.tar" for n in range(3)),
    ]
    with pytest.raises(DataError, match="make_shards was interrupted; run it again"):
        Manifest.load(left)
    write(left)
    assert contents(left) == contents(tmp_path / "shards")


def test_no_rows_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"), ShardWriter(tmp_path, **SETTINGS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_finished_shards_are_kept_unless_overwrite(shards: Path) -> None:
    before = contents(shards)
    with pytest.raises(DataError, match=r"holds shards\.manifest already.*use overwrite=True"):
        write(shards)
    assert contents(shards) == before
    write(shards, rows_per_shard=152, overwrite=True)
    assert sorted(contents(shards)) == ["shard-000000.tar", "shards.manifest"]
    assert list(verify(shards)) == []


def test_overwriting_a_set_of_an_earlier_version_leaves_one_manifest(shards: Path) -> None:
    (shards / "shards.manifest").rename(shards / "manifest.json")
    with pytest.raises(DataError, match=r"holds manifest\.json already.*use overwrite=True"):
        write(shards)
    write(shards, overwrite=True)
    assert sorted(contents(shards)) == [
        *(f"shard-00000{n}.tar" for n in range(3)),
        "shards.manifest",
    ]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, **SETTINGS) as writer:
        with pytest.raises(DataError, match="another run is writing shards"):
            ShardWriter(tmp_path, **SETTINGS)
        writer.write(*make_rows())
    assert list(verify(tmp_path)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 65_536}, "sequence_length=65536; expected 1 to 65535"),
        ({"rows_per_shard": 60}, "rows_per_shard=60; expected .* whole number of blocks"),
        ({"pad_token_id": 3000}, "pad_token_id=3000, vocab_size=3000"),
        ({"tokenizer": {"name": "x"}}, r"tokenizer lacks \['sha256'\]"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardWriter(tmp_path, **{**SETTINGS, **settings})


@pytest.mark.parametrize(
    ("ids", "documents", "message"),
    [
        (np.full((2, T), 3000), [], "ids from 3000 to 3000; expected 0 to 2999"),
        (np.full((2, T), -1), [], "ids from -1 to -1"),
        (np.zeros((2, T - 1), int), [], r"shape \(2, 15\).*expected integers \[N, 16\]"),
        (np.zeros((2, T)), [], "dtype float64"),
        (np.zeros((2, T), int), [(2, 0, 4)], "lies outside the 2 rows of 16"),
        (np.zeros((2, T), int), [(0, 0, 17)], "lies outside"),
        (np.zeros((2, T), int), [(0, 4, 4)], "is empty"),
        (np.zeros((2, T), int), [(0, 0, 4), (0, 3, 9)], "overlap"),
        (np.zeros((2, T), int), [(1, 0, 4), (0, 0, 4)], "don't ascend"),
    ],
)
def test_bad_rows(
    tmp_path: Path, ids: np.ndarray, documents: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path, **SETTINGS) as writer:
        writer.write(ids, np.array(documents, int).reshape(-1, 3))


def change_manifest(
    folder: Path, change: Callable[[dict[str, Any]], object], rehash: bool = True
) -> None:
    path = folder / "shards.manifest"
    content = json.loads(path.read_text())
    stated = content.pop("sha256")
    change(content)
    path.write_text(
        json.dumps({"sha256": _content_sha256(content) if rehash else stated, **content})
    )


def test_missing_manifest(shards: Path) -> None:
    (shards / "shards.manifest").unlink()
    with pytest.raises(DataError, match="incomplete copy"):
        Manifest.load(shards)
    with pytest.raises(DataError, match="no such folder"):
        Manifest.load(shards / "other")
    for name in ("train", "validation"):
        write(shards / name)
    with pytest.raises(DataError, match=rf"did you mean {shards}/train or {shards}/validation\?"):
        Manifest.load(shards)


def write_pinned(folder: Path) -> Manifest:
    """A manifest as earlier versions wrote it, whose identity checkpoints name."""
    shard = {
        "file": "shard-000000.tar",
        "bytes": 10_240,
        "sha256": "cd" * 32,
        "rows": 5,
        "block_rows": [3, 2],
        "ids_offset": [1536, 3584],
        "ids_crc32": [4_294_967_295, 0],
        "documents_offset": [512, 2560],
        "documents_bytes": [18, 12],
        "documents_crc32": [7, 8],
    }
    header = {
        "sequence_length": 16,
        "dtype": "u16",
        "vocab_size": 99,
        "largest_id": 98,
        "rows": 5,
        "tokens": 80,
    }
    header |= {
        "documents": 5,
        "padded_rows": 0,
        "tokenizer": TOKENIZER,
        "pad_token_id": 0,
        "source": {"kind": "é"},
    }
    content = {"format": "scaledistill-shards", "version": 1, **header, "shards": [shard]}
    stated = "5592f5e86572a6e76bfa92869ece7d29e0a33c547d9ec022671da419741992bc"
    (folder / "manifest.json").write_text(json.dumps({"sha256": stated, **content}))
    return Manifest.load(folder)


def test_the_identity_of_data_is_pinned(tmp_path: Path) -> None:
    manifest = write_pinned(tmp_path)
    assert manifest.shards[0].ids_crc32.tolist() == [4_294_967_295, 0]
    made = Manifest(**{name: getattr(manifest, name) for name in Manifest.model_fields})
    assert made.sha256 == manifest.sha256
    assert json.loads(manifest.dump()) == json.loads((tmp_path / "manifest.json").read_text())


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "indented": lambda content: json.dumps(content, indent=2),
    "compact": lambda content: json.dumps(content, separators=(",", ":")),
    "sorted": lambda content: json.dumps(content, sort_keys=True),
    "shards first": lambda content: json.dumps({"shards": content.pop("shards"), **content}),
    "shards in the source": lambda content: json.dumps(content).replace(
        '"name": "test"', '"name": "te\\u0073t"'
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(1 << 22, 256), (100, 2), (1, 1)])
def test_any_form_of_json_is_the_same_data(
    shards: Path, form: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"kind": "test", "shards": [{"file": "a, b.tar"}], "text": '"shards": [{'}
    expected = write(shards, source=source, overwrite=True)
    path = shards / "shards.manifest"
    path.write_text(FORMS[form](json.loads(path.read_text())))
    monkeypatch.setattr(manifest_text, "READ_BYTES", sizes[0])
    monkeypatch.setattr(manifest_text, "SHARDS_AT_ONCE", sizes[1])
    found = Manifest.load(shards)
    assert found.sha256 == expected.sha256
    assert found.dump() == expected.dump()


def test_a_large_manifest_is_read_without_an_object_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousandth of 1.05 G rows: memory and time per block are what counts."""
    with ShardWriter(
        tmp_path, **{**SETTINGS, "rows_per_block": 1, "rows_per_shard": 250}
    ) as writer:
        rows = 4000
        documents = np.stack([np.arange(rows), np.zeros(rows, int), np.full(rows, T)], 1)
        writer.write(np.tile(np.arange(rows)[:, None] % 2999, T), documents)
    monkeypatch.setattr(manifest, "_read_json", None)  # the slow way is not taken
    loaded = Manifest.load(tmp_path)
    content = json.loads(loaded.dump())
    assert content.pop("sha256") == loaded.sha256 == _content_sha256(content)
    arrays = [getattr(shard, name) for shard in loaded.shards for name in COLUMNS]
    assert sum(values.nbytes for values in arrays) == 6 * 4 * rows
    bases = {id(values.base): values.base.nbytes for values in arrays}
    assert sum(bases.values()) == 6 * 4 * rows, "views of arrays that many shards share"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": "other"}'])
def test_damaged_manifest(shards: Path, text: bytes) -> None:
    (shards / "shards.manifest").write_bytes(text)
    with pytest.raises(
        DataError, match=r"(not a JSON object|reads .*scaledistill-shards).*shards make"
    ):
        Manifest.load(shards)


def test_edited_manifest(shards: Path) -> None:
    change_manifest(shards, lambda content: content.update(pad_token_id=7), rehash=False)
    with pytest.raises(DataError, match="was changed or damaged"):
        Manifest.load(shards)


def first_shard(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["shards"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=2), "'version': 2.*reads.*'version': 1"),
        (lambda content: content.update(rows=151), "rows is 151, but the shards hold 150"),
        (lambda content: content.update(documents=1), "documents is 1, but the shards hold 300"),
        (
            lambda content: content.update(tokens=ROWS * T),
            "0 positions of padding cannot lie in padded_rows=22",
        ),
        (
            lambda content: content.update(vocab_size=100),
            "largest_id=.* is not below vocab_size=100",
        ),
        (lambda content: content.update(rows="150"), "rows: Input should be a valid integer"),
        (lambda content: content.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda content: content["tokenizer"].pop("sha256"), r"tokenizer lacks \['sha256'\]"),
        (
            lambda content: content["shards"].append(content["shards"][0]),
            "two equal shards, shard-000000.tar",
        ),
        (
            lambda content: content["shards"][1].update(sha256=content["shards"][0]["sha256"]),
            "same sha256",
        ),
        (
            lambda content: content["shards"][0]["ids_crc32"].pop(),
            r"shard-000000.tar: .* lengths \[7, 8\]",
        ),
        (first_shard(file="../other.tar"), "shards.0.file: String should match pattern"),
        (
            first_shard(block_rows=[8, 8, 8, 8, 8, 8, 8, -8]),
            "shards.0.block_rows: .*a list of whole numbers from 0",
        ),
        (
            first_shard(ids_crc32=[2**63] * 8),
            "shards.0.ids_crc32: .*whole numbers from 0 to 2.63 - 1",
        ),
        (first_shard(documents_crc32="1"), "shards.0.documents_crc32: .*a list of whole numbers"),
        (first_shard(block_rows=[]), r"its lists of blocks have lengths \[0, 8\]"),
        (first_shard(documents_offset=[512] + [2**62] * 7), "members overlap or are out of order"),
        (
            lambda content: content["shards"][2].update(block_rows=[8, 8, 0]),
            "blocks of 0 to 8 rows; expected 1 to",
        ),
        (first_shard(rows=63), "shard-000000.tar: rows is 63, but its blocks hold 64"),
        (first_shard(bytes=3000), "its last block ends at byte .*, beyond its 3000 bytes"),
        (first_shard(ids_offset=[1024] * 8), "members overlap or are out of order"),
    ],
)
def test_inconsistent_manifest(
    shards: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(shards, change)
    with pytest.raises(DataError, match=message):
        Manifest.load(shards)


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


BREAK: dict[str, tuple[Callable[[Path, Any], object], str]] = {
    "truncated": (
        lambda path, _: os.truncate(path, 5000),
        "shard-000001.tar: 5000 bytes, expected",
    ),
    "zero bytes": (lambda path, _: path.write_bytes(b""), "shard-000001.tar: 0 bytes, expected"),
    "not a tar": (
        lambda path, shard: path.write_bytes(b"x" * shard.bytes),
        "shard-000001.tar: not a tar file",
    ),
    "ids": (
        lambda path, shard: flip(path, shard.ids_offset[3] + 5),
        "shard-000001.tar, block 3: its token ids are",
    ),
    "documents": (
        lambda path, shard: flip(path, shard.documents_offset[2]),
        "shard-000001.tar, block 2: its document boundaries are damaged",
    ),
    "header": (
        lambda path, shard: flip(path, shard.ids_offset[4] - 512),
        "shard-000001.tar, block 4: tar member 9 is",
    ),
    "padding": (
        lambda path, shard: flip(path, shard.bytes - 1),
        "shard-000001.tar: sha256 .*, expected sha256",
    ),
    "missing": (lambda path, _: path.unlink(), "shard-000001.tar: can't be read"),
    "copy": (
        lambda path, _: path.write_bytes(path.with_name("shard-000000.tar").read_bytes()),
        "shard-000001.tar: a copy of shard-000000.tar",
    ),
    "extra": (
        lambda path, _: path.with_name("more.tar").touch(),
        "more.tar: is in the folder but not in",
    ),
}


@pytest.mark.parametrize("case", BREAK)
def test_verify_finds(shards: Path, case: str) -> None:
    damage, message = BREAK[case]
    damage(shards / "shard-000001.tar", Manifest.load(shards).shards[1])
    problems = "\n".join(verify(shards))
    assert re.search(message, problems), problems
    assert not re.search("^shard-00000[02]", problems, re.MULTILINE), problems


def test_verify_finds_every_flipped_bit(shards: Path) -> None:
    path = shards / "shard-000002.tar"
    whole = path.read_bytes()
    for byte in range(0, len(whole), 97):
        flip(path, byte, byte % 8)
        assert any(verify(shards)), byte
        path.write_bytes(whole)
    assert not any(verify(shards))


def test_verify_finds_content_that_contradicts_the_manifest(shards: Path) -> None:
    change_manifest(shards, lambda content: content.update(largest_id=2999, tokens=ROWS * T - 87))
    assert list(verify(shards)) == [
        "shards.manifest: largest_id is 2999, but the shards give 2400",
        "shards.manifest: tokens is 2313, but the shards give 2312",
    ]
    change_manifest(shards, lambda content: content.update(vocab_size=2000, largest_id=1999))
    assert "shard-000001.tar, block 7: id 2048 in a vocabulary of 2000" in list(verify(shards))


def test_unknown_tokens_are_counted_in_the_text_only() -> None:
    ids_NT = np.array([[7, 7, 1, 7, 0, 0], [7, 5, 7, 7, 7, 7]], np.uint16)
    documents = np.array([[0, 0, 4], [1, 0, 3], [1, 3, 6]], np.uint16)
    assert count_in_text(ids_NT, documents, 7) == 2  # not the first and last of a piece
    assert count_in_text(ids_NT, documents, 1) == 1
    assert count_in_text(ids_NT, documents, 0) == 0
    assert count_in_text(ids_NT, documents[:0], 7) == 0


def unknown(share: float, **source: Any) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        text = content["tokens"] - 2 * content["documents"]
        content["tokenizer"]["unknown_tokens"] = round(share * text)
        content["source"] |= source

    return change


def test_a_set_of_unknown_tokens_is_a_problem(shards: Path) -> None:
    assert Manifest.load(shards).unknown_problem() is None  # not counted
    change_manifest(shards, unknown(0.5))
    found = (
        "shards.manifest: 50.0% of its tokens are unknown to the tokenizer, more than 5.0%: the "
        "tokenizer does not fit"
    )
    assert any(problem.startswith(found) for problem in verify(shards))
    checked = check_shards(shards)
    assert checked.returncode == 3
    assert f"ERROR {found}" in checked.stdout
    change_manifest(shards, unknown(0.5, max_unknown_fraction=0.6))
    assert Manifest.load(shards).unknown_problem() is None
    assert Manifest.load(shards).unknown_problem(0.05) is not None


def test_verify_counts_unknown_tokens(shards: Path) -> None:
    change_manifest(shards, unknown(0.01))
    change_manifest(shards, lambda content: content["tokenizer"].update(unk_token_id=2999))
    [problem] = verify(shards)
    assert re.fullmatch(r"shards.manifest: unknown_tokens is \d+, but the shards give 0", problem)


def check_shards(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).parents[1] / "tools" / "check_shards.py"
    environment = {**os.environ, "PYTHONPATH": str(tool.parents[1]), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, tool, *arguments], capture_output=True, text=True, env=environment
    )


def test_check_shards_tool(shards: Path, tmp_path: Path) -> None:
    good = check_shards(shards, "--json", tmp_path / "figures.json")
    assert (good.returncode, good.stderr) == (0, "")
    data = Manifest.load(shards).sha256
    for shown in (
        *(
            f"tokenizer: test (sha256 {'ab' * 32})\n",
            f"sha256 of the data: {data}\n",
            "2,312",
            "3.67%",
        ),
        *("document pieces (stored boundaries)", "tokens with [CLS] and [SEP]"),
    ):
        assert shown in good.stdout
    figures = {
        entry["name"]: entry["value"]
        for entry in json.loads((tmp_path / "figures.json").read_text())
    }
    assert (figures["shards/rows"], figures["shards/problems"]) == (ROWS, 0)
    flip(shards / "shard-000000.tar", 600)
    bad = check_shards(shards)
    assert bad.returncode == 3
    assert "ERROR shard-000000.tar, block 0: its document boundaries are damaged" in bad.stdout
    flip(shards / "shard-000000.tar", 600)
    (shards / "shards.manifest").rename(shards / "manifest.json")  # as earlier versions named it
    (shards / "more.tar").touch()
    old = check_shards(shards)
    assert (
        old.returncode,
        "ERROR more.tar: is in the folder but not in manifest.json; a" in old.stdout,
    ) == (
        3,
        True,
    )
    assert f"sha256 of the data: {data}\n" in old.stdout
    (shards / "manifest.json").unlink()
    assert check_shards(shards).returncode == 3
