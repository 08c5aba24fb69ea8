"""The record of a run: rows, events, a display or log lines, trackers, and `loss.png`.

Inputs: one row per logging step, as plain numbers, and events. Outputs: files and console output;
for a dry run, the log lines only. Only rank 0 creates a `Recorder`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from scaledistill.errors import DivergedError
from scaledistill.metrics.display import Display, loss_text, speed
from scaledistill.metrics.events import EVENTS_FILE, Event, WarningEvents, read_events
from scaledistill.metrics.rows import by_student, student_values
from scaledistill.metrics.trackers import Trackers
from scaledistill.storage.background import Background, ended
from scaledistill.storage.files import write_bytes

log = logging.getLogger(__name__)

ROW_SECONDS = 0.1
"""A step waits this long for the disk, and not at all while earlier rows are still waiting."""
WORD_SECONDS = 30.0
"""A warning is logged if rows wait for longer."""
PROBE = "probe/stsb_spearman"
_PROBE_OF_STUDENT = re.compile(r"probe/[^/]+/stsb_spearman")
MOST_DRAWN = 12
"""The curves of more students than this would hide each other in `loss.png`."""
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for the disk."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without unreadable lines such as a truncated last."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Recorder:
    """Writes a run's metrics to all their destinations; a context manager around the loop."""

    def __init__(
        self,
        folder: Path,
        *,
        max_steps: int,
        resumed_at: int,
        trackers: Iterable[str],
        config: Mapping[str, Any],
        project: str | None = None,
        run_name: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        """Open the record, without the rows after `resumed_at`, which are recorded again.

        Args:
            max_steps: of the run, for the display.
            trackers: names of W&B, TensorBoard, MLflow; `project` and `run_name` are theirs.
            config: the run's settings, for the trackers.
            facts: the environment, the data and the teacher, for the first event.
        """
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._max_steps = max_steps
        self._trackers = Trackers(
            trackers,
            folder,
            config,
            project=project,
            run_name=run_name,
            resumed_at=resumed_at,
        )
        # A resumed run repeats the later steps, and records them again.
        kept = [row for row in read_rows(self._path) if row["step"] <= resumed_at]
        write_bytes(self._path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = self._path.open("a")
        events = folder / EVENTS_FILE
        if events.exists():  # a killed run may have left half a line
            write_bytes(events, "".join(each.line() for each in read_events(events)).encode())
        self._events = events.open("a")
        self._disk = Background("metrics.jsonl")
        # Its own thread: a row is waited for only if the disk has done all that came before it.
        self._events_disk = Background("events.jsonl")
        self._step = resumed_at
        self._waiting: deque[tuple[float, Future[None]]] = deque()  # rows, with when each was made
        self._has_warned = False
        console = _console()
        self._display = (
            Display(console, folder.name, max_steps, resumed_at, kept)
            if sys.stderr.isatty() and not console.is_dumb_terminal
            else None
        )
        self._warnings, self._entered = WarningEvents(self.event), contextlib.ExitStack()
        origin = ("resumed", f"from step {resumed_at}") if resumed_at else ("started", "at step 0")
        self.event(*origin, details=facts)

    def __enter__(self) -> Recorder:
        self._entered.enter_context(self._warnings)
        if self._display:
            self._entered.enter_context(self._display)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, at: TracebackType | None) -> None:
        self._entered.close()
        if error is not None:
            kind = "diverged" if isinstance(error, DivergedError) else "failed"
            self.event(kind, f"{type(error).__name__}: {error}")
        events_closed = self._events_disk.submit(self._close_events)
        closed = self._disk.submit(self._close)
        try:
            if ended(closed, CLOSE_SECONDS):
                closed.result()
            else:
                log.warning(
                    "%s: the record is not complete: the disk has not answered for %.0f s",
                    *(self._folder, CLOSE_SECONDS),
                )
        finally:
            ended(events_closed, CLOSE_SECONDS)
            self._trackers.finish()  # last: they may wait for a network

    def show_notices(self, notice: Callable[[], str]) -> bool:
        """Show on the display what `notice` returns; return False if there is no display."""
        if self._display:
            self._display.notice = notice
        return self._display is not None

    def advance(self, step: int) -> None:
        """Move the display to a step."""
        self._step = step
        if self._display:
            self._display.step = step

    def event(
        self,
        kind: str,
        message: str,
        step: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Record an event of one of `events.KINDS` (default: at the current step)."""
        event = Event(kind, self._step if step is None else step, message, details=details or {})
        # Not waited for: it may come from a thread that writes.
        self._events_disk.submit(self._write_event, event)
        if self._display:
            self._display.event(kind, event.step, message)

    def record(self, row: Mapping[str, Any], seconds_left: float | None = None) -> None:
        """Write a logging step's row; values that are not finite become null.

        `seconds_left` is only shown to people.
        """
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._waiting.append(
            (time.monotonic(), self._disk.submit(self._write, clean, patience=ROW_SECONDS))
        )
        self._warn_of_waiting()
        self._trackers.log(
            {key: value for key, value in clean.items() if key != "step" and value is not None},
            step=row["step"],
        )
        if self._display:
            self._display.show(clean, seconds_left)
        else:
            _log(clean, self._max_steps, seconds_left)

    def _warn_of_waiting(self) -> None:
        """Warn once each time that the disk hangs."""
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()
        if not self._waiting:
            self._has_warned = False
            return
        seconds = time.monotonic() - self._waiting[0][0]
        if seconds >= WORD_SECONDS and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: the disk has not answered for %.0f s; training continues, and the rows are "
                "written when it does",
                *(self._path, seconds),
            )

    def _write(self, row: Mapping[str, Any]) -> None:
        """Write a row; runs in the background thread."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            # What could not be written stays in the buffer and is written with the next row.
            log.warning("%s: %s; training continues", self._path, error.strerror)

    def _write_event(self, event: Event) -> None:
        """Write an event; runs in its background thread."""
        # A full disk is reported with the next row; a warning from here would be another event.
        with contextlib.suppress(OSError):
            self._events.write(event.line())
            self._events.flush()

    def _close_events(self) -> None:
        """Close the file of events; runs in its background thread."""
        with contextlib.suppress(OSError):
            self._events.close()

    def _close(self) -> None:
        """Close the file and draw the loss curve; runs in the background thread."""
        try:
            self._file.close()
        except OSError as error:
            log.warning("%s: the record is not complete: %s", self._folder, error.strerror)
        try:
            draw_losses(self._folder)
        except Exception as error:  # noqa: BLE001 - a picture must not fail the run
            log.warning("%s: no loss.png: %s", self._folder, error)


def _console() -> Console:
    """Return the console that messages are logged to: two would overwrite each other's lines."""
    handlers = logging.getLogger("scaledistill").handlers
    shared = [handler.console for handler in handlers if isinstance(handler, RichHandler)]
    return shared[0] if shared else Console(stderr=True)


class RowLog:
    """Logs rows and writes nothing: what a dry run has in place of a `Recorder`."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps

    def advance(self, step: int) -> None:
        """Show nothing: there is no display."""

    def record(self, row: Mapping[str, Any], seconds_left: float | None = None) -> None:
        """Log a logging step's row."""
        _log(row, self._max_steps, seconds_left)


class Pace:
    """Estimates the time left from the steps since the first row, when compilation is done."""

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step
        self._since: tuple[int, float] | None = None

    def seconds_left(self, step: int) -> float | None:
        """Return the seconds that the remaining steps will take, or None if not known yet.

        Validations and saves are included.
        """
        now = time.monotonic()
        first, start = self._since = self._since or (step, now)
        if step in (first, self._last_step):
            return None
        return (now - start) / (step - first) * (self._last_step - step)


def summary(row: Mapping[str, Any]) -> str:
    """Return a row's metrics for people, on one line."""
    parts = ["loss " + loss_text(row["loss"])]
    parts += _each(by_student(row, "loss"), ".4f")
    if "validation_loss" in row:
        parts.append("validation " + loss_text(row["validation_loss"]))
        parts += _each(by_student(row, "validation_loss"), ".4f")
    if row.get(PROBE) is not None:
        parts.append(f"STS-B probe {row[PROBE]:.3f}")
    probes = {key.split("/")[1]: x for key, x in row.items() if _PROBE_OF_STUDENT.fullmatch(key)}
    if probes:
        parts += ["STS-B probe", *_each(probes, ".3f")]
    parts += speed(row)
    return "  ".join(parts)


def _each(values: Mapping[str, float | None], form: str) -> list[str]:
    """Return "(a 0.5, b not finite)" for the students' values, or nothing."""
    shown = [f"{name} {'not finite' if x is None else f'{x:{form}}'}" for name, x in values.items()]
    return [f"({', '.join(shown)})"] if shown else []


def line(row: Mapping[str, Any], seconds_left: float | None = None) -> str:
    """Return a row's metrics as a log line, with the learning rate and the time left."""
    parts = [summary(row)]
    if row.get("lr") is not None:
        parts.append(f"lr {row['lr']:.2e}")
    elif rates := by_student(row, "lr"):
        parts += ["lr", *_each(rates, ".2e")]
    if seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)


def _log(row: Mapping[str, Any], max_steps: int, seconds_left: float | None) -> None:
    log.info("step %d/%d  %s", row["step"], max_steps, line(row, seconds_left))


def draw_losses(folder: Path) -> None:
    """Draw `loss.png` from `metrics.jsonl`: training and validation loss by step and student."""
    rows = read_rows(folder / "metrics.jsonl")
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss")]
    if not losses:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = dict.fromkeys(name for row in rows for name in by_student(row, "loss"))
    if len(names) > MOST_DRAWN:
        names = {}  # their sum
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}, "validation_loss": {}}
    for row in rows:
        for metric, by_name in curves.items():
            found = student_values(row, metric, names) if names else {"": row.get(metric)}
            for name, value in found.items():
                if value:
                    by_name.setdefault(name, []).append((row["step"], value))
    for name in names or [""]:
        label = f" of {name}" if name else ""
        colors = (None, None) if name else ("#1f77b4", "#d62728")
        if curve := curves["loss"].get(name):
            xy = zip(*curve, strict=True)
            axes.plot(*xy, color=colors[0], linewidth=1, label=f"training{label}")
        if curve := curves["validation_loss"].get(name):
            axes.plot(
                *zip(*curve, strict=True),
                color=colors[1],
                marker="o",
                markersize=4,
                label=f"validation{label}",
            )
    axes.set(xlabel="optimizer step", ylabel="relation loss", yscale="log")
    axes.set_title(folder.name, parse_math=False)  # two $ would be a formula
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder / "loss.png")
