"""The messages of docs/troubleshooting.md are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a module, with "…" for each value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (x.value if isinstance(x, ast.Constant) else "…" for x in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    headings = "\n".join(re.findall(r"^### (.*)$", page, re.MULTILINE))
    messages = re.findall(r"`([^`]+)`", headings)
    assert len(messages) > 12
    texts = [
        text
        for path in (ROOT / "scaledistill").rglob("*.py")
        for text in strings(ast.parse(path.read_text(encoding="utf-8")))
    ]
    missing = [
        message
        for message in messages
        if not any(message.rstrip("…").rstrip() in text for text in texts)
    ]
    assert missing == []
