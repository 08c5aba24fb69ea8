"""A task's data for one model: tokenised features, and functions from outputs to scores.

Inputs: a cell and the folders of the model and of the data. Outputs: `Prepared`. Not handled here:
batches and training (`finetune`).

Legend: N examples, C classes, T tokens of a feature.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from scaledistill.data.prepare.text import load_tokenizer
from scaledistill.errors import DataError
from scaledistill.glue.cell import Cell, hash_of
from scaledistill.glue.metrics import majority_scores, scores
from scaledistill.glue.read import Examples, read_split
from scaledistill.glue.squad import (
    add_positions,
    best_answers,
    majority_squad_scores,
    make_features,
    squad_scores,
)
from scaledistill.glue.tasks import TASKS, Task

Features = list[dict[str, Any]]
Scored = tuple[dict[str, float], list[dict[str, Any]]]
SUBSET_SEED = 0


@dataclass(frozen=True)
class DevSplit:
    """A dev split of a task."""

    name: str
    rows: int
    features: Features
    score: Callable[[Sequence[np.ndarray]], Scored]
    """Turns the outputs for each feature ([C], for spans [2, T]) into the scores and the prediction
    for each example."""


@dataclass(frozen=True)
class Prepared:
    """What a cell is trained on and scored on."""

    tokenizer: PreTrainedTokenizerFast
    train: Features
    train_rows: int
    all_train_rows: int
    """Training rows in the file; `train_rows` of them are used."""
    dev: list[DevSplit]
    majority: dict[str, float]
    """By metric, the dev scores of always predicting the most common training label."""
    data_sha256: str


def prepare(
    cell: Cell, model_folder: Path, data_folder: Path | None, inputs: Sequence[str]
) -> Prepared:
    """Read and tokenise a cell's data, with a cache of one entry.

    Args:
        data_folder: as for `read_split`.
        inputs: the names of the arguments of the model's forward.

    Raises:
        DataError: the data cannot be read, or differs from the data that the cell was planned with.
    """
    conditions = cell.conditions
    prepared = _prepared(
        cell.task,
        model_folder,
        data_folder,
        conditions.max_length,
        conditions.max_train_rows,
        tuple(inputs),
    )
    if prepared.data_sha256 != conditions.data_sha256:
        raise DataError(
            f"the data of {TASKS[cell.task].title} has changed since the grid was started; restart "
            "the grid"
        )
    return prepared


# One entry is enough: a worker's next cell nearly always has the same task and model.
@functools.lru_cache(maxsize=1)
def _prepared(
    task_name: str,
    model_folder: Path,
    data_folder: Path | None,
    max_length: int,
    max_train_rows: int | None,
    inputs: tuple[str, ...],
) -> Prepared:
    task, tokenizer = TASKS[task_name], load_tokenizer(model_folder)
    tokenizer.padding_side = "right"  # spans and the truncation of outputs count from the left
    train = read_split(task, "train", data_folder)
    rows = subset(len(train.texts), max_train_rows)
    dev = {split: read_split(task, split, data_folder) for split in task.dev_splits}
    if task.kind == "span":
        features, origins = make_features(tokenizer, train, rows, max_length)
        add_positions(features, origins, train)
        splits = [
            _span_split(name, examples, tokenizer, max_length) for name, examples in dev.items()
        ]
        majority = [majority_squad_scores(train, examples) for examples in dev.values()]
    else:
        features = _features(tokenizer, train, rows, max_length)
        splits = [
            _split(task, name, examples, tokenizer, max_length) for name, examples in dev.items()
        ]
        majority = [
            majority_scores(task, name, train.labels, examples.labels)
            for name, examples in dev.items()
        ]
    for some in (features, *(split.features for split in splits)):
        for feature in some:
            # Such as token_type_ids, which some models do not take.
            for name in feature.keys() - {*inputs}:
                del feature[name]
    return Prepared(
        tokenizer=tokenizer,
        train=features,
        train_rows=len(rows),
        all_train_rows=len(train.texts),
        dev=splits,
        majority={metric: value for scored in majority for metric, value in scored.items()},
        data_sha256=data_sha256(train, dev.values()),
    )


def data_sha256(train: Examples, dev: Iterable[Examples]) -> str:
    """Return one sha256 for all of a task's data, in hexadecimal."""
    return hash_of([train.sha256, *(split.sha256 for split in dev)])


def subset(num_rows: int, max_rows: int | None) -> list[int]:
    """Return the training rows to use, in file order: the same ones for all models and seeds."""
    if max_rows is None or max_rows >= num_rows:
        return list(range(num_rows))
    return sorted(random.Random(SUBSET_SEED).sample(range(num_rows), max_rows))


def _features(
    tokenizer: PreTrainedTokenizerFast, examples: Examples, rows: Sequence[int], max_length: int
) -> Features:
    sides = [list(side) for side in zip(*(examples.texts[row] for row in rows), strict=True)]
    encoded = tokenizer(*sides, truncation=True, max_length=max_length)
    return [
        {**{name: encoded[name][i] for name in encoded}, "labels": examples.labels[row]}
        for i, row in enumerate(rows)
    ]


def _split(
    task: Task, name: str, examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> DevSplit:
    features = _features(tokenizer, examples, range(len(examples.texts)), max_length)

    def score(logits: Sequence[np.ndarray]) -> Scored:
        logits_NC = np.stack(logits)
        if task.kind == "regression":
            found_N = logits_NC[:, 0]
            details: list[dict[str, Any]] = [{"prediction": _rounded(value)} for value in found_N]
        else:
            found_N = logits_NC.argmax(axis=1)
            details = [
                {"prediction": int(value), "logits": [_rounded(logit) for logit in logits_C]}
                for value, logits_C in zip(found_N, logits_NC, strict=True)
            ]
        rows = zip(examples.ids, examples.labels, details, strict=True)
        predictions = [
            {"split": name, "id": one, "label": label, **detail} for one, label, detail in rows
        ]
        return scores(task, name, found_N, np.asarray(examples.labels)), predictions

    return DevSplit(name, len(examples.texts), features, score)


def _span_split(
    name: str, examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> DevSplit:
    features, origins = make_features(tokenizer, examples, range(len(examples.texts)), max_length)

    def score(logits: Sequence[np.ndarray]) -> Scored:
        found = best_answers(origins, logits, examples)
        rows = zip(examples.ids, examples.labels, found, strict=True)
        predictions = [
            {"split": name, "id": one, "answers": label.texts, "prediction": text}
            for one, label, text in rows
        ]
        return squad_scores(found, examples), predictions

    return DevSplit(name, len(examples.texts), features, score)


def _rounded(value: float) -> float:
    """Round to six significant digits; more would be noise and fill the disk."""
    return float(f"{value:.6g}")
