"""`scaledistill estimate`: memory, throughput and time of a run on types of GPUs.

Inputs: command-line arguments. Outputs: tables, a JSON file and an exit code. Not handled here: the
figures (`preflight.devices`). Imports nothing heavy at the top.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaledistill.cli.parsing import Parser
from scaledistill.errors import EXIT_DONE, carry_out
from scaledistill.metrics.benchmark import output_file

if TYPE_CHECKING:
    from rich.table import Table

    from scaledistill.preflight.devices import Forecast, Needs

DEFAULT_COUNTS = [1, 2, 4, 8]
PROG = "scaledistill estimate"
DESCRIPTION = """\
Estimate the memory, the largest micro-batch, the throughput and the time of a run on
types and numbers of GPUs, and on this machine."""
EPILOG = """Nothing is loaded: FLOPs and memory are counted from the models' shapes. The time is
without validation, saving and evaluation. Its range comes from the efficiency
(model FLOP/s over the data sheet's dense 16-bit peak) and from how much of the
communication overlaps with computation. Check a run that has started with the
tokens_per_second and mfu in its metrics.jsonl; --from-run plans with them.

exit codes: 0 done, 2 wrong options or configuration, 3 the models cannot be read, 130 interrupted

examples:
  %(prog)s --config my.yaml
  %(prog)s --config my.yaml --gpu H100,A100 --num-gpus 8,16 --efficiency 0.45"""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument("--config", metavar="FILE", required=True, help="the run's settings")
    parse.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting, such as train.max_steps=100; repeatable",
    )
    parse.add_argument(
        "--gpu",
        type=_words,
        metavar="NAME,…",
        dest="gpus",
        help="types of GPUs by (part of) their name (default: all that are known)",
    )
    parse.add_argument(
        "--num-gpus",
        type=_counts,
        metavar="N,…",
        default=DEFAULT_COUNTS,
        help=f"numbers of GPUs (default: {','.join(map(str, DEFAULT_COUNTS))})",
    )
    efficiency = parse.add_mutually_exclusive_group()
    efficiency.add_argument(
        "--efficiency",
        type=_fraction,
        metavar="X",
        help="efficiency on GPUs, from 0 to 1 (default: 0.4, with a range of 0.25 to 0.55)",
    )
    efficiency.add_argument(
        "--from-run",
        type=Path,
        metavar="DIR",
        help="take the efficiency that the run in this folder has measured on such GPUs",
    )
    parse.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write the figures as a JSON list of name, value, unit, n",
    )
    return parse


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _counts(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected whole numbers from 1 up, separated by commas"
        )
    return [int(word) for word in words]


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0, at most 1")
    return number


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    options = parser(prog).parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.basicConfig(format="%(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    return carry_out(lambda: run(options), prog, names={"folder": "--from-run", "names": "--gpu"})


def run(options: argparse.Namespace) -> int:
    """Estimate, print and write the figures, and return the exit code.

    Raises:
        ConfigError, DataError: settings or models are wrong.
    """
    # Imported here: they take seconds.
    from rich.console import Console

    from scaledistill.config.load import load_config
    from scaledistill.preflight import devices

    config = load_config(options.config, options.overrides)
    gpus = devices.chosen(options.gpus)
    efficiency = devices.ASSUMED
    if options.efficiency:
        efficiency = devices.Efficiency.stated(options.efficiency)
    elif options.from_run:
        efficiency = devices.Efficiency.of_run(options.from_run)
    survey = devices.survey(config, gpus, options.num_gpus, efficiency)
    if options.json:
        text = json.dumps(devices.figures(survey), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_memory_table(survey.needs))
    console.print()
    console.print(_forecast_table(survey.forecasts))
    console.print()
    facts = survey.needs[0].facts
    notes = [
        f"{facts.flops_per_token / 1e9:.3g} GFLOP per token, "
        f"{facts.teacher_flops_fraction:.0%} of them the teacher's forward",
        f"efficiency on GPUs: {efficiency.middle:.0%} of the 16-bit peak ({efficiency.source})",
        *survey.problems,
    ]
    for note in notes:
        console.print(note, highlight=False, markup=False)
    return EXIT_DONE


def _memory_table(needs: Sequence[Needs]) -> Table:
    """Return the bytes of a rank by part, with a column for each number of ranks."""
    from rich.table import Table

    from scaledistill.preflight.devices import parts

    table = Table("memory per rank", box=None, pad_edge=False, header_style="bold")
    columns = [parts(need.facts) for need in needs]
    for run, _ in needs:
        kind = "GPU" if run.device_type == "cuda" else "CPU"
        table.add_column(
            f"{run.world_size} {kind}{'s' if run.world_size > 1 else ''}", justify="right"
        )
    for part in dict.fromkeys(part for column in columns for part in column):
        sizes = [_size(column[part]) if part in column else "" for column in columns]
        table.add_row(f"  {part}", *sizes)
    if any(need.facts.optimizer_on_host and not need.facts.on_host for need in needs):
        table.add_row("  (optimizer in host memory)")
    return table


def _forecast_table(forecasts: Sequence[Forecast]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (
        "device",
        "number",
        "largest micro-batch",
        "memory",
        "tokens/s",
        "time (range)",
    ):
        table.add_column(heading, justify="left" if heading == "device" else "right")
    previous = ""
    for one in forecasts:
        name = one.device.name
        row = [name if name != previous else "", str(one.num_ranks)]
        previous = name
        if not one.fits:
            table.add_row(
                *row,
                str(one.largest_micro_batch or "none"),
                f"{_size(one.memory_bytes)}, too large",
            )
            continue
        least, expected, most = map(_time, one.seconds)
        table.add_row(
            *row,
            str(one.largest_micro_batch),
            f"{_size(one.memory_bytes)} at {one.run.micro_batch_size}",
            f"{one.tokens_per_second:,.0f}",
            f"{expected} ({least} to {most})",
        )
    return table


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"
