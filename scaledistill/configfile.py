"""Read a run's settings from a JSON file and `--set a.b=c` overrides, and say what is wrong with them in one line each.

Enters: a file, or plain dicts. Leaves: a `DistillConfig`.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from scaledistill.config import DistillConfig, Settings
from scaledistill.errors import ConfigError

UNION_MEMBER = re.compile(r"constrained-int|bool|literal\[.*\]")  # where pydantic's path of an error goes on too far


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a configuration file, apply `a.b=c` overrides, and check it.

    Raises:
        ConfigError: the file is missing or no JSON, or a key is unknown, of the wrong type or contradicts another.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], n=1)
        raise ConfigError(
            f"--config {path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path}: found a JSON {type(tree).__name__}, expected an object with blocks such as 'teacher'"
        )
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> DistillConfig:
    """Check a configuration given as plain dicts and lists.

    Raises:
        ConfigError: see `load_config`.
    """
    try:
        return DistillConfig.model_validate(dict(tree))
    except ValidationError as error:
        lines: dict[str, str] = {}
        for line in map(_explain, error.errors()):  # a value that may be of two types has an error for each
            found, separator, expected = line.partition("; should be ")
            lines[found] = f"{lines[found]} or {expected}" if separator and found in lines else line
        raise ConfigError("\n".join(lines.values())) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"the key {min(twice)!r} stands twice in one object")
    return dict(pairs)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set train.max_steps=100")
    try:
        value = json.loads(text)
    except ValueError:
        value = text  # a bare word is a string
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a block")
    node[last] = value


def _explain(item: Any) -> str:
    """Return one line for one of pydantic's errors: dotted path, found, expected, remedy."""
    location = tuple(part for part in item["loc"] if part != "[key]")
    if item["type"] != "extra_forbidden" and location and UNION_MEMBER.fullmatch(str(location[-1])):
        location = location[:-1]
    path = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        block = _block_at(location[:-1])
        names = list(block.model_fields) if block else []
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{path}: missing, a value is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    found = item["input"]
    return f"{path}: found {json.dumps(found, default=str)} ({type(found).__name__}); {message.replace('Input s', 's')}"


def _block_at(location: Sequence[str | int]) -> type[Settings] | None:
    """Return the settings class that a path leads to."""
    found: Any = DistillConfig
    for part in location:
        if isinstance(found, type) and issubclass(found, Settings):
            found = found.model_fields[str(part)].annotation if str(part) in found.model_fields else None
        elif get_origin(found) is dict:
            found = get_args(found)[1]
        if get_origin(found) in (Union, types.UnionType):
            found = next((arg for arg in get_args(found) if arg is not type(None)), None)
    return found if isinstance(found, type) and issubclass(found, Settings) else None
