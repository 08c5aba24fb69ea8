"""Export the student in training, or that of any checkpoint, as a plain transformers model.

Inputs: a configuration, and a student's full fp32 state or a run folder with checkpoints. Outputs:
a folder in `<run.folder>/export`. Checkpoints are only read, so a run may be in progress. Not
handled here: the files themselves (`models.export`), when a run exports (`training.loop`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from scaledistill.checkpoint import mirror
from scaledistill.checkpoint.format import Checkpoint, verify
from scaledistill.checkpoint.names import STATE, committed, folder_name, step_of
from scaledistill.config.load import parse_config
from scaledistill.config.naming import teacher_names
from scaledistill.config.schema import DistillConfig
from scaledistill.errors import ConfigError, DataError, named
from scaledistill.metrics.recorder import read_rows
from scaledistill.models.export import export_student
from scaledistill.models.hub import names_resolved_once
from scaledistill.models.student import exported
from scaledistill.models.teacher import load_config
from scaledistill.preflight.checks import student_shape
from scaledistill.storage.files import disk_remedy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What the model card says about a run's student."""

    step: int
    teacher_sha256: str
    data_sha256: str
    losses: Mapping[str, str | None]
    versions: Mapping[str, str]


def write_student(
    folder: Path,
    config: DistillConfig,
    model: Any,
    weights: Mapping[str, Tensor],
    facts: Facts,
    check: Callable[[PreTrainedModel], None] = lambda model: None,
) -> None:
    """Write a student as a plain transformers model with its model card, and read it back.

    Args:
        model: the model config of the student under training.
        weights: every parameter of that model, fp32, on the CPU.
        check: called with the model that was read back, before it replaces an older export; raises
            to keep the older one.

    Raises:
        DataError: the export cannot be written, or what was read back differs.
    """
    [(name, spec)] = config.students.items()
    train, data = config.train, config.data
    student_config, state = exported(model, weights, spec.num_layers)
    card: dict[str, object] = {
        "teacher": f"`{config.teacher.model}`, layer {config.teacher.layer}",
        "teacher weights (sha256)": facts.teacher_sha256,
        "relations": f"{config.relation_heads(name)} heads, pairs {config.relations.pairs}",
        "training data (sha256 of the manifest)": facts.data_sha256,
        "tokens": f"{facts.step * train.global_batch_size * data.sequence_length:,}"
        f" ({facts.step:,} steps of {train.global_batch_size} × {data.sequence_length})",
        **{label: loss or "not measured" for label, loss in facts.losses.items()},
        "init": spec.init,
        "versions": ", ".join(f"{package} {number}" for package, number in facts.versions.items()),
    }
    try:
        with named(tokenizer_source="teacher.model"):
            export_student(
                folder,
                student_config,
                state,
                tap=spec.tap,
                tokenizer_source=config.teacher.model,
                revision=config.teacher.revision,
                card=card,
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
    checkpoint = find_checkpoint(config, wanted)
    state = checkpoint.state
    try:
        settled = parse_config(state["config"])
        step, teacher_sha256, data_sha256 = (
            state["step"],
            state["teacher_sha256"],
            state["data"]["data_sha256"],
        )
        written_with = state["versions"]
    # The hashes match, so the file is not damaged: another version wrote it.
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(
            f"{checkpoint.folder} was written by another version and cannot be exported: {error}; "
            "resume the run with the version that wrote it"
        ) from None
    # The run folder and the teacher may have moved since the checkpoint was written.
    settled = settled.model_copy(
        update={
            "run": settled.run.model_copy(update={"folder": config.run.folder}),
            "teacher": settled.teacher.model_copy(
                update={
                    key: getattr(config.teacher, key)
                    for key in ("model", "revision", "trust_remote_code")
                }
            ),
        }
    )
    teacher = settled.teacher
    with named(**teacher_names(teacher)):
        teacher_config = load_config(teacher.model, teacher.revision, teacher.trust_remote_code)
    folders = []
    for name in settled.students:
        model = student_shape(settled, name, teacher_config)
        weights = checkpoint.tensors(f"{name}.weights")
        folder = Path(config.run.folder) / "export" / f"{name}-step-{step}"
        end = f"/{name}" if len(settled.students) > 1 else ""
        losses = _losses_at(Path(config.run.folder), step, end)
        facts = Facts(step, teacher_sha256, data_sha256, losses, written_with)
        try:
            write_student(folder, settled.for_student(name), model, weights, facts)
        except ValueError as error:  # the student's shapes follow from the teacher's
            raise ConfigError(
                f"teacher.model={teacher.model!r} is not the one that {checkpoint.folder} was "
                f"trained with: {error}; set it to {state['config']['teacher']['model']!r}, or to "
                "its current path"
            ) from None
        folders.append(folder)
    return folders


def find_checkpoint(config: DistillConfig, wanted: int | str) -> Checkpoint:
    """Return the checkpoint of a step, or with "newest" the newest one that is not damaged.

    Raises:
        ConfigError: there is none.
        DataError: it cannot be used.
    """
    root = Path(config.run.folder) / "checkpoints"
    candidates = committed(root)
    if not candidates:
        raise ConfigError(
            f"run.folder={config.run.folder!r} has no checkpoints{_elsewhere(config)}"
        )
    steps = [step_of(path) for path in candidates]
    known = f"there {'is' if len(steps) == 1 else 'are'} {', '.join(map(str, sorted(steps)))}"
    if wanted != "newest":
        candidates = [root / folder_name(int(wanted))]
        if int(wanted) not in steps:
            raise ConfigError(
                f"--export {wanted}: {root} has no checkpoint of step {wanted}; {known} "
                "(checkpoint.every_steps and checkpoint.keep say which are "
                f"kept){_elsewhere(config)}"
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
        f"--export {wanted}: no checkpoint in {root} can be used; {known}, see the warnings above"
    )


def _elsewhere(config: DistillConfig) -> str:
    """Return a hint at the checkpoints in `checkpoint.remote`, which an export does not read."""
    remote = config.checkpoint.remote
    there = list(mirror.checkpoints(remote)) if remote else []
    if not there:
        return ""
    return (
        f"; {remote} has {', '.join(sorted(there))}: copy one to "
        f"{Path(config.run.folder) / 'checkpoints'} first"
    )


def _losses_at(folder: Path, step: int, end: str) -> dict[str, str | None]:
    """Return the recorded losses of a step, or of the last step before it that has any.

    `end` is that of the metrics' names: "/<student>" if the run has several.
    """
    losses: dict[str, str | None] = {}
    names = {"validation loss": f"validation_loss{end}", "training loss": f"loss{end}"}
    for label, key in names.items():
        rows = [
            row
            for row in read_rows(folder / "metrics.jsonl")
            if row["step"] <= step and row.get(key) is not None
        ]
        if rows:
            when = "" if rows[-1]["step"] == step else f" (at step {rows[-1]['step']:,})"
            losses[label] = f"{rows[-1][key]:.4f}{when}"
        elif label == "validation loss":
            losses[label] = None
    return losses
