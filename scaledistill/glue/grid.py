"""Run a grid of cells: one at a time per GPU, or one or several at a time on a CPU.

Inputs: models, settings and an output folder. Outputs: the folder with a record of each cell and
the summary of all. Finished cells are kept, so the same call resumes after any interruption. Not
handled here: the work of a cell (`finetune`) and the tables (`summary`).
"""

from __future__ import annotations

import logging
import os
import selectors
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from scaledistill.config.schema import EvaluationSettings
from scaledistill.errors import DataError, Field, SettingError, counted, named
from scaledistill.glue.cell import Cell, read_error, read_record, remove_partial_files, write_error
from scaledistill.glue.output import write_summary
from scaledistill.glue.plan import Model, Plan, make_plan
from scaledistill.glue.summary import GRID, Summary, summary_of
from scaledistill.glue.worker import Share, Worker
from scaledistill.storage.files import locked, read_json, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """The progress or the end of a cell."""

    cell: Cell
    state: Literal["running", "finished", "failed"]
    fraction: float
    """The finished fraction of the cell's training steps."""
    text: str
    """The cell's scores, or why it failed; "" while it runs."""


OnUpdate = Callable[[Update], None]


class GridStoppedError(Exception):
    """A stop was requested; finished cells are kept, and the same call resumes."""


@dataclass(frozen=True)
class GridResult:
    """The outcome of a grid."""

    output: Path
    finished: list[Cell]
    failures: dict[Cell, str]
    """The failed cells, and why each failed."""
    summary: Summary


def run_grid(
    models: Mapping[str, str],
    settings: EvaluationSettings,
    output: Path,
    *,
    quick: bool = False,
    workers: int | None = None,
    published: bool = False,
    own_output: bool = False,
    on_update: OnUpdate | None = None,
    stop: Callable[[], object] = lambda: None,
) -> GridResult:
    """Run the grid: fine-tune and score each model on each task, and write the summary.

    A cell that is finished in `output` is not run again; a failed one is. A failed cell does not
    stop the others and is listed in the result.

    Args:
        models: folder or hub name of each model by its name in tables and figures.
        output: gets `cells/`, `grid.json` and `summary.md`, `.csv`, `.json`, `.png`.
        quick: state in the tables that the settings are those of a quick look.
        workers: number of cells that run at a time (default: one per GPU; one without GPUs). On
            CPUs they share the cores.
        published: add published scores to the tables.
        own_output: see `write_grid`.
        on_update: called with each update (default: write the end of each cell to the log).
        stop: called about once a second; a true result stops the grid.

    Raises:
        GridStoppedError: `stop` returned a true value.
        ConfigError, DataError: models, data or settings cannot be used and nothing has run, or a
            worker does not start.
    """
    workers = worker_count(workers)
    plan = make_plan(models, settings)
    return run_plan(
        plan,
        output,
        quick=quick,
        workers=workers,
        published=published,
        own_output=own_output,
        on_update=on_update,
        stop=stop,
    )


def run_plan(
    plan: Plan,
    output: Path,
    *,
    quick: bool,
    workers: int,
    published: bool,
    own_output: bool = False,
    on_update: OnUpdate | None = None,
    stop: Callable[[], object] = lambda: None,
    first: Worker | None = None,
) -> GridResult:
    """Run what `make_plan` returned; see `run_grid`.

    Args:
        first: a worker that was started in advance, while the plan was made.

    Raises:
        ConfigError: another process uses the folder, or it has another model of the same name.
        DataError: a worker does not start.
        GridStoppedError: `stop` returned a true value.
    """
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with named(folder="output"):
            stack.enter_context(locked(output))
        remove_partial_files(output)
        write_grid(plan, output, quick=quick, own_output=own_output)
        waiting = [cell for cell in plan.cells if read_record(cell, output) is None]
        if kept := len(plan.cells) - len(waiting):
            log.info("%d of %d cells are finished already", kept, len(plan.cells))
        with _Pool(plan, output, workers, on_update or _Log(len(waiting)), first) as pool:
            pool.run(waiting, stop)
        summary = summary_of(output, published=published)
        write_summary(summary, output)
    errors = {
        cell: read_error(cell, output) for cell in plan.cells if read_record(cell, output) is None
    }
    return GridResult(
        output=output,
        finished=[cell for cell in plan.cells if cell not in errors],
        failures={cell: error or "no record was written" for cell, error in errors.items()},
        summary=summary,
    )


def write_grid(plan: Plan, output: Path, *, quick: bool, own_output: bool = False) -> None:
    """Write the list of cells for the summary: the plan's, and comparable earlier ones.

    Args:
        own_output: the folder is that of the plan's models; other models of their names are older
            versions of them.

    Raises:
        SettingError: one of the plan's models has the name of another model in the folder.
    """
    before = read_json(output / GRID) or {"cells": [], "models": {}}
    earlier = [Cell.from_dict(cell) for cell in before["cells"]]
    for cell in earlier:
        model, path = plan.models.get(cell.model), before["models"][cell.model]["path"]
        if (
            model
            and model.sha256 != cell.model_sha256
            and path not in (model.path, _location(model))
            and not own_output
        ):
            raise SettingError(
                "output",
                str(output),
                f"has scores of another model {model.name}, {path}",
                (f"give {model.path} a name of its own, or set another ", Field("output")),
            )
    kept = [cell for cell in earlier if _compares(cell, plan)]
    if len(kept) < len(earlier):
        log.warning(
            "%s: %s of earlier grids left out of the summary: other models, data or settings",
            output,
            counted(len(earlier) - len(kept), "cell"),
        )
    cells = list(dict.fromkeys([*kept, *plan.cells]))
    models = before["models"] | {
        name: {"path": _location(model), "parameters": model.parameters}
        for name, model in plan.models.items()
    }
    names = dict.fromkeys(cell.model for cell in cells)
    write_json(
        output / GRID,
        {
            "quick": quick,
            "models": {name: models[name] for name in names},
            "cells": [asdict(cell) for cell in cells],
        },
    )


def _location(model: Model) -> str:
    """Return a model's folder, absolute, or its hub name."""
    return os.path.abspath(model.path) if os.path.isdir(model.path) else model.path


def _compares(cell: Cell, plan: Plan) -> bool:
    """Whether an earlier cell belongs in the same table as the plan's cells."""
    if cell.model in plan.models and plan.models[cell.model].sha256 != cell.model_sha256:
        return False
    if cell.task in plan.tasks:
        return cell.conditions == plan.tasks[cell.task].conditions
    return all(cell.conditions.general == data.conditions.general for data in plan.tasks.values())


def worker_count(workers: int | None) -> int:
    """Return the number of cells that run at a time; None means the default.

    Raises:
        SettingError: `workers` is below 1, or above the machine's number of GPUs, or of cores if it
            has no GPU.
    """
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    most, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if workers is not None and not 1 <= workers <= most:
        raise SettingError(
            "workers", workers, f", expected 1 to {most}: the machine has {most} {what}"
        )
    return workers or max(1, gpus)


class _Pool:
    """A pool of workers that run one cell each; on exit, the context manager ends them."""

    def __init__(
        self, plan: Plan, output: Path, workers: int, on_update: OnUpdate, first: Worker | None
    ) -> None:
        self._plan, self._output, self._workers, self._on_update = plan, output, workers, on_update
        self._first = first
        self._running: dict[int, Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._waiting: deque[Cell] = deque()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._selector.close()
        for worker in self._running.values():
            worker.end()

    def run(self, cells: Sequence[Cell], stop: Callable[[], object]) -> None:
        """Run cells until each has finished or failed, or `stop` returns a true value."""
        self._waiting.extend(cells)
        while self._waiting or any(worker.cell for worker in self._running.values()):
            for number in range(self._workers):
                if self._waiting and number not in self._running:
                    worker, self._first = self._first or Worker(), None
                    self._running[number] = worker
                    self._selector.register(worker, selectors.EVENT_READ, number)
                    self._give_next(number)
            for key, _ in self._selector.select(timeout=1):
                self._hear(key.data)
            if stop():
                raise GridStoppedError

    def _give_next(self, number: int) -> None:
        worker = self._running[number]
        worker.cell = None
        if self._waiting:
            cell = self._waiting.popleft()
            settings = self._plan.settings
            data_folder = None if settings.data_folder is None else Path(settings.data_folder)
            model_folder = self._plan.models[cell.model].folder
            share = _share(number, self._workers)
            worker.give(
                cell, self._output, model_folder, data_folder, share, settings.scores_each_epoch
            )
            self._on_update(Update(cell, "running", 0.0, ""))

    def _hear(self, number: int) -> None:
        worker = self._running[number]
        answers = worker.answers()
        if answers is None:
            how, words = worker.last_words()
            self._close(number)
            if not worker.ready:
                raise DataError(f"a worker process ended before it was ready, {how}:\n{words}")
            if worker.cell:
                write_error(worker.cell, self._output, f"the worker process ended: {how}", words)
                self._tell_end(worker.cell)
            return
        for answer in answers:
            worker.ready = True
            if worker.cell and "fraction" in answer:
                self._on_update(Update(worker.cell, "running", answer["fraction"], ""))
            elif worker.cell and "finished" in answer:
                self._tell_end(worker.cell)
                if answer["leaves"]:
                    self._close(number)
                else:
                    self._give_next(number)

    def _tell_end(self, cell: Cell) -> None:
        if record := read_record(cell, self._output):
            text = ", ".join(f"{metric} {value:.1f}" for metric, value in record["scores"].items())
            if record.get("only_answer") is not None:
                text += f" (predicts {record['only_answer']} for every example)"
            self._on_update(Update(cell, "finished", 1.0, text))
        else:
            self._on_update(
                Update(
                    cell, "failed", 1.0, read_error(cell, self._output) or "its record is damaged"
                )
            )

    def _close(self, number: int) -> None:
        self._selector.unregister(self._running[number])
        self._running.pop(number).end()


def _share(number: int, workers: int) -> Share:
    """Return a worker's share of the machine: its GPU, or its part of the cores."""
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        return Share(visible.split(",")[number], cores)
    return Share(None, max(1, cores // workers))


class _Log:
    """Logs the end of each cell."""

    def __init__(self, total: int) -> None:
        self._total, self._ended = total, 0

    def __call__(self, update: Update) -> None:
        if update.state == "running":
            return
        self._ended += 1
        level = logging.ERROR if update.state == "failed" else logging.INFO
        log.log(
            level,
            "%d/%d  %s  %s: %s",
            self._ended,
            self._total,
            update.cell.title,
            update.state,
            update.text,
        )
