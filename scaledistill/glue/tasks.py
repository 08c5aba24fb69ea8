"""The table of tasks: original files, the hub's data set, labels and metrics.

Inputs: names. Outputs: `Task` objects. Not handled here: reading (`read`) and scoring (`metrics`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scaledistill.errors import SettingError, did_you_mean, near_miss


@dataclass(frozen=True)
class Task:
    """A task. Columns are named as in the header of the original files."""

    name: str
    title: str
    metrics: tuple[str, ...]
    """Metric names; the first one selects hyper-parameters."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their ids, as on the hub; () for regression and spans."""
    kind: Literal["classification", "regression", "span"] = "classification"
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    label_column: str = "label"
    digits: bool = True
    """Whether the files have class ids, not class names."""
    header: tuple[str, ...] = ()
    """The columns, if the files have no header."""
    hub_columns: tuple[str, ...] = ("sentence1", "sentence2")
    dev_splits: tuple[str, ...] = ("dev",)
    most_short_rows: int = 0
    """Maximum rows with too few columns; the official files have some, which the official readers
    skip."""


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("matthews",),
            ("unacceptable", "acceptable"),
            columns=("sentence",),
            header=("source", "label", "mark", "sentence"),
            hub_columns=("sentence",),
        ),
        Task(
            "sst2",
            "SST-2",
            ("accuracy",),
            ("negative", "positive"),
            columns=("sentence",),
            hub_columns=("sentence",),
        ),
        Task(
            "mrpc",
            "MRPC",
            ("f1", "accuracy"),
            ("not_equivalent", "equivalent"),
            columns=("#1 String", "#2 String"),
            label_column="Quality",
        ),
        Task("stsb", "STS-B", ("pearson", "spearman"), kind="regression", label_column="score"),
        Task(
            "qqp",
            "QQP",
            ("f1", "accuracy"),
            ("not_duplicate", "duplicate"),
            columns=("question1", "question2"),
            label_column="is_duplicate",
            hub_columns=("question1", "question2"),
            most_short_rows=100,
        ),
        Task(
            "mnli",
            "MNLI",
            ("accuracy_m", "accuracy_mm"),
            ("entailment", "neutral", "contradiction"),
            label_column="gold_label",
            digits=False,
            hub_columns=("premise", "hypothesis"),
            dev_splits=("dev_matched", "dev_mismatched"),
        ),
        Task(
            "qnli",
            "QNLI",
            ("accuracy",),
            ("entailment", "not_entailment"),
            columns=("question", "sentence"),
            digits=False,
            hub_columns=("question", "sentence"),
        ),
        Task("rte", "RTE", ("accuracy",), ("entailment", "not_entailment"), digits=False),
        Task("wnli", "WNLI", ("accuracy",), ("not_entailment", "entailment")),
        Task("squad2", "SQuAD 2.0", ("f1", "exact"), kind="span"),
    )
}


def find_tasks(tasks: Sequence[str]) -> list[Task]:
    """Return the tasks of these names.

    Raises:
        SettingError: a name is unknown or repeated, or there are none.
    """
    if not tasks:
        raise SettingError("tasks", expected="is empty", remedy=f"name some of {', '.join(TASKS)}")
    for number, name in enumerate(tasks):
        if name not in TASKS:
            if hint := _several(name):
                raise SettingError("tasks", expected=f": {name!r} is not a task", remedy=hint)
            plain = "".join(character for character in name.lower() if character.isalnum())
            meant = did_you_mean(near_miss(plain, TASKS))
            raise SettingError(
                "tasks",
                expected=f": unknown task {name!r}, expected some of {', '.join(TASKS)}{meant}",
            )
        if name in tasks[:number]:
            raise SettingError("tasks", expected=f"names {name} twice", remedy="name it once")
    return [TASKS[name] for name in tasks]


def _several(name: str) -> str | None:
    """Return what to write instead of a name that means several tasks; None for other names."""
    if name.lower() in ("all", "glue"):
        parts = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
        return f"name them all: {','.join(parts)}"
    parts = [part.lower() for part in re.split(r"[\s,;+]+", name) if part]
    if len(parts) > 1 and all(part in TASKS for part in parts):
        return (
            f"write {','.join(parts)} on the command line, {json.dumps(parts)} in a configuration"
        )
    return None
