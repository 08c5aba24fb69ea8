"""`scaledistill shards merge`: write the shards of parts that were tokenised on several machines.

Inputs: command-line arguments. Outputs: progress, a summary and an exit code. Not handled here:
merging (`data.prepare.parts`), making the parts (`cli.shards_make`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from scaledistill.cli.parsing import Parser
from scaledistill.errors import carry_out, named
from scaledistill.metrics.benchmark import output_file

PROG = "scaledistill shards merge"
DESCRIPTION = """Write the shards of parts that were tokenised on several machines.

DIR holds the folders part-0001-of-0004 to part-0004-of-0004 that `shards make --part` wrote; they
are kept. The shards are those that one machine would have made."""
EPILOG = """exit codes: 0 done, 2 different settings, 3 missing or damaged parts, 130 interrupted

examples:
  %(prog)s shards/wiki-512
  %(prog)s shards/wiki-512 --overwrite --json figures.json"""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument(
        "output", type=Path, metavar="DIR", help="folder with all parts; the shards go there too"
    )
    parse.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the shards in DIR once the new ones are finished",
    )
    parse.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write the figures as a JSON list of name, value, unit, n",
    )
    return parse


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Merge the parts and return the exit code."""
    options = parser(prog).parse_args(arguments)
    return carry_out(
        lambda: _merge(options),
        prog,
        disk=options.output,
        interrupted="no unfinished shards are left",
    )


def _merge(options: argparse.Namespace) -> None:
    import dataclasses

    from rich.console import Console

    from scaledistill.cli.shards_make import Display, print_summary
    from scaledistill.data.prepare.compression import ReadProgress
    from scaledistill.data.prepare.make import Recipe
    from scaledistill.data.prepare.parts import merge_parts

    # Settings are options of `shards make`.
    settings = [*(field.name for field in dataclasses.fields(Recipe)), "overwrite"]
    unlimited = argparse.Namespace(max_documents=None, max_tokens=None)
    display = Display(Console(stderr=True), ReadProgress(), unlimited)
    with display.bar, named(**{name: f"--{name.replace('_', '-')}" for name in settings}):
        report = merge_parts(options.output, overwrite=options.overwrite, on_progress=display)
    if options.json:
        options.json.write_text(json.dumps(report.measurements(), indent=1) + "\n")
    print_summary(Console(), report, options.output)
