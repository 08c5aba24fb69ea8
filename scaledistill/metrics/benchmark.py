"""Benchmarks: variants measured in turn, named figures, tables, and facts about the machine.

Inputs: what the tools under `tools/` measure. Outputs: tables on the console, `--markdown` for
docs/benchmarks.md and `--json` for machines. Module-level imports are from the standard library
only: a peer's process imports this module (for `Turns`) in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, cast

VERSIONED = ("torch", "transformers", "deepspeed", "triton")


@dataclass
class Report:
    """The results of a benchmark: figures for machines, tables for people."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def add(self, name: str, values: float | Sequence[float], unit: str) -> float:
        """Add the median of `values` (n of them) under a name, and return it."""
        values = values if isinstance(values, Sequence) else [values]
        median = statistics.median(values)
        self.figures.append({"name": name, "value": median, "unit": unit, "n": len(values)})
        return median

    def add_speeds(
        self, seconds: Mapping[str, Sequence[float]], batch: int
    ) -> dict[str, list[str]]:
        """Add the figures of timed batches, by what was timed (see `in_turn`).

        Returns:
            For each: milliseconds, sequences per second and the ratio to the first, as texts.
        """
        first, texts = next(iter(seconds)), {}
        for name, taken in seconds.items():
            milliseconds, rates = [1000 * one for one in taken], [batch / one for one in taken]
            latency = self.add(f"{name}/latency/batch-{batch}", milliseconds, "ms")
            rate = self.add(f"{name}/throughput/batch-{batch}", rates, "sequences/s")
            gains = ratios(seconds[first], taken)
            faster = self.add(f"{name}/speedup/batch-{batch}", gains, "×")
            ratio = "1" if name == first else f"{faster:.2f}×"
            texts[name] = [f"{latency:.1f}", f"{rate:.1f}", ratio]
        return texts

    def json(self) -> str:
        """Return the figures as JSON, in which a value that is not finite is null."""
        finite = [
            figure | {"value": figure["value"] if math.isfinite(figure["value"]) else None}
            for figure in self.figures
        ]
        return json.dumps(finite, indent=1, allow_nan=False) + "\n"

    def table(self, title: str, columns: Sequence[str]) -> Table:
        """Add an empty table and return it."""
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def publish(self, options: argparse.Namespace, *, gpu: str | None = None) -> None:
        """Print the tables, and write the files that `--json` and `--markdown` ask for.

        `gpu` is the name of the GPU measured on, if any.
        """
        from rich.console import Console

        facts = machine_facts(gpu)
        console = Console(width=None if sys.stdout.isatty() else 140)
        tables = [table for table in self.tables if table.rows]
        for table in tables:
            console.print(table.rich())
        for name, fact in facts.items():
            console.print(f"{name}: {fact}", highlight=False, markup=False, soft_wrap=True)
        if options.json:
            options.json.write_text(self.json())
        if options.markdown:
            where = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
            options.markdown.write_text(
                "\n\n".join([*(table.markdown() for table in tables), where]) + "\n"
            )


@dataclass
class Table:
    """A title, column names and rows of text."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> Any:
        """Return the table for a rich console."""
        from rich.table import Table as RichTable

        table = RichTable(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(
            [f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)]
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks share."""
    parser.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write the figures here: name, value, unit, n",
    )
    parser.add_argument(
        "--markdown", type=output_file, metavar="FILE", help="write the tables here as Markdown"
    )


def output_file(text: str) -> Path:
    """Read the path of a file that can be written."""
    path = Path(text)
    # Fail now rather than after all measurements.
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder; make it first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    return path


def in_turn(
    runs: Mapping[str, Callable[[], float]], *, rounds: int, max_seconds: float, title: str
) -> dict[str, list[float]]:
    """Call each run once per round and return the seconds of each.

    Taking turns spreads disturbances of the machine over all runs alike. A run returns the seconds
    that it took. Once they add up to `max_seconds`, it is left out of later rounds and its list is
    shorter: equal indices in two lists are the same round. Each round prints a line on stderr that
    starts with `title`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1, rounds + 1):
        taking_part = [name for name in runs if sum(seconds[name]) < max_seconds]
        if not taking_part:
            break
        for name in taking_part:
            seconds[name].append(runs[name]())
        took = ", ".join(f"{name} {1000 * seconds[name][-1]:,.1f} ms" for name in taking_part)
        sys.stderr.write(f"{title}, round {number} of {rounds}: {took}\n")
    return seconds


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return slow / fast per round that both were in: noise longer than a round cancels out."""
    return [one / other for one, other in zip(slow, fast, strict=False)]


def machine_facts(gpu: str | None) -> dict[str, str]:
    """Return hardware, versions, commit and command, as text for people."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(errors="replace"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    hardware = (
        f"{model[1] if model else platform.machine()}, {cores} core{'s' * (cores != 1)}, "
        f"{memory / 2**30:.0f} GiB"
    )
    return {
        "hardware": f"{gpu}; {hardware}" if gpu else hardware,
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("scaledistill", *VERSIONED))
        + f", Python {platform.python_version()}",
        "commit": _commit(Path(__file__).parent),
        "command": " ".join(["python", *sys.argv]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit(folder: Path) -> str:
    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        # An installed package may lie in somebody else's checkout.
        git("ls-files", "--error-unmatch", str(folder))
        return git("describe", "--always", "--dirty=, changed since", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


class Turns:
    """A worker's end of the pipes to its `Worker`: waits for a turn, answers with its figures.

    Other output to stdout is redirected to stderr, so that stdout carries only answers.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def wait(self) -> None:
        """Block until it is this worker's turn; exit the process if the other end is closed."""
        if not sys.stdin.readline():
            sys.exit()

    def answer(self, **figures: Any) -> None:
        """Send the figures, which ends the turn."""
        self._answers.write(json.dumps(figures) + "\n")


class WorkerError(RuntimeError):
    """A worker process ended too early."""


class Worker:
    """A process that works when given a turn; as a context manager, it is killed on exit."""

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str]
    ) -> None:
        self._name, self._log = name, log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=dict(environment),
            )

    def turn(self) -> dict[str, Any]:
        """Give the worker its turn and return its answer.

        Raises:
            WorkerError: it has ended; the message has its exit status and last lines of output.
        """
        asked, answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        line = ""
        with contextlib.suppress(BrokenPipeError):
            asked.write("turn\n")
            asked.flush()
            line = answers.readline()
        if not line:
            words = self._log.read_text(errors="replace").splitlines()[-20:]
            raise WorkerError(
                "\n".join([f"{self._name} ended with status {self._process.wait()}:", *words])
            )
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
