"""Name a run's settings in the errors of modules that get them as plain parameters.

Inputs: errors from `models`, in which a parameter has its function's own name (see `errors`).
Outputs: the names for `errors.named`, such as `teacher.model`; and the names of metrics.
"""

from __future__ import annotations

from collections.abc import Collection

from scaledistill.config.schema import StudentSettings, TeacherSettings
from scaledistill.errors import Field


def teacher_names(teacher: TeacherSettings) -> dict[str, str | Field]:
    """Return the settings of what loads, checks and places the teacher, by parameter."""
    return {
        "model": Field("teacher.model", teacher.model),
        "layer": "teacher.layer",
        "num_layers": "teacher.layer",
        "dtype": "teacher.dtype",
        "trust_remote_code": "teacher.trust_remote_code",
    }


def student_names(student: str) -> dict[str, str | Field]:
    """Return the settings of what shapes and initialises a student, by parameter.

    Args:
        student: its key in `students`.
    """
    block = f"students.{student}"
    return {
        "config": block,
        "teacher_config": "teacher.model",
        "trust_remote_code": "teacher.trust_remote_code",
        **{name: f"{block}.{name}" for name in StudentSettings.model_fields},
    }


def own_metric(metric: str, student: str, students: Collection[str]) -> str:
    """Return the name of a student's metric: "lr", or "lr/<student>" if the run has several."""
    return f"{metric}/{student}" if len(students) > 1 else metric
