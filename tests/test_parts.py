"""Shards made in parts: the bytes of one machine, and errors that name the part."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_make_shards import bytes_of, random_documents
from test_text import save_tokenizer
from transformers import PreTrainedTokenizerFast

from scaledistill.cli import shards_make, shards_merge
from scaledistill.data.prepare import make, parts
from scaledistill.data.prepare.make import make_shards
from scaledistill.data.prepare.parts import make_part, merge_parts
from scaledistill.data.prepare.text import load_tokenizer
from scaledistill.data.sizes import Part
from scaledistill.errors import ConfigError, DataError

SETTINGS: dict[str, Any] = {
    "sequence_length": 16,
    "source": {"kind": "test"},
    "held_out_fraction": 0.3,
    "held_out_max_documents": 40,
    "rows_per_shard": 64,
    "max_unknown_fraction": 1,
    "workers": 0,
}
PARTS = [Part(number, 4) for number in range(1, 5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Short and long documents, empty ones, and some twice."""
    long = [" ".join(random_documents(seed, 40)) for seed in range(3)]
    return [*random_documents(5, 150), *long, "", *random_documents(6, 150), *long[:1]]


@pytest.fixture(scope="module", autouse=True)
def _small_units() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "_CHUNK_DOCUMENTS", 7)
        patch.setattr(make, "LONG_CHARACTERS", 1500)
        patch.setattr("scaledistill.data.prepare.longtext.LONG_CHARACTERS", 1500)
        patch.setattr("scaledistill.data.prepare.longtext.PIECE_CHARACTERS", 400)
        patch.setattr(parts, "IDS_PER_FILE", 2000)
        yield


@pytest.fixture(scope="module")
def whole(documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_shards(iter(documents), folder, tokenizer=tokenizer, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def four(documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any) -> Path:
    """Four parts, made one by one."""
    folder = tmp_path_factory.mktemp("four")
    for part in reversed(PARTS):
        make_part(iter(documents), folder, part=part, tokenizer=tokenizer, **SETTINGS)
    return folder


@pytest.fixture
def copy(four: Path, tmp_path: Path) -> Path:
    return shutil.copytree(four, tmp_path / "copy")


def test_four_parts_merge_to_the_bytes_of_one_machine(whole: Path, copy: Path) -> None:
    report = merge_parts(copy)
    expected = bytes_of(whole)
    assert len(expected) > 8
    for name, data in expected.items():
        found = hashlib.sha256((copy / name).read_bytes()).hexdigest()
        assert found == hashlib.sha256(data).hexdigest(), name
    merged = {name for name in bytes_of(copy) if not name.startswith("part-")}
    assert merged == expected.keys()
    assert report.documents == 305


@pytest.mark.parametrize("options", [{"max_documents": 100}, {"last_row": "drop", "seed": 3}])
def test_other_settings_and_numbers_of_parts(
    options: dict[str, Any],
    documents: list[str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    settings = SETTINGS | options
    make_shards(iter(documents), tmp_path / "whole", tokenizer=tokenizer, **settings)
    for part in (Part(1, 2), Part(2, 2)):
        make_part(iter(documents), tmp_path / "two", part=part, tokenizer=tokenizer, **settings)
    merge_parts(tmp_path / "two")
    merged = bytes_of(tmp_path / "two")
    assert {key: merged[key] for key in merged if key[:5] != "part-"} == bytes_of(
        tmp_path / "whole"
    )


def test_the_work_is_divided_evenly(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, four: Path, tmp_path: Path
) -> None:
    reports = [
        make_part(iter(documents), tmp_path, part=part, tokenizer=tokenizer, **SETTINGS)
        for part in PARTS
    ]
    assert {report.documents for report in reports} == {305}
    assert sum(report.train.documents for report in reports) == 305
    tokens = [report.train.tokens for report in reports]
    assert max(tokens) < 0.5 * sum(tokens)
    assert bytes_of(tmp_path) == bytes_of(four)


def test_more_parts_than_units(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = SETTINGS | {"held_out_fraction": 0.0, "held_out_max_documents": None}
    for part in PARTS:
        make_part(iter(["one two"]), tmp_path, part=part, tokenizer=tokenizer, **settings)
    assert merge_parts(tmp_path).train.tokens == 2


def test_a_part_is_not_overwritten_unless_asked_and_what_a_killed_run_left_is_removed(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, copy: Path
) -> None:
    before = bytes_of(copy)
    options: dict[str, Any] = {"part": PARTS[1], "tokenizer": tokenizer, **SETTINGS}
    with pytest.raises(
        DataError, match="part-0002-of-0004 exists already; name another folder, or use overwrite"
    ):
        make_part(iter(documents), copy, **options)
    left = copy / ".partial-part-0002-of-0004"
    left.mkdir()
    (left / "tokens-000077.safetensors").write_bytes(b"half")
    make_part(iter(documents), copy, overwrite=True, **options)
    assert bytes_of(copy) == before


def test_an_interrupted_part_leaves_nothing(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def interrupted() -> Iterator[str]:
        yield from documents[:100]
        raise KeyboardInterrupt

    output = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt):
        make_part(interrupted(), output, part=PARTS[0], tokenizer=tokenizer, **SETTINGS)
    assert not output.parent.exists()


def test_two_runs_of_a_part_at_once(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"part": PARTS[0], "tokenizer": tokenizer, **SETTINGS}

    def nested() -> Iterator[str]:
        with pytest.raises(DataError, match=r"another run is writing part 1/4 to .*; wait for it"):
            make_part(iter(documents), tmp_path, **options)
        yield from documents

    make_part(nested(), tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["part-0001-of-0004"]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_missing_and_damaged_parts_are_named(copy: Path, tmp_path: Path) -> None:
    third = copy / "part-0003-of-0004"
    tokens = third / "tokens-000001.safetensors"
    data = tokens.read_bytes()

    tokens.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"part 3/4: .*000001.safetensors has {len(data) - 1} byt"):
        merge_parts(copy)
    tokens.write_bytes(data)
    damage(tokens)
    with pytest.raises(DataError, match=r"part 3/4: .*tokens-000001.safetensors is damaged: sha"):
        merge_parts(copy)
    assert not (copy / "train").exists()
    tokens.unlink()
    with pytest.raises(DataError, match=r"part 3/4: .*000001.safetensors is missing; make this"):
        merge_parts(copy)

    description = third / parts.PART_FILE
    description.write_text(description.read_text().replace(": 305", ": 3"))
    with pytest.raises(DataError, match=r"part 3/4: .*shards.part was changed or damaged; make"):
        merge_parts(copy)
    (third / parts.PART_FILE).unlink()
    with pytest.raises(DataError, match=r"part 3/4: .*shards.part can't be read: "):
        merge_parts(copy)
    third.rename(copy / ".partial-part-0003-of-0004")
    with pytest.raises(DataError, match=r"lacks part 3/4 \(3/4 unfinished\); make .*--part 3"):
        merge_parts(copy)
    shutil.copytree(copy / "part-0001-of-0004", copy / "part-0001-of-0002")
    with pytest.raises(DataError, match=r"different divisions \(1 of 2 and 3 of 4\); remove"):
        merge_parts(copy)
    shutil.copytree(copy / "part-0001-of-0002", tmp_path / "x" / "part-0002-of-0002")
    shutil.copytree(copy / "part-0001-of-0002", tmp_path / "x" / "part-0001-of-0002")
    with pytest.raises(DataError, match=r"part 1/2: .* holds part 1/4"):
        merge_parts(tmp_path / "x")
    with pytest.raises(DataError, match="has no parts; make them with"):
        merge_parts(tmp_path)


def test_parts_of_other_settings_or_text_are_named(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, copy: Path
) -> None:
    def remake(documents: list[str], **options: Any) -> None:
        settings = SETTINGS | options
        make_part(
            iter(documents), copy, part=PARTS[2], tokenizer=tokenizer, overwrite=True, **settings
        )

    remake(documents, sequence_length=32)
    with pytest.raises(ConfigError, match=r"parts 1/4 and 3/4 .* settings: sequence_length 16"):
        merge_parts(copy)
    remake(documents[1:])
    with pytest.raises(DataError, match="1/4 and 3/4 read different input: 305 and 304 documents"):
        merge_parts(copy)
    remake([documents[1], documents[0], *documents[2:]])
    with pytest.raises(DataError, match="305 documents each, with different text; give all"):
        merge_parts(copy)
    # Where the files are does not matter.
    remake(documents, source={"kind": "test", "files": ["/elsewhere"]})
    merge_parts(copy)
    with pytest.raises(DataError, match=r"holds shards\.manifest already; name another folder, or"):
        merge_parts(copy)
    merge_parts(copy, overwrite=True)


def test_settings_of_parts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens=9 can't be used with part='1/4', since"):
        make_part(iter([]), tmp_path, part=PARTS[0], tokenizer=tokenizer, max_tokens=9, **SETTINGS)
    with pytest.raises(DataError, match="gave no document"):
        make_part(iter([]), tmp_path, part=PARTS[0], tokenizer=tokenizer, **SETTINGS)
    assert Part.parse("3/12") == (3, 12)
    for text in ("0/4", "5/4", "1", "1/0", "-1/2", "1/10000"):
        with pytest.raises(ValueError, match="expected I/N with I from 1 to N"):
            Part.parse(text)


def test_unknown_text_stops_a_part_early(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "UNKNOWN_SAMPLE_TOKENS", 100)
    endless = (f"word {number}" for number in itertools.count())
    with pytest.raises(DataError, match=r"tokens for part 1/4 are unknown .* \(such as 'word'"):
        make_part(
            endless,
            tmp_path / "out",
            part=PARTS[0],
            tokenizer=tokenizer,
            **SETTINGS | {"max_unknown_fraction": 0.05},
        )
    assert not (tmp_path / "out").exists()


def test_the_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n\n".join(["one two", "", "alpha one"] * 20))

    def run(main: Callable[[Sequence[str]], int], *arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    name = os.fsdecode(b"caf\xe9.txt")  # not UTF-8
    (tmp_path / "text.txt").rename(tmp_path / name)
    options = [name, "--tokenizer", "tokenizer", "--output", "out", "--workers", "0"]
    options += ["--max-unknown-fraction", "1", "--sequence-length", "8"]
    said = run(shards_make.main, *options, "--part", "1/2")
    assert "part 1/2: 21 of 40 documents" in said
    assert "shards merge out" in said
    assert "lacks part 2/2; make it with" in run(shards_merge.main, "out", code=3)
    with pytest.raises(SystemExit, match="2"):
        run(shards_make.main, *options, "--part", "3/2")
    assert "argument --part: found '3/2', expected I/N" in capsys.readouterr().err
    run(shards_make.main, *options[:-1], "16", "--part", "2/2")
    said = run(shards_merge.main, "out", code=2)
    assert "settings: --sequence-length 8 and 16; make one" in said
    run(shards_make.main, *options, "--part", "2/2", "--overwrite")
    assert "40 documents" in run(shards_merge.main, "out", "--json", "figures.json")
    names = [row["name"] for row in json.loads((tmp_path / "figures.json").read_text())]
    assert "make_shards/train/rows" in names
    assert "use --overwrite" in run(shards_merge.main, "out", code=3)
