"""Read what a run left in its folder.

Inputs: a run's folder, of a finished, stopped or running run. Outputs: a `RunRecord`; what is
missing is empty. Not handled here: how it is shown (`report.charts`, `report.page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaledistill.errors import SourceError
from scaledistill.metrics.events import EVENTS_FILE, Event, read_events
from scaledistill.metrics.recorder import read_rows
from scaledistill.metrics.rows import by_student
from scaledistill.report.names import MAPS_FILE
from scaledistill.storage.files import read_json

GLUE_FOLDERS = ("evaluation", "glue")
"""Where a run's own evaluation writes its summary, and where people tend to put another one."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder."""

    name: str
    """Of the folder; unique among the runs of a page."""
    rows: Sequence[Mapping[str, Any]]
    events: Sequence[Event]
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    maps: Mapping[str, Any]
    glue: Mapping[str, Any]
    """The `summary.json` of its GLUE scores."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The environment, data and teacher of the last start; {} for a run of an older version."""
        return next((event.details for event in reversed(self.events) if event.details), {})

    @property
    def students(self) -> list[str]:
        """The names of the students."""
        if configured := self.config.get("students"):
            return list(configured)
        recorded = dict.fromkeys(name for row in self.rows for name in by_student(row, "loss"))
        return list(recorded) or [""]


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        SourceError: it is not the folder of a run that has begun to train.
    """
    if not folder.is_dir():
        raise SourceError("folder", str(folder), "is not a folder", "give a run's folder")
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        raise SourceError(
            "folder",
            str(folder),
            "has no metrics.jsonl with rows",
            "give a run's folder (run.folder) after its first logging step",
        )
    glue: Mapping[str, Any] = {}
    for name in GLUE_FOLDERS:
        glue = glue or read_json(folder / name / "summary.json") or {}
    return RunRecord(
        folder.resolve().name,
        rows,
        read_events(folder / EVENTS_FILE),
        read_json(folder / "config.json") or {},
        read_json(folder / "status.json") or {},
        read_json(folder / MAPS_FILE) or {},
        glue,
    )
