"""One optimizer step, and the validation loss: where teacher, students, data and loss meet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaledistill.data.stream import Batch
from scaledistill.distributed.ranks import all_reduce_sum, any_rank
from scaledistill.engines import StepOutcome
from scaledistill.errors import DataError
from scaledistill.metrics.stopwatch import Stopwatch
from scaledistill.models.view import capture_view
from scaledistill.relations import QKV, RelationLoss
from scaledistill.training.session import Session, Student

log = logging.getLogger(__name__)

STOP_CHECK_BATCHES = 4
"""Validation batches between checks for a stop request, each of which waits for the GPU."""
LOWER_RATE = "Lower train.learning_rate or lengthen train.warmup_steps"
NOT_FINITE = {
    "teacher": (
        "the teacher's Q, K or V were",
        'Set teacher.dtype to "bf16" or "fp32" if it is "fp16"; otherwise check the weights of '
        "teacher.model",
    ),
    "student": (
        "the student's output was",
        f'{LOWER_RATE}, or set train.precision to "bf16" or "fp32" if it is "fp16"',
    ),
    "loss": ("the loss, though neither model's output, was", LOWER_RATE),
    "gradient": (
        "a gradient, though not the loss, was",
        f"{LOWER_RATE}, or lower train.max_grad_norm",
    ),
}
"""For each cause of a skipped step: its description and the remedy."""
PROBE_BATCHES = 2
"""Micro-batches that an export is compared on."""
PROBE_TOLERANCE = {
    torch.float32: (0.01, 1e-4),
    torch.bfloat16: (0.05, 1e-3),
    torch.float16: (0.05, 1e-3),
}
"""Tolerances (relative, absolute) between the loss of an export and that of the run on the same
rows, by the dtype of the student's output. Both compute the same function, but kernels may sum in
another order and compiled blocks round less often. Misplaced weights are tens of percent off."""


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step, reduced over micro-batches and ranks: equal on all ranks."""

    students: dict[str, StudentStep]
    """By name."""
    stop_requested: bool

    @property
    def loss(self) -> float:
        """The sum over students."""
        return sum(student.loss for student in self.students.values())


@dataclass(frozen=True)
class StudentStep:
    """A student's part of an optimizer step."""

    loss: float
    """The weighted sum over pairs, a mean over the global batch."""
    by_pair: dict[str, float]
    learning_rate: float
    grad_norm: float | torch.Tensor
    """Before clipping; on the device until it is recorded."""
    skipped: bool
    """The loss or a gradient was not finite: nothing was updated."""
    cause: str | None = None
    """What was first not finite in a skipped step: "teacher", "student", "loss" or "gradient"."""


def train_step(
    session: Session,
    stream: Iterator[Batch],
    stop_reason: Callable[[], str | None],
    watch: Stopwatch,
) -> StepResult:
    """Run one optimizer step of every student on the next global batch. Collective."""
    students, ranks = session.students, session.ranks
    accumulation, pairs = session.run.accumulation, list(session.config.relations.pairs)
    # A row per student, of its total loss and each pair's; a last row for the stop requests.
    sums = torch.zeros(len(students) + 1, 1 + len(pairs), dtype=torch.float64, device=ranks.device)
    batches = []
    for micro in range(accumulation):
        with watch.phase("data wait"):
            batch = next(stream)
        batches.append(batch)
        with watch.phase("teacher"):
            target = session.teacher(batch.tokens)
        for number, student in enumerate(students):
            if student.dropout:
                seed_dropout(session.config.run.seed, session.step, micro, ranks.rank)
            loss = student_loss(student, target, batch, watch)
            # A non-finite loss makes the gradients NaN: the engine skips the step on all ranks.
            poison = torch.where(torch.isfinite(loss.total.detach()), 1.0, torch.nan)
            with watch.phase("backward"):
                student.engine.backward(loss.total * poison, last=micro + 1 == accumulation)
            sums[number] += torch.stack(
                [loss.total.detach(), *(loss.by_pair[pair].detach() for pair in pairs)]
            )
            # Else the loss's graph would stay in memory during the next forward.
            del loss, poison
        del target
    rates = [student.learning_rate(session.step) for student in students]
    with watch.phase("optimizer"):
        outcomes = [each.engine.step(rate) for each, rate in zip(students, rates, strict=True)]
    sums[-1] = float(stop_reason() is not None)
    # Our one device-to-host synchronisation per step.
    *losses, (stops, *_) = all_reduce_sum(sums).tolist()
    session.step += 1
    results = {
        student.name: _student_step(session, own, rate, outcome)
        for student, own, rate, outcome in zip(students, losses, rates, outcomes, strict=True)
    }
    return StepResult(_with_causes(session, results, batches), stops > 0)


def _student_step(
    session: Session, sums: list[float], rate: float, outcome: StepOutcome
) -> StudentStep:
    """Return a student's part of a step.

    Args:
        sums: its total loss and each pair's, summed over micro-batches and ranks.
    """
    run = session.run
    total, *by_pair = (value / (run.accumulation * run.world_size) for value in sums)
    skipped = outcome.skipped or not math.isfinite(total)
    losses = dict(zip(run.config.relations.pairs, by_pair, strict=True))
    return StudentStep(total, losses, rate, outcome.grad_norm, skipped)


@torch.no_grad()
def _with_causes(
    session: Session, results: dict[str, StudentStep], batches: Iterable[Batch]
) -> dict[str, StudentStep]:
    """Add to each skipped step what was first not finite on any rank. Collective.

    The batches are run again, by the teacher once for all these students. Since their steps were
    skipped, the weights are unchanged; successful steps pay nothing for this.
    """
    skipped = [student for student in session.students if results[student.name].skipped]
    if not skipped:
        return results
    for student in skipped:
        student.engine.train_mode(False)
    # Values that are not finite: the teacher's, then each student's.
    counts = torch.zeros(1 + len(skipped), dtype=torch.float64, device=session.ranks.device)
    for batch in batches:
        counts[0] += _count_not_finite(session.teacher(batch.tokens), batch.mask_BT)
        for number, student in enumerate(skipped, start=1):
            output = student.engine.forward(batch.tokens)
            counts[number] += _count_not_finite(output, batch.mask_BT)
    for student in skipped:
        student.engine.train_mode(True)
    teacher, *own = all_reduce_sum(counts).tolist()
    results = dict(results)
    for student, count in zip(skipped, own, strict=True):
        result = results[student.name]
        cause = "gradient" if math.isfinite(result.loss) else "loss"
        cause = "teacher" if teacher else "student" if count else cause
        results[student.name] = replace(result, cause=cause)
    return results


def _count_not_finite(qkv: QKV, mask_BT: Tensor | None) -> Tensor:
    """Count the NaN or infinite values on real tokens: a float64 scalar on their device."""
    count = torch.zeros((), dtype=torch.float64, device=qkv.q.device)
    for values_BTD in qkv:
        wrong_BT = (~values_BTD.isfinite()).sum(-1)
        count += (wrong_BT if mask_BT is None else wrong_BT * mask_BT).sum()
    return count


def student_loss(student: Student, target: QKV, batch: Batch, watch: Stopwatch) -> RelationLoss:
    """Return a student's loss of a micro-batch against the teacher's Q, K and V."""
    with watch.phase("student"):
        found = student.engine.forward(batch.tokens)
    with watch.phase("loss"):
        return student.loss(target, found, batch.tokens)


class ExportProbe:
    """The loss of a student under training on a few rows, to compare its export with.

    The rows are the first of `data.validation` if it is set, else those of the first training step.
    Rows whose loss is not finite under training, as in fp16, are not compared.
    """

    @torch.no_grad()
    def __init__(self, session: Session, student: Student) -> None:
        """Run the teacher and the student on the rows. Collective."""
        self._session, self._student, engine = session, student, student.engine
        engine.train_mode(False)
        with ExitStack() as stack:
            batches = (
                session.validation_batches()
                if session.held_out
                else stack.enter_context(session.stream(0))
            )
            # Of the stream, no more than the first step's.
            most = PROBE_BATCHES if session.held_out else session.run.accumulation
            probed = list(islice(batches, min(PROBE_BATCHES, most)))
        self._compared: list[tuple[Batch, QKV, float]] = []
        for batch in probed:
            target, found = session.teacher(batch.tokens), engine.forward(batch.tokens)
            self._dtype = found.q.dtype
            loss = float(student.loss(target, found, batch.tokens).total)
            if math.isfinite(loss):
                self._compared.append((batch, target, loss))
        engine.train_mode(True)

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Compare the loss of an export that was loaded again. Not collective.

        Args:
            model: the export, complete up to the student's tap.

        Raises:
            DataError: its loss differs from the run's by more than rounding can explain.
        """
        config, device = self._student.config, self._session.ranks.device
        rows = "data.validation" if self._session.held_out else "data.train"
        if not self._compared:
            log.warning(
                "the student's loss is not finite on the first rows of %s, so the export is not "
                "compared with it",
                rows,
            )
            return
        view = capture_view(model, config.num_hidden_layers)
        view.module.to(device, self._dtype).eval()
        loss = fmean(
            float(self._student.loss(target, view(batch.tokens), batch.tokens).total)
            for batch, target, _ in self._compared
        )
        expected = fmean(in_run for _, _, in_run in self._compared)
        relative, absolute = PROBE_TOLERANCE[self._dtype]
        if not abs(loss - expected) <= relative * abs(expected) + absolute:
            raise DataError(
                f"the student's loss on rows of {rows} is {expected:.4f} in the run, but "
                f"{loss:.4f} once exported and loaded again; expected equal losses within "
                f"{relative:.0%}. The export was not put in place, and the run's checkpoints may "
                "be wrong too: start over with other settings in `engine`, and report this"
            )


def seed_dropout(*numbers: int) -> None:
    """Seed a forward's randomness from the run's position, so that no random state is saved."""
    torch.manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


@torch.no_grad()
def validation_losses(
    session: Session,
    stop_reason: Callable[[], str | None] = lambda: None,
    on_batch: Callable[[str], None] = lambda phase: None,
) -> dict[str, float] | None:
    """Return each student's mean loss over the held-out rows; None if a stop was requested.

    It does not depend on the number of ranks or on the micro-batch. Collective.
    """
    students, ranks, watch = session.students, session.ranks, Stopwatch()
    for student in students:
        student.engine.train_mode(False)
    stopped = False
    # Σ loss × rows of each student, Σ rows
    sums = torch.zeros(len(students) + 1, dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(session.validation_batches()):
        on_batch("validation")
        if number % STOP_CHECK_BATCHES == 0 and (
            stopped := any_rank(stop_reason() is not None, ranks.device)
        ):
            break
        target = session.teacher(batch.tokens)
        for place, student in enumerate(students):
            loss = student_loss(student, target, batch, watch)
            sums[place] += loss.total.double() * batch.weight
            del loss
        del target  # else it would stay in memory during the teacher's next forward
        sums[-1] += batch.weight
    for student in students:
        student.engine.train_mode(True)
    if stopped:
        return None
    *loss_sums, rows = all_reduce_sum(sums).tolist()
    return {
        student.name: loss_sum / rows for student, loss_sum in zip(students, loss_sums, strict=True)
    }
