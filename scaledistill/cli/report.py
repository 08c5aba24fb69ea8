"""`scaledistill report`: write the page about a run.

Inputs: command-line arguments. Outputs: an HTML file and an exit code. Not handled here: the page
(`report.page`), measuring relation maps (`training.maps`).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from scaledistill.cli.parsing import Parser
from scaledistill.errors import ConfigError, carry_out
from scaledistill.report.names import REPORT_FILE

PROG = "scaledistill report"
DESCRIPTION = """Write one self-contained HTML page about a run, or about several side by side.

It shows losses, speed, events, configuration, data, GLUE scores and relation maps. The run may
still be training."""
EPILOG = """exit codes: 0 done, 2 wrong options, 3 not a run's folder, or wrong data or environment,
130 interrupted

examples:
  %(prog)s runs/l6
  %(prog)s runs/l6 runs/l12 --output compare.html"""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's folder")
    parse.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write the page (default: report.html in the folder of the first run)",
    )
    parse.add_argument(
        "--maps",
        action="store_true",
        help="first measure the relation maps of each run's newest checkpoint; its teacher and "
        "data must be where config.json says. A run does this itself when it ends",
    )
    return parse


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    options = parser(prog).parse_args(arguments)
    log = logging.getLogger("scaledistill")
    if not log.handlers:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = options.output or options.runs[0] / REPORT_FILE
    return carry_out(lambda: _report(options, output), prog, names={"folder": "RUN"}, disk=output)


def _report(options: argparse.Namespace, output: Path) -> None:
    if output.is_dir():
        raise ConfigError(f"--output {output}: found a folder, expected a file; add report.html")
    from scaledistill.report.page import write_report
    from scaledistill.report.record import read_run

    if options.maps:
        for run in options.runs:
            read_run(run)  # before the measurements, which take minutes
        _measure_maps(options.runs)
    write_report(options.runs, output)
    sys.stdout.write(f"{output}\n")


def _measure_maps(runs: Sequence[Path]) -> None:
    from scaledistill.config.load import load_config
    from scaledistill.training.maps import write_checkpoint_maps

    for run in runs:
        # The folder may have been moved since.
        config = load_config(run / "config.json", [f"run.folder={json.dumps(str(run))}"])
        write_checkpoint_maps(config)
