"""Skipped steps: counted, reported, and students that have diverged.

Inputs: the result of each step. Outputs: warnings, and once too many steps in a row were skipped,
the students to drop, or an error that ends the run. Not handled here: finding out what was not
finite (`training.step`), dropping students (`training.session`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from scaledistill.config.schema import TrainSettings
from scaledistill.distributed.ranks import Ranks, reported_once
from scaledistill.errors import DivergedError
from scaledistill.training.step import NOT_FINITE, StepResult

log = logging.getLogger(__name__)


class SkipGuard:
    """Finds the students of which more than `train.max_skipped_steps` steps in a row were
    skipped.
    """

    def __init__(
        self, settings: TrainSettings, ranks: Ranks, newest_checkpoint: Callable[[], int | None]
    ) -> None:
        """Start with no skipped step.

        Args:
            newest_checkpoint: returns the step of the newest checkpoint, to name it in the error;
                may be collective.
        """
        self._settings, self._ranks = settings, ranks
        self._newest_checkpoint = newest_checkpoint
        self._in_a_row: Counter[str] = Counter()

    def check(self, step: int, result: StepResult) -> dict[str, str]:
        """Report the students whose step was skipped. Collective.

        Args:
            step: how many steps have been made.
            result: of the last one.

        Returns:
            The students to drop, with the reason, if `train.on_divergence` is "drop" and others
            are left.

        Raises:
            DivergedError: on rank 0, if the run ends because a student has diverged.
            PeerError: on the other ranks.
        """
        batch, limit = self._settings.global_batch_size, self._settings.max_skipped_steps
        samples = f"samples {(step - 1) * batch} to {step * batch - 1}"
        several = len(result.students) > 1
        diverged: dict[str, str] = {}
        for name, student in result.students.items():
            self._in_a_row[name] = self._in_a_row[name] + 1 if student.skipped else 0
            if not student.skipped:
                continue
            of = f" of student {name}" if several else ""
            what, _ = NOT_FINITE[student.cause or "loss"]
            if self._ranks.is_main:
                log.warning(
                    "step %d%s skipped: %s not finite on %s",
                    *(step, of, what, samples),
                    extra={"event": "skipped"},
                )
            if self._in_a_row[name] > limit:
                diverged[name] = (
                    f"{self._in_a_row[name]} steps in a row{of} had a non-finite loss or gradient, "
                    f"the last on {samples}, where {what} not finite"
                )
        others = len(result.students) - len(diverged)
        # Without the teacher's values no student can be trained.
        by_teacher = any(result.students[name].cause == "teacher" for name in diverged)
        if self._settings.on_divergence == "drop" and others and not by_teacher:
            return diverged
        for name, reason in diverged.items():
            self._stop(reason, result.students[name].cause or "loss", others)
        return {}

    def _stop(self, reason: str, cause: str, others: int) -> NoReturn:
        limit, newest = self._settings.max_skipped_steps, self._newest_checkpoint()
        _, remedy = NOT_FINITE[cause]
        go_on = (
            ', or set train.on_divergence to "drop" to train the others on'
            if others and cause != "teacher"
            else ""
        )
        checkpoint = (
            "there is no checkpoint yet"
            if newest is None
            else f"the last checkpoint is step {newest}"
        )
        with reported_once(self._ranks):
            raise DivergedError(
                f"{reason}; train.max_skipped_steps={limit} allows no more. {remedy}{go_on}; "
                f"{checkpoint}"
            )
