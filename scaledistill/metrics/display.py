"""The live display of a run on a terminal, and the same figures as a line of text.

Inputs: rows and events as they come. Outputs: a few lines that rich redraws in place, as wide as
the terminal and never cut: what does not fit is wrapped. Not handled here: when there is a display
and when a log line (`metrics.recorder`).
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scaledistill.metrics.rows import by_student

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_COLUMNS = 32
OTHER_LINES = 12
"""Lines of the display other than those of students; wrapped warnings take some of them."""


MOST_VALIDATED = 4
"""The validation losses of more students than this are not shown one by one."""


def short(number: float) -> str:
    """Return a number with one decimal and a unit prefix: 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def speed(row: Mapping[str, Any]) -> list[str]:
    """Return a row's throughput, MFU, data wait and memory, as far as it has them."""
    parts = []
    if row.get("tokens_per_second") is not None:
        parts.append(f"{short(row['tokens_per_second'])} tokens/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    if row.get("data_wait_fraction") is not None:
        parts.append(f"data wait {row['data_wait_fraction']:.1%}")
    if row.get("memory_peak_bytes") is not None:
        parts.append(f"memory {row['memory_peak_bytes'] / 1e9:.1f} GB")
    return parts


def loss_text(loss: float | None) -> str:
    """Return a loss for people; None stands for one that was not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def sparkline(values: Iterable[float | None], columns: int = SPARKLINE_COLUMNS) -> str:
    """Return a curve of `columns` characters or fewer; each shows the mean of its values.

    The scale is logarithmic, as losses fall quickly at first. Values that are None or not above 0
    are left out.
    """
    logs = [math.log(value) for value in values if value is not None and value > 0]
    columns = min(columns, len(logs))
    edges = [number * len(logs) // columns for number in range(columns + 1)] if columns else []
    means = [sum(logs[first:last]) / (last - first) for first, last in pairwise(edges)]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    top = len(BARS) - 1
    return "".join(BARS[round((mean - low) / span * top) if span else 0] for mean in means)


def ago(seconds: float) -> str:
    """Return how long ago something was: "40 s ago", "3 min ago", "2 h ago"."""
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 3600 else f"{seconds / 3600:.1f} h ago"


def clock(seconds: float) -> str:
    """Return a duration: 1:23:45, or 2 days, 1:23:45."""
    return str(timedelta(seconds=max(0, round(seconds))))


class Display:
    """A run's figures on the terminal; a context manager that redraws them in place."""

    def __init__(
        self,
        console: Console,
        name: str,
        max_steps: int,
        resumed_at: int,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start at a step.

        Args:
            console: which messages are logged to as well; they appear above the display.
            name: of the run.
            rows: recorded before the run was resumed.
        """
        self._name, self._max_steps, self.step = name, max_steps, resumed_at
        self._start = time.monotonic()
        self._row: Mapping[str, Any] = {}
        # Enough for a curve; a longer run drops every other loss, and then records half as often.
        self._losses: dict[str, list[float | None]] = {}
        self._stride, self._num_rows = 1, 0
        self._end: float | None = None
        self.notice: Callable[[], str] = str
        self._validation: Mapping[str, Any] | None = None
        self._saved: tuple[int, float | None] | None = (resumed_at, None) if resumed_at else None
        self._warnings: deque[str] = deque(maxlen=1)
        self._num_warnings = 0
        for row in rows:
            self._keep(row)
        self._live = Live(self, console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            self._live.stop()

    def show(self, row: Mapping[str, Any], seconds_left: float | None = None) -> None:
        """Show a logging step's row."""
        self.step, self._row = row["step"], row
        self._end = None if seconds_left is None else time.monotonic() + seconds_left
        self._keep(row)

    def event(self, kind: str, step: int, message: str) -> None:
        """Show a save or a warning."""
        if kind == "saved":
            self._saved = step, time.monotonic()
        elif kind in ("warning", "skipped"):
            self._warnings.append(message)
            self._num_warnings += 1

    def _keep(self, row: Mapping[str, Any]) -> None:
        if "validation_loss" in row:
            self._validation = row
        self._num_rows += 1
        if (self._num_rows - 1) % self._stride:
            return
        for name, loss in {"": row.get("loss"), **by_student(row, "loss")}.items():
            self._losses.setdefault(name, []).append(loss)
        if len(self._losses.get("", ())) >= 16 * SPARKLINE_COLUMNS:
            self._stride *= 2
            self._losses = {name: losses[::2] for name, losses in self._losses.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw; rich calls this several times a second."""
        now = time.monotonic()
        yield self._heading(now)
        bar = Table.grid(expand=True)  # the bar alone would not end its line
        bar.add_row(ProgressBar(total=max(1, self._max_steps), completed=self.step))
        yield bar
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        for label, text in self._lines(now, options):
            table.add_row(Text(label), text)
        yield table

    def _heading(self, now: float) -> Table:
        left = "" if self._end is None else f", {clock(self._end - now)} left"
        done = self.step / max(1, self._max_steps)
        heading = Table.grid(expand=True, padding=(0, 2))
        heading.add_column(ratio=1, overflow="fold")
        heading.add_column(justify="right", overflow="fold")
        heading.add_row(
            Text(self._name, style="bold"),
            Text(
                f"step {self.step:,}/{self._max_steps:,}  {done:.1%}  "
                f"{clock(now - self._start)} elapsed{left}"
            ),
        )
        return heading

    def _lines(self, now: float, options: ConsoleOptions) -> Iterable[tuple[str, Text]]:
        """Yield labels and texts."""
        if not self._row:
            yield "loss", Text("after the first logging step")
        else:
            own = by_student(self._row, "loss")
            yield "loss", self._loss("", self._row.get("loss"), options)
            shown = max(1, (options.height or options.max_height) - OTHER_LINES)
            for name, loss in list(own.items())[:shown]:
                yield f"  {name}", self._loss(name, loss, options)
            if len(own) > shown:
                yield "", Text(f"and {len(own) - shown} more students")
        if self._validation:
            yield "validation", Text(_validation_text(self._validation))
        if self._row:
            yield "speed", Text("  ".join(speed(self._row)))
            rates = {key: value for key, value in self._row.items() if re.match(r"lr(/|$)", key)}
            if rates and len(set(rates.values())) == 1:
                yield "learning rate", Text(f"{next(iter(rates.values())):.2e}")
        if self._saved:
            step, at = self._saved
            when = "resumed from it" if at is None else ago(now - at)
            yield "checkpoint", Text(f"step {step:,}, {when}")
        if self._warnings:
            many = "" if self._num_warnings == 1 else f"{self._num_warnings:,} in all, the last: "
            yield "warning", Text(many + self._warnings[-1], style="yellow")
        if notice := self.notice():
            yield "stopping", Text(notice, style="bold")

    def _loss(self, name: str, loss: float | None, options: ConsoleOptions) -> Text:
        text = Text(f"{loss_text(loss):<10}  ")
        if not options.ascii_only:
            text.append(sparkline(self._losses.get(name, ())), style="cyan")
        return text


def _validation_text(row: Mapping[str, Any]) -> str:
    """Return a row's validation losses and the probe's score."""
    text = loss_text(row["validation_loss"])
    own = by_student(row, "validation_loss")
    if 0 < len(own) <= MOST_VALIDATED:
        text += f" ({', '.join(f'{name} {loss_text(loss)}' for name, loss in own.items())})"
    if row.get("probe/stsb_spearman") is not None:
        text += f"  STS-B probe {row['probe/stsb_spearman']:.3f}"
    return f"{text}  at step {row['step']:,}"
