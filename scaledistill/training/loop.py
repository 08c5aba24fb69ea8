"""The training loop: runs the steps and does what is due between them.

Inputs: a configuration. Outputs: how the run ended; its files are in `run.folder`. Not handled
here: the step itself (`training.step`) and opening models and data (`training.session`).
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from scaledistill.checkpoint import mirror
from scaledistill.config.schema import DistillConfig
from scaledistill.data.stream import Batch
from scaledistill.distributed.launcher import stated_rank
from scaledistill.distributed.ranks import (
    Ranks,
    any_rank,
    failing_together,
    process_group,
    reported_once,
)
from scaledistill.distributed.watchdog import Watchdog
from scaledistill.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED, counted
from scaledistill.metrics.recorder import RowLog
from scaledistill.metrics.stopwatch import Stopwatch
from scaledistill.models.hub import names_resolved_once
from scaledistill.preflight import checks, fetching
from scaledistill.preflight.report import start_summary
from scaledistill.report.page import report_at_end
from scaledistill.run import folder as runfolder
from scaledistill.run.resume_hint import newest_step, resume_hint
from scaledistill.training.maps import write_session_maps
from scaledistill.training.profiling import WARMUP_STEPS, check_trial_steps, profile_run
from scaledistill.training.record import MetricsLog, open_recorder
from scaledistill.training.saves import CheckpointSchedule
from scaledistill.training.session import Session, open_session
from scaledistill.training.skips import SkipGuard
from scaledistill.training.step import ExportProbe, StepResult, train_step
from scaledistill.training.validation import Validation, Validator

log = logging.getLogger(__name__)

STARTING_OVER = ".starting-over"
"""A file in a new run's folder until the older run's copies are moved away."""
COMPILING_STEPS = 10
"""After this many steps nothing more is compiled: batches with new shapes then run uncompiled."""

OpenSession = Callable[..., Session]
"""Opens models and data, as `training.session.open_session` does."""
TrainStep = Callable[[Session, Iterator[Batch], Callable[[], str | None], Stopwatch], StepResult]
"""Makes one optimizer step, as `training.step.train_step` does."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    state: str
    """"done", "stopped", "failed" (its evaluation) or, for a dry run, "dry run"."""
    exit_code: int
    step: int
    message: str


@names_resolved_once()
def distill(
    config: DistillConfig,
    *,
    fresh: bool = False,
    dry_run_steps: int | None = None,
    profile_steps: int | None = None,
    open_session: OpenSession = open_session,
    train_step: TrainStep = train_step,
) -> RunResult:
    """Distil the configured student. Collective.

    The run resumes from the newest good checkpoint in its folder, if there is one.

    Args:
        config: the run's settings.
        fresh: start over; an existing run folder is renamed, not deleted.
        dry_run_steps: run this many real steps from the start and write nothing.
        profile_steps: run a few warm-up steps, then this many under the profiler; write only the
            profile.
        open_session, train_step: open models and data, and make one optimizer step; tests pass
            functions that wrap them.

    Raises:
        ConfigError: the settings don't fit each other, the models, the data, or the run that they
            would resume.
        DataError: data, model or disk do not meet the run's needs.
        DivergedError: too many steps in a row had a non-finite loss or gradient.
    """
    result = _run(config, fresh, dry_run_steps, profile_steps, open_session, train_step)
    # Free all models and engines, so that this process can go on to evaluate. They are in reference
    # cycles; their parameters are in further cycles that only a second pass can reach, through
    # autograd's references.
    for _ in range(2):
        gc.collect()
    if result.state != "done" or stated_rank() != "0":
        return result
    # The other ranks have exited and freed their memory.
    if config.evaluation and config.evaluation.tasks:
        from scaledistill.glue.api import evaluate_run  # imported here because it takes seconds

        state, exit_code, message = evaluate_run(config, result.message)
        result = replace(result, state=state, exit_code=exit_code, message=message)
    if result.state != "stopped":
        report_at_end(Path(config.run.folder))
    return result


def _run(
    config: DistillConfig,
    fresh: bool,
    dry_run_steps: int | None,
    profile_steps: int | None,
    open_session: OpenSession,
    train_step: TrainStep,
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
            logs=ranks.is_main,
            max_hours=run.max_hours,
        )
        stack.enter_context(stop.listening())
        if config.run.deterministic:
            stack.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            torch.use_deterministic_algorithms(True)
        status = None
        if not trial:
            last_step = config.train.max_steps
            status = stack.enter_context(
                runfolder.owned(Path(run.folder), last_step, ranks, fresh=fresh)
            )
            with failing_together():
                if config.checkpoint.remote and ranks.is_main:
                    set_copies_aside(config.checkpoint.remote, Path(run.folder), fresh=fresh)
            watchdog.record_failure = partial(
                status.write_failure, "failed", exit_code=EXIT_ENVIRONMENT
            )
        else:
            last_step = dry_run_steps or (profile_steps or 0) + WARMUP_STEPS
            with reported_once(ranks):
                check_trial_steps(last_step, config.train.max_steps, dry_run_steps)
        stack.enter_context(watchdog.naming_lost_ranks())
        watchdog.at("checking")
        fetching.fetch_configs(config, ranks)
        with failing_together():
            plan = checks.plan_run(
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
            opened=(plan.sources, plan.order, plan.held_out),
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
        return _train(session, status, last_step, stop, watchdog.at, train_step)


def set_copies_aside(remote: str, folder: Path, *, fresh: bool) -> None:
    """Move an older run's copies away if this run starts over, or if such a start was ended here.

    Without that, a restart would resume the older run from them.
    """
    mark = folder / STARTING_OVER
    if fresh:
        mark.touch()
    if mark.exists():
        if aside := mirror.set_aside(remote):
            log.info("--fresh: the old run's copies are kept as %s", aside)
        mark.unlink()


def _train(
    session: Session,
    status: runfolder.Status | None,
    last_step: int,
    stop: runfolder.StopRequest,
    at: Callable[..., None],
    train_step: TrainStep,
) -> RunResult:
    """Run the steps with what is due between them; a dry run only logs. Collective."""
    watch = Stopwatch(session.ranks.device, at)
    if status is None:
        metrics = MetricsLog(session, watch, last_step, RowLog(last_step))
        return run_steps(session, last_step, stop, at, watch, metrics, train_step=train_step)
    stop.answer = "saving a checkpoint and stopping"
    status.reached(session.step, session.epochs())
    status.dropped = session.dropped
    recorder = open_recorder(session, status, last_step)
    if recorder and recorder.show_notices(lambda: stop.notice):
        stop.prints_notice = False
    metrics = MetricsLog(session, watch, last_step, recorder, status)
    validates = session.config.train.validation_every_steps > 0
    with recorder or nullcontext():
        result = run_steps(
            session,
            last_step,
            stop,
            at,
            watch,
            metrics,
            validator=Validator(session, stop.reason, at) if validates else None,
            checkpoints=CheckpointSchedule(session, at, metrics.saved),
            status=status,
            train_step=train_step,
        )
        metrics.ended(result.state, result.message)
    # Rank 0's trackers may take long to finish, and with NCCL the others could not leave before it.
    at("ending")
    any_rank(False, session.ranks.device)
    return result


def run_steps(
    session: Session,
    last_step: int,
    stop: runfolder.StopRequest,
    at: Callable[..., None],
    watch: Stopwatch,
    metrics: MetricsLog,
    *,
    validator: Validator | None = None,
    checkpoints: CheckpointSchedule | None = None,
    status: runfolder.Status | None = None,
    train_step: TrainStep = train_step,
) -> RunResult:
    """Run the steps up to `last_step`, or until a stop is requested. Collective.

    A dry run has no validator, no checkpoints and no status.
    """
    ranks, train, first_step = session.ranks, session.config.train, session.step
    folder = Path(session.config.run.folder)
    newest = checkpoints.newest if checkpoints else partial(newest_step, folder)
    guard = SkipGuard(train, ranks, newest)
    with ExitStack() as stack:
        stream = stack.enter_context(session.stream())
        if session.step < last_step and any_rank(stop.reason() is not None, ranks.device):
            return stopped(status, ranks, session.step, stop.acknowledge())
        stopping, reason = False, None
        while session.step < last_step:
            at("data wait", session.step + 1)
            result = train_step(session, stream, stop.reason, watch)
            step, at_end = session.step, session.step == last_step
            metrics.reached(step)
            if result.stop_requested:
                stopping, reason = True, stop.acknowledge()

            count_skips(session, result)
            if diverged := guard.check(step, result):
                session.drop(diverged, writes=status is not None)

            validation = None
            if validator and (at_end or step % train.validation_every_steps == 0):
                with watch.paused():
                    validation = validator.validate()
                take_over(session, validation)
                if not validation:
                    stopping, reason = True, stop.acknowledge()

            leaving = stopping or at_end
            due = step == 1 or step % session.config.logging.every_steps == 0
            if due or validation or leaving:
                metrics.record(result, validation)

            if checkpoints:
                with watch.paused():
                    checkpoints.after_step(leaving=leaving)

            if train.compile and step == first_step + COMPILING_STEPS:
                stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
            if stopping and not at_end:
                return stopped(status, ranks, step, reason)
        return finished(session, status, stop, at)


# Functions, because a loop's variable would keep a dropped student in memory.


def count_skips(session: Session, result: StepResult) -> None:
    """Add a step's skips to those of each student."""
    for student in session.students:
        student.skipped_steps += result.students[student.name].skipped


def take_over(session: Session, validation: Validation | None) -> None:
    """Keep a validation's results with the students; None if it was stopped."""
    for student in session.students:
        loss = validation.losses[student.name] if validation else math.nan
        student.last_validation = loss if math.isfinite(loss) else None
        student.validated_at = session.step
        if validation:
            student.best = validation.best[student.name]


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


def finished(
    session: Session,
    status: runfolder.Status | None,
    stop: runfolder.StopRequest,
    at: Callable[[str], None],
) -> RunResult:
    """Export the students, unless this is a dry run; return that all steps are done. Collective."""
    step = session.step
    if status is None:
        message = f"{counted(step, 'step')} run, nothing written"
        return RunResult("dry run", EXIT_DONE, step, message)
    at("export")
    stop.answer = "all steps are done and saved; the run ends as soon as the student is exported"
    folders = []
    for student in session.students:
        # A resume may have turned validation off.
        before = (
            "" if student.validated_at in (None, step) else f" at step {student.validated_at:,}"
        )
        losses = {f"validation loss{before}": student.last_validation}
        probe = ExportProbe(session, student)
        folders.append(str(session.export(student, student.name, losses, probe.check)))
    write_session_maps(session)
    curve = Path(session.config.run.folder) / "loss.png"
    what = "the student is" if len(folders) == 1 else "the students are"
    message = (
        f"{counted(step, 'step')} done; {what} in {', '.join(folders)}, the loss curve in {curve}"
        + "".join(
            f"; {name} was dropped at step {found['step']}"
            for name, found in session.dropped.items()
        )
    )
    if session.ranks.is_main:
        status.write_if_possible("done", message, EXIT_DONE)
    return RunResult("done", EXIT_DONE, step, message)
