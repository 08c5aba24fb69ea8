"""Read the student to publish from a run, a checkpoint, an export or any supported model folder.

Inputs: a folder. Outputs: a `Student` with its weights and what its model card says. Nothing is
written. Not handled here: formats (`publishing.formats`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from scaledistill.checkpoint.names import FOLDER, STATE, committed, step_of
from scaledistill.config.load import parse_config
from scaledistill.errors import ConfigError, DataError, Field, SettingError, SourceError, named
from scaledistill.glue.plan import positions
from scaledistill.models.architectures import build_encoder
from scaledistill.models.card import README, TAGS, read_card, teacher_metadata
from scaledistill.models.export import EXPORT, FORMAT, SETTINGS
from scaledistill.models.student import exported
from scaledistill.models.teacher import load_encoder
from scaledistill.preflight.roster import student_states
from scaledistill.publishing.request import check_source
from scaledistill.storage.files import read_json
from scaledistill.training.exports import find_checkpoint, students_of

log = logging.getLogger(__name__)

LONGEST = 512
"""Tokens of an input if neither the model nor a run limits them."""
SENTENCE_SETTINGS = "config_sentence_transformers.json"
SENTENCE_KEYS = ("prompts", "default_prompt_name", "similarity_fn_name")
"""What of these settings an export keeps."""


@dataclass(frozen=True)
class SentenceModules:
    """What sentence-transformers does with a model's texts and hidden states."""

    pooling: str = "mean"
    """How it makes a vector of the hidden states; "mean" is all that formats with vectors can
    have."""
    normalizes: bool = False
    """Whether it then gives the vector length 1."""
    lowercases: bool = False
    """Whether it lowercases the texts, beside what the tokenizer does."""
    includes_prompt: bool = True
    """Whether the tokens of a prompt count in the mean."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The prompts and the measure of similarity, as they are stored."""
    limits: tuple[object, ...] = ()
    """What may be the longest input, in tokens."""


@dataclass(frozen=True)
class Student:
    """A student with its weights."""

    name: str
    config: PreTrainedConfig
    state: Mapping[str, Tensor]
    """Every parameter, fp32, on the CPU."""
    tap: str | None
    """That of the run, "last" or "extra"; None if every parameter counts as trained."""
    tokenizer: str
    """Folder or hub name, at `revision`."""
    card: Mapping[str, object]
    metadata: Mapping[str, Any]
    num_tokens: int
    """The longest input: the rows that it was trained on, or its position table."""
    revision: str | None = None
    settings: str | None = None
    """The settings of its run, JSON."""
    readme: str | None = None
    """The model card that it has already."""
    sentence: SentenceModules = SentenceModules()

    @property
    def trained_layers(self) -> int:
        """The number of blocks of which every parameter was trained, from the first."""
        return self.config.num_hidden_layers - (self.tap == "last")

    def cut(self, num_layers: int) -> Student:
        """Return the student of the first `num_layers` blocks; its card is written anew.

        Raises:
            SettingError: it does not have as many.
        """
        whole = self.config.num_hidden_layers
        if not 1 <= num_layers <= whole:
            raise SettingError(
                "num_layers", num_layers, f": the model has {whole} layers", f"use 1 to {whole}"
            )
        if num_layers == whole:
            return self
        config, state = exported(self.config, self.state, num_layers)
        card = {**self.card, "layers": f"the first {num_layers} of the student's {whole}"}
        tap = "extra" if self.tap else None
        return dataclasses.replace(
            self, config=config, state=state, tap=tap, card=card, readme=None
        )

    def encoder(self) -> PreTrainedModel:
        """Return the model, in eval mode, on the CPU."""
        encoder = build_encoder(self.config)
        encoder.load_state_dict(dict(self.state))
        return encoder.eval()


def open_student(
    source: Path,
    *,
    student: str | None = None,
    step: int | str = "newest",
    teacher: str | None = None,
) -> Student:
    """Read a student.

    Args:
        source: the folder of a run, of one of its checkpoints, of an export, or of any model of a
            supported architecture.
        student: which one, if a run has several.
        step: the checkpoint of a run, or "newest".
        teacher: where the teacher of a run is now; by default where it was.

    Raises:
        ConfigError: there is no such student or checkpoint, or the teacher is another one.
        DataError: the folder is none of these, or its files cannot be used.
    """
    check_source(source)
    place, stated = source.absolute(), None if step == "newest" else step
    is_checkpoint = bool(FOLDER.fullmatch(place.name)) and (place / STATE).is_file()
    if is_checkpoint:
        _refuse({"step": stated}, "is read only for runs")
        return _from_checkpoint(place.parent, step_of(place), student, teacher, place.parents[1])
    if (source / "status.json").is_file() or (source / "checkpoints").is_dir():
        root = source / "checkpoints"
        if not committed(root):
            exports = sorted(path.parent for path in source.glob(f"export/*/{README}"))
            remedy = f"export {exports[0]}" if exports else "export once it has written one"
            raise SourceError("source", str(source), "is a run without checkpoints", remedy)
        return _from_checkpoint(root, step, student, teacher, source)
    _refuse({"step": stated}, "is read only for runs")
    _refuse({"student": student, "teacher": teacher}, "is read only for runs and checkpoints")
    return _from_folder(source)


def _refuse(options: Mapping[str, object], reason: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise SettingError(option, value, reason, "leave it out")


def _from_checkpoint(
    root: Path, step: int | str, student: str | None, teacher: str | None, run: Path
) -> Student:
    checkpoint = find_checkpoint(root, step, "--step")
    try:
        settings = parse_config(checkpoint.state["config"])
    except (KeyError, ConfigError) as error:
        raise DataError(f"{checkpoint.folder} was written by another version: {error}") from None
    trained = student_states(checkpoint.state)
    if student is None and len(trained) > 1:
        raise SettingError(
            "student",
            expected=f": the run has several: {', '.join(trained)}",
            remedy="name one of them",
        )
    place = settings.teacher.model_copy(update={"model": str(teacher)} if teacher else {})
    [name] = [student] if student else trained
    with named(**{"teacher.model": Field("teacher", place.model)}):
        [content] = students_of(checkpoint, str(run), place, name).values()
    return Student(
        name=name,
        config=content.config,
        state=content.state,
        tap=content.tap,
        tokenizer=place.model,
        revision=place.revision,
        card=content.card,
        metadata=content.metadata,
        settings=content.run.to_json(),
        num_tokens=_num_tokens(content.config, content.run.data.sequence_length),
    )


def _from_folder(folder: Path) -> Student:
    with named(model=Field("source", str(folder)), config=Field("source", str(folder))):
        encoder = load_encoder(folder, dtype=torch.float32)
    config = encoder.config
    record = read_json(folder / EXPORT) or {}
    known = {key: record.get(key) for key in FORMAT} == FORMAT
    card = read_card(folder)
    if not known and card is not None and set(TAGS) <= set(card.data.get("tags") or []):
        raise SourceError(
            "source",
            str(folder),
            f"is an export without {EXPORT}, so what of it was trained is not known",
            "export a checkpoint of its run, or export it again",
        )
    own = teacher_metadata(str(folder), folder)
    own.pop("base_model", None)  # it is this model itself
    settings = folder / SETTINGS
    rows = ((read_json(settings) or {}).get("data") or {}).get("sequence_length")
    sentence = _sentence_modules(folder)
    limits = [rows, *(() if known and rows else sentence.limits)]
    return Student(
        name=folder.resolve().name,
        config=config,
        state={name: tensor.detach() for name, tensor in encoder.state_dict().items()},
        tap=record["tap"] if known else None,
        tokenizer=str(folder),
        card=record["card"] if known else {"init": "unknown"},
        metadata=record["metadata"] if known else own,
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else None,
        readme=(folder / README).read_text(encoding="utf-8") if card is not None else None,
        num_tokens=_num_tokens(config, *limits),
        sentence=sentence,
    )


def _sentence_modules(folder: Path) -> SentenceModules:
    """Read the modules of a folder that sentence-transformers wrote; any other takes the mean."""
    encoder, pooling, kinds = folder, "mean", []
    pool: Mapping[str, Any] = {}
    try:
        modules = json.loads((folder / "modules.json").read_text())
        for module in modules:
            kinds.append(module["type"].rpartition(".")[2])
            if kinds[-1] == "Transformer":
                encoder = folder / module["path"]
            if kinds[-1] == "Pooling":
                pool = read_json(folder / module["path"] / "config.json") or {}
                pooling = _pooling(pool)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pooling = "unreadable"
    if kinds[2:] not in ([], ["Normalize"]):
        pooling = " + ".join(kinds)
    transformer = read_json(encoder / "sentence_bert_config.json") or {}
    tokenizer = read_json(encoder / "tokenizer_config.json") or {}
    whole = read_json(folder / SENTENCE_SETTINGS) or {}
    return SentenceModules(
        pooling,
        normalizes="Normalize" in kinds,
        lowercases=bool(transformer.get("do_lower_case")),
        includes_prompt=bool(pool.get("include_prompt", True)),
        settings={key: whole[key] for key in SENTENCE_KEYS if whole.get(key)} if kinds else {},
        limits=(transformer.get("max_seq_length"), tokenizer.get("model_max_length")),
    )


def _pooling(config: Mapping[str, Any]) -> str:
    """Return the modes of a Pooling module, in the form of versions up to 5 or of later ones."""
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key in config if key.startswith(prefix) and config[key]]
    found = config.get("pooling_mode") or modes or "mean"
    found = [found] if isinstance(found, str) else found
    return " + ".join(mode.removesuffix("_tokens").removesuffix("_token") for mode in found)


def _num_tokens(config: PreTrainedConfig, *limits: object) -> int:
    """Return the longest input; positions beyond the training rows have untrained embeddings."""
    known = [limit for limit in (positions(config), *limits) if isinstance(limit, int) and limit]
    return min(known, default=LONGEST)
