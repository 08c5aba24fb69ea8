"""`scaledistill export`: write a student in the formats that people deploy.

Inputs: command-line arguments. Outputs: a folder, messages and an exit code. Not handled here: the
work itself (`publishing`).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scaledistill.cli.parsing import Parser, positive, step_or_newest
from scaledistill.errors import carry_out
from scaledistill.publishing.request import (
    FORMATS,
    Options,
    check_formats,
    check_output,
    check_source,
)

PROG = "scaledistill export"
DESCRIPTION = """Write a student in the formats that people deploy.

The folder appears whole or not at all, after each format was loaded again and compared with
PyTorch; its model card has sizes, speeds and losses."""
EPILOG = """exit codes: 0 done, 2 wrong options, 3 wrong data or environment, 130 interrupted

examples:
  %(prog)s runs/large_to_l6 --format sentence-transformers --output l6-sentences
  %(prog)s runs/large_to_l6/export/l6-h384-best --format transformers \\
      --format onnx --format onnx-int8 --data-dir glue --output l6"""
NAMES = {
    "source": "SOURCE",
    "tokenizer_source": "SOURCE",
    "step": "--step",
    "student": "--student",
    "teacher": "--teacher",
    "teacher.model": "--teacher",
    "num_layers": "--num-layers",
    "formats": "--format",
    "output": "--output",
    "data_folder": "--data-dir",
    "sample": "--sample",
    "glue": "--glue",
    "name": "--glue-model",
}
"""The options, by the parameters that errors name."""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="the folder of a run, of a checkpoint, of an export, or of any supported model",
    )
    parse.add_argument(
        "--format",
        action="append",
        dest="formats",
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}; repeatable (default: transformers). All but the first need "
        "pip install 'scaledistill[export]'",
    )
    parse.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="the folder to write"
    )
    parse.add_argument("--force", action="store_true", help="replace an older export there")
    which = parse.add_argument_group("which student")
    which.add_argument("--student", metavar="NAME", help="the student, if the run has several")
    which.add_argument(
        "--step",
        type=step_or_newest,
        metavar="STEP",
        help="the run's checkpoint: a step, or 'newest' (default)",
    )
    which.add_argument(
        "--teacher", metavar="MODEL", help="where the run's teacher is now, if it has moved"
    )
    which.add_argument(
        "--num-layers",
        type=positive,
        metavar="N",
        help="keep the first N layers, in all forms. By default, all but transformers leave out a "
        "last layer whose output was not trained",
    )
    card = parse.add_argument_group("what the model card says")
    card.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="folder with GLUE files: scores each form on STS-B without fine-tuning",
    )
    card.add_argument(
        "--sample",
        type=Path,
        metavar="FILE",
        help="text file, a sentence per line: 200 of them are compared with PyTorch (default: "
        "those of --data-dir, or random tokens)",
    )
    card.add_argument(
        "--glue", type=Path, metavar="FOLDER", help="output folder of the GLUE runner: its scores"
    )
    card.add_argument("--glue-model", metavar="NAME", help="the model's name there")
    card.add_argument(
        "--base-model", metavar="NAME", help="the teacher's hub name, if the run used a folder"
    )
    card.add_argument(
        "--licence",
        "--license",
        metavar="ID",
        help="such as apache-2.0 (default: the teacher's, as its model card states it)",
    )
    return parse


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    parse = parser(prog)
    options = parse.parse_args(arguments)
    if options.glue_model and not options.glue:
        parse.error("--glue-model is read only with --glue")
    set_up_messages()
    return carry_out(
        lambda: _export(options), prog, names=NAMES, interrupted="nothing was exported"
    )


def set_up_messages() -> None:
    """Show the package's messages on stderr and hold back those of third parties."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("scaledistill").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # The hub client logs each retry; the final failure is reported here.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _export(options: argparse.Namespace) -> None:
    formats = tuple(dict.fromkeys(options.formats or ["transformers"]))
    check_formats(formats)
    check_output(options.output, force=options.force)
    check_source(options.source)
    # Imported here, because they load torch.
    from scaledistill.publishing.formats import write_formats
    from scaledistill.publishing.source import open_student

    step = "newest" if options.step is None else options.step
    student = open_student(
        options.source, student=options.student, step=step, teacher=options.teacher
    )
    report = write_formats(
        student,
        options.output,
        Options(
            formats,
            num_layers=options.num_layers,
            data_folder=options.data_dir,
            sample=options.sample,
            licence=options.licence,
            base_model=options.base_model,
            glue=options.glue,
            glue_model=options.glue_model,
        ),
        force=options.force,
    )
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in report.tables:
        console.print(table.rich())
    sys.stdout.write(f"{', '.join(formats)}: {options.output}\n")
