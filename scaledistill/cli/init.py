"""`scaledistill init`: write a configuration to start from, and the launchers.

Inputs: command-line arguments. Outputs: files in the working folder. Not handled here: where the
presets and launchers are (`config.presets`), the settings' descriptions (`config.manual`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scaledistill.cli.parsing import Parser
from scaledistill.errors import ConfigError, carry_out

PROG = "scaledistill init"
DESCRIPTION = """Write a configuration to start from, and the launchers.

FILE ends in .yaml, and then says what each setting does, or in .json."""
EPILOG = """examples:
  %(prog)s --preset large_to_l6 my.yaml
  %(prog)s --preset large_to_l6_a6000 my.yaml --with-launchers"""
NEEDED = ("large_to_l6.json", "large_to_l6_a6000.json")
"""Presets that a launcher starts if it is given none."""
ON_THE_HUB = {"models/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
"""The folder that a clone's Makefile fills, and where it is from."""


def parser(prog: str = PROG) -> Parser:
    """Return the parser of the command line."""
    parse = Parser(prog, DESCRIPTION, EPILOG)
    parse.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the file to write")
    parse.add_argument("--preset", metavar="NAME", help="what to write; --list shows the names")
    parse.add_argument("--list", action="store_true", help="list the presets and exit")
    parse.add_argument(
        "--with-launchers",
        action="store_true",
        help="also write launch/, with scripts for one GPU, a node, several nodes, Slurm and "
        "Kubernetes, into the working folder",
    )
    parse.add_argument("--force", action="store_true", help="replace files that exist")
    return parse


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Write the files and return the exit code."""
    parse = parser(prog)
    options = parse.parse_args(arguments)
    if options.file and not options.preset:
        parse.error(
            f"to write {options.file}, name a preset: --preset NAME (--list shows the names)"
        )
    if not (options.list or options.preset or options.with_launchers):
        parse.error("--preset NAME is missing; --list shows the names")
    work = _list if options.list else lambda: _write(options)
    return carry_out(work, prog, disk="the folder")


def _list() -> None:
    from scaledistill.config.presets import presets, read_preset, summary

    known = presets()
    width = max(map(len, known))
    for name, path in known.items():
        sys.stdout.write(f"{name:{width}}  {summary(read_preset(path))}\n")


def _write(options: argparse.Namespace) -> None:
    files: dict[Path, bytes] = {}
    if options.preset:
        target = options.file or Path(f"{options.preset}.yaml")
        files[target] = _content(options.preset, target)
    scripts = _launchers() if options.with_launchers else {}
    for path, source in scripts.items():
        files.setdefault(path, source.read_bytes())
    # An equal file is no loss.
    present = [path for path, data in files.items() if path.exists() and not _holds(path, data)]
    if present and not options.force:
        names = ", ".join(map(str, present))
        verb = "exists" if len(present) == 1 else "exist"
        raise ConfigError(f"{names} {verb}; name another file, or replace with --force")
    for path in files:
        if path not in scripts and not path.parent.is_dir():
            raise ConfigError(f"{path}: no folder {path.parent}; make it first")
    for path, data in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if data.startswith(b"#!"):
            path.chmod(0o755)
    sys.stdout.write("".join(f"written: {path}\n" for path in files))
    if options.preset:
        sys.stdout.write(
            "next: set teacher.model, data.train and the sizes in it, then\n"
            f"      scaledistill distill --config {shlex.quote(str(target))} --validate\n"
        )


def _content(preset: str, target: Path) -> bytes:
    """Return a preset as the target's name has it, as YAML or JSON."""
    from scaledistill.config.load import YAML_SUFFIXES
    from scaledistill.config.manual import commented_yaml
    from scaledistill.config.presets import find_preset, read_preset, summary

    source = find_preset(preset)
    suffix = target.suffix.lower()
    if suffix == ".json":
        text = source.read_text(encoding="utf-8")
        for folder, name in ON_THE_HUB.items():
            text = text.replace(f'"{folder}"', f'"{name}"')
        return text.encode()
    if suffix not in YAML_SUFFIXES:
        raise ConfigError(f"{target}: found the suffix {suffix!r}, expected .yaml, .yml or .json")
    tree = read_preset(source)
    teacher = tree["teacher"]
    teacher["model"] = ON_THE_HUB.get(teacher["model"], teacher["model"])
    head = (
        f"# {preset}: {summary(tree)}\n"
        "# All settings, with defaults: scaledistill distill --config FILE --print-config yaml\n"
        "# What a setting does: scaledistill distill --explain train.max_steps\n\n"
    )
    return (head + commented_yaml(tree)).encode()


def _launchers() -> dict[Path, Path]:
    """Return the launchers' files, and the presets that they read, by their paths here."""
    from scaledistill.config.presets import templates

    launch, configs = templates("launch"), templates("configs")
    files = {Path("launch") / path.name: path for path in sorted(launch.iterdir()) if path.suffix}
    return files | {Path("configs") / name: configs / name for name in NEEDED}


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
