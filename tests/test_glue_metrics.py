"""Scores against formulas written down here, and published numbers."""

from __future__ import annotations

import builtins
import json
from typing import Any

import numpy as np
import pytest

from scaledistill.errors import DataError
from scaledistill.glue.metrics import majority_scores, only_answer, scores
from scaledistill.glue.summary import PUBLISHED
from scaledistill.glue.tasks import TASKS

N = 1000


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(found == labels))


def f1(found: np.ndarray, labels: np.ndarray) -> float:
    hits = np.sum((found == 1) & (labels == 1))
    precision, recall = hits / np.sum(found == 1), hits / np.sum(labels == 1)
    return float(2 * precision * recall / (precision + recall))


def matthews(found: np.ndarray, labels: np.ndarray) -> float:
    [[tn, fn], [fp, tp]] = [
        [np.sum((found == f) & (labels == t), dtype=float) for t in (0, 1)] for f in (0, 1)
    ]
    return float((tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def pearson(found: np.ndarray, labels: np.ndarray) -> float:
    a, b = found - found.mean(), labels - labels.mean()
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def spearman(found: np.ndarray, labels: np.ndarray) -> float:
    def ranks(values: np.ndarray) -> np.ndarray:  # ties get their mean rank
        return np.array(
            [np.sum(values < value) + (np.sum(values == value) + 1) / 2 for value in values]
        )

    return pearson(ranks(found), ranks(labels))


FORMULAS: dict[str, Any] = {
    "accuracy": accuracy,
    "accuracy_m": accuracy,
    "accuracy_mm": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.kind != "span"])
def test_random_predictions(name: str) -> None:
    task, generator = TASKS[name], np.random.default_rng(5)
    found: dict[str, float] = {}
    expected: dict[str, float] = {}
    for split in task.dev_splits:
        if task.kind == "regression":
            labels = np.round(generator.uniform(0, 5, N) * 5) / 5
            predictions = labels + generator.normal(0, 2, N).round(1)
        else:
            labels = generator.choice(
                len(task.labels), N, p=[0.3, *[0.7 / (len(task.labels) - 1)] * len(task.labels[1:])]
            )
            predictions = np.where(
                generator.random(N) < 0.4, generator.integers(0, len(task.labels), N), labels
            )
        own = scores(task, split, predictions, labels)
        found |= own
        expected |= {metric: 100 * FORMULAS[metric](predictions, labels) for metric in own}
    assert sorted(found) == sorted(task.metrics)
    assert found == pytest.approx(expected, abs=1e-9)


def test_by_hand() -> None:
    found, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert scores(TASKS["mrpc"], "dev", found, labels) == pytest.approx(
        {"f1": 200 / 3, "accuracy": 60}
    )
    assert scores(TASKS["cola"], "dev", found, labels) == pytest.approx({"matthews": 100 / 6})
    opposite = scores(TASKS["stsb"], "dev", np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]))
    assert opposite == pytest.approx({"pearson": -100, "spearman": -100})
    assert list(scores(TASKS["mnli"], "dev_mismatched", labels, labels)) == ["accuracy_mm"]


def test_constant_predictions_score_zero() -> None:
    constant = np.ones(4)
    assert scores(TASKS["cola"], "dev", constant, np.array([0, 1, 1, 0])) == {"matthews": 0}
    assert scores(TASKS["stsb"], "dev", constant, np.arange(4.0)) == {"pearson": 0, "spearman": 0}
    assert scores(TASKS["mrpc"], "dev", 0 * constant, np.array([0, 1, 1, 0]))["f1"] == 0


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "sklearn":
            raise ImportError("no sklearn")
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError, match=r"need scikit-learn and scipy .* pip install 'scaledistill\[eval\]'"
    ):
        scores(TASKS["cola"], "dev", np.ones(2), np.ones(2))


def test_published_rows_fit_the_tables() -> None:
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        for column, value in row["scores"].items():
            task, metric = column.split("/")
            assert metric in TASKS[task].metrics
            assert 0 < value < 100
    [peer] = [row for row in rows if "bertdistiller" in row["name"]]
    assert peer["scores"]["cola/matthews"] == pytest.approx(2 * 70.04 - 100)


@pytest.mark.parametrize(
    ("task", "train", "dev", "expected"),
    [
        ("mrpc", [1, 1, 0], [1, 1, 1, 0], {"f1": 600 / 7, "accuracy": 75.0}),
        # The training set's majority, not dev's.
        ("mrpc", [0, 0, 1], [1, 1, 1, 0], {"f1": 0.0, "accuracy": 25.0}),
        ("cola", [1, 0, 1], [1, 0, 1, 1], {"matthews": 0.0}),
        ("rte", [0, 1], [0, 0, 1, 1, 1], {"accuracy": 40.0}),  # at a tie the first class
        ("stsb", [0.0, 5.0, 2.5], [1.0, 2.0, 3.0], {"pearson": 0.0, "spearman": 0.0}),
    ],
)
def test_the_majority_class(
    task: str, train: list[Any], dev: list[Any], expected: dict[str, float]
) -> None:
    assert majority_scores(TASKS[task], "dev", train, dev) == pytest.approx(expected)


def test_the_majority_class_of_a_task_with_two_dev_sets() -> None:
    assert majority_scores(TASKS["mnli"], "dev_mismatched", [2, 2, 0], [2, 2, 1, 0]) == {
        "accuracy_mm": 50.0
    }


@pytest.mark.parametrize(
    ("task", "predictions", "expected"),
    [
        ("mrpc", [1, 1, 1], "equivalent"),
        ("rte", [0, 0], "entailment"),
        ("rte", [0, 0, 1], None),
        ("stsb", [2.71, 2.72, 2.70], "2.7"),
        ("stsb", [2.71, 2.72, 2.90], None),
        ("squad2", ["", ""], "no answer"),
        ("squad2", ["the", "the"], "'the'"),
        ("squad2", ["", "the"], None),
        ("rte", [1], None),  # of one example nothing follows
        ("rte", [], None),
    ],
)
def test_one_answer_for_all(task: str, predictions: list[Any], expected: str | None) -> None:
    assert only_answer(task, [{"prediction": one} for one in predictions]) == expected
