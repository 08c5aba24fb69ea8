"""Read a run's settings from a JSON or YAML file and `--set a.b=c` overrides.

Inputs: a file, or plain dicts. Outputs: a `DistillConfig`, or an error with one line per problem.
Not handled here: the fields and their checks (`schema`), the wording of pydantic's errors
(`wording`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scaledistill.config.presets import CLONE
from scaledistill.config.schema import INIT_WORDS, SCHEMA_KEY, DistillConfig, StudentSettings
from scaledistill.config.wording import explain, takes
from scaledistill.config.yaml_text import lines_of, parse_yaml
from scaledistill.errors import ConfigError, DataError, Field, did_you_mean, joined, near_miss

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".yaml", ".yml")
YAML_SUFFIXES = SUFFIXES[1:]
YAML_LINE = re.compile(r"^[A-Za-z_][\w.-]*\s*:(\s|$)", re.MULTILINE)
TOML_LINE = re.compile(r"\[\w[\w.-]*\]\s*$|[A-Za-z_][\w.-]*\s*=", re.MULTILINE)
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null, or leave the key out"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a configuration file, apply `a.b=c` overrides, and check it.

    Raises:
        ConfigError: the file is missing or neither JSON nor YAML, or a key is unknown, has the
            wrong type or contradicts another key; where the file has a line for it, the message
            starts with "FILE:LINE: ".
    """
    path = Path(path)
    text = _read(path)
    tree = read_tree(text, path)
    in_file = tuple(students) if isinstance(students := tree.get("students"), dict) else ()
    for override in overrides:
        _apply_override(tree, override)
    _check_new_students(tree, in_file, overrides)
    separate: list[ConfigError] = []
    try:
        return parse_config(tree, separate)
    except ConfigError:
        places = _Places(path, text, [override.partition("=")[0] for override in overrides])
        raise joined([places.located(problem) for problem in separate]) from None


def read_tree(text: str, path: Path) -> dict[str, Any]:
    """Return the values of a configuration's text, which is YAML if the file's name says so.

    Raises:
        ConfigError: it is not valid, or has no blocks.
    """
    is_yaml = path.suffix.lower() in YAML_SUFFIXES
    kind = "YAML" if is_yaml else "JSON"
    try:
        tree = parse_yaml(text) if is_yaml else json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        problem = _what_is_wrong(path, text, error)
        raise ConfigError(f"--config {path}: not valid JSON: {problem}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid {kind}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path}: found a {kind} {type(tree).__name__}, expected an object with "
            "blocks such as 'teacher'"
        )
    return tree


class _Places:
    """The lines of a file's keys, to begin messages with."""

    def __init__(self, path: Path, text: str, overridden: Sequence[str]) -> None:
        self._path, self._lines = path, lines_of(text)
        self._overridden = [tuple(key.split(".")) for key in overridden]

    def located(self, problem: ConfigError | DataError) -> ConfigError:
        """Return a problem of one setting with its place; unchanged if it has none in the file."""
        setting, rest = problem.pieces[0], "".join(map(str, problem.pieces[1:]))
        name = setting.name if isinstance(setting, Field) else ""
        block = tuple(name.split(".")) if name else ()
        # A message about a block, or the whole file, starts with the setting that is at fault.
        first = re.match(r": ([\w.-]+)|([\w.-]+)", rest)
        words = tuple((first[1] or first[2]).split(".")) if first else ()
        at_fault = (*block, *words)
        said = re.findall(r"\w+", rest)
        for key in self._overridden:
            mentioned = block and key[: len(block)] == block and key[-1] in said
            if mentioned or at_fault[: len(key)] == key:
                return ConfigError(*problem.pieces)  # the command line, not the file, has it
        line = self._lines.get(at_fault)
        for size in range(len(block), 0, -1):
            line = line or self._lines.get(block[:size])
        where = f"{self._path}:{line}: " if line else ""
        return ConfigError(where, *problem.pieces)


def parse_config(
    tree: Mapping[str, Any], separate: list[ConfigError] | None = None
) -> DistillConfig:
    """Check a configuration given as plain dicts and lists.

    Args:
        tree: the settings by block; `$schema` is ignored.
        separate: gets the problems one by one, before they are raised as one error.

    Raises:
        ConfigError: see `load_config`.
    """
    try:
        return DistillConfig.model_validate(
            {key: value for key, value in tree.items() if key != SCHEMA_KEY}
        )
    except ValidationError as error:
        problems = explain(error.errors(), tree)
        if separate is not None:
            separate += problems
        raise joined(problems) from None


def check_paths(config: DistillConfig, path: str | Path, *, warns: bool = True) -> None:
    """Check that relative paths are meant from the working folder.

    A path that is missing there is also looked for beside the configuration file, one folder above
    it and in the repository. `warns`: log a warning if the run would start in another folder
    than an earlier one.

    Raises:
        ConfigError: a path exists in one of those places, but not in the working folder.
    """
    here = Path.cwd()
    roots = [*Path(path).resolve().parents[:2], *([CLONE] if CLONE else [])]
    sources = {setting: source.shards for setting, source in config.data.sources.items()}
    named = {**sources, "data.validation": config.data.validation}
    named |= {"teacher.model": config.teacher.model}
    for name, student in config.students.items():
        if student.init not in INIT_WORDS:
            named[f"students.{name}.init"] = student.init
    named |= {
        "evaluation.data_folder": config.evaluation.data_folder if config.evaluation else None
    }
    problems = []
    for setting, value in named.items():
        if not value or "://" in value or Path(value).is_absolute() or Path(value).exists():
            continue
        root = next((root for root in roots if root != here and (root / value).is_dir()), None)
        if root:
            problems.append(
                f"{setting}={value!r} is not in the working folder {here}, but in {root}; start "
                f"the command there (cd {root}), or give the whole path, {root / value}"
            )
    folder = Path(config.run.folder)
    if not folder.is_absolute() and not folder.exists():
        root = next(
            (root for root in roots if root != here and (root / folder / "checkpoints").is_dir()),
            None,
        )
        if root and warns:
            log.warning(
                "run.folder=%s starts a new run in the working folder %s; to resume the run in %s, "
                "start the command in %s",
                *(folder, here, root / folder, root),
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _read(path: Path) -> str:
    """Return the text of a configuration file."""
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.suffix in SUFFIXES)
        inside = (
            f"give a file in it: {', '.join(str(path / name) for name in names[:6])}"
            if names
            else "give a file"
        )
        raise ConfigError(
            f"--config {path}: found a folder, expected a JSON or YAML file; {inside}"
        )
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file{_where_else(path)}")
    try:
        # Some editors begin a file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {path}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ConfigError(
            f"--config {path}: the file is empty; `scaledistill init` writes one to start from"
        )
    return text


def _where_else(path: Path) -> str:
    """Return a hint where a missing file may be, or what it may be called."""
    looked = "" if path.is_absolute() else f" in the working folder {Path.cwd()}"
    candidates = [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    candidates += [path.with_suffix(suffix) for suffix in SUFFIXES]
    presets = []
    if CLONE:
        presets = sorted((CLONE / "configs").glob("*.json"))
        candidates += [CLONE / path, *(each for each in presets if each.stem == path.stem)]
    for candidate in candidates:
        if candidate.is_file():
            return f"{looked}{did_you_mean(_short(candidate))}"
    files = {each.stem: each for each in (*presets, *_configs_beside(path))}
    if near := near_miss(path.stem, files):
        return f"{looked}{did_you_mean(_short(files[near]))}"
    return f"{looked}; `scaledistill init` writes one to start from"


def _configs_beside(path: Path) -> list[Path]:
    """Return the files in the folder of `path` whose names are those of configurations."""
    folder = path.parent
    return [each for each in folder.iterdir() if each.suffix in SUFFIXES] if folder.is_dir() else []


def _short(path: Path) -> Path:
    """Return a path as a user would type it: relative if it is inside the working folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _what_is_wrong(path: Path, text: str, error: json.JSONDecodeError) -> str:
    """Return what is not valid JSON, in which line, and what to do about it.

    The parser's own message is the fallback.
    """
    rest = text[error.pos :]
    before = text[: error.pos].rstrip()
    line = f"in line {error.lineno}"
    first = rest.splitlines()[0].strip() if rest.strip() else ""
    is_object = text.lstrip()[0] in "{["
    if not is_object and YAML_LINE.search(text):
        return f"it is YAML, or something like it, {line}; rename it to {path.with_suffix('.yaml')}"
    if TOML_LINE.match(text.lstrip()):
        return (
            f"it is TOML, or something like it, {line}; write it as YAML or JSON: `scaledistill "
            "init` writes one to start from"
        )
    if rest.startswith(("//", "/*", "#")):
        return f"a comment ({first[:40]!r}) {line}; JSON has none: remove it"
    if before.endswith(",") and rest[:1] in ("}", "]"):
        number = before.count("\n") + 1
        return f"a comma after the last entry in line {number}; remove it"
    if rest.startswith(",") and rest[1:].lstrip()[:1] in ("}", "]"):
        return f"a comma after the last entry {line}; remove it"
    if rest.startswith("'"):
        return f"single quotes {line}; JSON has double quotes only"
    if word := re.match(r"True|False|None", rest):
        return f"{word[0]} {line}; write {PYTHON_WORDS[word[0]]}"
    if not rest.strip():
        return f"the file ends before its brackets are closed, in line {error.lineno}"
    if error.msg.startswith("Expecting ',' delimiter"):
        number = before.count("\n") + 1
        return f"a comma or a closing bracket is missing in line {number}, before {first[:40]!r}"
    return str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"the key {min(twice)!r} occurs twice in one object; remove one")
    return dict(pairs)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(
            f"--set {override}: expected KEY=VALUE, such as --set train.max_steps=100"
        )
    try:
        value = json.loads(text)
    except ValueError:
        value = text  # a bare word is a string
    if type(value) in (int, float) and takes(path, text) and not takes(path, value):
        value = text  # the shell removes the quotes of "2024"
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if isinstance(node, list):
            whole = path.partition(f".{parent}.")[0] + f".{parent}"
            raise ConfigError(
                f"--set {override}: {parent!r} is a list; give it whole: --set {whole}='[…]'"
            )
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a block")
    node[last] = value


def _check_new_students(
    tree: Mapping[str, Any], in_file: Sequence[str], overrides: Sequence[str]
) -> None:
    """Check that a student that the file lacks has got its size, not only a misspelt name.

    Raises:
        ConfigError: naming the first such student, and what it lacks.
    """
    students = tree.get("students")
    if not in_file or not isinstance(students, dict):
        return
    needed = [key for key, field in StudentSettings.model_fields.items() if field.is_required()]
    for name, block in students.items():
        if name in in_file or not isinstance(block, dict):
            continue
        if missing := [key for key in needed if key not in block]:
            wanted = (f"students.{name}.", f"students.{name}=", "students=")
            override = next(each for each in reversed(overrides) if each.startswith(wanted))
            known = " or ".join(f"students.{each}" for each in in_file)
            raise ConfigError(
                f"--set {override}: there is no student {name!r} in the file; use {known}, or to "
                f"add it, set {' and '.join(f'students.{name}.{key}' for key in missing)} too"
            )
