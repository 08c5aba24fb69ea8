"""`scaledistill shards make`: make shards of token ids from text.

Inputs: command-line arguments. Outputs: progress, a summary and an exit code. Not handled here:
reading, tokenising and packing (`data.prepare`).
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaledistill.cli.parsing import Parser
from scaledistill.data.sizes import ROWS_PER_SHARD, Part
from scaledistill.errors import SettingError, carry_out, counted, say
from scaledistill.metrics.benchmark import output_file

if TYPE_CHECKING:
    from rich.console import Console

    from scaledistill.data.prepare.compression import ReadProgress
    from scaledistill.data.prepare.make import ShardReport
    from scaledistill.data.prepare.sources import SplitBy

PROG = "scaledistill shards make"
LINE_SECONDS = 10  # between progress lines if stderr is not a terminal
DESCRIPTION = """Make shards of token ids from text.

Writes OUTPUT/train and, with a held-out fraction, OUTPUT/validation. Rerun it with --overwrite to
replace them."""
EPILOG = """exit codes: 0 done, 2 wrong options, 3 wrong input or environment, 130 interrupted

examples:
  %(prog)s books/*.txt.xz --tokenizer google-bert/bert-large-uncased \\
    --sequence-length 512 --held-out-fraction 0.001 --output shards/books
  %(prog)s --dataset wikimedia/wikipedia --dataset-config 20231101.en \\
    --tokenizer google-bert/bert-large-uncased --output shards/wiki"""


def part_of(text: str) -> Part:
    """Read I/N."""
    try:
        return Part.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    source = parse.add_argument_group("input, one of")
    source.add_argument(
        "inputs",
        nargs="*",
        help="text, JSON-lines and Parquet files or globs, plain or .gz .xz .zst .bz2",
    )
    source.add_argument(
        "--wds",
        nargs="+",
        metavar="TAR",
        help="WebDataset text shards (.txt or .json members) or globs",
    )
    source.add_argument(
        "--dataset",
        metavar="NAME",
        help="a data set for the datasets library: hub name or local folder",
    )
    source.add_argument(
        "--installed-docs", action="store_true", help="the docstrings of the installed packages"
    )
    source.add_argument(
        "--documents",
        choices=("blank-line", "line", "file"),
        help=(
            "what one document is in a text file: the text between blank lines, a line or the "
            "file (default: blank-line)"
        ),
    )
    source.add_argument(
        "--column",
        help="key or column of the text in JSON, Parquet and data sets (default: text)",
    )
    source.add_argument("--dataset-config", metavar="NAME", help="configuration of --dataset")
    source.add_argument("--split", metavar="NAME", help="split of --dataset (default: train)")
    packing = parse.add_argument_group("tokens and rows")
    packing.add_argument(
        "--tokenizer", required=True, help="folder or hub name; must be the teacher's"
    )
    packing.add_argument(
        "--tokenizer-revision", metavar="REV", help="commit or tag of a tokenizer on the hub"
    )
    packing.add_argument(
        "--sequence-length",
        type=int,
        default=512,
        metavar="T",
        help="tokens per row (default: %(default)s)",
    )
    packing.add_argument(
        "--last-row",
        choices=("pad", "drop"),
        default="pad",
        help="pad or drop the last, partial row (default: %(default)s)",
    )
    packing.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents")
    packing.add_argument(
        "--max-tokens", type=int, metavar="N", help="stop after the document that reaches N tokens"
    )
    packing.add_argument(
        "--max-unknown-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help=(
            "refuse text with a larger fraction of unknown tokens; 1 accepts any text (default: "
            "%(default)s)"
        ),
    )
    split = parse.add_argument_group("held-out documents")
    split.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of documents for OUTPUT/validation (default: none)",
    )
    split.add_argument(
        "--held-out-max-documents",
        type=int,
        metavar="N",
        help="hold out at most N different documents",
    )
    split.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed for the choice of held-out documents (default: %(default)s)",
    )
    output = parse.add_argument_group("output")
    output.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="output folder, for train/ and, with a held-out fraction, validation/",
    )
    output.add_argument(
        "--rows-per-shard",
        type=int,
        default=ROWS_PER_SHARD,
        metavar="N",
        help="rows per shard: a multiple of 256, or less than 256 (default: %(default)s)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the shards in DIR once the new ones are finished",
    )
    output.add_argument(
        "--part",
        type=part_of,
        metavar="I/N",
        help="only tokenise part I of N, into DIR/part-I-of-N; run `scaledistill shards merge DIR` "
        "once all parts are there",
    )
    output.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of tokenising processes, which does not affect the result (default: all "
        "cores)",
    )
    output.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write the figures as a JSON list of name, value, unit, n",
    )
    return parse


def parse(arguments: Sequence[str] | None, prog: str = PROG) -> argparse.Namespace:
    """Parse the command line; wrong options end the process with exit code 2."""
    parse = parser(prog)
    arguments = sys.argv[1:] if arguments is None else arguments
    known = [option for action in parse._actions for option in action.option_strings]
    # parse_intermixed_args, which lets options stand between the inputs, calls others unknown late.
    for name in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
        if name not in (*known, "--"):
            parse.error(parse.unknown([name]))
    options = parse.parse_intermixed_args(arguments)
    given = [bool(options.inputs), bool(options.wds), bool(options.dataset), options.installed_docs]
    if sum(given) != 1:
        parse.error(
            f"found {sum(given)} kinds of input; give one of: files, --wds, --dataset, "
            "--installed-docs"
        )
    for name, value, read, kinds in (
        ("--documents", options.documents, options.inputs, "text files"),
        ("--column", options.column, not options.installed_docs, "files, --wds and --dataset"),
        ("--dataset-config", options.dataset_config, options.dataset, "--dataset"),
        ("--split", options.split, options.dataset, "--dataset"),
    ):
        if value and not read:
            parse.error(f"{name} is read only with {kinds}")
    return options


def open_source(
    options: argparse.Namespace, progress: ReadProgress
) -> tuple[Iterator[str], dict[str, object]]:
    """Return the documents, and a description of the input for the manifests."""
    from scaledistill.data.prepare import docstrings, pool, sources

    if options.installed_docs:
        parallel = functools.partial(pool.parallel_map, workers=options.workers)
        return docstrings.installed_docs(parallel), {"kind": "installed-docs"}
    column = options.column or "text"
    if options.dataset:
        facts = {
            "name": options.dataset,
            "config": options.dataset_config,
            "split": options.split or "train",
        }
        documents = sources.dataset_documents(**facts, column=column)
        return documents, {"kind": "dataset", "column": column, "dataset": facts}
    paths = sources.expand(options.wds or options.inputs)
    # JSON cannot hold names that are not UTF-8.
    files = [os.fsencode(path).decode(errors="backslashreplace") for path in paths]
    if options.wds:
        documents = sources.webdataset_documents(paths, column=column, progress=progress)
        return documents, {"kind": "webdataset", "column": column, "files": files}
    if options.column and all(sources.is_text(path) for path in paths):
        raise SettingError(
            "column",
            options.column,
            "is read only in JSON lines and Parquet, found text files alone",
            "leave it out",
        )
    split_by: SplitBy = options.documents or "blank-line"
    documents = sources.file_documents(paths, column=column, split_by=split_by, progress=progress)
    return documents, {
        "kind": "files",
        "column": column,
        "documents": split_by,
        "files": files,
    }


class Display:
    """Progress on stderr: a live bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, read: ReadProgress, options: argparse.Namespace) -> None:
        from rich import progress

        self._read, self._options, self._console = read, options, console
        columns = ("{task.description}", progress.BarColumn(), progress.TaskProgressColumn())
        self.bar = progress.Progress(
            *columns,
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self.bar.add_task("reading", total=None)
        self._next_line = time.monotonic() + LINE_SECONDS

    def __call__(self, report: ShardReport) -> None:
        """Show the counts so far."""
        documents = counted(report.documents, "document")
        text = f"{documents}, {report.tokens:,} tokens, {report.tokens_per_second:,.0f} tokens/s"
        done = self._done_fraction(report)
        self.bar.update(self._task, description=text, completed=done, total=1.0 if done else None)
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            left = f", {done:.0%}, {report.seconds * (1 - done) / done:,.0f} s left" if done else ""
            self._console.print(text + left, highlight=False)

    def _done_fraction(self, report: ShardReport) -> float:
        """Return the finished fraction of the input, by the nearest limit; 0 if it is unknown."""
        parts = [
            (self._read.done_bytes, self._read.total_bytes),
            (report.documents, self._options.max_documents),
            (report.tokens, self._options.max_tokens),
        ]
        return min(1.0, max(done / whole if whole else 0.0 for done, whole in parts))


def print_summary(console: Console, report: ShardReport, output: Path) -> None:
    """Print the counts and the next command."""
    from rich.table import Table

    table = Table(
        "",
        *report.splits,
        title=f"{counted(report.documents, 'document')} in {report.seconds:.1f} s",
    )
    rows = {
        "documents": "documents",
        "rows": "rows",
        "tokens of text": "tokens",
        "unknown tokens": "unknown",
        "padding": "padding",
        "dropped tokens": "dropped_tokens",
    }
    for label, field in rows.items():
        table.add_row(label, *(f"{getattr(counts, field):,}" for counts in report.splits.values()))
    table.add_row(
        "unknown share", *(f"{counts.unknown_fraction:.2%}" for counts in report.splits.values())
    )
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    check = f"{_command()} shards check"
    checks = " && ".join(f"{check} {shlex.quote(str(output / split))}" for split in report.splits)
    text = (
        f"{counted(report.empty_documents, 'empty document')}, {report.tokens_per_second:,.0f} "
        f"tokens/s\nnext: {checks}"
    )
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_part(console: Console, report: ShardReport, options: argparse.Namespace) -> None:
    """Print the counts of a part and the next command."""
    part, output = options.part, shlex.quote(str(options.output))
    own, read = report.train.documents, counted(report.documents, "document")
    text = (
        f"part {part}: {own:,} of {read}, {report.tokens:,} tokens in {report.seconds:.1f} s\n"
        f"next, with all {part.of} parts in one folder: {_command()} shards merge {output}"
    )
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _command() -> str:
    """Return how to call the command of this environment: `scaledistill` if it is on the path."""
    # The path is not resolved: in a virtual environment the interpreter is a link.
    command, this = shutil.which("scaledistill"), Path(sys.executable)
    if command is not None and Path(command).parent == this.parent:
        return "scaledistill"
    python = shutil.which("python")
    is_this = python is not None and Path(python).parent == this.parent
    return f"{'python' if is_this else shlex.quote(str(this))} -m scaledistill"


def run(options: argparse.Namespace, prog: str) -> None:
    """Make the shards and print a summary."""
    from rich.console import Console

    from scaledistill.data.prepare.compression import ReadProgress
    from scaledistill.data.prepare.make import make_shards
    from scaledistill.data.prepare.parts import make_part
    from scaledistill.data.prepare.text import load_tokenizer

    read = ReadProgress()
    documents, source = open_source(options, read)
    tokenizer = load_tokenizer(options.tokenizer, options.tokenizer_revision)
    if options.sequence_length > tokenizer.model_max_length:
        say(
            prog,
            f"warning: --sequence-length {options.sequence_length} is more than the tokenizer's "
            f"model_max_length {tokenizer.model_max_length}; check that the teacher has as many "
            "positions",
        )
    display = Display(Console(stderr=True), read, options)
    make = functools.partial(make_part, part=options.part) if options.part else make_shards
    with display.bar:
        report = make(
            documents,
            options.output,
            tokenizer=tokenizer,
            source=source,
            sequence_length=options.sequence_length,
            last_row=options.last_row,
            held_out_fraction=options.held_out_fraction,
            held_out_max_documents=options.held_out_max_documents,
            seed=options.seed,
            max_documents=options.max_documents,
            max_tokens=options.max_tokens,
            max_unknown_fraction=options.max_unknown_fraction,
            rows_per_shard=options.rows_per_shard,
            workers=options.workers,
            overwrite=options.overwrite,
            on_progress=display,
        )
    if options.json:
        options.json.write_text(json.dumps(report.measurements(), indent=1) + "\n")
    if options.part:
        print_part(Console(), report, options)
    else:
        print_summary(Console(), report, options.output)


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    options = parse(arguments, prog)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("scaledistill").setLevel(logging.INFO)
    # The hub client logs each retry; the final failure is reported here.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    return carry_out(
        lambda: run(options, prog),
        prog,
        names={name: f"--{name.replace('_', '-')}" for name in vars(options)},
        disk=options.output,
        interrupted="no unfinished shards are left",
    )
