"""Read a task's examples from the original files or from the hub, with the same rows and label ids.

Inputs: a task, a split, and a folder or None. Outputs: `Examples` with every row, checked. Quotes
have no meaning in the original TSV files: a row is the text between two line feeds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scaledistill.data.prepare.compression import StoredError, open_stored
from scaledistill.errors import DataError, Field, SourceError, counted, did_you_mean
from scaledistill.glue.tasks import Task
from scaledistill.storage.files import near_folder

log = logging.getLogger(__name__)

HUB_GLUE, HUB_SQUAD = "nyu-mll/glue", "rajpurkar/squad_v2"
LARGEST_SCORE = 5.0  # STS-B's scale


class Answers(NamedTuple):
    """The answers to a question of SQuAD 2.0; empty if the context does not answer it."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]
    """The first character of each answer in the context, counted from 0."""


@dataclass(frozen=True)
class Examples:
    """One split of a task, in file order."""

    ids: list[str]
    """The file's own ids if it has any, otherwise row numbers from 0."""
    texts: list[tuple[str, ...]]
    """One or two sentences; for SQuAD, question and context."""
    labels: list[Any]
    """Class ids, scores from 0 to 5, or `Answers`."""
    sha256: str
    """The hash of texts and labels, in hexadecimal."""


def read_split(task: Task, split: str, data_folder: Path | None) -> Examples:
    """Read a complete split: "train" or one of `task.dev_splits`.

    Args:
        data_folder: has a folder for each task, named as in the original download; None: read the
            hub's data set.

    Raises:
        DataError: a file is missing or damaged, a row has the wrong number of columns or an unknown
            label, there are no rows, or the hub cannot be reached. The message names file and line.
    """
    if data_folder is None:
        ids, texts, labels = _read_hub(task, split)
        where = f"{HUB_SQUAD if task.kind == 'span' else HUB_GLUE}, {task.title}, {split}"
    else:
        path = _find(task, split, data_folder)
        ids, texts, labels = (_parse_squad if task.kind == "span" else _parse_tsv)(
            task, path, _text_of(path)
        )
        where = str(path)
    if not labels:
        raise DataError(f"{where} has no examples; fetch {task.title} again")
    digest = hashlib.sha256(json.dumps([texts, labels], ensure_ascii=True).encode()).hexdigest()
    return Examples(ids, texts, labels, digest)


Rows = tuple[list[str], list[tuple[str, ...]], list[Any]]


def _find(task: Task, split: str, data_folder: Path) -> Path:
    """Return the file of a split."""
    if not data_folder.is_dir():
        meant = did_you_mean(near_folder(data_folder))
        if data_folder.is_file():
            meant = f"; for {task.title} that is {data_folder.absolute().parent.parent}"
        raise SourceError(
            "data_folder",
            str(data_folder),
            "is not a folder",
            f"give the one that has a folder for each task{meant}",
        )
    if hint := _nearby(task, split, data_folder):
        raise SourceError("data_folder", str(data_folder), hint)
    wanted = {
        _plain(task.name),
        _plain(task.title),
        *(["squad", "squadv2"] if task.kind == "span" else []),
    }
    folders = [
        path
        for path in sorted(data_folder.iterdir())
        if path.is_dir() and _plain(path.name) in wanted
    ]
    names = [f"{split}-v2.0.json" if task.kind == "span" else f"{split}.tsv"]
    if task.kind == "span":
        folders.append(data_folder)
    for folder in folders:
        for path in (folder / name for name in (names[0], f"{names[0]}.gz")):
            if path.is_file():
                return path
    if not folders:
        there = (
            ", ".join(sorted(path.name for path in data_folder.iterdir() if path.is_dir()))
            or "none"
        )
        raise DataError(
            f"{data_folder} has no folder for {task.title} (found: {there}); put the original "
            f"files into {data_folder / task.title}, or leave the task out"
        )
    raise DataError(
        f"{folders[0]} has neither {names[0]} nor {names[0]}.gz; fetch {task.title} again, or "
        "leave the task out"
    )


def _nearby(task: Task, split: str, data_folder: Path) -> str | None:
    """Return which folder to give instead, if the tasks are one level higher or deeper."""
    if task.kind == "span":
        return None

    def has_file(folder: Path) -> bool:
        return any((folder / name).is_file() for name in (f"{split}.tsv", f"{split}.tsv.gz"))

    if has_file(data_folder):
        parent = data_folder.absolute().parent
        return f"is the folder of one task; give the folder that it is in, {parent}"
    names = {_plain(task.name), _plain(task.title)}
    if any(path.is_dir() and _plain(path.name) in names for path in data_folder.iterdir()):
        return None
    for inner in sorted(path for path in data_folder.iterdir() if path.is_dir()):
        with contextlib.suppress(OSError):  # of others, such as lost+found
            if any(_plain(path.name) in names and has_file(path) for path in inner.iterdir()):
                return f"has the tasks one level deeper; give {inner}"
    return None


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _text_of(path: Path) -> str:
    try:
        with open_stored(path) as stream:
            return stream.read().decode("utf-8-sig")
    except StoredError as error:
        raise DataError(f"{path} {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error


def _parse_tsv(task: Task, path: Path, text: str) -> Rows:
    lines = text.split("\n")  # not splitlines, for which some characters in the texts end a line
    if lines[-1] == "":
        lines.pop()
    first = 1 if task.header else 2
    header = (
        list(task.header) or lines.pop(0).rstrip("\r").split("\t") if lines else list(task.header)
    )
    wanted = (*task.columns, task.label_column)
    if lines and (missing := [name for name in wanted if name not in header]):
        raise DataError(
            f"{path}:1: no column {missing[0]!r} in the header ({', '.join(header)}); expected the "
            f"original file of {task.title} with its labels"
        )
    *columns, label_column = map(header.index, wanted) if lines else [0] * len(wanted)
    id_column = next((header.index(name) for name in ("index", "id") if name in header), None)
    label_of = _label_reader(task)
    rows: Rows = ([], [], [])
    ids, texts, labels = rows
    short = 0
    for number, line in enumerate(lines, first):
        cells = line.rstrip("\r").split("\t")
        if len(cells) < len(header) and short < task.most_short_rows:
            short += 1
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{number}: found {len(cells)} columns, expected {len(header)} "
                f"({', '.join(header)}); fetch the original file again: its columns are separated "
                "by tabs, and quotes have no meaning"
            )
        ids.append(str(number - first) if id_column is None else cells[id_column])
        texts.append(tuple(cells[column] for column in columns))
        labels.append(label_of(cells[label_column], f"{path}:{number}"))
    if short:
        log.warning(
            "%s: %s with too few columns left out, as the official reader does",
            path,
            counted(short, "row"),
        )
    return rows


def _label_reader(task: Task) -> Callable[[str, str], Any]:
    """Return the function that turns a label in a file into a class id or a score."""
    by_text = {str(i) if task.digits else label: i for i, label in enumerate(task.labels)}

    def class_id(text: str, where: str) -> int:
        if text not in by_text:
            raise DataError(
                f"{where}: label {text!r}, expected {' or '.join(by_text)}; {_LABEL_REMEDY}"
            )
        return by_text[text]

    def score(text: str, where: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        return _checked_score(value, text, where)

    return score if task.kind == "regression" else class_id


_LABEL_REMEDY = "use the original train and dev files, which have labels (test files have none)"


def _checked_score(value: float, found: object, where: str) -> float:
    if not 0 <= value <= LARGEST_SCORE:
        raise DataError(
            f"{where}: score {found!r}, expected a number from 0 to {LARGEST_SCORE:g}; "
            f"{_LABEL_REMEDY}"
        )
    return value


def _parse_squad(task: Task, path: Path, text: str) -> Rows:
    rows: Rows = ([], [], [])
    ids, texts, labels = rows
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    ids.append(str(question["id"]))
                    texts.append((str(question["question"]), str(paragraph["context"])))
                    found = [] if question["is_impossible"] else question["answers"]
                    pairs = [(str(answer["text"]), int(answer["answer_start"])) for answer in found]
                    labels.append(
                        _answers(pairs, paragraph["context"], f"{path}, question {question['id']}")
                    )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not the original file of {task.title} ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error
    return rows


def _answers(pairs: Sequence[tuple[str, int]], context: str, where: str) -> Answers:
    for text, start in pairs:
        if context[start : start + len(text)] != text:
            raise DataError(
                f"{where}: answer {text!r} is not at character {start} of its context; fetch the "
                "data again"
            )
    return Answers(tuple(text for text, _ in pairs), tuple(start for _, start in pairs))


def _read_hub(task: Task, split: str) -> Rows:
    from datasets import load_dataset

    name, options = (HUB_SQUAD, ()) if task.kind == "span" else (HUB_GLUE, (task.name,))
    hub_split = split.replace("dev", "validation")
    log.info("looking for %s (%s, %s) on the hub", name, task.title, hub_split)
    try:
        data = load_dataset(name, *options, split=hub_split)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{name} ({task.title}, {hub_split}) cannot be loaded from the hub ({reason}); without "
            "network access, give a folder with the original files as ",
            Field("data_folder"),
        ) from error
    where = f"{name}, {task.title}, {hub_split}"
    rows: Rows = ([], [], [])
    ids, texts, labels = rows
    if task.kind == "span":
        for row in data:
            pairs = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
            ids.append(row["id"])
            texts.append((row["question"], row["context"]))
            labels.append(_answers(pairs, row["context"], f"{where}, question {row['id']}"))
        return rows
    names = getattr(data.features["label"], "names", None)
    if task.kind == "classification" and names is not None and tuple(names) != task.labels:
        raise DataError(
            f"{where}: its classes are {', '.join(names)}, expected {', '.join(task.labels)} in "
            "this order"
        )
    texts.extend(zip(*(data[column] for column in task.hub_columns), strict=True))
    labels.extend(
        _hub_label(task, label, f"{where}, row {row}") for row, label in enumerate(data["label"])
    )
    ids.extend(map(str, range(len(labels))))
    return rows


def _hub_label(task: Task, label: Any, where: str) -> int | float:
    if task.kind == "regression":
        return _checked_score(float(label), label, where)
    if label not in range(len(task.labels)):
        raise DataError(
            f"{where}: label {label!r}, expected 0 to {len(task.labels) - 1}; {_LABEL_REMEDY}"
        )
    return int(label)
