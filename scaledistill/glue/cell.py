"""A cell of the grid: one model fine-tuned on one task with one set of hyper-parameters.

Inputs: everything that decides a result. Outputs: the cell's files in the output folder, read and
written here: `….json` with the scores, `….jsonl.gz` with the prediction of each example, and
`….error` if the cell failed. Not handled here: computing the scores (`finetune`) and comparing them
(`summary`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaledistill.storage.files import read_json, write_bytes, write_json

RECIPE = 2  # raise it with any change that affects scores, so that finished cells are run again
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Conditions:
    """What all cells of a task share; a table contains only cells with the same conditions."""

    data_sha256: str
    max_length: int
    batch_size: int
    warmup_fraction: float
    weight_decay: float
    group_by_length: bool
    max_train_rows: int | None
    recipe: int = RECIPE

    @property
    def general(self) -> tuple[object, ...]:
        """The conditions that do not depend on the task."""
        found = asdict(self)
        del found["data_sha256"], found["max_length"]
        return tuple(found.values())


@dataclass(frozen=True)
class Cell:
    """Everything that decides a result, except the machine's arithmetic."""

    model: str
    model_sha256: str
    task: str
    learning_rate: float
    epochs: int
    seed: int
    conditions: Conditions

    @property
    def title(self) -> str:
        """The cell's name in messages and tables."""
        return f"{self.model} {self.task} {self.learning_rate:g} × {self.epochs} seed {self.seed}"

    def path(self, output: Path) -> Path:
        """Return the path of the cell's record; it contains a hash of all of the cell's fields."""
        key = hash_of([json.dumps(asdict(self), sort_keys=True)])[:12]
        return (
            output
            / "cells"
            / self.model
            / self.task
            / f"{self.learning_rate:g}-{self.epochs}-{self.seed}-{key}.json"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """Return the cell whose fields `dataclasses.asdict` returned."""
        return cls(**{**values, "conditions": Conditions(**values["conditions"])})


def hash_of(parts: Iterable[str]) -> str:
    """Return the sha256 of the texts, in hexadecimal."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_record(cell: Cell, output: Path) -> dict[str, Any] | None:
    """Return a finished cell's record; None if it or its predictions are missing or damaged."""
    path = cell.path(output)
    record = read_json(path)
    if record is None or record.pop("sha256", None) != hash_of([json.dumps(record)]):
        return None
    try:
        predictions = _predictions_path(path).read_bytes()
    except OSError:
        return None
    return (
        record if hashlib.sha256(predictions).hexdigest() == record["predictions_sha256"] else None
    )


def write_record(
    cell: Cell, output: Path, record: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> None:
    """Write a finished cell: its predictions, then its record, each atomically."""
    path = cell.path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    packed = gzip.compress(lines.encode(), mtime=0)
    write_bytes(_predictions_path(path), packed)
    whole = {
        "cell": asdict(cell),
        **record,
        "predictions_sha256": hashlib.sha256(packed).hexdigest(),
    }
    write_json(path, {**whole, "sha256": hash_of([json.dumps(whole)])})
    path.with_suffix(".error").unlink(missing_ok=True)


def read_error(cell: Cell, output: Path) -> str | None:
    """Return why the cell's last run failed; None if it did not."""
    return (read_json(cell.path(output).with_suffix(".error")) or {}).get("error")


def read_predictions(cell: Cell, output: Path) -> list[dict[str, Any]]:
    """Return the prediction of each dev example of a finished cell."""
    lines = gzip.decompress(_predictions_path(cell.path(output)).read_bytes()).decode().split("\n")
    return [json.loads(line) for line in lines if line]


def write_error(cell: Cell, output: Path, error: str, details: str) -> None:
    """Record that a cell failed, with the error's message and its traceback."""
    path = cell.path(output).with_suffix(".error")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"cell": asdict(cell), "error": error, "details": details})


def remove_partial_files(output: Path) -> None:
    """Remove files that a killed worker left incomplete."""
    for path in (output / "cells").glob("*/*/.*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _predictions_path(path: Path) -> Path:
    return path.with_suffix(".jsonl.gz")
