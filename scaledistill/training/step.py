"""One optimizer step, and the validation loss: where teacher, student, data and loss meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaledistill.config.schedule import learning_rate
from scaledistill.data.stream import Batch
from scaledistill.distributed.ranks import all_reduce_sum, any_rank
from scaledistill.errors import DataError
from scaledistill.metrics.stopwatch import Stopwatch
from scaledistill.models.view import capture_view
from scaledistill.relations import QKV, RelationLoss
from scaledistill.training.session import Session

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

    losses: dict[str, float]
    """"loss" (the weighted sum) and "loss/<student>/<pair>": means over the global batch."""
    learning_rate: float
    grad_norm: float | torch.Tensor
    """Before clipping; on the device until it is recorded."""
    skipped: bool
    """The loss or a gradient was not finite: nothing was updated."""
    stop_requested: bool
    cause: str | None = None
    """What was first not finite in a skipped step: "teacher", "student", "loss" or "gradient"."""


def train_step(
    session: Session,
    stream: Iterator[Batch],
    stop_reason: Callable[[], str | None],
    watch: Stopwatch,
) -> StepResult:
    """Run one optimizer step on the next global batch. Collective."""
    student, ranks = session.student, session.ranks
    pairs = list(session.config.relations.pairs)
    # Sums of the total loss, of each pair's loss and of the stop requests.
    sums = torch.zeros(2 + len(pairs), dtype=torch.float64, device=ranks.device)
    accumulation, batches = session.run.accumulation, []
    for micro in range(accumulation):
        with watch.phase("data wait"):
            batch = next(stream)
        batches.append(batch)
        if student.dropout:
            seed_dropout(session.config.run.seed, session.step, micro, ranks.rank)
        loss = forward_loss(session, batch, watch)
        # A non-finite loss makes the gradients NaN, so that the engine skips the step on all ranks.
        poison = torch.where(torch.isfinite(loss.total.detach()), 1.0, torch.nan)
        with watch.phase("backward"):
            student.engine.backward(loss.total * poison, last=micro + 1 == accumulation)
        sums[:-1] += torch.stack(
            [loss.total.detach(), *(loss.by_pair[pair].detach() for pair in pairs)]
        )
        # Else the loss's graph would stay in memory during the next micro-batch's forward.
        del loss, poison
    rate = learning_rate(session.step, session.config.train)
    with watch.phase("optimizer"):
        outcome = student.engine.step(rate)
    sums[-1] = float(stop_reason() is not None)
    # Our one device-to-host synchronisation per step.
    *losses, stops = all_reduce_sum(sums).tolist()
    names = ["loss", *(f"loss/{student.name}/{pair}" for pair in pairs)]
    means = [loss / (accumulation * ranks.world_size) for loss in losses]
    session.step += 1
    is_finite = math.isfinite(means[0])
    skipped = outcome.skipped or not is_finite
    cause = skip_cause(session, batches, loss_is_finite=is_finite) if skipped else None
    return StepResult(
        dict(zip(names, means, strict=True)), rate, outcome.grad_norm, skipped, stops > 0, cause
    )


@torch.no_grad()
def skip_cause(session: Session, batches: Iterable[Batch], *, loss_is_finite: bool) -> str:
    """Rerun a skipped step's batches; return what was first not finite on any rank. Collective.

    Since the step was skipped, the weights are unchanged and can be used again; successful steps
    pay nothing for this.
    """
    student, ranks = session.student, session.ranks
    student.engine.train_mode(False)
    counts = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in batches:
        outputs = both_outputs(session, batch, Stopwatch())
        counts += torch.stack([_count_not_finite(qkv, batch.mask_BT) for qkv in outputs])
    student.engine.train_mode(True)
    teacher, own = all_reduce_sum(counts).tolist()
    if teacher:
        return "teacher"
    if own:
        return "student"
    return "gradient" if loss_is_finite else "loss"


def _count_not_finite(qkv: QKV, mask_BT: Tensor | None) -> Tensor:
    """Count the NaN or infinite values on real tokens: a float64 scalar on their device."""
    count = torch.zeros((), dtype=torch.float64, device=qkv.q.device)
    for values_BTD in qkv:
        wrong_BT = (~values_BTD.isfinite()).sum(-1)
        count += (wrong_BT if mask_BT is None else wrong_BT * mask_BT).sum()
    return count


def forward_loss(session: Session, batch: Batch, watch: Stopwatch) -> RelationLoss:
    """Return the relation loss of a micro-batch: the teacher's Q, K and V against the student's."""
    target, found = both_outputs(session, batch, watch)
    with watch.phase("loss"):
        return session.student.loss(target, found, batch.tokens)


def both_outputs(session: Session, batch: Batch, watch: Stopwatch) -> tuple[QKV, QKV]:
    """Return the teacher's and the student's Q, K and V of a micro-batch."""
    with watch.phase("teacher"):
        target = session.teacher(batch.tokens)
    with watch.phase("student"):
        return target, session.student.engine.forward(batch.tokens)


class ExportProbe:
    """The loss of the student under training on a few rows, to compare its export with.

    The rows are the first of `data.validation` if it is set, else those of the first training step.
    """

    @torch.no_grad()
    def __init__(self, session: Session) -> None:
        """Run the teacher and the student on the rows. Collective."""
        self._session, engine = session, session.student.engine
        engine.train_mode(False)
        with ExitStack() as stack:
            batches = (
                session.validation_batches()
                if session.held_out
                else stack.enter_context(session.stream(0))
            )
            # Of the stream, no more than the first step's.
            most = PROBE_BATCHES if session.held_out else session.run.accumulation
            self._batches = list(islice(batches, min(PROBE_BATCHES, most)))
        self._targets = [session.teacher(batch.tokens) for batch in self._batches]
        outputs = [engine.forward(batch.tokens) for batch in self._batches]
        self._dtype = outputs[0].q.dtype
        self._loss = self._mean_loss(outputs)
        engine.train_mode(True)

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Compare the loss of an export that was loaded again. Not collective.

        Args:
            model: the export, complete up to the student's tap.

        Raises:
            DataError: its loss differs from the run's by more than rounding can explain.
        """
        config, device = self._session.student.config, self._session.ranks.device
        view = capture_view(model, config.num_hidden_layers)
        view.module.to(device, self._dtype).eval()
        loss = self._mean_loss([view(batch.tokens) for batch in self._batches])
        relative, absolute = PROBE_TOLERANCE[self._dtype]
        if not abs(loss - self._loss) <= relative * abs(self._loss) + absolute:
            rows = "data.validation" if self._session.held_out else "data.train"
            raise DataError(
                f"the student's loss on rows of {rows} is {self._loss:.4f} in the run, but "
                f"{loss:.4f} once exported and loaded again; expected equal losses within "
                f"{relative:.0%}. The export was not put in place, and the run's checkpoints may "
                "be wrong too: start over with other settings in `engine`, and report this"
            )

    def _mean_loss(self, outputs: list[QKV]) -> float:
        loss = self._session.student.loss
        compared = zip(self._targets, outputs, self._batches, strict=True)
        total = sum(
            float(loss(target, found, batch.tokens).total) for target, found, batch in compared
        )
        return total / len(outputs)


def seed_dropout(*numbers: int) -> None:
    """Seed a forward's randomness from the run's position, so that no random state is saved."""
    torch.manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


@torch.no_grad()
def validation_loss(
    session: Session,
    stop_reason: Callable[[], str | None] = lambda: None,
    on_batch: Callable[[str], None] = lambda phase: None,
) -> float | None:
    """Return the mean loss over the held-out rows; None if a stop was requested. Collective.

    It does not depend on the number of ranks or on the micro-batch.
    """
    student, ranks = session.student, session.ranks
    student.engine.train_mode(False)
    stopped = False
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # Σ loss × rows, Σ rows
    for number, batch in enumerate(session.validation_batches()):
        on_batch("validation")
        if number % STOP_CHECK_BATCHES == 0 and (
            stopped := any_rank(stop_reason() is not None, ranks.device)
        ):
            break
        loss = forward_loss(session, batch, Stopwatch())
        sums += torch.stack(
            [loss.total.double() * batch.weight, torch.full_like(sums[0], batch.weight)]
        )
        del loss
    student.engine.train_mode(True)
    if stopped:
        return None
    loss_sum, rows = all_reduce_sum(sums).tolist()
    return loss_sum / rows
