"""Finished cells of the experiments in tools/quality.py: a small JSON file each, kept in git.

Enters: what a cell is, what was measured, where. Leaves: `<folder>/<cell>.<hash>.json`. The hash in
the name is of the file's bytes, so that a file changed by hand is noticed; the report reads nothing
else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scaledistill.errors import DataError
from scaledistill.metrics.benchmark import machine_facts
from scaledistill.storage.files import write_bytes

HASH_LENGTH = 12


class Results:
    """The result files in a folder."""

    def __init__(self, folder: Path) -> None:
        """Read and check them all.

        Raises:
            DataError: a file is not what was written, or a cell has two.
        """
        self.folder = folder
        self._found: dict[str, dict[str, Any]] = {}
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.rglob("*.json")):
            content = path.read_bytes()
            name, _, digest = path.relative_to(folder).with_suffix("").as_posix().rpartition(".")
            if digest != _digest(content):
                raise DataError(
                    f"{path} is not what was measured: its content has the hash "
                    f"{_digest(content)}, its name says {digest}; bring the file back from git, or "
                    "delete it and measure the cell again"
                )
            if name in self._paths:
                raise DataError(
                    f"{path} and {self._paths[name]} are of one cell; delete the one that does not "
                    "count"
                )
            self._found[name], self._paths[name] = json.loads(content), path

    def get(self, cell: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what was measured of a cell with these settings; None where that is still to be
        done.
        """
        found = self._found.get(cell)
        return found["result"] if found and found["settings"] == _plain(settings) else None

    def record(self, cell: str) -> dict[str, Any] | None:
        """Return the whole file of a cell, whatever its settings."""
        return self._found.get(cell)

    def put(
        self, cell: str, settings: Mapping[str, Any], result: Mapping[str, Any], seconds: float
    ) -> Path:
        """Write a finished cell, in place of one with other settings, and return the file."""
        record = {
            "cell": cell,
            "settings": settings,
            "result": result,
            "seconds": round(seconds, 1),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **machine_facts(None),
        }
        content = (json.dumps(record, indent=1) + "\n").encode()
        path = self.folder / f"{cell}.{_digest(content)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        if (old := self._paths.get(cell)) and old != path:
            old.unlink(missing_ok=True)
        self._found[cell], self._paths[cell] = json.loads(content), path
        return path


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:HASH_LENGTH]
