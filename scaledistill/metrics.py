"""The record of a run: `metrics.jsonl` for machines, a display or lines for people, trackers, and `loss.png`.

Enters: one row per logging step, as plain numbers. Leaves: files and the console. Only rank 0 makes a `Recorder`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from scaledistill.errors import ConfigError

log = logging.getLogger(__name__)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; a line that cannot be read, such as a last one cut short, is left out."""
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
    """Writes a run's figures wherever they go. Used as a context manager around the loop."""

    def __init__(
        self, folder: Path, *, max_steps: int, resumed_at: int, trackers: Iterable[str], config: Mapping[str, Any]
    ):
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._max_steps = max_steps
        self._trackers = [_tracker(name, folder, config) for name in trackers]
        kept = [row for row in read_rows(self._path) if row["step"] <= resumed_at]  # later ones are made again
        partial = self._path.with_name(".metrics.jsonl")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self._path)
        self._file = self._path.open("a")
        self._display = _Display(max_steps, resumed_at) if sys.stderr.isatty() else None

    def __enter__(self) -> Recorder:
        if self._display:
            self._display.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._display:
            self._display.progress.stop()
        for tracker in self._trackers:
            tracker.finish()
        try:
            self._file.close()
            draw_losses(self._folder)
        except OSError as error:
            log.warning("%s: the record is not complete: %s", self._folder, error.strerror)

    def advance(self, step: int) -> None:
        """Move the display to a step."""
        if self._display:
            self._display.progress.update(self._display.task, completed=step)

    def record(self, row: Mapping[str, Any]) -> None:
        """Write a logging step's row; a value that is not finite becomes null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:  # what the disk did not take stays in the buffer and goes with the next row
            log.warning("%s: %s; training goes on", self._path, error.strerror)
        for tracker in self._trackers:
            tracker.log(
                {key: value for key, value in clean.items() if key != "step" and value is not None}, step=row["step"]
            )
        if self._display:
            self._display.show(clean)
        else:
            log.info("step %d/%d  %s", row["step"], self._max_steps, summary(clean))


def summary(row: Mapping[str, Any]) -> str:
    """Return a row's figures for people, on one line."""
    parts = ["loss " + ("not finite" if row["loss"] is None else f"{row['loss']:.4f}")]
    if row.get("validation_loss") is not None:
        parts.append(f"validation {row['validation_loss']:.4f}")
    if row.get("tokens_per_second") is not None:
        parts.append(f"{short(row['tokens_per_second'])} tokens/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    if row.get("data_wait_fraction") is not None:
        parts.append(f"data wait {row['data_wait_fraction']:.1%}")
    if row.get("memory_peak_bytes") is not None:
        parts.append(f"memory {row['memory_peak_bytes'] / 1e9:.1f} GB")
    return "  ".join(parts)


def short(number: float) -> str:
    """Return a number with three figures or so and a unit: 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


class _Figures(ProgressColumn):
    def get_table_column(self) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", ratio=1)

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("figures", ""))


class _Display:
    """A progress bar on the terminal, with the last row's figures beside it."""

    def __init__(self, max_steps: int, resumed_at: int) -> None:
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=10),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            _Figures(),
            console=Console(stderr=True),
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("distil", total=max_steps, completed=resumed_at, figures="")

    def show(self, row: Mapping[str, Any]) -> None:
        """Move to a row; one with a validation loss also stays above the bar."""
        self.progress.update(self.task, completed=row["step"], figures=summary(row))
        if row.get("validation_loss") is not None:
            losses = {key: row[key] for key in ("loss", "validation_loss")}
            self.progress.console.print(f"step {row['step']}  {summary(losses)}", highlight=False)


def check_trackers(names: Iterable[str]) -> None:
    """Check `logging.trackers`.

    Raises:
        ConfigError: accelerate has no such tracker, or its package is not installed.
    """
    for name in names:
        from accelerate import tracking  # seconds, that a run without trackers needn't spend

        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(tracking.LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"logging.trackers: unknown tracker {name!r}; known: {known}")
        if name not in [getattr(tracker, "value", tracker) for tracker in tracking.get_available_trackers()]:
            raise ConfigError(f"logging.trackers: {name!r} is not installed; pip install it or remove it")


def _tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Any:
    from accelerate import tracking

    check_trackers([name])
    known = tracking.LOGGER_TYPE_TO_CLASS[name]
    # Only rank 0 comes here; accelerate's own rank check and its logger would need its runtime.
    tracking.logger = log
    cls = type(known.__name__, (known,), {"main_process_only": False})
    tracker = cls(folder.name, **({"logging_dir": str(folder)} if known.requires_logging_directory else {}))
    tracker.start()
    tracker.store_init_configuration({"config": json.dumps(config)})
    return tracker


def draw_losses(folder: Path) -> None:
    """Draw `loss.png` from `metrics.jsonl`: training and validation loss by step."""
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
    axes.plot(*zip(*losses, strict=True), color="#1f77b4", linewidth=1, label="training")
    if validation := [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss")]:
        axes.plot(*zip(*validation, strict=True), color="#d62728", marker="o", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel="relation loss", title=folder.name, yscale="log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder / "loss.png")
