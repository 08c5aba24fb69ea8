"""Plan a grid: check all models and data, list the cells and estimate their work.

Inputs: models by name, the grid's settings. Outputs: a `Plan`, or one error that lists all problems
before anything runs. Not handled here: running the plan (`grid`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
)

from scaledistill.config.schema import EvaluationSettings
from scaledistill.data.tokenizer import TOKENIZER_FILES, has_vocabulary_file, load_tokenizer
from scaledistill.errors import (
    ConfigError,
    DataError,
    Field,
    Problems,
    SettingError,
    SourceError,
    named,
)
from scaledistill.glue.cell import MODEL_NAME, Cell, Conditions
from scaledistill.glue.features import data_sha256
from scaledistill.glue.files import model_sha256
from scaledistill.glue.metrics import check_installed
from scaledistill.glue.read import read_split
from scaledistill.glue.squad import check_questions, stride_of
from scaledistill.glue.tasks import Task, find_tasks
from scaledistill.models.architectures import first_position
from scaledistill.models.teacher import (
    WEIGHT_FILES,
    check_weight_files,
    omitted_weights,
    read_config,
    resolve_folder,
)
from scaledistill.models.weights import weight_files

MODEL_FILES = (*WEIGHT_FILES, *TOKENIZER_FILES)
CHARACTERS_PER_TOKEN = 4.3  # English, WordPiece
PADDING = 2.0  # tokens computed per token of text; a batch is padded to its longest example
GROUPED_PADDING = 1.1  # the same if the examples of a batch have similar lengths


@dataclass(frozen=True)
class Model:
    """A checked model: its files and its size."""

    name: str
    path: str
    folder: Path
    sha256: str
    parameters: int
    encoder_parameters: int
    """Parameters without the embeddings: those that each token is multiplied with."""
    positions: int | None
    """Maximum tokens per sequence; None if the model has no table of positions."""


@dataclass(frozen=True)
class TaskData:
    """The checked data of a task."""

    task: Task
    conditions: Conditions
    train_rows: int
    """Training rows that are used."""
    questions: tuple[str, ...]
    """Of span tasks: the questions that may leave too little room for a context."""
    train_tokens: float
    """Tokens computed in a training epoch, estimated from the characters."""
    dev_tokens: float
    """Tokens computed in scoring, estimated from the characters."""


@dataclass(frozen=True)
class Plan:
    """A checked grid: its models, its tasks' data, its settings and its cells."""

    models: dict[str, Model]
    tasks: dict[str, TaskData]
    settings: EvaluationSettings
    cells: list[Cell]

    def work(self, cell: Cell) -> float:
        """Return an estimate of a cell's FLOPs."""
        return _work(
            self.tasks[cell.task],
            self.models[cell.model].encoder_parameters,
            cell.epochs,
            self.settings,
        )


def _work(
    data: TaskData, encoder_parameters: int, epochs: int, settings: EvaluationSettings
) -> float:
    scored = epochs if settings.scores_each_epoch else 1
    # A forward costs 2 FLOPs per parameter and token, a backward twice as much as a forward.
    return 2 * encoder_parameters * (3 * epochs * data.train_tokens + scored * data.dev_tokens)


def grid_size(models: int, settings: EvaluationSettings) -> str:
    """Return the number of fine-tunings and its factors, as text."""
    axes = {
        "model": models,
        "task": len(settings.tasks),
        "learning rate": len(settings.learning_rates),
    }
    axes |= {"epoch count": len(settings.epochs), "seed": len(settings.seeds)}
    count = math.prod(axes.values())
    product = " × ".join(
        f"{number} {name}{'' if number == 1 else 's'}" for name, number in axes.items()
    )
    return f"{count:,} fine-tuning{'' if count == 1 else 's'} ({product})"


def flops_per_parameter(data: Iterable[TaskData], settings: EvaluationSettings) -> float:
    """Return the FLOPs of all fine-tunings of one model, per parameter of its encoder."""
    pairs = itertools.product(data, settings.epochs)
    return (
        len(settings.learning_rates)
        * len(settings.seeds)
        * sum(_work(each, 1, epochs, settings) for each, epochs in pairs)
    )


def make_plan(models: Mapping[str, str], settings: EvaluationSettings) -> Plan:
    """Check models and data, and list the cells.

    Args:
        models: folder or hub name of each model by its name in tables and figures.

    Raises:
        ConfigError, DataError: one line for every problem.
    """
    problems = Problems()
    if not models:
        problems.found.append(ConfigError("no model to fine-tune; name at least one"))
    tasks, data = plan_tasks(settings, problems)
    found = [problems.attempt(plan_model, name, path, tasks) for name, path in models.items()]
    ready = {model.name: model for model in found if model}
    for model in ready.values():
        check_lengths(f"model {model.name}", model.positions, data.values(), problems)
        check_room(f"model {model.name}", model.folder, data.values(), problems)
    problems.raise_all()
    axes = (ready, data, settings.learning_rates, settings.epochs, settings.seeds)
    cells = [
        Cell(name, ready[name].sha256, task, rate, epochs, seed, data[task].conditions)
        for name, task, rate, epochs, seed in itertools.product(*axes)
    ]
    return Plan(ready, data, settings, cells)


def plan_tasks(
    settings: EvaluationSettings, problems: Problems
) -> tuple[list[Task], dict[str, TaskData]]:
    """Check the settings and read the data of all tasks.

    Problems are added to `problems`.

    Returns:
        The tasks, and by task name the data that can be used.
    """
    for name in ("learning_rates", "epochs", "seeds"):
        values = getattr(settings, name)
        if repeated := [value for value in values if values.count(value) > 1]:
            problems.found.append(
                SettingError(
                    name, expected=f"has {repeated[0]:g} more than once", remedy="name it once"
                )
            )
    problems.attempt(check_installed)
    tasks = problems.attempt(find_tasks, settings.tasks) or []
    found = [problems.attempt(plan_data, task, settings) for task in tasks]
    return tasks, {data.task.name: data for data in found if data}


def check_lengths(
    what: str, limit: int | None, data: Iterable[TaskData], problems: Problems
) -> None:
    """Check that no task's `max_length` exceeds the positions of a model.

    Args:
        what: the model's name in messages.
        limit: the model's positions; None: no limit.
        problems: gets the problems.
    """
    for each in data:
        length = each.conditions.max_length
        if limit is not None and length > limit:
            problems.found.append(
                SettingError(
                    "max_length",
                    length,
                    f"({each.task.title}) is more than the {limit} positions of {what}",
                    ("set ", Field("max_length"), f" to {limit} or less, the same for all models"),
                )
            )


def check_room(what: str, folder: Path, data: Iterable[TaskData], problems: Problems) -> None:
    """Check that each task's `max_length` leaves room for text beside the special tokens.

    Args:
        what: the model's name in messages.
        folder: has the model's tokenizer.
        problems: gets the problems.
    """
    tokenizer = problems.attempt(load_tokenizer, folder)
    if tokenizer is None:
        return
    for each in data:
        length, title = each.conditions.max_length, each.task.title
        if each.task.kind == "span":
            problems.attempt(check_questions, tokenizer, each.questions, length)
            continue
        texts = len(each.task.columns)
        added = tokenizer.num_special_tokens_to_add(pair=texts == 2)
        if length < added + texts:
            problems.found.append(
                SettingError(
                    "max_length",
                    length,
                    f"({title}) leaves no room for text: the tokenizer of {what} adds {added} "
                    f"tokens to {'a pair' if texts == 2 else 'a sentence'}",
                    (
                        "set ",
                        Field("max_length"),
                        f" to {added + texts} or more (128 is usual)",
                    ),
                )
            )


def plan_model(name: str, path: str, tasks: Sequence[Task]) -> Model:
    """Check a model's name, config, weight files and tokenizer.

    Raises:
        ConfigError, DataError: one of these is missing or cannot be used for the tasks.
    """
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"model name {name!r}: expected letters, digits, '.', '-' and '_'; it names a folder"
        )
    with named(model=Field(f"model {name}", path)):
        return _check_files(name, path, tasks)


def _check_files(name: str, path: str, tasks: Sequence[Task]) -> Model:
    """Check a model's files; errors call it `model`."""
    if hint := _model_inside(Path(path)):
        raise SourceError("model", expected=hint)
    folder = resolve_folder(path, None, MODEL_FILES)
    config = read_config(folder)
    for task in tasks:
        mapping = (
            MODEL_FOR_QUESTION_ANSWERING_MAPPING
            if task.kind == "span"
            else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        )
        if type(config) not in mapping:
            raise SettingError(
                "model",
                expected=f": transformers has no model of type {config.model_type!r} for "
                f"{task.title}",
                remedy="leave the task or the model out",
            )
    check_weight_files(folder)
    omitted_weights(folder, config)
    _check_tokenizer(folder, config, tasks)
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        try:
            with safe_open(folder / file, "np") as stored:
                for key in stored.keys():  # noqa: SIM118 - not a dictionary
                    sizes[key] = math.prod(stored.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise SourceError(
                "model",
                expected=f": {file} cannot be read ({error})",
                remedy="fetch the model again",
            ) from error
    return Model(
        name=name,
        path=path,
        folder=folder,
        sha256=model_sha256(folder),
        parameters=sum(sizes.values()),
        encoder_parameters=sum(size for key, size in sizes.items() if "embed" not in key),
        positions=positions(config),
    )


def _model_inside(path: Path) -> str | None:
    """Return which folder to give instead of a run folder or a file; None for other paths."""
    if path.is_file():
        return f"is a file; give its folder, {path.parent}"
    is_run = (path / "metrics.jsonl").is_file()  # it has a config.json too, its own
    if not path.is_dir() or ((path / "config.json").is_file() and not is_run):
        return None
    runs = [above for above in path.absolute().parents[:3] if (above / "metrics.jsonl").is_file()]
    for parent in (path, path / "export", *(run / "export" for run in runs)):
        exports = sorted(found.parent for found in parent.glob("*/config.json"))
        if exports:
            if parent == path:
                what = "holds models"
            elif parent.parent == path:
                what = "is a run's folder"
            else:
                what = "is in a run"
            return f"{what}, not a model's folder; give {' or '.join(map(str, exports))}"
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file():
        return (
            "is the folder of a run that has exported no model yet; finish it, then give its "
            "export/<student>"
        )
    return None


def plan_data(task: Task, settings: EvaluationSettings) -> TaskData:
    """Read all of a task's data, and return what the plan needs to know of it.

    Raises:
        DataError: see `read_split`.
    """
    folder = None if settings.data_folder is None else Path(settings.data_folder)
    length = settings.max_length or (384 if task.kind == "span" else 128)
    train, *dev = (read_split(task, split, folder) for split in ("train", *task.dev_splits))

    def tokens(texts: Sequence[tuple[str, ...]]) -> float:
        counts = (1 + sum(len(text) / CHARACTERS_PER_TOKEN + 1 for text in row) for row in texts)
        return sum(min(length, count) for count in counts)

    used = min(len(train.texts), settings.max_train_rows or len(train.texts))
    conditions = Conditions(
        data_sha256=data_sha256(train, dev),
        max_length=length,
        batch_size=settings.batch_size,
        warmup_fraction=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        group_by_length=settings.group_by_length,
        max_train_rows=settings.max_train_rows,
    )
    padding = GROUPED_PADDING if settings.group_by_length else PADDING
    train_tokens = padding * tokens(train.texts) * used / len(train.texts)
    questions: tuple[str, ...] = ()
    if task.kind == "span":
        # A token has at least one byte, so shorter questions cannot fill the space.
        long = max(0, (length - stride_of(length)) // 2 - 4)
        asked = {row[0].strip() for split in (train, *dev) for row in split.texts}
        questions = tuple(sorted(question for question in asked if len(question.encode()) > long))
    dev_tokens = sum(tokens(split.texts) for split in dev)
    return TaskData(task, conditions, used, questions, train_tokens, dev_tokens)


def _check_tokenizer(folder: Path, config: PreTrainedConfig, tasks: Sequence[Task]) -> None:
    # transformers silently makes an empty tokenizer if its files are missing.
    if not has_vocabulary_file(folder):
        raise SourceError(
            "model",
            expected="has no tokenizer",
            remedy="copy tokenizer.json and tokenizer_config.json there from the original model",
        )
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        raise SourceError("model", expected=f": {error}") from error
    if tokenizer.pad_token is None:
        raise SourceError(
            "model",
            expected=": its tokenizer has no padding token",
            remedy="set pad_token in tokenizer_config.json",
        )
    spans = [task.title for task in tasks if task.kind == "span"]
    if tokenizer.cls_token is None and spans:
        raise SourceError(
            "model",
            expected=f": its tokenizer has no cls_token, which stands for no answer in {spans[0]}",
            remedy="set cls_token in tokenizer_config.json, or leave the task out",
        )
    if len(tokenizer) > config.vocab_size:
        raise SourceError(
            "model",
            expected=f": its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}",
            remedy="they do not match: copy the tokenizer from the original model",
        )


def positions(config: PreTrainedConfig) -> int | None:
    """Return the maximum tokens per sequence; None if the model has no table of positions."""
    limit = getattr(config, "max_position_embeddings", None)
    # `first_position` raises for architectures that cannot be distilled; assume that their tables
    # count from 0.
    with contextlib.suppress(ConfigError):
        return limit and int(limit) - first_position(config)
    return limit
