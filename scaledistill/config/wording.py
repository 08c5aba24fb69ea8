"""Turn pydantic's errors into messages: the setting, what was found, what is expected.

Inputs: pydantic's errors and the tree that they refer to. Outputs: one line per setting. What is
expected is read from the fields of `schema`, so that a setting of two types gets one line, and all
kinds of errors have the same form.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from scaledistill.config.hints import foreign
from scaledistill.config.schema import TAGS, DistillConfig, Settings
from scaledistill.errors import ConfigError, Field, counted, did_you_mean, near_miss

VERY_NEAR, NEAR, FAR = 0.85, 0.5, 0.75
"""How similar an unknown key must be to a known one: for a typing error; within the same block;
anywhere else."""

PRECISIONS = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
    "full": "fp32",
}


def explain(
    errors: Sequence[Any], tree: Mapping[str, Any], root: type[Settings] = DistillConfig
) -> list[ConfigError]:
    """Return an error for each setting of `tree` that pydantic refuses, in pydantic's order.

    Args:
        errors: as `ValidationError.errors()` returns them.
        tree: the refused values.
        root: the model that refused them.
    """
    problems: dict[str, ConfigError] = {}
    for error in errors:
        location = [part for part in error["loc"] if part not in ("[key]", *TAGS)]
        path, annotation, default = setting_at(location, root)
        if error["type"] == "extra_forbidden":
            path = ".".join(map(str, location))
            line = f"{path}: unknown key; {key_hint(location, tree)}"
        elif error["type"] == "missing":
            line = f"{path}: missing, a value is required"
        elif error["type"] == "value_error":
            message = error["msg"].removeprefix("Value error, ")
            line = f"{path}: {message}" if path else message
        else:
            line = _wrong_value(path, error, annotation, default)
        key = path if error["type"] != "value_error" else line
        problems.setdefault(key, ConfigError(Field(path), line.removeprefix(path)))
    return list(problems.values())


def setting_names(students: Sequence[str] = ("<name>",)) -> list[str]:
    """Return the dotted names of all settings, those of each student once per name."""
    return list(_names(DistillConfig, "", students))


def _names(block: type[Settings], prefix: str, students: Sequence[str]) -> Iterator[str]:
    for name, field in block.model_fields.items():
        inner = block_of(field.annotation)
        if inner is None:
            yield prefix + name
        elif get_origin(field.annotation) is dict:
            for student in students:
                yield from _names(inner, f"{prefix}{name}.{student}.", students)
        else:
            yield from _names(inner, f"{prefix}{name}.", students)


def block_of(annotation: Any) -> type[Settings] | None:
    """Return the block of settings that a field holds, directly or as a dict's values."""
    annotation = split_type(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType, dict):
        return next(filter(None, map(block_of, get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def entries_of(annotation: Any) -> type[Settings] | None:
    """Return the settings of each entry, if a setting may be a list of such."""
    plain = split_type(annotation)[0]
    if get_origin(plain) in (Union, types.UnionType):
        return next(filter(None, map(entries_of, get_args(plain))), None)
    return block_of(get_args(plain)[0]) if get_origin(plain) is list else None


def setting_at(
    location: Sequence[str | int], root: type[Settings] = DistillConfig
) -> tuple[str, Any, Any]:
    """Return the dotted path of a setting, its type, and its default or None.

    `location` is pydantic's path. It may go deeper: for a setting of several types, its last part
    names the type.
    """
    annotation: Any = root
    path: list[str] = []
    default = None
    for part in location:
        block = block_of(annotation)
        if get_origin(split_type(annotation)[0]) is dict or isinstance(part, int):
            annotation = _item_of(annotation)
            default = None
        elif block is not None:
            field = block.model_fields.get(str(part))
            parts = (field.annotation, *field.metadata) if field else (None,)
            annotation = Annotated[parts] if len(parts) > 1 else parts[0]
            default = (
                field.get_default(call_default_factory=True)
                if field and not field.is_required()
                else None
            )
        else:
            break
        path.append(str(part))
    return ".".join(path), annotation, default


def takes(key: str, value: object) -> bool:
    """Return whether a setting takes a value; False if there is no such setting."""
    annotation = setting_at(key.split("."))[1]
    if annotation is None:
        return False
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _item_of(annotation: Any) -> Any:
    """Return the type of a list's entries or of a dict's values; None for other types."""
    plain = split_type(annotation)[0]
    if get_origin(plain) in (Union, types.UnionType):
        return next((each for each in map(_item_of, get_args(plain)) if each is not None), None)
    return get_args(plain)[-1] if get_origin(plain) in (list, dict) else None


def split_type(annotation: Any) -> tuple[Any, list[Any]]:
    """Split a type into the plain type and its constraints."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    plain, *extras = get_args(annotation)
    constraints = [each for extra in extras for each in getattr(extra, "metadata", None) or [extra]]
    return plain, constraints


def expected(annotation: Any) -> str:
    """Describe in words the values that a setting of this type takes."""
    plain, constraints = split_type(annotation)
    if get_origin(plain) in (Union, types.UnionType):
        return " or ".join(expected(each) for each in get_args(plain) if each is not type(None))
    if get_origin(plain) is Literal:
        *values, last = [json.dumps(value) for value in get_args(plain)]
        return f"{', '.join(values)} or {last}" if values else last
    if get_origin(plain) is list:
        at_least = next((each.min_length for each in constraints if _has(each, "min_length")), 0)
        items = expected(get_args(plain)[0])
        if at_least > 1:
            return f"a list of {at_least} values, each {items}"
        return f"a list{' of at least one entry' if at_least else ''}, each {items}"
    if get_origin(plain) is dict or block_of(plain):
        return 'an object, such as {"key": value}'
    if plain is str:
        return "non-empty text in double quotes" if constraints else "text in double quotes"
    words = {bool: "true or false", int: "a whole number", float: "a number"}.get(
        plain, "another value"
    )
    bounds = {"gt": "above {}", "ge": "from {} up", "lt": "below {}", "le": "up to {}"}
    given = [
        text.format(getattr(each, name))
        for each in constraints
        for name, text in bounds.items()
        if _has(each, name)
    ]
    return " and ".join([f"{words} {given[0]}", *given[1:]]) if given else words


def _has(constraint: Any, name: str) -> bool:
    return getattr(constraint, name, None) is not None


def _wrong_value(path: str, error: Any, annotation: Any, default: Any) -> str:
    found = error["input"]
    words = (
        expected(annotation)
        if annotation is not None
        else error["msg"].removeprefix("Input should be ")
    )
    if error["type"] == "finite_number":
        words = words.replace("a number", "a finite number")
    length = f", {counted(len(found), 'entry', 'entries')}" if isinstance(found, list) else ""
    shown = json.dumps(found, default=str, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    advice = _remedy(found, annotation, default)
    where = path or "the configuration"
    kind = "" if found is None else f" ({type(found).__name__}{length})"
    return f"{where}: found {shown}{kind}; expected {words}{advice}"


def _remedy(found: Any, annotation: Any, default: Any) -> str:
    """Return what to write instead: the value in the right form, a similar one or the default."""
    if annotation is None:
        return ""
    candidates: list[Any] = []
    if isinstance(found, str):
        words = {"true": True, "false": False, "yes": True, "no": False}
        candidates += [_number(found), words.get(found.lower())]
        plain = split_type(annotation)[0]
        members = get_args(plain) if get_origin(plain) in (Union, types.UnionType) else [plain]
        choices = [
            each for member in members if get_origin(member) is Literal for each in get_args(member)
        ]
        alias = PRECISIONS.get(found.lower(), found.lower())
        if near := near_miss(alias, choices):
            return did_you_mean(json.dumps(near))
    elif isinstance(found, bool):
        candidates.append(str(found).lower())
    elif isinstance(found, int | float):
        candidates += [
            int(found) if found == found and abs(found) < 1e18 and found == int(found) else None,
            str(found),
        ]
    candidates.append([found])
    if isinstance(found, list) and len(found) == 1:
        candidates.append(found[0])
    check = TypeAdapter(annotation)
    for candidate in candidates:
        if candidate is None or (isinstance(candidate, str) and not candidate):
            continue
        try:
            check.validate_python(candidate, strict=True)
        except ValidationError:
            continue
        unquoted = (
            " without quotes" if isinstance(found, str) and not isinstance(candidate, list) else ""
        )
        return f"; write {json.dumps(candidate)}{unquoted}"
    if isinstance(default, Settings) or default is None:
        return ""
    return f"; the default is {json.dumps(default)}"


def _number(text: str) -> int | float | None:
    plain = text.replace("_", "")
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        plain = plain.replace(",", "")
    elif plain.count(",") == 1:  # a decimal comma
        plain = plain.replace(",", ".")
    try:
        value = json.loads(plain)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            return None
    # 1e6 or 2.0 in place of an integer; NaN fails the comparison.
    if isinstance(value, float) and 1 <= abs(value) < 1e18 and value == int(value):
        return int(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def key_hint(location: Sequence[str | int], tree: Mapping[str, Any]) -> str:
    """Return what to write instead of an unknown key: a key of its block, or of another block."""
    *parents, key = map(str, location)
    block = block_of(setting_at(location[:-1])[1]) if parents else DistillConfig
    here = list(block.model_fields) if block else []
    if near := near_miss(key, here, cutoff=VERY_NEAR):
        return f"did you mean {near!r}?"
    students = tree.get("students")
    own = (
        [str(name) for name in students] if isinstance(students, dict) and students else ["<name>"]
    )
    last = key.rpartition(".")[2]
    names = [name for name in setting_names(own) if not name.startswith("evaluation.")]
    names.remove("engine.name")  # too common a word
    elsewhere = [name for name in names if name.rpartition(".")[2] == last]
    if elsewhere:
        return f"did you mean {_either(elsewhere)}?"
    if advice := foreign(last):
        return advice.as_key(own[0])
    if nearly := _nearest(last, names, VERY_NEAR):
        return f"did you mean {_either(nearly)}?"
    if near := near_miss(key, here, cutoff=NEAR):
        return f"did you mean {near!r}?"
    if close := _nearest(last, names, FAR):
        return f"did you mean {_either(close)}?"
    return f"known keys: {', '.join(here)}"


def _nearest(key: str, names: Sequence[str], likeness: float) -> list[str]:
    """Return the settings whose last part is most similar to a key."""
    near = near_miss(key, (name.rpartition(".")[2] for name in names), cutoff=likeness)
    return [name for name in names if name.rpartition(".")[2] == near]


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))
