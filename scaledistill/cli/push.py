"""`scaledistill push`: upload an export to the hub.

Inputs: command-line arguments. Outputs: a list of files, on request their upload, and an exit code.
Not handled here: the upload itself (`publishing.hub`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scaledistill.cli.export import set_up_messages
from scaledistill.cli.parsing import Parser
from scaledistill.errors import carry_out

PROG = "scaledistill push"
DESCRIPTION = """Upload an export to the hub. Without --yes it only lists what would go."""
EPILOG = """exit codes: 0 done, 2 wrong options, 3 wrong export or hub, 130 interrupted

examples:
  %(prog)s l6 --repo your-name/l6-h384
  %(prog)s l6 --repo your-name/l6-h384 --private --licence apache-2.0 --yes"""
NAMES = {
    "repo": "--repo",
    "licence": "--licence",
    "export": "EXPORT",
}
"""The options, by the parameters that errors name."""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument(
        "export", type=Path, metavar="EXPORT", help="the folder that `scaledistill export` wrote"
    )
    parse.add_argument(
        "--repo", required=True, metavar="NAME/ID", help="the repository; made if there is none"
    )
    parse.add_argument("--private", action="store_true", help="make a new repository private")
    parse.add_argument(
        "--licence",
        "--license",
        metavar="ID",
        help="required if the model card has none, such as apache-2.0; written into it",
    )
    parse.add_argument(
        "--base-model", metavar="NAME", help="the teacher's hub name; written into the model card"
    )
    parse.add_argument("--yes", action="store_true", help="upload")
    return parse


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit code."""
    options = parser(prog).parse_args(arguments)
    set_up_messages()
    return carry_out(
        lambda: _push(options), prog, names=NAMES, interrupted="rerun the same command to resume"
    )


def _push(options: argparse.Namespace) -> None:
    # Imported here, because it loads the hub's client.
    from scaledistill.publishing.hub import plan_upload, upload

    planned = plan_upload(
        options.export, options.repo, licence=options.licence, base_model=options.base_model
    )
    for key, value in planned.changes.items():
        sys.stdout.write(f"README.md: {key} becomes {value}\n")
    if not planned.has_base_model:
        sys.stdout.write("README.md: names no teacher; --base-model NAME states its hub name\n")
    count = 0
    for folder, files in planned.folders.items():
        for name, size in files.items():
            path = f"{folder}/{name}" if folder else name
            sys.stdout.write(f"{size:>15,}  {path}\n")
            count += 1
    total = f"{count} files, {planned.num_bytes / 1e6:,.1f} MB"
    where = f"{planned.repo}{' (private if it is new)' if options.private else ''}"
    if not options.yes:
        sys.stdout.write(
            f"{total} would go to {where}; files that only an older export there has would be "
            "removed; add --yes to upload\n"
        )
        return
    address = upload(planned, private=options.private)
    sys.stdout.write(f"{total} are in {address}\n")
