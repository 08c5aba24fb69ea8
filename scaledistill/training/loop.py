"""The training loop: runs the steps and does what is due between them.

Inputs: a configuration. Outputs: how the run ended; its files are in `run.folder`. Not handled
here: the step itself (`training.step`) and opening models and data (`training.session`).
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scaledistill.checkpoint import mirror
from scaledistill.checkpoint.saver import Outcome
from scaledistill.config.schema import DistillConfig
from scaledistill.distributed.launcher import stated_rank
from scaledistill.distributed.ranks import (
    Ranks,
    any_rank,
    failing_together,
    process_group,
    reported_once,
)
from scaledistill.distributed.watchdog import Watchdog
from scaledistill.errors import (
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_STOPPED,
    DataError,
    DivergedError,
    PeerError,
    counted,
)
from scaledistill.metrics.recorder import Pace, Recorder, line
from scaledistill.metrics.stopwatch import Stopwatch, memory_peak_bytes
from scaledistill.models.hub import names_resolved_once
from scaledistill.preflight import checks as doctor
from scaledistill.preflight import fetching
from scaledistill.preflight.report import start_summary
from scaledistill.run import folder as runfolder
from scaledistill.run.resume_hint import newest_step, resume_hint
from scaledistill.storage.files import disk_remedy, write_json
from scaledistill.training.profiling import WARMUP_STEPS, check_trial_steps, profile_run
from scaledistill.training.session import Session, open_session
from scaledistill.training.step import (
    NOT_FINITE,
    ExportProbe,
    StepResult,
    train_step,
    validation_loss,
)

if TYPE_CHECKING:
    from scaledistill.training.probe import StudentProbe

log = logging.getLogger(__name__)

COMPILING_STEPS = 10
"""After this many steps nothing more is compiled: batches with new shapes then run uncompiled."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    state: str
    """"done", "stopped", "failed" (its evaluation) or, for a dry run, "dry run"."""
    exit_code: int
    step: int
    message: str


class Bookkeeper:
    """Does what is due between steps.

    That is: the check for non-finite losses, validation, metrics, checkpoints, exports, the status.
    Every method is collective. A dry run has no status and writes nothing.
    """

    def __init__(
        self,
        session: Session,
        status: runfolder.Status | None,
        last_step: int,
        stop: runfolder.StopRequest,
        at: Callable[..., None],
    ) -> None:
        self._session = session
        self._stop, self._at = stop, at
        self._stop_reason: str | None = None
        self.stop_requested = False
        self._status = status
        self._last_step = last_step
        self._config = session.config
        self._folder = Path(session.config.run.folder)
        self._recorder: Recorder | None = None
        self._probe: StudentProbe | None = None
        self._skipped_in_a_row = self._failed_saves = 0
        self._settle_at: int | None = None
        self._lap_start = session.step
        self._pace = Pace(last_step)
        self.watch = Stopwatch(session.ranks.device, at)

    def start(self, stack: ExitStack) -> None:
        """Open the record and the status, and load the probe if there is one. Collective."""
        session = self._session
        if self._status is None:
            return
        self._stop.answer = "saving a checkpoint and stopping"
        self._status.step, self._status.started = session.step, True
        with failing_together():
            if session.ranks.is_main:
                self._open_record(stack, self._status)
        if self._config.evaluation and self._config.evaluation.probe:
            # Imported here because it takes seconds.
            from scaledistill.training.probe import StudentProbe

            self._probe = StudentProbe(session)

    def _open_record(self, stack: ExitStack, status: runfolder.Status) -> None:
        session = self._session
        origin = f"resuming at step {session.step}" if session.step else "starting"
        log.info("%s: %s, up to step %d", self._folder, origin, self._last_step)
        try:
            write_json(self._folder / "config.json", self._config.model_dump())
            status.write("running", "training")
            recorder = Recorder(
                self._folder,
                max_steps=self._last_step,
                resumed_at=session.step,
                trackers=self._config.logging.trackers,
                config=self._config.model_dump(),
                project=self._config.logging.project,
                run_name=self._config.logging.run_name,
            )
        except OSError as error:
            raise DataError(
                f"run.folder={self._folder} cannot be written: {error}; {disk_remedy(error)}"
            ) from None
        self._recorder = stack.enter_context(recorder)

    def after_step(self, result: StepResult) -> None:
        """Do what is due after a step. Collective."""
        session, train = self._session, self._config.train
        if self._status:
            self._status.step = session.step
        if result.stop_requested:
            self._heed_stop()
        self._check_finite(result)
        at_end = session.step == self._last_step

        def due(every: int) -> bool:
            return every > 0 and (session.step % every == 0 or at_end)

        validation = None
        if self._status and due(train.validation_every_steps):
            with self.watch.paused():
                validation = self._validate()
        leaving = at_end or self.stop_requested
        if (
            validation is not None
            or leaving
            or session.step == 1
            or due(self._config.logging.every_steps)
        ):
            self._record(result, validation)
        elif self._recorder:
            self._recorder.advance(session.step)
        if self._status:
            with self.watch.paused():
                self._save(leaving, due(self._config.checkpoint.every_steps))

    def finish(self) -> RunResult:
        """Export the student and return how the run ended. Collective."""
        session = self._session
        if self._status is None:
            return RunResult(
                "dry run",
                EXIT_DONE,
                session.step,
                f"{counted(session.step, 'step')} run, nothing written",
            )
        self._at("export")
        self._stop.answer = (
            "all steps are done and saved; the run ends as soon as the student is exported"
        )
        losses = {"validation loss": session.last_validation}
        folder = session.export(session.student.name, losses, ExportProbe(session).check)
        curve = self._folder / "loss.png"
        message = (
            f"{counted(session.step, 'step')} done; the student is in {folder}, the loss curve in "
            f"{curve}"
        )
        if session.ranks.is_main:
            self._status.write_if_possible("done", message, EXIT_DONE)
        return RunResult("done", EXIT_DONE, session.step, message)

    def stop_at_start(self) -> bool:
        """Return whether a stop was requested before the first step. Collective."""
        if any_rank(self._stop.reason() is not None, self._session.ranks.device):
            self._heed_stop()
        return self.stop_requested

    def stop(self) -> RunResult:
        """Return that the run was stopped; `after_step` has saved it. Collective."""
        return stopped(self._status, self._session.ranks, self._session.step, self._stop_reason)

    def _heed_stop(self) -> None:
        self.stop_requested, self._stop_reason = True, self._stop.acknowledge()

    def _warn(self, message: str, *arguments: object) -> None:
        if self._session.ranks.is_main:
            log.warning(message, *arguments)

    def _check_finite(self, result: StepResult) -> None:
        """Count skipped steps; end the run if too many in a row were skipped."""
        session, batch = self._session, self._config.train.global_batch_size
        if not result.skipped:
            self._skipped_in_a_row = 0
            return
        session.skipped_steps += 1
        self._skipped_in_a_row += 1
        samples = f"samples {(session.step - 1) * batch} to {session.step * batch - 1}"
        what, remedy = NOT_FINITE[result.cause or "loss"]
        self._warn("step %d skipped: %s not finite on %s", session.step, what, samples)
        if self._skipped_in_a_row > self._config.train.max_skipped_steps:
            message = (
                f"{self._skipped_in_a_row} steps in a row had a non-finite loss or gradient, the "
                f"last on {samples}, where {what} not finite; "
                f"train.max_skipped_steps={self._config.train.max_skipped_steps} allows no more. "
                f"{remedy}; {self._newest_checkpoint()}"
            )
            with reported_once(session.ranks):
                raise DivergedError(message)

    def _newest_checkpoint(self) -> str:
        """Wait for the save under way and return which checkpoint is the last. Collective."""
        self._settle(wait=True)
        step = newest_step(self._folder)
        return (
            "there is no checkpoint yet" if step is None else f"the last checkpoint is step {step}"
        )

    def _validate(self) -> dict[str, float] | None:
        """Validate, and export the student if it is the best so far.

        Returns the validation loss and the probe's scores; None if a stop was requested meanwhile.
        """
        session = self._session
        loss = validation_loss(session, self._stop.reason, self._at)
        if loss is None:
            self._heed_stop()
            return None
        session.last_validation = loss if math.isfinite(loss) else None
        # Losses on other held-out rows cannot be compared with this one.
        yardstick = session.validation_identity()
        best = session.best if session.best.get("yardstick") == yardstick else {}
        if math.isfinite(loss) and loss < best.get("validation_loss", math.inf):
            self._at("export")
            try:
                session.export(f"{session.student.name}-best", {"validation loss": loss})
                session.best = {
                    "step": session.step,
                    "validation_loss": loss,
                    "yardstick": yardstick,
                }
            except (DataError, PeerError) as error:
                kept = (
                    "the previous best export is kept"
                    if session.best
                    else "there is no best export yet"
                )
                self._warn("%s; training continues, %s", error, kept)
        self._at("probe")
        return {"validation_loss": loss, **(self._probe.scores() if self._probe else {})}

    def _record(self, result: StepResult, validation: dict[str, float] | None) -> None:
        session, data = self._session, self._config.data
        seconds, phases = self.watch.lap()
        tokens = (
            (session.step - self._lap_start)
            * self._config.train.global_batch_size
            * data.sequence_length
        )
        self._lap_start = session.step
        row = {
            "step": session.step,
            **result.losses,
            "lr": result.learning_rate,
            "grad_norm": float(result.grad_norm),
        }
        row |= validation or {}
        row["tokens_per_second"] = tokens / seconds
        row["mfu"] = tokens / seconds * session.flops_per_token / session.peak_flops
        for phase in ("data wait", "teacher", "optimizer"):
            row[f"{phase.replace(' ', '_')}_fraction"] = phases[phase] / seconds
        row["memory_peak_bytes"] = memory_peak_bytes(session.ranks.device)
        row["skipped_steps"] = session.skipped_steps
        seconds_left = self._pace.seconds_left(session.step)
        if self._recorder and self._status:
            self._recorder.record(row, seconds_left)
            self._status.write_soon("running", "training")
        elif self._status is None:
            log.info("step %d/%d  %s", session.step, self._last_step, line(row, seconds_left))

    def _save(self, leaving: bool, due: bool) -> None:
        """Settle the previous save, save if due or if that one failed, and wait if the run ends."""
        session, settings = self._session, self._config.checkpoint
        if not (leaving or due or session.step == self._settle_at):
            return
        self._at("save")
        failed = self._settle(wait=leaving or due)
        if failed and not leaving and self._failed_saves > settings.max_failed_saves:
            limit = f"checkpoint.max_failed_saves={settings.max_failed_saves}"
            self._give_up(
                failed,
                f"{counted(self._failed_saves, 'save')} failed in a row, {limit} allows no more",
            )
        if leaving or due or failed:
            session.save()
        if leaving and (failed := self._settle(wait=True)):
            self._give_up(failed, "the run ends here")
        # Check the save after this many steps, and again until it has ended.
        self._settle_at = (
            session.step + max(1, settings.every_steps // 10) if session.saver.pending else None
        )

    def _settle(self, *, wait: bool) -> Outcome | None:
        """Return the outcome of the pending save if it has failed."""
        outcome = self._session.saver.settle(wait=wait)
        if outcome is None:
            return None
        self._failed_saves = self._failed_saves + 1 if outcome.error else 0
        if outcome.error:
            self._warn("checkpoint of step %d not saved: %s", outcome.step, outcome.error)
        return outcome if outcome.error else None

    def _give_up(self, failed: Outcome, why: str) -> None:
        with reported_once(self._session.ranks):
            raise DataError(
                f"the checkpoint of step {failed.step} could not be saved: {failed.error}; {why}. "
                f"{failed.remedy[:1].upper()}{failed.remedy[1:]}; {resume_hint(self._folder)}"
            )


@names_resolved_once()
def distill(
    config: DistillConfig,
    *,
    fresh: bool = False,
    dry_run_steps: int | None = None,
    profile_steps: int | None = None,
) -> RunResult:
    """Distil the configured student. Collective.

    The run resumes from the newest good checkpoint in its folder, if there is one.

    Args:
        config: the run's settings.
        fresh: start over; an existing run folder is renamed, not deleted.
        dry_run_steps: run this many real steps from the start and write nothing.
        profile_steps: run a few warm-up steps, then this many under the profiler; write only the
            profile.

    Raises:
        ConfigError: the settings don't fit each other, the models, the data, or the run that they
            would resume.
        DataError: data, model or disk do not meet the run's needs.
        DivergedError: too many steps in a row had a non-finite loss or gradient.
    """
    result = _distill(config, fresh, dry_run_steps, profile_steps)
    if (
        not (config.evaluation and config.evaluation.tasks)
        or result.state != "done"
        or stated_rank() != "0"
    ):
        return result
    from scaledistill.glue.api import evaluate_run  # imported here because it takes seconds

    # The other ranks have exited and freed their memory.
    state, exit_code, message = evaluate_run(config, result.message)
    return replace(result, state=state, exit_code=exit_code, message=message)


def _distill(
    config: DistillConfig, fresh: bool, dry_run_steps: int | None, profile_steps: int | None
) -> RunResult:
    """Run, then free all models and engines, so that this process can go on to evaluate."""
    result = _run(config, fresh, dry_run_steps, profile_steps)
    # Models and engines are in reference cycles; their parameters are in further cycles that only
    # a second pass can reach, through autograd's references.
    for _ in range(2):
        gc.collect()
    return result


def _run(
    config: DistillConfig, fresh: bool, dry_run_steps: int | None, profile_steps: int | None
) -> RunResult:
    with ExitStack() as stack:
        run = config.run
        # The group's own timeout is longer, so that the watchdog reports first.
        ranks = stack.enter_context(process_group(run.timeout_seconds + run.lost_rank_seconds))
        trial = dry_run_steps is not None or profile_steps is not None
        hint = (lambda: "rerun the same command") if trial else partial(resume_hint, run.folder)
        watchdog = stack.enter_context(Watchdog(ranks, run, writes=not trial, resume_hint=hint))
        stop = runfolder.StopRequest(
            Path(run.folder),
            watch_file=ranks.is_main and not trial,
            speaks=ranks.is_main,
            max_hours=run.max_hours,
        )
        stack.enter_context(stop.listening())
        if config.run.deterministic:
            torch.use_deterministic_algorithms(True)
        status = None
        if not trial:
            last_step = config.train.max_steps
            status = stack.enter_context(
                runfolder.owned(Path(run.folder), last_step, ranks, fresh=fresh)
            )
            with failing_together():
                remote = config.checkpoint.remote if fresh and ranks.is_main else None
                if remote and (aside := mirror.set_aside(remote)):
                    log.info("--fresh: the old run's copies are kept as %s", aside)
            watchdog.tell = partial(status.write_failure, "failed", exit_code=EXIT_ENVIRONMENT)
        else:
            last_step = dry_run_steps or (profile_steps or 0) + WARMUP_STEPS
            with reported_once(ranks):
                check_trial_steps(last_step, config.train.max_steps, dry_run_steps)
        stack.enter_context(watchdog.naming_lost_ranks())
        watchdog.at("checking")
        fetching.fetch_configs(config, ranks)
        with failing_together():
            plan = doctor.check(
                config, ranks.world_size, ranks.device, ranks=ranks, writes=status is not None
            )
        if any_rank(stop.reason() is not None, ranks.device):
            return stopped(status, ranks, status.step if status else 0, stop.acknowledge())
        watchdog.at("loading")
        sized_by = plan.estimate if plan.run.auto_micro_batch else None
        session = open_session(
            plan.run,
            ranks,
            resume=status is not None,
            sized_by=sized_by,
            opened=(plan.shards, plan.held_out),
        )
        stack.enter_context(session.saver)
        if ranks.is_main:
            plan = replace(plan, run=session.run)  # with the micro-batch that was chosen
            for text in start_summary(
                plan, ranks.device.type, step=session.step, last_step=last_step
            ):
                log.info("%s", text)
        if profile_steps:
            folder = profile_run(session, last_step, watchdog.at)
            message = f"{counted(session.step, 'step')} run, the profile is in {folder}"
            return RunResult("dry run", EXIT_DONE, session.step, message)
        bookkeeper = Bookkeeper(session, status, last_step, stop, watchdog.at)
        return run_steps(session, bookkeeper, last_step, stop, watchdog.at)


def stopped(
    status: runfolder.Status | None, ranks: Ranks, step: int, reason: str | None
) -> RunResult:
    """Record and return that a run was stopped; the ranks leave together. Collective."""
    then = (
        "rerun the same command to resume"
        if step and status
        else "rerun the same command to start again"
    )
    message = f"stopped after step {step} ({reason or 'another rank was asked to'}); {then}"
    with failing_together():  # a launcher that sees one rank leave ends the others
        if status and ranks.is_main:
            status.write_if_possible("stopped", message, EXIT_STOPPED)
    return RunResult("stopped", EXIT_STOPPED, step, message)


def run_steps(
    session: Session,
    bookkeeper: Bookkeeper,
    last_step: int,
    stop: runfolder.StopRequest,
    at: Callable[[str, int], None],
) -> RunResult:
    """Run the steps up to `last_step`, or until a stop is requested. Collective."""
    first_step = session.step
    with ExitStack() as stack:
        stream = stack.enter_context(session.stream())
        bookkeeper.start(stack)
        if session.step < last_step and bookkeeper.stop_at_start():
            return bookkeeper.stop()
        while session.step < last_step:
            at("data wait", session.step + 1)
            result = train_step(session, stream, stop.reason, bookkeeper.watch)
            bookkeeper.after_step(result)
            if session.config.train.compile and session.step == first_step + COMPILING_STEPS:
                stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
            if bookkeeper.stop_requested and session.step < last_step:
                return bookkeeper.stop()
        return bookkeeper.finish()
