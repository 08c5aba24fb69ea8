"""`scaledistill doctor`: checks of this machine and its environment.

Inputs: command-line arguments. Outputs: a line per finding, a JSON file and an exit code. Not
handled here: the checks (`preflight.doctor`). Imports nothing heavy, since torch may be broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from scaledistill.cli.parsing import Parser, not_negative, positive
from scaledistill.errors import EXIT_DONE, carry_out, counted, did_you_mean, near_miss
from scaledistill.metrics.benchmark import output_file
from scaledistill.preflight.doctor import CHECKS, MIN_FREE_BYTES, Finding, Machine, Wanted, examine

EXIT_PROBLEMS = 1
QUICK = tuple(name for name in CHECKS if name not in ("kernels", "deepspeed"))
PROG = "scaledistill doctor"
DESCRIPTION = """\
Check this machine, its Python environment and, with --config, where a run finds its data
and models."""
EPILOG = """Each line is ok, a warning or a problem, with the remedy below it. The checks of the
kernels and of DeepSpeed take a minute or more, because they compile.

exit codes: 0 no problem (there may be warnings), 1 problems, 2 wrong options or configuration,
130 interrupted

examples:
  %(prog)s --config my.yaml
  %(prog)s --quick --only gpu,disk,port --json doctor.json"""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument(
        "--config", metavar="FILE", help="also check the shards, models and run folder of this run"
    )
    parse.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="with --config: override a setting; repeatable",
    )
    parse.add_argument(
        "--only", type=_names, metavar="CHECK,…", help=f"some of {','.join(CHECKS)} (default: all)"
    )
    parse.add_argument(
        "--quick", action="store_true", help="leave out kernels and deepspeed, which compile"
    )
    parse.add_argument(
        "--run-folder",
        type=Path,
        metavar="DIR",
        help="the run folder to check (default: that of --config, or runs)",
    )
    parse.add_argument(
        "--min-free-gb",
        type=not_negative,
        metavar="X",
        default=MIN_FREE_BYTES / 1e9,
        help=f"space that the run folder needs (default: {MIN_FREE_BYTES / 1e9:g})",
    )
    parse.add_argument("--num-gpus", type=positive, metavar="N", help="GPUs that must be visible")
    parse.add_argument(
        "--shared-file",
        type=Path,
        metavar="FILE",
        help="a file made by another machine, which must be visible here",
    )
    parse.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write the findings as a JSON list of check, level, text, remedy",
    )
    return parse


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in CHECKS:
            near = did_you_mean(near_miss(name, CHECKS))
            raise argparse.ArgumentTypeError(
                f"there is no check {name!r}; expected some of {','.join(CHECKS)}{near}"
            )
    return names


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    parse = parser(prog)
    options = parse.parse_args(arguments)
    if options.overrides and not options.config:
        parse.error("--set is read only with --config")
    if options.num_gpus and "gpu" not in (options.only or CHECKS):
        parse.error("--num-gpus is read only by the check gpu, which --only leaves out")
    if not _chosen(options):
        parse.error(f"--quick leaves out {','.join(options.only)}; drop one of the options")
    return carry_out(lambda: _examine(options), prog)


def _chosen(options: argparse.Namespace) -> list[str]:
    """Return the names of the checks to make, in order."""
    return [
        name
        for name in CHECKS
        if name in (options.only or CHECKS) and (name in QUICK or not options.quick)
    ]


def _examine(options: argparse.Namespace) -> int:
    config, findings = None, []
    if options.config:
        try:
            from scaledistill.config.load import load_config

            config = load_config(options.config, options.overrides)
        except ImportError as error:
            findings.append(
                Finding(
                    "config",
                    "problem",
                    f"--config {options.config} cannot be read: {error}",
                    f"pip install {error.name}; the checks of data and hub were left out",
                )
            )
    default = Path(config.run.folder) if config else Path("runs")
    wanted = Wanted(
        config,
        folder=options.run_folder or default,
        min_free_bytes=int(options.min_free_gb * 1e9),
        num_gpus=options.num_gpus,
        shared_file=options.shared_file,
    )
    # Hub clients retry for minutes and log each attempt.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    sys.stdout.write(f"{socket.gethostname()}, {sys.executable}\n\n")
    sys.stdout.write("".join(_shown(findings)))
    for finding in examine(Machine(), wanted, _chosen(options)):
        findings.append(finding)
        sys.stdout.write("".join(_shown([finding])))
        sys.stdout.flush()
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    sys.stdout.write(f"\n{counted(problems, 'problem')}, {counted(warnings, 'warning')}\n")
    if options.json:
        rows = [finding._asdict() for finding in findings]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return EXIT_PROBLEMS if problems else EXIT_DONE


def _shown(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield each finding as lines for people, folded on a terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for finding in findings:
        begin, indent = f"{finding.level:8} {finding.check:9} ", 19 * " "
        lines = textwrap.wrap(
            finding.text,
            width,
            initial_indent=begin,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if finding.remedy:
            lines += textwrap.wrap(
                finding.remedy,
                width,
                initial_indent=f"{indent}remedy: ",
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        yield "\n".join(lines) + "\n"
