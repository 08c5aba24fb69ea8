"""GLUE's tasks and files: names, labels, rows, and what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scaledistill.errors import ConfigError, DataError
from scaledistill.glue.read import Answers, read_split
from scaledistill.glue.tasks import TASKS, find_tasks

DATA = (
    Path(
        os.environ.get(
            "SCALEDISTILL_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"
        )
    )
    / "glue"
)
SIZES = {  # rows of the official train and dev files
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "qqp": (363846, 40430),
    "mnli": (392702, 9815, 9832),
    "qnli": (104743, 5463),
    "rte": (2490, 277),
    "wnli": (635, 71),
    "squad2": (130319, 11873),
}
DEV_LABELS = {
    "cola": {1: 721, 0: 322},
    "sst2": {1: 444, 0: 428},
    "mrpc": {1: 279, 0: 129},
    "qnli": {0: 2702, 1: 2761},
    "rte": {0: 146, 1: 131},
    "wnli": {1: 31, 0: 40},
}
# A row of each class as the original files have it: header (None: there is none), rows, the labels
# that they stand for.
ORIGINAL: dict[str, tuple[str | None, list[str], list[int | float]]] = {
    "cola": (None, ["gj04\t1\t\tA b.", "gj04\t0\t*\tB a."], [1, 0]),
    "sst2": ("sentence\tlabel", ["good \t1", "bad \t0"], [1, 0]),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ["1\t7\t8\ta\tb", "0\t7\t8\ta\tc"],
        [1, 0],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\ty\t1\tn\tn\ta\tb\t5.000", "1\tg\tf\ty\t1\tn\tn\ta\tb\t0.25"],
        [5.0, 0.25],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["9\t1\t2\ta?\tb?\t1", "8\t1\t2\ta?\tc?\t0"],
        [1, 0],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            f"{i}\tp\tq\tg\ta\tb\tx\t{name}"
            for i, name in enumerate(("neutral", "entailment", "contradiction"))
        ],
        [1, 0, 2],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\ta?\tb\tnot_entailment", "1\ta?\tb\tentailment"],
        [1, 0],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\ta\tb\tentailment", "1\ta\tb\tnot_entailment"],
        [0, 1],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\ta\tb\t1", "1\ta\tb\t0"], [1, 0]),
}


def write(
    folder: Path, task: str, split: str = "dev", rows: list[str] | None = None, header: bool = True
) -> Path:
    """Write a task's file as the original is; return it."""
    first, own, _ = ORIGINAL[task]
    path = folder / TASKS[task].title / f"{split}.tsv"
    path.parent.mkdir(exist_ok=True)
    lines = [first] if first and header else []
    path.write_text("\n".join([*lines, *(own if rows is None else rows)]) + "\n", encoding="utf-8")
    return path


def test_task_names() -> None:
    assert [task.name for task in find_tasks(["rte", "cola"])] == ["rte", "cola"]
    for names, message in (
        (["cloa"], r"unknown task 'cloa', expected some of cola, sst2, .*; did you mean cola\?"),
        (["SST-2"], r"unknown task 'SST-2'.*did you mean sst2\?"),
        (["rte", "rte"], "tasks names rte twice"),
        ([], "tasks is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_tasks(names)


@pytest.mark.parametrize("name", ORIGINAL)
def test_labels_of_the_original_files(name: str, tmp_path: Path) -> None:
    task, labels = TASKS[name], ORIGINAL[name][2]
    for split in ("train", *task.dev_splits):
        write(tmp_path, name, split)
        found = read_split(task, split, tmp_path)
        assert found.labels == labels
        assert len(found.texts[0]) == len(task.columns)
    assert set(labels) == set(range(len(task.labels))) or task.kind == "regression"


@pytest.mark.parametrize("name", ORIGINAL)
def test_both_sources_give_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    task, labels = TASKS[name], ORIGINAL[name][2]
    write(tmp_path, name, task.dev_splits[0])
    local = read_split(task, task.dev_splits[0], tmp_path)
    kind = Value("float32") if task.kind == "regression" else ClassLabel(names=list(task.labels))
    columns: dict[str, Any] = dict(
        zip(task.hub_columns, map(list, zip(*local.texts, strict=True)), strict=True)
    )
    asked = []

    def load_dataset(*arguments: str, split: str) -> Dataset:
        asked.append((*arguments, split))
        return Dataset.from_dict(
            {**columns, "label": labels},
            features=Features({**dict.fromkeys(columns, Value("string")), "label": kind}),
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub = read_split(task, task.dev_splits[0], None)
    assert (hub.texts, hub.labels, hub.sha256) == (local.texts, local.labels, local.sha256)
    assert asked == [("nyu-mll/glue", name, task.dev_splits[0].replace("dev", "validation"))]


def test_the_hub_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    rows: dict[str, Any] = {"sentence1": ["a"], "sentence2": ["b"], "label": [-1]}

    def hub_with(names: list[str]) -> None:
        features = Features(
            sentence1=Value("string"), sentence2=Value("string"), label=ClassLabel(names=names)
        )
        data = Dataset.from_dict(rows, features=features)
        monkeypatch.setattr("datasets.load_dataset", lambda *arguments, split: data)

    hub_with(["entailment", "not_entailment"])
    with pytest.raises(
        DataError, match=r"nyu-mll/glue, RTE, validation, row 0: label -1, expected 0 to 1"
    ):
        read_split(TASKS["rte"], "dev", None)
    hub_with(["not_entailment", "entailment"])
    with pytest.raises(
        DataError, match="its classes are not_entailment, entailment, expected entailment, not_ent"
    ):
        read_split(TASKS["rte"], "dev", None)

    def fail(*arguments: str, split: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        DataError,
        match=r"cannot be loaded from the hub \(no route\).* folder with the original files",
    ):
        read_split(TASKS["rte"], "dev", None)


def test_rows_are_whole(tmp_path: Path) -> None:
    strange = ['"', 'She said "no', "a\u2028b\x85c\x0bd", "'' ``", 'x""y', " "]
    rows = [f"{i}\t{text}\t{text}\tentailment" for i, text in enumerate(strange)]
    write(tmp_path, "rte", rows=rows)
    found = read_split(TASKS["rte"], "dev", tmp_path)
    assert found.texts == [(text, text) for text in strange]
    assert found.ids == [str(i) for i in range(len(strange))]


def test_byte_order_mark_line_ends_gzip_and_folder_names(tmp_path: Path) -> None:
    plain = read_split(TASKS["mrpc"], "dev", write(tmp_path, "mrpc").parent.parent)
    path = tmp_path / "MRPC" / "dev.tsv"
    content = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")
    path.unlink()
    path.parent.rename(tmp_path / "mrpc")
    (tmp_path / "mrpc" / "dev.tsv.gz").write_bytes(gzip.compress(content))
    assert read_split(TASKS["mrpc"], "dev", tmp_path) == plain


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "cola",
            ["s\t1\t\tA", "s\t1\tB"],
            r"dev.tsv:2: found 3 columns, expected 4 \(source, label, mark, sentence\)",
        ),
        (
            "rte",
            ["0\ta\tb\tentailment", "1\ta\tb\tc\tentailment"],
            r"dev.tsv:3: found 5 columns, expected 4",
        ),
        (
            "cola",
            ["s\t2\t\tA"],
            r"dev.tsv:1: label '2', expected 0 or 1; use the original train and dev files",
        ),
        (
            "rte",
            ["0\ta\tb\tmaybe"],
            r"dev.tsv:2: label 'maybe', expected entailment or not_entailment",
        ),
        (
            "stsb",
            [ORIGINAL["stsb"][1][0].replace("5.000", "7.0")],
            r":2: score '7.0', expected a number from 0 to 5",
        ),
        (
            "stsb",
            [ORIGINAL["stsb"][1][0].replace("5.000", "nan")],
            r":2: score 'nan', expected a number from 0 to 5",
        ),
        ("sst2", [], r"dev.tsv has no examples; fetch SST-2 again"),
        ("cola", [], r"dev.tsv has no examples; fetch CoLA again"),
    ],
)
def test_bad_rows(task: str, rows: list[str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, task, rows=rows)
    if not rows and task == "cola":
        path.write_text("")
    with pytest.raises(DataError, match=message):
        read_split(TASKS[task], "dev", tmp_path)


def test_bad_files(tmp_path: Path) -> None:
    rte = TASKS["rte"]
    with pytest.raises(DataError, match=r"data_folder='.*none' is not a folder"):
        read_split(rte, "dev", tmp_path / "none")
    with pytest.raises(
        DataError, match=r"has no folder for RTE \(found: none\); put the original files into .*RTE"
    ):
        read_split(rte, "dev", tmp_path)
    path = write(tmp_path, "rte")
    with pytest.raises(
        DataError, match=r"RTE has neither train.tsv nor train.tsv.gz; fetch RTE again"
    ):
        read_split(rte, "train", tmp_path)
    path.write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    with pytest.raises(
        DataError, match=r"dev.tsv:1: no column 'label' in the header .* with its labels"
    ):
        read_split(rte, "dev", tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"dev.tsv cannot be read .* fetch it again"):
        read_split(rte, "dev", tmp_path)
    path.with_suffix(".tsv.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    path.unlink()
    with pytest.raises(
        DataError, match=r"dev.tsv.gz is damaged or cut short: gzip member 1, .*; fetch or compress"
    ):
        read_split(rte, "dev", tmp_path)
    rows = [b"index\tsentence1\tsentence2\tlabel\n", b"0\ta\tb\tentailment\n"]
    members = b"".join(map(gzip.compress, rows))
    path.with_suffix(".tsv.gz").write_bytes(members + bytes(7))
    assert read_split(rte, "dev", tmp_path).texts == [("a", "b")]
    path.with_suffix(".tsv.gz").write_bytes(members + b"garbage")
    with pytest.raises(
        DataError, match=r"dev.tsv.gz is damaged or cut short: b'garbag' follows gzip member 2"
    ):
        read_split(rte, "dev", tmp_path)
    path.write_bytes(members)
    with pytest.raises(
        DataError,
        match=r"dev.tsv holds gzip data, which its suffix does not say; give it the suffix",
    ):
        read_split(rte, "dev", tmp_path)


def test_short_rows_of_qqp_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    task = dataclasses.replace(TASKS["qqp"], most_short_rows=2)
    good = ORIGINAL["qqp"][1]
    write(tmp_path, "qqp", rows=[good[0], "1\t2", "a?\t1", good[1]])
    monkeypatch.setattr("scaledistill.glue.read.log.propagate", True)
    assert read_split(task, "dev", tmp_path).labels == [1, 0]
    assert "2 rows with too few columns left out" in caplog.text
    write(tmp_path, "qqp", rows=[*good, "1\t2", "1\t2", "1\t2"])
    with pytest.raises(DataError, match=r"dev.tsv:6: found 2 columns, expected 6"):
        read_split(task, "dev", tmp_path)


def squad_file(folder: Path, *, start: int = 4) -> Path:
    questions = [
        {
            "id": "q1",
            "question": "Who?",
            "is_impossible": False,
            "answers": [{"text": "cat", "answer_start": start}],
        },
        {
            "id": "q2",
            "question": "Why?",
            "is_impossible": True,
            "answers": [],
            "plausible_answers": [{"text": "x"}],
        },
    ]
    path = folder / "dev-v2.0.json"
    path.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "The cat sat.", "qas": questions}]}]})
    )
    return path


def test_squad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    squad = TASKS["squad2"]
    path = squad_file(tmp_path)
    found = read_split(squad, "dev", tmp_path)
    assert found.ids == ["q1", "q2"]
    assert found.texts == [("Who?", "The cat sat."), ("Why?", "The cat sat.")]
    assert found.labels == [Answers(("cat",), (4,)), Answers((), ())]
    answers = [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    columns = {
        "id": found.ids,
        "question": ["Who?", "Why?"],
        "context": ["The cat sat."] * 2,
        "answers": answers,
    }
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_dict(columns))
    assert read_split(squad, "dev", None) == found
    squad_file(tmp_path, start=5)
    with pytest.raises(DataError, match=r"question q1: answer 'cat' is not at character 5"):
        read_split(squad, "dev", tmp_path)
    path.write_text('{"data": [{}]}')
    with pytest.raises(
        DataError, match=r"dev-v2.0.json is not the original file of SQuAD 2.0 \(KeyError"
    ):
        read_split(squad, "dev", tmp_path)


@pytest.mark.skipif(
    not DATA.is_dir(), reason="no GLUE files: SCALEDISTILL_TEST_DATA names no folder with glue/"
)
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "qnli", "rte", "wnli"])
def test_official_files(name: str) -> None:
    task = TASKS[name]
    for split, size in zip(("train", *task.dev_splits), SIZES[name], strict=True):
        folder = DATA / task.title
        files = [
            path for path in (folder / f"{split}.tsv", folder / f"{split}.tsv.gz") if path.is_file()
        ]
        if not files:
            assert (name, split) == ("qnli", "train"), "the one file that cannot be had"
            continue
        examples = read_split(task, split, DATA)
        assert len(examples.labels) == size
        if split != "train" and name in DEV_LABELS:
            assert Counter(examples.labels) == DEV_LABELS[name]
        # Every cell is one that stands between two tabs, quotes and all.
        content = (gzip.decompress if files[0].suffix == ".gz" else bytes)(files[0].read_bytes())
        lines = content.decode("utf-8-sig").rstrip("\n").split("\n")[0 if task.header else 1 :]
        assert len(lines) == size
        for line, texts in zip(lines, examples.texts, strict=True):
            assert set(texts) <= set(line.rstrip("\r").split("\t"))
        if split == "dev" and name in ("mrpc", "stsb", "qnli"):
            assert sum('"' in text for texts in examples.texts for text in texts) > 20
