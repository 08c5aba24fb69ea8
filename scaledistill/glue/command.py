"""The command line of the GLUE runner.

Inputs: command-line arguments. Outputs: tables, files and an exit code. Not handled here: running
the cells (`grid`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from scaledistill.config.defaults import BATCH_SIZE, EPOCHS, LEARNING_RATES, SEEDS
from scaledistill.errors import (
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    ConfigError,
    carry_out,
    counted,
    did_you_mean,
    near_miss,
)
from scaledistill.glue.cell import MODEL_NAME
from scaledistill.glue.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console

    from scaledistill.config.schema import EvaluationSettings
    from scaledistill.glue.grid import GridResult, Update
    from scaledistill.glue.plan import Plan

PROG = "scaledistill glue"
QUICK = {
    "learning_rates": [1e-4],
    "epochs": [2],
    "seeds": [1],
    "max_train_rows": 1200,
    "group_by_length": True,
}
"""The defaults with --quick, where they differ."""
DESCRIPTION = """Fine-tune and score models on GLUE and SQuAD 2.0.

With --probe, score them without fine-tuning. Rerun the same command to resume after an
interruption; finished cells are not run again. The output folder gets summary.md, .csv, .json and
.png, and cells/ with the record of each cell and its prediction for each dev example."""
EPILOG = """exit codes: 0 done, 2 wrong options, 3 wrong data or environment, or failed cells,
130 interrupted

examples:
  %(prog)s --model runs/l6/export/l6 --model google-bert/bert-base-uncased \\
    --tasks cola,rte --data-dir glue --output runs/glue
  %(prog)s --probe stsb --model runs/l6/export/l6"""

# Options of run_glue.py and similar tools, and the option that does the same here.
FOREIGN = {
    "--task-name": "--tasks",
    "--model-name-or-path": "--model",
    "--max-seq-length": "--max-length",
    "--per-device-train-batch-size": "--batch-size",
    "--train-batch-size": "--batch-size",
    "--num-train-epochs": "--epochs",
    "--learning-rate": "--learning-rates",
    "--max-train-samples": "--max-train-rows",
    "--output-dir": "--output",
    "--data-folder": "--data-dir",
    "--device": "CUDA_VISIBLE_DEVICES",
}
LISTS = ("--tasks", "--learning-rates", "--epochs", "--seeds")


class _Once(argparse.Action):
    """Store a list; refuse the option's second occurrence, which would replace the first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice; give all values at once, separated by commas")
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _list_of(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            parts = text.replace(",", " ").split()
            with contextlib.suppress(ValueError):
                if [kind(part) for part in parts]:
                    what = f"{','.join(parts)}: {what}"
            raise argparse.ArgumentTypeError(
                f"found {text!r}, expected {what}, separated by commas"
            ) from None

    return parse


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parse = _Parser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parse.add_argument_group("what")
    what.add_argument(
        "--model", action="append", metavar="[NAME=]MODEL", dest="models",
        help="a folder or hub name, and its name in tables (default: the last part); repeatable",
    )  # fmt: skip
    what.add_argument("--tasks", action=_Once, metavar="TASK,…", help=f"some of {','.join(TASKS)}")
    what.add_argument(
        "--data-dir", metavar="DIR", dest="data_folder",
        help="a folder with the original files, one folder per task (default: from the hub)",
    )  # fmt: skip
    what.add_argument(
        "--probe", choices=("stsb",),
        help="instead of --tasks: score the models without fine-tuning, in seconds",
    )  # fmt: skip
    grid = parse.add_argument_group("the grid: each learning rate × epochs × seed")
    lists: dict[str, tuple[type, Sequence[float]]] = {
        "learning_rates": (float, LEARNING_RATES),
        "epochs": (int, EPOCHS),
        "seeds": (int, SEEDS),
    }
    for name, (kind, values) in lists.items():
        default = ",".join(f"{value:g}" for value in values)
        grid.add_argument(
            _option(name),
            action=_Once,
            type=_list_of(kind),
            metavar="N,…",
            help=f"(default: {default})",
        )
    grid.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"examples per step (default: {BATCH_SIZE})",
    )
    grid.add_argument(
        "--max-length",
        type=int,
        metavar="T",
        help="maximum tokens per example (default: 128; squad2: 384)",
    )
    grid.add_argument(
        "--max-train-rows",
        type=int,
        metavar="N",
        help="use at most N training rows per task, the same for all models",
    )
    grid.add_argument(
        "--group-by-length", action=argparse.BooleanOptionalAction,
        help=(
            "batch rows of similar length: up to three times faster, but their order is less "
            "random (default: no)"
        ),
    )  # fmt: skip
    grid.add_argument(
        "--scores-each-epoch", action="store_true", default=None,
        help=(
            "also score after each earlier epoch, for the record; this takes time and changes no "
            "result"
        ),
    )  # fmt: skip
    grid.add_argument(
        "--quick", action="store_true",
        help=(
            "a quick look: other defaults (learning rate 1e-4, 2 epochs, seed 1, 1,200 training "
            "rows per task, --group-by-length)"
        ),
    )  # fmt: skip
    run = parse.add_argument_group("the run")
    run.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="output folder (default: runs/glue; with --quick: runs/glue-quick)",
    )
    run.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the scores as a JSON list of name, value, unit, n",
    )
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="cells at a time (default: one per GPU; one without GPUs)",
    )
    run.add_argument(
        "--list",
        action="store_true",
        help="print what would run and how long it would take, and exit",
    )
    run.add_argument("--published", action="store_true", help="add published scores to the tables")
    run.add_argument(
        "--speed",
        action="store_true",
        help="also measure latency and throughput; the machine must be idle",
    )
    return parse


def parse(arguments: Sequence[str] | None, prog: str = PROG) -> argparse.Namespace:
    """Parse the command line; wrong options end the process with exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parse = parser(prog)
    options, unknown = parse.parse_known_args(arguments)
    if unknown:
        known = [name for action in parse._actions for name in action.option_strings]
        parse.error(_unknown(unknown[0], arguments, known))
    if not options.models:
        parse.error("--model is missing")
    if options.probe and options.tasks:
        parse.error(
            f"--probe {options.probe} excludes --tasks, since it does not fine-tune; run the "
            "command once with each"
        )
    if options.probe:
        kept = ("models", "probe", "data_folder", "json")
        unread = [name for name, value in vars(options).items() if value and name not in kept]
        if unread:
            parse.error(f"{_option(unread[0])} is not read with --probe; leave it out")
    if options.list:
        for name in ("json", "published", "speed"):
            if getattr(options, name):
                parse.error(f"--{name} is not read with --list; leave it out")
    if not (options.tasks or options.probe):
        parse.error("--tasks is missing (or --probe stsb, for a score without fine-tuning)")
    if options.json and not options.json.parent.is_dir():
        parse.error(f"--json {options.json}: no folder {options.json.parent}; make it first")
    if options.json and options.json.is_dir():
        parse.error(f"--json {options.json} is a folder; name a file in it")
    options.output = options.output or Path("runs/glue-quick" if options.quick else "runs/glue")
    return options


def _unknown(word: str, arguments: Sequence[str], known: Sequence[str]) -> str:
    """Return the error message for an unknown argument, with what was probably meant."""
    if word.startswith("-"):
        name = word.partition("=")[0]
        near = FOREIGN.get(name.replace("_", "-")) or near_miss(name, known)
        return f"unknown option {word}{did_you_mean(near)}"
    place = list(arguments).index(word)
    before = [i for i in range(place) if arguments[i].startswith("-")]
    option, equals, value = arguments[before[-1]].partition("=") if before else ("", "", "")
    after = before[-1] + 1 if before else 0
    values = [*([value] if equals else []), *arguments[after:place]]
    values += itertools.takewhile(lambda one: not one.startswith("-"), arguments[place:])
    meant = ""
    if option in LISTS:
        joined = ",".join(part for one in values for part in one.split(",") if part)
        meant = f"; separate values by commas: {option} {joined}"
    elif option == "--model":
        meant = f"; repeat the option: {' '.join(f'--model {one}' for one in values)}"
    return f"unknown argument {word}{meant}"


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """Return the path or hub name of each model by its name.

    Raises:
        ConfigError: two models have the same name, or an argument has no path.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not MODEL_NAME.fullmatch(name):  # a path, with or without "=" in it
            name, path = "", argument
        if not path:
            raise ConfigError(f"--model {argument!r}: expected a folder or hub name after '='")
        name = name or Path(os.path.abspath(path)).name
        if name in models:
            raise ConfigError(
                f"two models are called {name!r}: {models[name]} and {path}; give one as --model "
                f"NAME={path}"
            )
        models[name] = path
    return models


def settings_of(options: argparse.Namespace) -> EvaluationSettings:
    """Return the grid's settings: the given options over --quick's or the other defaults.

    Raises:
        ConfigError: a value is out of range.
    """
    from pydantic import ValidationError

    from scaledistill.config.schema import EvaluationSettings
    from scaledistill.config.wording import explain

    given = {
        name: getattr(options, name)
        for name in EvaluationSettings.model_fields
        if hasattr(options, name)
    }
    given["tasks"] = [task for task in options.tasks.split(",") if task]
    values: dict[str, Any] = (QUICK if options.quick else {}) | {
        name: value for name, value in given.items() if value is not None
    }
    try:
        return EvaluationSettings.model_validate(values)
    except ValidationError as error:
        raise explain(error.errors(), values, EvaluationSettings)[0] from error


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    options = parse(arguments, prog)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("scaledistill").setLevel(logging.INFO)
    # matplotlib warns if there is no home folder for its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # The hub client logs each retry; the final failure is reported here.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    return carry_out(
        lambda: run(options),
        "glue",
        names={name: _option(name) for name in vars(options)} | {"data_folder": "--data-dir"},
        disk=options.output,
        interrupted=f"finished cells are kept in {options.output}; rerun the same command to "
        "resume",
    )


def run(options: argparse.Namespace) -> int:
    """Run the grid, show and write the results, and return the exit code."""
    models = named_models(options.models)
    if options.probe:
        return probe(models, options)
    settings = settings_of(options)
    if options.list:
        from scaledistill.glue.listing import print_list

        plan, workers = _plan(models, settings, options)
        print_list(_console(), plan, options.output, workers)
        return EXIT_DONE
    from scaledistill.glue.worker import Worker

    # The worker imports torch while this process imports it too and makes the plan.
    with Worker() as first:
        from scaledistill.glue.grid import run_plan

        plan, workers = _plan(models, settings, options)
        with Display(plan, options.output) as display:
            result = run_plan(
                plan,
                options.output,
                quick=options.quick,
                workers=workers,
                published=options.published,
                on_update=display,
                first=first,
            )
    console = _console()
    show(console, result)
    if options.json:
        options.json.write_text(json.dumps(result.summary.figures(), indent=1) + "\n")
    if options.speed:
        from scaledistill.glue.speed import measure_speed

        report = measure_speed(
            {model.name: model.folder for model in plan.models.values()}, options.output
        )
        for table in report.tables:
            console.print(table.rich())
    return EXIT_ENVIRONMENT if result.failures else EXIT_DONE


def _plan(
    models: Mapping[str, str], settings: EvaluationSettings, options: argparse.Namespace
) -> tuple[Plan, int]:
    """Return the checked plan and the number of workers."""
    from scaledistill.glue.grid import worker_count
    from scaledistill.glue.plan import make_plan

    workers = worker_count(options.workers)
    plan = make_plan(models, settings)
    if options.speed:
        from scaledistill.glue.speed import check_positions

        check_positions(plan)
    return plan, workers


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def probe(models: Mapping[str, str], options: argparse.Namespace) -> int:
    """Score the models without fine-tuning, show and write the scores; return the exit code."""
    from scaledistill.glue.probe import probe_models

    report = probe_models(models, Path(options.data_folder) if options.data_folder else None)
    for table in report.tables:
        _console().print(table.rich())
    if options.json:
        options.json.write_text(report.json())
    return EXIT_DONE


def show(console: Console, result: GridResult) -> None:
    """Print the tables, their notes and the failed cells."""
    for table in result.summary.tables():
        shown = table.rich()
        # Long model names fold over several lines instead of being cut, and the other columns'
        # headers fold first.
        names = shown.columns[0]
        names.overflow, names.min_width = "fold", min(32, max(len(row[0]) for row in table.rows))
        console.print(shown)
    for note in result.summary.notes():
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for cell, error in result.summary.failures:
        console.print(
            f"not finished: {cell}: {error}",
            highlight=False,
            markup=False,
            soft_wrap=True,
            style="red",
        )
    console.print(
        f"written: {result.output / 'summary.md'}, .csv, .json, .png",
        highlight=False,
        soft_wrap=True,
    )


class Display:
    """Progress on stderr: a line per cell, and a live bar on a terminal.

    Use it as a context manager around the run.
    """

    def __init__(self, plan: Plan, output: Path) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from scaledistill.glue.cell import read_record

        console = Console(stderr=True)
        waiting = [cell for cell in plan.cells if read_record(cell, output) is None]
        self._work = {cell: plan.work(cell) for cell in waiting}
        self._done = dict.fromkeys(waiting, 0.0)
        self._ended = 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=3600,
        )
        self._task = self.bar.add_task("", total=sum(self._work.values()) or None)

    def __enter__(self) -> Display:
        if self._work:
            cells = counted(len(self._work), "cell")
            text = (
                f"{cells} to run; Ctrl-C loses only unfinished cells; rerun the same command to "
                "resume"
            )
            self.bar.console.print(text, highlight=False, soft_wrap=True)
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def __call__(self, update: Update) -> None:
        """Show an update from the grid."""
        cell = update.cell
        self._done[cell] = update.fraction
        if update.state != "running":
            self._ended += 1
            first_line = update.text.partition("\n")[0]
            line = (
                f"{self._ended}/{len(self._work)}  {cell.title}  {update.state}: "
                f"{first_line}{self._left()}"
            )
            self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        done = sum(self._work[one] * fraction for one, fraction in self._done.items())
        self.bar.update(
            self._task, description=f"{self._ended}/{len(self._work)}  {cell.title}", completed=done
        )

    def _left(self) -> str:
        """Return the estimated time left; "" if the bar shows it."""
        if not self.bar.disable or self._ended == len(self._work):
            return ""
        from scaledistill.glue.listing import duration

        elapsed = self.bar.tasks[0].elapsed or 0.0
        whole = sum(self._work.values())
        done = sum(self._work[one] * share for one, share in self._done.items())
        return f"  (about {duration(elapsed * (whole - done) / done)} left)" if done else ""


if __name__ == "__main__":
    sys.exit(main())
