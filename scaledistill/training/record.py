"""The record of a run: what is measured at a logging step, and where it goes.

Inputs: the results of steps and validations, and the stopwatch. Outputs: rows for the files, the
trackers and the log, and `status.json` while the run trains. Not handled here: how rows are written
(`metrics.recorder`), at which steps (`training.loop`).
"""

from __future__ import annotations

import logging
import platform
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from scaledistill.config.naming import own_metric
from scaledistill.data.manifest import Manifest
from scaledistill.distributed.ranks import failing_together
from scaledistill.errors import DataError
from scaledistill.metrics.recorder import Pace, Recorder, RowLog
from scaledistill.metrics.stopwatch import Stopwatch, memory_peak_bytes
from scaledistill.run.folder import Status
from scaledistill.storage.files import disk_remedy, write_json
from scaledistill.storage.remote import without_credentials
from scaledistill.training.session import Session, versions
from scaledistill.training.step import StepResult
from scaledistill.training.validation import Validation

log = logging.getLogger(__name__)

RECORDED_PHASES = ("data wait", "teacher", "optimizer")


class MetricsLog:
    """Measures laps of the loop and records a row for each."""

    def __init__(
        self,
        session: Session,
        watch: Stopwatch,
        last_step: int,
        recorder: Recorder | RowLog | None,
        status: Status | None = None,
    ) -> None:
        """Start the first lap.

        Args:
            watch: times the steps; nobody else may read it.
            last_step: where the run ends, to estimate the time left.
            recorder: takes the rows; None on ranks that record nothing.
            status: of the run; None for a dry run.
        """
        self._session, self._watch = session, watch
        self._recorder, self._status = recorder, status
        self._pace = Pace(last_step)
        self._lap_start = session.step

    def reached(self, step: int) -> None:
        """Show and report that a step was made."""
        if self._status:
            self._status.reached(step, self._session.epochs())
        if self._recorder:
            self._recorder.advance(step)

    def saved(self, step: int) -> None:
        """Record that the checkpoint of a step was written."""
        if isinstance(self._recorder, Recorder):
            self._recorder.event("saved", f"checkpoint of step {step}", step)

    def ended(self, state: str, message: str) -> None:
        """Record how the run ended."""
        if isinstance(self._recorder, Recorder):
            self._recorder.event(state, message)

    def record(self, result: StepResult, validation: Validation | None) -> None:
        """Record the last step and the lap that it ends; waits for the GPU."""
        row = self._row(result, validation)
        seconds_left = self._pace.seconds_left(self._session.step)
        if self._recorder:
            self._recorder.record(row, seconds_left)
            if self._status:
                self._status.write_soon("running", "training")

    def _row(self, result: StepResult, validation: Validation | None) -> dict[str, float]:
        session = self._session
        seconds, phases = self._watch.lap()
        steps, self._lap_start = session.step - self._lap_start, session.step
        tokens = steps * session.run.tokens_per_step
        row = {"step": session.step, **student_metrics(result, session.config.students)}
        if validation:
            row["validation_loss"] = sum(validation.losses.values())
            for name, loss in validation.losses.items():
                row[session.own_metric("validation_loss", name)] = loss
            row |= validation.scores
        row["tokens_per_second"] = tokens / seconds
        row["mfu"] = tokens / seconds * session.flops_per_token / session.peak_flops
        for phase in RECORDED_PHASES:
            row[f"{phase.replace(' ', '_')}_fraction"] = phases[phase] / seconds
        row["memory_peak_bytes"] = memory_peak_bytes(session.ranks.device)
        row |= {f"epoch/{name}": number for name, number in session.epochs().items()}
        row["skipped_steps"] = session.skipped_steps
        if session.dropped:
            row["dropped_students"] = len(session.dropped)
        return row


def student_metrics(result: StepResult, names: Collection[str]) -> dict[str, float]:
    """Return a step's losses, learning rates and gradient norms by metric name.

    "loss" is the sum over students.

    Args:
        names: the students of the run, those that were dropped included.
    """
    row = {"loss": result.loss}
    for name, student in result.students.items():
        row[own_metric("loss", name, names)] = student.loss
        row |= {f"loss/{name}/{pair}": loss for pair, loss in student.by_pair.items()}
    for name, student in result.students.items():
        row[own_metric("lr", name, names)] = student.learning_rate
        row[own_metric("grad_norm", name, names)] = float(student.grad_norm)
    return row


def open_recorder(session: Session, status: Status, last_step: int) -> Recorder | None:
    """Write `config.json` and the status, and open the recorder on rank 0. Collective.

    Raises:
        DataError: the run's folder cannot be written.
    """
    with failing_together():
        if session.ranks.is_main:
            return _open_recorder(session, status, last_step)
    return None


def run_facts(session: Session) -> dict[str, Any]:
    """Return what a run is made of: "environment", "data" and "teacher", as plain values."""
    run, device = session.run, session.ranks.device
    on_gpu = device.type == "cuda"
    environment = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU",
        "ranks": session.ranks.world_size,
        "micro-batch": f"{run.micro_batch_size} × {run.accumulation}",
        "precision": session.config.train.precision,
        "engine": session.config.engine.name,
        "host": socket.gethostname(),
        "system": platform.platform(),
        **versions(),
    }
    if on_gpu:
        environment["CUDA"] = str(torch.version.cuda)
    config = session.config
    data = {
        "training" if len(session.sources) == 1 else f"training: {source.name}": _data_facts(
            settings.shards, source.shards.manifest
        )
        for settings, source in zip(config.data.sources.values(), session.sources, strict=True)
    }
    if session.held_out and config.data.validation:
        data["validation"] = _data_facts(config.data.validation, session.held_out.manifest)
    teacher = {
        "model": config.teacher.model,
        "revision": config.teacher.revision,
        "layer": config.teacher.layer,
        "sha256 of the weights": session.teacher.sha256,
    }
    return {"environment": environment, "data": data, "teacher": teacher}


def _data_facts(location: str, manifest: Manifest) -> dict[str, Any]:
    unknown = manifest.unknown_fraction
    return {
        "location": without_credentials(location),
        "sha256 of the manifest": manifest.sha256,
        "rows": manifest.rows,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "sequence length": manifest.sequence_length,
        "unknown tokens": None if unknown is None else f"{unknown:.3%}",
        "tokenizer": manifest.tokenizer["name"],
        "sha256 of the tokenizer": manifest.tokenizer["sha256"],
        "source": manifest.source,
    }


def _open_recorder(session: Session, status: Status, last_step: int) -> Recorder:
    config = session.config
    folder, settings = Path(config.run.folder), config.logging
    origin = f"resuming at step {session.step}" if session.step else "starting"
    log.info("%s: %s, up to step %d", folder, origin, last_step)
    try:
        write_json(folder / "config.json", config.model_dump())
        status.write("running", "training")
        return Recorder(
            folder,
            max_steps=last_step,
            resumed_at=session.step,
            trackers=settings.trackers,
            config=config.model_dump(),
            project=settings.project,
            run_name=settings.run_name,
            facts=run_facts(session),
        )
    except OSError as error:
        raise DataError(
            f"run.folder={folder} cannot be written: {error}; {disk_remedy(error)}"
        ) from None
