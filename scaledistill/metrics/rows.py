"""What a row of `metrics.jsonl` has of each student: a run of one student names it nowhere.

Inputs: rows. Outputs: values by student. Not handled here: files (`metrics.recorder`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def by_student(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return a metric of each student of a run with several; {} if the run has one."""
    prefix = f"{metric}/"
    return {
        name: value
        for key, value in row.items()
        if key.startswith(prefix) and "/" not in (name := key[len(prefix) :])
    }


def student_values(row: Mapping[str, Any], metric: str, students: Iterable[str]) -> dict[str, Any]:
    """Return a metric of the students that the row has; their number may vary over a run."""
    if own := by_student(row, metric):
        return own
    known = {key.split("/")[1] for key in row if key.startswith("loss/")}  # with pairs or without
    return {name: row.get(metric) for name in students if not known - {name}}


def student_value(row: Mapping[str, Any], metric: str, student: str) -> Any:
    """Return a metric of one student, or None."""
    return student_values(row, metric, [student]).get(student)
