"""List what a grid would run, what is finished, and how long the rest will take.

Inputs: a plan and its output folder. Outputs: a table on the console, and estimates in seconds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from scaledistill.glue.cell import Cell, read_error, read_record
from scaledistill.glue.plan import Plan, grid_size
from scaledistill.metrics.benchmark import Table
from scaledistill.metrics.stopwatch import measured_matrix_rate

# Rough fraction of the matrix rate that fine-tuning reaches; used only until a cell is finished.
EFFICIENCY = 0.5


def print_list(console: Console, plan: Plan, output: Path, workers: int) -> None:
    """Print the cells by model and task, and an estimate of the time."""
    records = {cell: record for cell in plan.cells if (record := read_record(cell, output))}
    rate, source = _rate(plan, {cell: record["seconds"] for cell, record in records.items()})
    table = Table(
        "What would run",
        ["model", "task", "cells", "finished", "failed before", "training rows", "time"],
    )
    left = 0.0
    for model in plan.models:
        for task, data in plan.tasks.items():
            cells = [cell for cell in plan.cells if (cell.model, cell.task) == (model, task)]
            waiting = [cell for cell in cells if cell not in records]
            failed = [cell for cell in waiting if read_error(cell, output)]
            seconds = sum(map(plan.work, waiting)) / rate
            left += seconds
            counts = [str(len(cells)), str(len(cells) - len(waiting)), str(len(failed))]
            table.rows.append(
                [model, data.task.title, *counts, f"{data.train_rows:,}", duration(seconds)]
            )
    console.print(table.rich())
    count = len(plan.cells) - len(records)
    together = f"{workers} at a time" if workers > 1 else "one at a time"
    console.print(
        grid_size(len(plan.models), plan.settings), highlight=False, markup=False, soft_wrap=True
    )
    text = (
        f"{count} of {len(plan.cells)} cells to run, {together}: about {duration(left / workers)} "
        f"{source}"
    )
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format a duration: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rate(plan: Plan, seconds: dict[Cell, float]) -> tuple[float, str]:
    """Return the FLOP/s of a worker and the source of that figure."""
    if seconds:
        rate = sum(map(plan.work, seconds)) / sum(seconds.values())
        return rate, f"(from the {len(seconds)} finished cells)"
    return estimated_rate(), "(estimated: FLOPs at half of the matrix rate measured just now)"


def estimated_seconds(flops: float) -> float:
    """Return the approximate seconds for these FLOPs of fine-tuning, with one worker per GPU."""
    return flops / (max(1, torch.cuda.device_count()) * estimated_rate())


def estimated_rate() -> float:
    """Return the approximate FLOP/s of a worker on this machine; for use before any cell ran."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return EFFICIENCY * measured_matrix_rate(device, torch.bfloat16 if on_gpu else torch.float32)
