"""Read the English docstrings of the installed packages, a text source that every machine has.

Inputs: folders of packages. Outputs: one document per module, sorted by package and path. Not
handled here: tokenising (`data.prepare.text`). Packages are parsed and never imported. Worker
processes import this module, so it imports nothing heavy at the top.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

logger = logging.getLogger(__name__)

MapFunction = Callable[[Callable[[list[str]], list[Any]], Iterable[list[str]]], Iterable[list[Any]]]

_NOT_LETTERS = bytes(set(range(128)) - set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "testing", "_vendor", "vendor", "vendored"}


def installed_docs(
    map_function: MapFunction = map, folders: Sequence[Path] | None = None
) -> Iterator[str]:
    """Yield the English docstrings of installed packages, one document per module.

    Documents are sorted by package and path. Nothing is imported. Tests, tiny docstrings and
    repeated ones are left out. The number of modules that cannot be parsed is logged.

    Args:
        map_function: like `map`; a parallel one is faster (most of the time is spent in Python's
            parser).
        folders: folders of packages; by default every site-packages and dist-packages on
            `sys.path`.
    """
    if folders is None:
        folders = [
            Path(entry)
            for entry in sys.path
            if Path(entry).name in ("site-packages", "dist-packages")
        ]
    modules: dict[str, str] = {}
    for folder in folders:
        for path in _module_paths(folder):
            # Of modules with one name, keep the first on the path: it is the one that is imported.
            modules.setdefault(os.path.relpath(path, folder), path)
    paths = [modules[name] for name in sorted(modules, key=lambda name: name.split(os.sep))]
    seen: set[bytes] = set()
    num_unparsed = 0
    for batch in map_function(
        _module_docstrings, (paths[i : i + 32] for i in range(0, len(paths), 32))
    ):
        for docstrings in batch:
            if docstrings is None:
                num_unparsed += 1
                continue
            fresh = []
            for docstring in docstrings:
                digest = hashlib.blake2b(docstring.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    fresh.append(docstring)
            if fresh:
                yield "\n\n".join(fresh)
    logger.info(
        "read the docstrings of %d modules; %d others cannot be parsed",
        len(paths) - num_unparsed,
        num_unparsed,
    )


def _module_paths(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(("test_", "conftest")):
                yield os.path.join(parent, name)


def _module_docstrings(paths: list[str]) -> list[list[str] | None]:
    """Return the English docstrings of each module in source order; None if it cannot be parsed."""
    found: list[list[str] | None] = []
    for path in paths:
        try:
            source = Path(path).read_bytes()
            if b'"""' not in source and b"'''" not in source:
                found.append([])
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's code
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError):
            found.append(None)
            continue
        docstrings = (ast.get_docstring(node) for node in _documented(tree))
        found.append([text for text in docstrings if text and _is_english(text)])
    return found


def _documented(
    node: ast.Module | ast.ClassDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documented(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield cast(ast.FunctionDef, child)


def _is_english(text: str) -> bool:
    """Return whether a text is long enough and consists mostly of ASCII letters.

    A rule of thumb that drops tables, code and most other languages.
    """
    data = text.encode("ascii", "ignore")
    num_letters = len(data.translate(None, _NOT_LETTERS))
    # Lone surrogates cannot be encoded.
    is_unicode = text.isascii() or text.encode("utf-8", "ignore").decode() == text
    return (
        is_unicode
        and len(text) >= 40
        and len(data) > 0.97 * len(text)
        and num_letters > 0.6 * len(text)
    )
