"""What happened during a run: `events.jsonl`, a line for each start, save, warning and end.

Inputs: events of the loop, and warnings that any module logs. Outputs: lines of the file. Not
handled here: the thread that writes them (`metrics.recorder`), pages made of them (`report`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
KINDS = (
    "started",
    "resumed",
    "saved",
    "skipped",
    "warning",
    "dropped",
    "stopped",
    "done",
    "failed",
    "diverged",
)


@dataclass(frozen=True)
class Event:
    """Something that happened at a step."""

    kind: str
    """One of `KINDS`."""
    step: int
    message: str
    time: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    details: Mapping[str, Any] = field(default_factory=dict)
    """Of a start: the environment, the data and the teacher."""

    def line(self) -> str:
        """Return the event as a line of `events.jsonl`."""
        return json.dumps(asdict(self)) + "\n"


def read_events(path: Path) -> list[Event]:
    """Return the events of a file, without unreadable lines such as a truncated last."""
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            event = Event(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if isinstance(event.step, int) and isinstance(event.details, dict):
            events.append(event)
    return events


class WarningEvents(logging.Handler):
    """Passes the package's warnings on as events while it is entered.

    A message that is logged with `extra={"event": kind}` becomes an event of that kind.
    """

    def __init__(self, on_event: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._on_event = on_event

    def __enter__(self) -> WarningEvents:
        logging.getLogger("scaledistill").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("scaledistill").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a message on."""
        self._on_event(getattr(record, "event", "warning"), record.getMessage())
