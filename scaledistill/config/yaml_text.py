"""Configurations as YAML: reading, the lines of keys, and writing with comments.

Inputs: text, or plain dicts and lists. Outputs: the other of the two. Scalars are read as YAML 1.2
defines them, which are JSON's: PyYAML's own rules (YAML 1.1) would read 1e-4 as text, `no` and
`off` as false, 010 as 8, 1:30 as 90 and a date as an object. Not handled here: files, and the
checks of the settings (`load`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

LINE_WIDTH = 100
FLOW_WIDTH = 60
"""Mappings up to this width are written on one line."""
MERGE = "tag:yaml.org,2002:merge"
SCALARS = {  # tag: the pattern of YAML 1.2's core schema, and the characters it may start with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        # Infinities and NaN stay text: no setting takes them.
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars, which refuses keys that occur twice."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - as PyYAML declares it

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == MERGE:
                continue
            line = _line(key)
            if key.tag != "tag:yaml.org,2002:str":
                raise ValueError(
                    f"a key in line {line} is not text but {_shown(key)}; put it in quotes"
                )
            if key.value in lines:
                raise ValueError(
                    f"the key {key.value!r} occurs twice, in lines {lines[key.value]} and {line}; "
                    "remove one"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes text that our loader would read as a number."""


for _tag, (_pattern, _first) in SCALARS.items():
    _compiled = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _compiled, _first)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{SCALARS['float'][0]})$"), SCALARS["float"][1]
)


def parse_yaml(text: str) -> Any:
    """Return the values of a YAML text: dicts with text keys, lists, text, numbers, bools, None.

    Raises:
        ValueError: it is not valid YAML, or a key occurs twice or is no text; the message states
            the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _unshared(loader.construct_object(node, deep=True))
    except yaml.MarkedYAMLError as error:
        raise ValueError(_what_is_wrong(error)) from None
    except yaml.YAMLError as error:  # characters that no YAML text may contain
        raise ValueError(" ".join(str(error).split())) from None


def lines_of(text: str) -> dict[tuple[str, ...], int]:
    """Return the line of each key and list entry, counted from 1; list entries are "0", "1", …

    A JSON text will do, since JSON is YAML, except for tabs. A text that is not valid has none.
    """
    try:
        node = _Loader(text.replace("\t", " ")).get_single_node()
    except yaml.YAMLError:
        return {}
    return {} if node is None else dict(_lines(node, ()))


def to_yaml(tree: Mapping[str, Any], describe: Callable[[str], str] = lambda key: "") -> str:
    """Return settings as YAML.

    Args:
        tree: the settings by block; values as JSON has them.
        describe: returns the comment above a setting or block, given its dotted name.
    """
    parts = [list(_written({key: value}, "", "", describe)) for key, value in tree.items()]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _lines(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield (*path, key.value), _line(key)
                yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*path, str(number)), _line(value)
            yield from _lines(value, (*path, str(number)))


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _shown(node: Any) -> str:
    kind = node.tag.rpartition(":")[2]
    return f"{node.value!r} ({kind})" if isinstance(node, yaml.ScalarNode) else f"a {kind}"


def _unshared(value: Any) -> Any:
    """Return a copy in which aliases are copies too, so that `--set` changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _what_is_wrong(error: yaml.MarkedYAMLError) -> str:
    """Return what is not valid YAML, in which line, and what to do about it."""
    problem, mark = error.problem or "", error.problem_mark or error.context_mark
    line = f"line {mark.line + 1}" if mark else "it"
    if "'\\t' that cannot start" in problem:
        return f"{line} has a tab; indent with spaces"
    if start := re.search(r"character '(.)' that cannot start", problem):
        return f"a value in {line} starts with {start[1]!r}; put it in quotes"
    if "mapping values are not allowed" in problem:
        return (
            f"{line} has a ':' within a value, or is indented more than the line above; put such "
            "a value in quotes"
        )
    if "another document" in problem:
        return f"a second document ('---') starts in {line}; keep one"
    if "recursive" in problem:
        return f"{line} contains itself by an alias ('*…'); write it out"
    if "could not determine a constructor" in problem:
        return f"{line} has a tag ('!…'), which settings do not need; remove it"
    if "stream end" in problem or "end of stream" in problem:
        return f"the file ends before its brackets or quotes are closed, in {line}"
    return f"{line}: {f'{error.context}: ' if error.context else ''}{problem}"


def _written(
    tree: Mapping[str, Any], prefix: str, indent: str, describe: Callable[[str], str]
) -> Iterator[str]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        width = LINE_WIDTH - len(indent) - 2
        yield from (f"{indent}# {line}" for line in textwrap.wrap(describe(name), width))
        start = f"{indent}{_inline(key)}:"
        if isinstance(value, Mapping) and not _fits(value, name, describe):
            yield start
            yield from _written(value, f"{name}.", f"{indent}  ", describe)
        else:
            yield f"{start} {_inline(value)}"


def _fits(value: Mapping[str, Any], name: str, describe: Callable[[str], str]) -> bool:
    """Return whether a mapping is short, without comments on its keys and without mappings."""
    plain = not any(isinstance(each, Mapping) and each for each in value.values())
    described = any(describe(f"{name}.{key}") for key in value)
    return not value or (plain and not described and len(_inline(value)) <= FLOW_WIDTH)


def _inline(value: Any) -> str:
    """Return a value on one line."""
    # Within a list, so that text is quoted where {…} or […] around it require that.
    whole = yaml.dump(
        [value],
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return whole.strip()[1:-1]
