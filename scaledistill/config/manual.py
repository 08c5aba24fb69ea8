"""What each setting does, as the schema documents it: for --explain, comments and editors.

Inputs: dotted names of settings. Outputs: text, and the JSON schema. Everything is read from the
fields of `schema`; nothing is described here.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_origin

from pydantic.fields import FieldInfo

from scaledistill.config.schedule import SCHEDULE_KEYS
from scaledistill.config.schema import (
    CONTENT_STAYS,
    MAY_CHANGE,
    SCHEMA_KEY,
    DistillConfig,
    Settings,
    TrainSettings,
)
from scaledistill.config.wording import (
    block_of,
    entries_of,
    expected,
    key_hint,
    setting_at,
    split_type,
)
from scaledistill.config.yaml_text import to_yaml
from scaledistill.errors import ConfigError

WIDTH = 90
NAME = "NAME"
"""Stands for the name of any student."""
NUMBER = "NUMBER"
"""Stands for the number of an entry of a list, from 0."""
RESUME = {
    MAY_CHANGE: "may change",
    CONTENT_STAYS: "the name may change; the content must be the same, which its hash shows",
}
"""What each mark of a field says about a resume."""


class Setting(NamedTuple):
    """A setting or block of settings, with what the schema says about it."""

    key: str
    field: FieldInfo | None
    """None for the whole configuration."""
    block: type[Settings] | None
    """The settings in it; None if it is a single value."""
    resume: str
    """Whether a resume may change it; "" if that differs within a block."""

    @property
    def location(self) -> list[str | int]:
        """The parts of its key, as `wording.setting_at` takes them."""
        parts = self.key.split(".") if self.key else []
        return [0 if part == NUMBER else part for part in parts]

    @property
    def description(self) -> str:
        """What it does, on one line."""
        text = self.field.description if self.field else None
        if not text and self.block is not None:
            text = self.block.__doc__
        return " ".join((text or "").split())


def find_setting(key: str) -> Setting:
    """Return a setting or block by its dotted name; "" is the whole configuration.

    Any name stands for a student. What is below a setting without settings of its own, such as a
    key of `engine.deepspeed`, is that setting.

    Raises:
        ConfigError: there is none of this name; the message says what may have been meant.
    """
    found = Setting("", None, DistillConfig, "")
    parts = key.split(".") if key else []
    while parts and found.block is not None:
        name = parts.pop(0)
        field = found.block.model_fields.get(name)
        if field is None:
            hint = key_hint([*found.location, name, *parts], {})
            raise ConfigError(f"unknown setting {key}; {hint}")
        found = _inner(found, name, field)
        if _is_dict(field) and found.block is not None and parts:  # a student, by its name
            found = found._replace(key=f"{found.key}.{parts.pop(0)}", field=None)
        if parts and (entries := entries_of(field.annotation)):  # with or without its number
            if parts[0] == NUMBER or parts[0].isdecimal():
                parts.pop(0)
            found = Setting(f"{found.key}.{NUMBER}", None, entries, "")
    if parts and not _is_dict(found.field):
        raise ConfigError(f"{found.key} is one value and has no key {'.'.join(parts)!r}")
    return found


def describe(key: str) -> str:
    """Return what a setting or block does, for a comment; "" if the schema does not say."""
    found = find_setting(key)
    return found.description if found.key == key else ""


def commented_yaml(tree: Mapping[str, Any]) -> str:
    """Return settings as YAML with a comment on each; those of students on the first one only."""
    first = next(iter(tree.get("students", ())), "")

    def comment(key: str) -> str:
        is_other = key.startswith("students.") and not f"{key}.".startswith(f"students.{first}.")
        return "" if is_other else describe(key)

    return to_yaml(tree, comment)


def explain_setting(key: str) -> str:
    """Return what a setting does, its values, its default and whether a resume may change it.

    Of a block, its keys.

    Raises:
        ConfigError: there is no such setting.
    """
    found = find_setting(key)
    lines = [found.key or "the configuration", *_wrapped(found.description, "  "), ""]
    if found.field is not None and found.block is None:
        _, annotation, _ = setting_at(found.location)
        default = "none, it must be set"
        if not found.field.is_required():
            value = found.field.get_default(call_default_factory=True)
            default = "not set" if value is None else json.dumps(value)
        resume = found.resume or "a resume with another value is refused"
        rows = {"values": expected(annotation), "default": default, "resume": resume}
        for name, text in rows.items():
            lines += _wrapped(f"{name:7}  {text}", "  ", " " * 11)
        if entries := entries_of(annotation):
            lines += ["", "  each entry of a list", "", *_keys(entries, f"{found.key}.{NUMBER}.")]
        return "\n".join(lines) + "\n"
    assert found.block is not None
    prefix = f"{found.key}." if found.key else ""
    if _is_dict(found.field):
        prefix += f"{NAME}."
    lines += _keys(found.block, prefix)
    lines += ["", f"  resume   {found.resume}"] if found.resume else []
    return "\n".join(lines) + "\n"


def _keys(block: type[Settings], prefix: str) -> Iterator[str]:
    """Yield the lines of a block's keys, with the first sentence on each."""
    width = max(len(prefix + name) for name in block.model_fields)
    for name in block.model_fields:
        first = re.split(r"(?<=[^.][.])\s", describe(prefix + name))[0]
        yield from _wrapped(f"{prefix + name:{width}}  {first}", "  ", " " * (width + 4))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, with the descriptions of all settings."""
    schema = DistillConfig.model_json_schema()
    pointer = {"type": "string", "description": "This schema, for editors; ignored."}
    schema["properties"] = {SCHEMA_KEY: pointer, **schema["properties"]}
    return {SCHEMA_KEY: "https://json-schema.org/draft/2020-12/schema", **schema}


def _inner(outer: Setting, name: str, field: FieldInfo) -> Setting:
    """Return a field of a block; what holds for the whole block holds for it."""
    key = f"{outer.key}.{name}" if outer.key else name
    resume = next((RESUME[mark] for mark in RESUME if mark in field.metadata), outer.resume)
    if outer.block is TrainSettings and name in SCHEDULE_KEYS:
        resume = "may change, if all steps made so far have the same learning rate with it"
    return Setting(key, field, block_of(field.annotation), resume)


def _is_dict(field: FieldInfo | None) -> bool:
    return field is not None and get_origin(split_type(field.annotation)[0]) is dict


def _wrapped(text: str, indent: str, hanging: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
