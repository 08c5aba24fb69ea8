"""Export the student in training, or that of any checkpoint, as a plain transformers model.

Inputs: a configuration, and a student's full fp32 state or a run folder with checkpoints. Outputs:
a folder in `<run.folder>/export`. Checkpoints are only read, so a run may be in progress. Not
handled here: the files themselves (`models.export`), when a run exports (`training.loop`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from scaledistill.checkpoint import mirror
from scaledistill.checkpoint.format import Checkpoint, verify
from scaledistill.checkpoint.names import STATE, committed, folder_name, step_of
from scaledistill.config.load import parse_config
from scaledistill.config.naming import teacher_names
from scaledistill.config.schema import DataSettings, DistillConfig, TeacherSettings
from scaledistill.data.manifest import MANIFEST_FILES
from scaledistill.data.mixture import data_identity
from scaledistill.errors import ConfigError, DataError, SettingError, named
from scaledistill.metrics.recorder import read_rows
from scaledistill.metrics.rows import student_value
from scaledistill.models.card import README, teacher_metadata
from scaledistill.models.export import SETTINGS, check_state, export_student
from scaledistill.models.hub import names_resolved_once
from scaledistill.models.student import exported
from scaledistill.models.teacher import load_config
from scaledistill.preflight.checks import student_shape
from scaledistill.preflight.roster import student_states
from scaledistill.storage.files import disk_remedy, is_path, read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What the model card says about a run's student."""

    steps: int
    """That it was trained."""
    teacher_sha256: str
    data_sha256: str
    """Of the manifest; of several sources, those of all, with their shares."""
    losses: Mapping[str, str | None]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class StudentExport:
    """The content of a run's export."""

    config: PreTrainedConfig
    state: Mapping[str, Tensor]
    """Every parameter of the student, fp32, on the CPU."""
    run: DistillConfig
    """The settings, with this student alone."""
    card: Mapping[str, object]
    """The facts of the model card, label to value."""
    metadata: Mapping[str, Any]
    """The card's fields for the hub."""

    @property
    def tap(self) -> str:
        """The student's tap, "last" or "extra"."""
        [spec] = self.run.students.values()
        return spec.tap


def student_export(
    config: DistillConfig, model: Any, weights: Mapping[str, Tensor], facts: Facts
) -> StudentExport:
    """Return the content of an export.

    Args:
        config: the settings of the run, with one student.
        model: the model config of the student under training.
        weights: every parameter of that model, fp32, on the CPU.
    """
    [(name, spec)] = config.students.items()
    train, data, teacher = config.train, config.data, config.teacher
    student_config, state = exported(model, weights, spec.num_layers)
    card: dict[str, object] = {
        "teacher": f"`{teacher.model}`, layer {teacher.layer}",
        "teacher weights (sha256)": facts.teacher_sha256,
        "relations": f"{config.relation_heads(name)} heads, pairs {config.relations.pairs}",
        "training data (sha256 of the manifest)": facts.data_sha256,
        "tokens": f"{facts.steps * train.global_batch_size * data.sequence_length:,}"
        f" ({facts.steps:,} steps of {train.global_batch_size} × {data.sequence_length})",
        **{label: loss or "not measured" for label, loss in facts.losses.items()},
        "init": spec.init,
        "seed": config.run.seed,
        "command": f"`scaledistill distill --config {SETTINGS}`, with the file {SETTINGS} "
        "of this folder",
        "versions": ", ".join(f"{package} {number}" for package, number in facts.versions.items()),
    }
    metadata = teacher_metadata(teacher.model, _cached(teacher))
    if names := _datasets(data):
        metadata["datasets"] = names
    return StudentExport(student_config, state, config, card, metadata)


def write_student(
    folder: Path,
    content: StudentExport,
    check: Callable[[PreTrainedModel], None] = lambda model: None,
) -> None:
    """Write a student as a plain transformers model with its model card, and read it back.

    Args:
        check: called with the model that was read back, before it replaces an older export; raises
            to keep the older one.

    Raises:
        DataError: the export cannot be written, or what was read back differs.
    """
    teacher = content.run.teacher
    try:
        with named(tokenizer_source="teacher.model"):
            export_student(
                folder,
                content.config,
                content.state,
                tap=content.tap,
                tokenizer_source=teacher.model,
                revision=teacher.revision,
                card=content.card,
                metadata=content.metadata,
                settings=content.run.to_json(),
                check=check,
            )
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder}: the export could not be written: {error}; {disk_remedy(error)}"
        ) from None


@names_resolved_once()
def export_checkpoint(config: DistillConfig, wanted: int | str) -> list[Path]:
    """Export a checkpoint's students; return the folders, `<run.folder>/export/<student>-step-N`.

    Settings are the checkpoint's own, except for the locations of the run folder and the teacher,
    which are those of `config`.

    Args:
        wanted: a step that has a checkpoint, or "newest", the newest one that is not damaged.

    Raises:
        ConfigError: there is no such checkpoint, or the teacher differs from the run's.
        DataError: the checkpoint or the teacher's folder cannot be read, or the export cannot be
            written.
    """
    checkpoint = checkpoint_of_run(config, wanted)
    folders = []
    for name, content in students_of(checkpoint, config.run.folder, config.teacher).items():
        step = checkpoint.state["step"]
        folders.append(Path(config.run.folder) / "export" / f"{name}-step-{step}")
        write_student(folders[-1], content)
    return folders


def checkpoint_of_run(
    config: DistillConfig, wanted: int | str, option: str = "--export"
) -> Checkpoint:
    """Return the checkpoint of a step of a run, or with "newest" the newest undamaged one.

    Raises:
        ConfigError: there is none.
        DataError: it cannot be used.
    """
    root = Path(config.run.folder) / "checkpoints"
    if not committed(root):
        raise ConfigError(
            f"run.folder={config.run.folder!r} has no checkpoints{_elsewhere(config)}"
        )
    return find_checkpoint(root, wanted, option, lambda: _elsewhere(config))


def students_of(
    checkpoint: Checkpoint,
    run_folder: str,
    teacher: TeacherSettings | None = None,
    wanted: str | None = None,
) -> dict[str, StudentExport]:
    """Return the students of a checkpoint by name. Settings are the checkpoint's own.

    Args:
        run_folder: where the run is now; its recorded losses go into the model card.
        teacher: where the teacher is now; by default where it was.
        wanted: the name of the only student to return; all by default.

    Raises:
        ConfigError: there is no such student, or the teacher differs from the run's.
        DataError: the checkpoint or the teacher's folder cannot be read.
    """
    state = checkpoint.state
    try:
        settled = parse_config(state["config"])
        step, teacher_sha256, data_sha256 = (
            state["step"],
            state["teacher_sha256"],
            data_identity(state["data"]),
        )
        written_with = state["versions"]
    # The hashes match, so the file is not damaged: another version wrote it.
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(
            f"{checkpoint.folder} was written by another version and cannot be exported: {error}; "
            "resume the run with the version that wrote it"
        ) from None
    trained = student_states(state)  # without those that were dropped
    if wanted is not None and wanted not in trained:
        raise SettingError(
            "student",
            wanted,
            "is not a student of this checkpoint",
            f"use {' or '.join(trained)}",
        )
    # The run folder and the teacher may have moved since the checkpoint was written.
    keys = ("model", "revision", "trust_remote_code")
    now = {key: getattr(teacher, key) for key in keys} if teacher else {}
    settled = settled.model_copy(
        update={
            "run": settled.run.model_copy(update={"folder": run_folder}),
            "teacher": settled.teacher.model_copy(update=now),
        }
    )
    found = settled.teacher
    with named(**teacher_names(found)):
        teacher_config = load_config(found.model, found.revision, found.trust_remote_code)
    students = {}
    for name in trained if wanted is None else [wanted]:
        model = student_shape(settled, name, teacher_config, state)
        weights = checkpoint.tensors(f"{name}.weights")
        losses = _losses_at(Path(run_folder), step, name)
        steps = step - trained[name].get("first_step", 0)
        facts = Facts(steps, teacher_sha256, data_sha256, losses, written_with)
        content = student_export(settled.for_student(name), model, weights, facts)
        try:
            check_state(content.config, content.state)
        except ValueError as error:  # the student's shapes follow from the teacher's
            raise ConfigError(
                f"teacher.model={found.model!r} is not the one that {checkpoint.folder} was "
                f"trained with: {error}; set it to {state['config']['teacher']['model']!r}, or to "
                "its current path"
            ) from None
        students[name] = content
    return students


def find_checkpoint(
    root: Path, wanted: int | str, option: str, hint: Callable[[], str] = str
) -> Checkpoint:
    """Return a checkpoint, verified.

    Args:
        root: the folder of the checkpoints; it has at least one.
        wanted: a step that has a checkpoint, or "newest", the newest one that is not damaged.
        option: the option that says so, for messages.
        hint: returns the end of the message if there is no such step.

    Raises:
        ConfigError: there is no such checkpoint.
        DataError: none can be used.
    """
    candidates = committed(root)
    steps = [step_of(path) for path in candidates]
    known = f"there {'is' if len(steps) == 1 else 'are'} {', '.join(map(str, sorted(steps)))}"
    if wanted != "newest":
        candidates = [root / folder_name(int(wanted))]
        if int(wanted) not in steps:
            raise ConfigError(
                f"{option} {wanted}: {root} has no checkpoint of step {wanted}; {known} "
                f"(checkpoint.every_steps and checkpoint.keep say which are kept){hint()}"
            )
    for folder in candidates:
        damage = verify(folder)
        if damage is None:
            try:
                return Checkpoint(folder, json.loads((folder / STATE).read_text()))
            except (OSError, ValueError) as error:
                damage = str(error)
        log.warning(
            "checkpoint %s is damaged, or the run has removed it meanwhile (%s)", folder, damage
        )
    raise DataError(
        f"{option} {wanted}: no checkpoint in {root} can be used; {known}, see the warnings above"
    )


def _elsewhere(config: DistillConfig) -> str:
    """Return a hint at the checkpoints in `checkpoint.remote`, which an export does not read."""
    remote, there = config.checkpoint.remote, []
    with suppress(DataError):  # it cannot be reached: the message is about something else
        there = mirror.checkpoints(remote) if remote else []
    if not there:
        return ""
    return (
        f"; {remote} has {', '.join(sorted(there))}: copy one to "
        f"{Path(config.run.folder) / 'checkpoints'} first"
    )


def _cached(teacher: TeacherSettings) -> Path | None:
    """Return the hub's local copy of the teacher, if there is one; the hub is not asked."""
    if is_path(teacher.model) or Path(teacher.model).is_dir():
        return None
    found = try_to_load_from_cache(teacher.model, README, revision=teacher.revision)
    return Path(found).parent if isinstance(found, str) else None


def _datasets(data: DataSettings) -> list[str]:
    """Return the hub names of the data sets that shards were made from, as far as known."""
    names = []
    for source in data.sources.values():
        files = (Path(source.shards) / name for name in MANIFEST_FILES)
        manifest: dict[str, Any] = next(filter(None, map(read_json, files)), {})
        name = ((manifest.get("source") or {}).get("dataset") or {}).get("name")
        if isinstance(name, str) and not is_path(name):
            names.append(name)
    return list(dict.fromkeys(names))


def _losses_at(folder: Path, step: int, student: str) -> dict[str, str | None]:
    """Return the recorded losses of a step, or of the last step before it that has any."""
    losses: dict[str, str | None] = {}
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= step]
    for label, metric in (("validation loss", "validation_loss"), ("training loss", "loss")):
        values = [(row["step"], student_value(row, metric, student)) for row in rows]
        if known := [(at, value) for at, value in values if value is not None]:
            at, value = known[-1]
            losses[label] = f"{value:.4f}{'' if at == step else f' (at step {at:,})'}"
        elif label == "validation loss":
            losses[label] = None
    return losses
