"""Skipped steps: counted, reported, and the end of a run that has diverged.

Inputs: the result of each step. Outputs: warnings, and an error once too many steps in a row were
skipped. Not handled here: finding out what was not finite (`training.step`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from scaledistill.config.schema import TrainSettings
from scaledistill.distributed.ranks import Ranks, reported_once
from scaledistill.errors import DivergedError
from scaledistill.training.step import NOT_FINITE, StepResult

log = logging.getLogger(__name__)


class SkipGuard:
    """Ends a run in which more than `train.max_skipped_steps` steps in a row were skipped."""

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

    def check(self, step: int, result: StepResult) -> None:
        """Report the students whose step was skipped. Collective.

        Args:
            step: how many steps have been made.
            result: of the last one.

        Raises:
            DivergedError: on rank 0, if too many in a row were skipped.
            PeerError: on the other ranks.
        """
        for name, student in result.students.items():
            self._in_a_row[name] = self._in_a_row[name] + 1 if student.skipped else 0
            if student.skipped:
                of = f" of student {name}" if len(result.students) > 1 else ""
                self._check(step, name, student.cause or "loss", of)

    def _check(self, step: int, name: str, cause: str, of: str) -> None:
        batch, limit = self._settings.global_batch_size, self._settings.max_skipped_steps
        samples = f"samples {(step - 1) * batch} to {step * batch - 1}"
        what, remedy = NOT_FINITE[cause]
        if self._ranks.is_main:
            log.warning(
                "step %d%s skipped: %s not finite on %s",
                *(step, of, what, samples),
                extra={"event": "skipped"},
            )
        if self._in_a_row[name] <= limit:
            return
        newest = self._newest_checkpoint()
        checkpoint = (
            "there is no checkpoint yet"
            if newest is None
            else f"the last checkpoint is step {newest}"
        )
        with reported_once(self._ranks):
            raise DivergedError(
                f"{self._in_a_row[name]} steps in a row{of} had a non-finite loss or gradient, the "
                f"last on {samples}, where {what} not finite; train.max_skipped_steps={limit} "
                f"allows no more. {remedy}; {checkpoint}"
            )
