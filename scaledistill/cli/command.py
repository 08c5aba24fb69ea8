"""The command `scaledistill`: finds the subcommand and calls its module.

Inputs: command-line arguments. Outputs: an overview, or the exit code of the subcommand. Not
handled here: the options of the subcommands. Only the module of the given subcommand is imported,
and none imports anything heavy at its top, so that --help is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from scaledistill import __version__
from scaledistill.errors import EXIT_CONFIG, EXIT_DONE, did_you_mean, near_miss


class Subcommand(NamedTuple):
    """A row of the overview."""

    module: str
    """The module in this folder: `parser(prog)` and `main(arguments, prog)`, see CONTRIBUTING."""
    summary: str


SUBCOMMANDS = {
    "init": Subcommand("init", "write a configuration to start from, and the launchers"),
    "shards make": Subcommand("shards_make", "make shards of token ids from text"),
    "shards merge": Subcommand("shards_merge", "merge shards made in parts on several machines"),
    "shards check": Subcommand("shards_check", "verify shards and print their contents"),
    "distill": Subcommand("distill", "distil students from a teacher; rerun to resume"),
    "glue": Subcommand("glue", "fine-tune and score models on GLUE and SQuAD 2.0"),
    "report": Subcommand("report", "write a page about runs: curves, events, relation maps"),
    "export": Subcommand(
        "export", "write a student for transformers, sentence-transformers or ONNX"
    ),
    "push": Subcommand("push", "upload an export to the hub; shows the files first"),
    "doctor": Subcommand("doctor", "check this machine, its packages and the data of a run"),
    "estimate": Subcommand("estimate", "estimate memory, speed and time of a run on types of GPUs"),
    "schema": Subcommand("schema", "print the JSON schema of a configuration, for editors"),
}
"""The subcommands in the order of the overview; a name may have several words."""
MEANT = {
    "new": "init",
    "preset": "init",
    "presets": "init",
    "config": "init",
    "train": "distill",
    "run": "distill",
    "make": "shards make",
    "prepare": "shards make",
    "merge": "shards merge",
    "check": "shards check",
    "verify": "shards check",
    "upload": "push",
    "publish": "push",
    "convert": "export",
    "onnx": "export",
    "eval": "glue",
    "evaluate": "glue",
}
"""Names that users know from other tools, and ours."""


def overview(group: str = "") -> str:
    """Return the list of subcommands, or of those whose name starts with the word `group`."""
    names = [name for name in SUBCOMMANDS if not group or name.split()[0] == group]
    width = max(map(len, names))
    rows = "".join(f"  {name:{width}}  {SUBCOMMANDS[name].summary}\n" for name in names)
    prefix = f"scaledistill {group}".rstrip()
    shown = "".join(f"  scaledistill {name} --help\n" for name in names[:2])
    return (
        f"usage: {prefix} SUBCOMMAND …\n\n"
        "Distil large frozen encoders into small students.\n\n"
        f"subcommands:\n{rows}\nexamples:\n{shown}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    for name, subcommand in SUBCOMMANDS.items():
        parts = name.split()
        if words[: len(parts)] == parts:
            module = import_module(f"scaledistill.cli.{subcommand.module}")
            return int(module.main(words[len(parts) :], prog=f"scaledistill {name}"))
    groups = {name.split()[0] for name in SUBCOMMANDS}
    group = words[0] if words and words[0] in groups else ""
    rest = words[1:] if group else words
    if not rest or rest[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview(group))
        return EXIT_DONE
    if rest == ["--version"]:
        sys.stdout.write(f"scaledistill {__version__}\n")
        return EXIT_DONE
    sys.stderr.write(f"scaledistill: {_what_is_wrong(group, rest)}\nTry 'scaledistill --help'.\n")
    return EXIT_CONFIG


def _what_is_wrong(group: str, words: Sequence[str]) -> str:
    """Return the error message for words that name no subcommand."""
    if words[0].startswith("-"):
        name = next(name for name in SUBCOMMANDS if name.startswith(group or "distill"))
        return (
            f"the option {words[0]} belongs to a subcommand; did you mean scaledistill {name} "
            f"{words[0]} …?"
        )
    given = f"{group} {words[0]}".strip()
    own = MEANT.get(words[0], "")  # "shards verify": only within its group
    meant = MEANT.get(given) or (own if group and own.startswith(f"{group} ") else None)
    meant = meant or near_miss(given, SUBCOMMANDS)
    if meant is None and len(words) > 1:
        meant = near_miss(f"{given} {words[1]}", SUBCOMMANDS)
    return f"unknown subcommand {given!r}{did_you_mean(meant and f'scaledistill {meant}')}"
