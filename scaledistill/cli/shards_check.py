"""`scaledistill shards check`: verify folders of shards and print their contents.

Inputs: command-line arguments. Outputs: a table, the problems and an exit code. Not handled here:
the checks (`data.shards.verify`, `data.mixture`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaledistill.cli.parsing import Parser
from scaledistill.errors import EXIT_DONE, EXIT_ENVIRONMENT, ConfigError, DataError, carry_out
from scaledistill.metrics.benchmark import output_file

if TYPE_CHECKING:
    from rich.console import Console

    from scaledistill.data.manifest import Manifest

PROG = "scaledistill shards check"
DESCRIPTION = """Check folders of shards against their manifests and print their contents.

The checks: sizes, sha256, tar, crc32, ids, documents; of several folders, whether a run can mix
them."""
EPILOG = """exit codes: 0 all sound, 2 wrong options, 3 problems, 130 interrupted

examples:
  %(prog)s shards/wiki-512/train
  %(prog)s shards/wiki-512/train --json figures.json"""
LABELS = {  # make_shards prints other counts: input documents, and tokens of text
    "documents": "document pieces (stored boundaries)",
    "tokens": "tokens with [CLS] and [SEP]",
}


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        type=_local,
        help="folder with shards.manifest and the tar files, as `shards make` writes it",
    )
    parse.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write the figures as a JSON list of name, value, unit, n",
    )
    return parse


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    options = parser(prog).parse_args(arguments)
    return carry_out(lambda: _check_all(options), prog)


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"expected a folder, found {text}; check the local copy (a run checks remote shards as "
            "it reads them)"
        )
    return Path(text)


def _check_all(options: argparse.Namespace) -> int:
    """Check the folders, print the findings and return the exit code."""
    from rich.console import Console

    from scaledistill.data.mixture import mixing_problem

    console = Console(soft_wrap=True, highlight=False)
    rows: list[dict[str, object]] = []
    manifests: dict[str, Manifest] = {}
    is_sound = True
    for folder in options.folders:
        manifest, figures, problems = check(console, folder)
        is_sound = is_sound and manifest is not None and not problems
        if manifest is not None:
            manifests[str(folder)] = manifest
        prefix = "shards/" if len(options.folders) == 1 else f"shards/{folder}/"
        rows += [
            {"name": f"{prefix}{name}", "value": value, "unit": unit, "n": 1}
            for name, value, unit in figures
        ]
    if problem := mixing_problem(manifests):
        is_sound = False
        console.print(f"ERROR {problem}", markup=False)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return EXIT_DONE if is_sound else EXIT_ENVIRONMENT


def check(
    console: Console, folder: Path
) -> tuple[Manifest | None, list[tuple[str, float, str]], list[str]]:
    """Check a folder and print the findings; return its manifest, figures and problems."""
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

    from scaledistill.data.manifest import MAX_UNKNOWN_FRACTION
    from scaledistill.data.shards import Manifest, verify

    try:
        manifest = Manifest.load(folder)
    except (ConfigError, DataError) as error:
        console.print(f"ERROR {error}", markup=False)
        return None, [], [str(error)]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=len(manifest.shards))
        problems = list(verify(folder, manifest, on_shard=lambda: progress.advance(task)))

    figures: list[tuple[str, float, str]] = [
        ("shards", len(manifest.shards), "files"),
        ("bytes", sum(shard.bytes for shard in manifest.shards), "bytes"),
        ("rows", manifest.rows, "rows"),
        ("sequence_length", manifest.sequence_length, "tokens"),
        ("tokens", manifest.tokens, "tokens with [CLS] and [SEP]"),
        ("documents", manifest.documents, "document pieces"),
        ("padded_rows", manifest.padded_rows, "rows"),
        (
            "padding_fraction",
            1 - manifest.tokens / (manifest.rows * manifest.sequence_length),
            "fraction",
        ),
        ("vocab_size", manifest.vocab_size, "ids"),
        ("largest_id", manifest.largest_id, "id"),
        ("problems", len(problems), "problems"),
    ]
    unknown = manifest.unknown_fraction
    if unknown is not None:
        figures.insert(-1, ("unknown_fraction", unknown, "fraction of the tokens of text"))
    table = Table(show_header=False, title=Text(str(folder)))
    for name, value, _ in figures:
        label = LABELS.get(name, name.replace("_", " "))
        table.add_row(Text(label), f"{value:,}" if isinstance(value, int) else f"{value:.2%}")
    console.print(table)
    tokenizer = f"{manifest.tokenizer['name']} (sha256 {manifest.tokenizer['sha256']})"
    console.print(f"tokenizer: {tokenizer}\nsha256 of the data: {manifest.sha256}", markup=False)
    if unknown is None:
        console.print("unknown tokens: not counted when these shards were made")
    elif (
        warning := manifest.unknown_problem(MAX_UNKNOWN_FRACTION)
    ) and not manifest.unknown_problem():
        console.print(f"WARNING {warning}", markup=False)  # accepted when the shards were made
    for problem in problems:
        console.print(f"ERROR {problem}", markup=False)
    if problems:
        console.print("Copy these shards again, or recreate them with `scaledistill shards make`.")
    return manifest, figures, problems
