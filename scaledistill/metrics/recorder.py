"""The record of a run: `metrics.jsonl`, a progress bar or log lines, trackers, and `loss.png`.

Inputs: one row per logging step, as plain numbers. Outputs: files and console output; for a dry
run, the log lines only. Only rank 0 creates a `Recorder`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

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


def by_student(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return a metric of each student of a run with several; {} if the run has one."""
    own = {key: value for key, value in row.items() if re.fullmatch(rf"{metric}/[^/]+", key)}
    return {key.partition("/")[2]: value for key, value in own.items()}


def student_value(row: Mapping[str, Any], metric: str, student: str) -> Any:
    """Return a metric of one student, or None; the number of students may vary over a run."""
    own = by_student(row, metric)
    known = {key.split("/")[1] for key in row if key.startswith("loss/")}  # with pairs or without
    return own.get(student) if own or known - {student} else row.get(metric)


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
    ):
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._max_steps = max_steps
        self._trackers = Trackers(trackers, folder, config, project=project, run_name=run_name)
        # A resumed run repeats the later steps, and records them again.
        kept = [row for row in read_rows(self._path) if row["step"] <= resumed_at]
        write_bytes(self._path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = self._path.open("a")
        self._disk = Background("metrics.jsonl")
        self._waiting: deque[tuple[float, Future[None]]] = deque()  # rows, with when each was made
        self._has_warned = False
        self._display = _Display(max_steps, resumed_at) if sys.stderr.isatty() else None

    def __enter__(self) -> Recorder:
        if self._display:
            self._display.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._display:
            self._display.progress.stop()
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
            self._trackers.finish()  # last: they may wait for a network

    def advance(self, step: int) -> None:
        """Move the display to a step."""
        if self._display:
            self._display.progress.update(self._display.task, completed=step)

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
            self._display.show(clean)
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

    def _close(self) -> None:
        """Close the file and draw the loss curve; runs in the background thread."""
        try:
            self._file.close()
            draw_losses(self._folder)
        except OSError as error:
            log.warning("%s: the record is not complete: %s", self._folder, error.strerror)


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
    parts = ["loss " + ("not finite" if row["loss"] is None else f"{row['loss']:.4f}")]
    parts += _each(by_student(row, "loss"), ".4f")
    if row.get("validation_loss") is not None:
        parts.append(f"validation {row['validation_loss']:.4f}")
        parts += _each(by_student(row, "validation_loss"), ".4f")
    if row.get(PROBE) is not None:
        parts.append(f"STS-B probe {row[PROBE]:.3f}")
    probes = {key.split("/")[1]: x for key, x in row.items() if _PROBE_OF_STUDENT.fullmatch(key)}
    if probes:
        parts += ["STS-B probe", *_each(probes, ".3f")]
    if row.get("tokens_per_second") is not None:
        parts.append(f"{short(row['tokens_per_second'])} tokens/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    if row.get("data_wait_fraction") is not None:
        parts.append(f"data wait {row['data_wait_fraction']:.1%}")
    if row.get("memory_peak_bytes") is not None:
        parts.append(f"memory {row['memory_peak_bytes'] / 1e9:.1f} GB")
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


def short(number: float) -> str:
    """Return a number with one decimal and a unit prefix: 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


class _Bar(Progress):
    """A progress bar with the last row's metrics below it: beside it, 80 columns would cut them."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, then the metrics; rich calls this to draw."""
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures)


class _Display:
    """The progress bar on the terminal."""

    def __init__(self, max_steps: int, resumed_at: int) -> None:
        self.progress = _Bar(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("distil", total=max_steps, completed=resumed_at)

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row; print one with a validation loss above the bar, where it stays."""
        self.progress.figures = line(row)
        self.progress.update(self.task, completed=row["step"])
        if row.get("validation_loss") is not None:
            of_loss = re.compile(r"(validation_)?loss(/[^/]+)?")
            losses = {key: x for key, x in row.items() if of_loss.fullmatch(key)}
            self.progress.console.print(f"step {row['step']}  {summary(losses)}", highlight=False)


def _loss_of(row: Mapping[str, Any], metric: str, student: str | None) -> float | None:
    return student_value(row, metric, student) if student else row.get(metric)


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
    for name in names or [None]:
        label = f" of {name}" if name else ""
        colors = (None, None) if name else ("#1f77b4", "#d62728")
        curves = {
            metric: [(row["step"], x) for row in rows if (x := _loss_of(row, metric, name))]
            for metric in ("loss", "validation_loss")
        }
        if curves["loss"]:
            xy = zip(*curves["loss"], strict=True)
            axes.plot(*xy, color=colors[0], linewidth=1, label=f"training{label}")
        if curves["validation_loss"]:
            axes.plot(
                *zip(*curves["validation_loss"], strict=True),
                color=colors[1],
                marker="o",
                markersize=4,
                label=f"validation{label}",
            )
    axes.set(xlabel="optimizer step", ylabel="relation loss", title=folder.name, yscale="log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder / "loss.png")
