"""The results of tools/quality: one small JSON file per finished cell, kept in git.

Inputs: a cell's name and settings, and its measurements. Outputs: `<folder>/<cell>.<hash>.json`.
The hash in the name is that of the file's bytes, so that a file changed by hand is detected. The
report reads only these files.
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
        """Read and check all files of the folder.

        Raises:
            DataError: a file was changed, or a cell has two files.
        """
        self.folder = folder
        self._records: dict[str, dict[str, Any]] = {}
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.rglob("*.json")):
            content = path.read_bytes()
            name, _, digest = path.relative_to(folder).with_suffix("").as_posix().rpartition(".")
            if digest != _digest(content):
                raise DataError(
                    f"{path} was changed after the measurement: its content has the hash "
                    f"{_digest(content)}, its name {digest}; restore the file from git, or delete "
                    "it and measure the cell again"
                )
            if name in self._paths:
                raise DataError(
                    f"{path} and {self._paths[name]} are results of the same cell; delete the "
                    "wrong one"
                )
            self._records[name], self._paths[name] = json.loads(content), path

    def get(self, cell: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of a cell with these settings; None if it is not measured yet."""
        record = self._records.get(cell)
        return record["result"] if record and record["settings"] == _plain(settings) else None

    def record(self, cell: str) -> dict[str, Any] | None:
        """Return all content of a cell's file, whatever its settings; None if there is none."""
        return self._records.get(cell)

    def put(
        self, cell: str, settings: Mapping[str, Any], result: Mapping[str, Any], seconds: float
    ) -> Path:
        """Write a finished cell, replacing one with other settings, and return the file.

        `seconds` is the time that the cell took.
        """
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
        self._records[cell], self._paths[cell] = json.loads(content), path
        return path


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:HASH_LENGTH]
