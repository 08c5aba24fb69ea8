"""The GLUE summary: which hyper-parameters are taken, and what the tables say, on made-up cells."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from scaledistill.errors import DataError
from scaledistill.glue.cell import Cell, Conditions, write_error, write_record
from scaledistill.glue.output import write_summary
from scaledistill.glue.summary import GRID, Summary, choose, summary_of
from scaledistill.glue.tasks import TASKS
from scaledistill.storage.files import write_json

CONDITIONS = Conditions("d", 128, 32, 0.1, 0.01, False, None)


def cell(
    task: str = "rte", rate: float = 1e-5, epochs: int = 3, seed: int = 1, model: str = "m"
) -> Cell:
    return Cell(model, "s", task, rate, epochs, seed, CONDITIONS)


def scored(
    values: dict[tuple[float, int], list[float | None]],
) -> tuple[list[Cell], dict[Cell, dict[str, float]]]:
    """Cells and their accuracy by learning rate and epochs, a seed each; None: not finished."""
    cells = {
        cell(rate=r, epochs=e, seed=s): value
        for (r, e), row in values.items()
        for s, value in enumerate(row)
    }
    return list(cells), {
        one: {"accuracy": value} for one, value in cells.items() if value is not None
    }


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        # The median, neither the mean nor the best.
        ({(1e-5, 3): [60, 61, 90], (2e-5, 3): [62, 63, 64]}, (2e-5, 3)),
        # A tie: the lower learning rate.
        ({(2e-5, 3): [60, 61, 62], (1e-5, 5): [60, 61, 62]}, (1e-5, 5)),
        ({(1e-5, 5): [60, 61, 62], (1e-5, 3): [60, 61, 62]}, (1e-5, 3)),  # then fewer epochs
        # Not those that lack a seed.
        ({(1e-5, 3): [60, 61, 62], (2e-5, 3): [90, None, 91]}, (1e-5, 3)),
        # Not those that another grid tried with fewer.
        ({(1e-5, 3): [60, 61, 62], (2e-5, 3): [64]}, (1e-5, 3)),
        # But where all do, those with most.
        ({(1e-5, 3): [60, None, None], (2e-5, 3): [50, None, 51]}, (2e-5, 3)),
    ],
)
def test_the_best_by_the_median(
    values: dict[tuple[float, int], list[float | None]], taken: tuple[float, int]
) -> None:
    choice = choose(*scored(values))
    assert choice is not None
    assert (choice.learning_rate, choice.epochs) == taken
    assert choice.n == sum(value is not None for value in values[taken])
    assert choice.planned == 3


def test_the_first_metric_decides() -> None:
    low, high = cell("mrpc", 1e-5), cell("mrpc", 2e-5)
    choice = choose(
        [low, high], {low: {"f1": 80, "accuracy": 90}, high: {"f1": 81, "accuracy": 70}}
    )
    assert choice is not None
    assert choice.scores["accuracy"].median == 70


def test_nothing_finished() -> None:
    assert choose([cell()], {}) is None


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two models, four tasks, two seeds; of the second model one RTE cell failed and MRPC did not
    run.
    """
    made: list[Cell] = []
    for model, base in (("teacher", 80.0), ("student-1", 70.0)):
        for task in ("cola", "mrpc", "rte", "wnli"):
            for seed in (1, 2):
                made.append(one := cell(task, seed=seed, model=model))
                if model == "student-1" and (task == "mrpc" or (task == "rte" and seed == 2)):
                    continue
                scores = {
                    metric: base + seed + number
                    for number, metric in enumerate(TASKS[task].metrics)
                }
                write_record(
                    one, tmp_path, {"scores": scores, "train_rows": 24, "all_train_rows": 48}, []
                )
    write_error(
        cell("rte", seed=2, model="student-1"), tmp_path, "out of memory\nmore", "Traceback …"
    )
    models = {name: {"path": name, "parameters": 22_713_216} for name in ("teacher", "student-1")}
    write_json(
        tmp_path / GRID, {"quick": False, "models": models, "cells": [asdict(one) for one in made]}
    )
    return tmp_path


def test_the_tables(output: Path) -> None:
    text = summary_of(output).markdown()
    assert "**Dev scores, %: median over the seeds ± half the range, n = 2**" in text
    assert (
        "| model | parameters | CoLA matthews | MRPC f1 | MRPC accuracy | RTE accuracy | WNLI "
        "accuracy | average |" in text
    )
    assert (
        "| teacher | 22.7 M | 81.5 ±0.5 | 81.5 ±0.5 | 82.5 ±0.5 | 81.5 ±0.5 | 81.5 ±0.5 | 81.5 |"
        in text
    )
    assert (
        "| student-1 | 22.7 M | 71.5 ±0.5 | none finished | none finished | 71.0 (1 of 2) |" in text
    )
    assert "- Average: over CoLA matthews, RTE accuracy; WNLI is excluded, as is usual." in text
    assert "**Not finished: 3 cells**" in text
    assert "- student-1 rte 1e-05 × 3 seed 2: out of memory\n" in text
    assert "- student-1 mrpc 1e-05 × 3 seed 1: not run yet\n" in text
    assert "Learning rates 1e-05; epochs 3; seeds 1, 2; batch size 32." in text
    assert "tried" not in text, "there was no choice"


def test_the_choice_is_shown_where_there_was_one(output: Path) -> None:
    grid = json.loads((output / GRID).read_text())
    others = [cell("cola", rate=2e-5, seed=seed, model="teacher") for seed in (1, 2)]
    for other in others:
        write_record(
            other,
            output,
            {"scores": {"matthews": 99.0}, "train_rows": 24, "all_train_rows": 48},
            [],
        )
    write_json(output / GRID, grid | {"cells": [*grid["cells"], *map(asdict, others)]})
    assert "| teacher | 2e-05 × 3 (2) | 1e-05 × 3 (1) |" in summary_of(output).markdown()


def test_figures(output: Path) -> None:
    figures = summary_of(output).figures()
    assert figures == summary_of(output).figures()
    by_name = {figure.pop("name"): figure for figure in figures}
    assert by_name["teacher/mrpc/accuracy"] == {"value": 82.5, "unit": "%", "n": 2}
    assert by_name["student-1/rte/accuracy"] == {"value": 71.0, "unit": "%", "n": 1}
    assert by_name["student-1/average"] == {"value": 71.25, "unit": "%", "n": 2}
    assert "student-1/mrpc/f1" not in by_name


def test_published_numbers_are_marked_and_never_averaged(output: Path) -> None:
    summary = summary_of(output, published=True)
    text = summary.markdown()
    assert "| BERT-base → 6×768 (published) | 66.0 M | 52.5 | 88.9 | – | 72.1 | – | – |" in text
    assert (
        "- Published, with other hyper-parameters, seeds and selection: BERT-base → 6×768 (unilm), "
        in text
    )
    assert summary.averaged == ["cola/matthews", "rte/accuracy"]
    assert not any(
        "unilm" in figure["name"] or "BERT" in figure["name"] for figure in summary.figures()
    )
    assert not any("RoBERTa" in row.name for row in summary.rows), "they have none of these columns"


def test_conditions_are_said(output: Path) -> None:
    grid = json.loads((output / GRID).read_text())
    for one in grid["cells"]:
        one["conditions"]["max_train_rows"] = 24
        made = Cell.from_dict(one)
        write_record(
            made,
            output,
            {
                "scores": dict.fromkeys(TASKS[made.task].metrics, 50.0),
                "train_rows": 24,
                "all_train_rows": 48,
            },
            [],
        )
    write_json(output / GRID, grid | {"quick": True})
    text = summary_of(output).markdown()
    assert (
        "- A quick look: few hyper-parameters and rows; not to be compared with published numbers."
        in text
    )
    assert (
        "- At most 24 training rows per task, the same ones for all (cut: CoLA, MRPC, RTE, WNLI)."
        in text
    )


def test_files(output: Path) -> None:
    summary = summary_of(output, published=True)
    write_summary(summary, output)
    before = {path.name: path.read_bytes() for path in output.glob("summary.*")}
    assert sorted(before) == ["summary.csv", "summary.json", "summary.md", "summary.png"]
    write_summary(summary_of(output, published=True), output)
    assert {path.name: path.read_bytes() for path in output.glob("summary.*")} == before
    rows = list(csv.DictReader(before["summary.csv"].decode().splitlines()))
    assert list(rows[0].values()) == [
        "teacher",
        "",
        "cola",
        "matthews",
        "81.5",
        "81.0",
        "82.0",
        "2",
        "1e-05",
        "3",
        "0",
        "",
    ]
    assert json.loads(before["summary.json"])["averaged"] == ["cola/matthews", "rte/accuracy"]


def test_nothing_at_all(output: Path) -> None:
    for path in (output / "cells").rglob("*.json"):
        path.unlink()
    summary = summary_of(output)
    write_summary(summary, output)
    assert not (output / "summary.png").exists()
    assert "none finished" in (output / "summary.md").read_text()


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no grid.json; expected the output folder of a GLUE grid"
    ):
        summary_of(tmp_path)


def test_an_empty_summary_has_no_figures() -> None:
    assert Summary([], [], [], [], [], []).figures() == []


@pytest.fixture
def collapsed(tmp_path: Path) -> Path:
    """A teacher that has learned MRPC and STS-B; a student of which seeds answer the same to
    everything.
    """
    made: list[Cell] = []
    majority = {"mrpc": {"f1": 81.2, "accuracy": 68.4}, "stsb": {"pearson": 0.0, "spearman": 0.0}}
    answers = {("mrpc", 1): "equivalent", ("mrpc", 2): "equivalent", ("stsb", 2): "2.7"}
    for model in ("teacher", "student"):
        for task, scores in majority.items():
            for seed in (1, 2):
                made.append(one := cell(task, seed=seed, model=model))
                answer = answers.get((task, seed)) if model == "student" else None
                found = scores if answer else dict.fromkeys(scores, 85.0)
                record = {"scores": found, "train_rows": 24, "all_train_rows": 24}
                record |= {"only_answer": answer, "majority_scores": scores}
                write_record(one, tmp_path, record, [])
    models = {name: {"path": name, "parameters": 1_000_000} for name in ("teacher", "student")}
    write_json(
        tmp_path / GRID, {"quick": False, "models": models, "cells": [asdict(one) for one in made]}
    )
    return tmp_path


def test_one_answer_for_all_is_no_score(collapsed: Path) -> None:
    summary = summary_of(collapsed)
    text = summary.markdown()
    assert "| teacher | 1.0 M | 85.0 ±0.0 | 85.0 ±0.0 | 85.0 ±0.0 | 85.0 ±0.0 | 85.0 |" in text
    marked = "81.2 ±0.0 (one class) | 68.4 ±0.0 (one class) | 42.5 ±42.5 (one value in 1 of 2)"
    assert f"| student | 1.0 M | {marked} |" in text
    assert "| majority class |  | 81.2 | 68.4 | 0.0 | 0.0 | 40.6 |" in text
    assert (
        "- student on MRPC: 2 of 2 seeds predict equivalent for every dev example. Such scores say "
        "nothing about the model; compare them with those of the majority class.\n"
    ) in text
    assert "- student on STS-B: 1 of 2 seeds predict 2.7 for every dev example." in text
    assert "teacher on" not in text
    assert "- Majority class: always predicting the most common label of the training set" in text
    figures = {
        figure["name"]: (figure["value"], figure["unit"], figure["n"])
        for figure in summary.figures()
    }
    assert figures["student/mrpc/one answer only"] == (2, "seeds", 2)
    assert figures["student/stsb/one answer only"] == (1, "seeds", 2)
    assert figures["majority class/mrpc/f1"] == (81.2, "%", 1)
    assert not any(name.startswith("teacher") and "one answer" in name for name in figures)


def test_one_answer_for_all_is_marked_in_the_files(collapsed: Path) -> None:
    summary = summary_of(collapsed)
    write_summary(summary, collapsed)
    table = csv.DictReader((collapsed / "summary.csv").read_text().splitlines())
    rows = {(row["model"], row["task"], row["metric"]): row for row in table}
    assert rows["student", "mrpc", "f1"]["one_answer_seeds"] == "2"
    assert rows["student", "mrpc", "f1"]["majority_class"] == "81.2"
    assert rows["teacher", "mrpc", "f1"]["one_answer_seeds"] == "0"
    whole = json.loads((collapsed / "summary.json").read_text())
    assert whole["majority"] == {
        "mrpc/f1": 81.2,
        "mrpc/accuracy": 68.4,
        "stsb/pearson": 0.0,
        "stsb/spearman": 0.0,
    }
    assert [choice["only_answers"] for choice in whole["choices"]] == [
        [],
        [],
        ["equivalent"] * 2,
        ["2.7"],
    ]


def test_records_of_earlier_versions_are_marked_by_their_predictions(output: Path) -> None:
    one = cell("cola", seed=1, model="teacher")
    predictions = [
        {"split": "dev", "id": str(row), "label": row % 2, "prediction": 1} for row in range(6)
    ]
    write_record(
        one,
        output,
        {"scores": {"matthews": 0.0}, "train_rows": 24, "all_train_rows": 48},
        predictions,
    )
    summary = summary_of(output)
    assert (
        "- teacher on CoLA: 1 of 2 seeds predict acceptable for every dev example."
        in summary.markdown()
    )
    assert summary.majority == {}
    assert "majority" not in summary.tables()[0].markdown()
