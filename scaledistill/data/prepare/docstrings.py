"""The English docstrings of the installed packages: a text source that every machine has.

In: folders of packages. Out: one document per module, sorted by package and path. Nothing is
imported, only parsed; worker processes import this module, so it imports nothing heavy at the top.
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
    """Yield the English docstrings of the installed packages, one document per module, sorted by
    package and path.

    Nothing is imported. Tests, tiny docstrings and repeated ones are left out. The log says how
    many modules could not be parsed.

    Args:
        map_function: like `map`; a parallel one makes this quicker (most of the time is Python's
            parser).
        folders: where packages stand; by default every site-packages and dist-packages on
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
            # The first on the path is the one that is imported.
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
    """Return the English docstrings of each module, in the order of the source; None where it
    cannot be parsed.
    """
    found: list[list[str] | None] = []
    for path in paths:
        try:
            source = Path(path).read_bytes()
            if b'"""' not in source and b"'''" not in source:
                found.append([])
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
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
    """Tell long enough and mostly ASCII letters; a rule of thumb that drops tables, code and most
    other languages.
    """
    data = text.encode("ascii", "ignore")
    num_letters = len(data.translate(None, _NOT_LETTERS))
    # No half of a surrogate pair.
    is_unicode = text.isascii() or text.encode("utf-8", "ignore").decode() == text
    return (
        is_unicode
        and len(text) >= 40
        and len(data) > 0.97 * len(text)
        and num_letters > 0.6 * len(text)
    )
