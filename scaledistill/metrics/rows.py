"""What a row of `metrics.jsonl` has of each student: a run of one student names it nowhere.

Inputs: rows. Outputs: values by student. Not handled here: files (`metrics.recorder`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def by_student(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return a metric of each student of a run with several; {} if the run has one."""
    own = {key: value for key, value in row.items() if re.fullmatch(rf"{metric}/[^/]+", key)}
    return {key.partition("/")[2]: value for key, value in own.items()}


def student_value(row: Mapping[str, Any], metric: str, student: str) -> Any:
    """Return a metric of one student, or None; the number of students may vary over a run."""
    own = by_student(row, metric)
    known = {key.split("/")[1] for key in row if key.startswith("loss/")}  # with pairs or without
    return own.get(student) if own or known - {student} else row.get(metric)
