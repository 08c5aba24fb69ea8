"""Validation during a run: losses on held-out rows, the best students so far, the probe.

Inputs: a session. Outputs: the losses and the scores, and the best students in
`export/<name>-best`. Not handled here: when to validate (`training.loop`), the loss itself
(`training.step`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaledistill.errors import DataError, PeerError
from scaledistill.training.session import Session, Student
from scaledistill.training.step import validation_losses

if TYPE_CHECKING:
    from scaledistill.training.probe import StudentProbe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    losses: dict[str, float]
    """By student."""
    scores: dict[str, float]
    """The probe's, by metric name, on rank 0; {} without one."""
    best: dict[str, dict[str, Any]]
    """The best export of each student after this validation, as in `Student.best`."""


class Validator:
    """Validates the students under training and exports each whenever it is the best so far."""

    def __init__(
        self, session: Session, stop_reason: Callable[[], str | None], at: Callable[[str], None]
    ) -> None:
        """Load the probe if `evaluation.probe` is set. Collective.

        Args:
            stop_reason: returns why to stop, or None.
            at: called with each phase that begins.
        """
        self._session, self._stop_reason, self._at = session, stop_reason, at
        self._probes: list[StudentProbe] = []
        evaluation = session.config.evaluation
        if evaluation and evaluation.probe:
            # Imported here because it takes seconds.
            from scaledistill.training.probe import StudentProbe

            self._probes = [StudentProbe(session, student) for student in session.students]

    def validate(self) -> Validation | None:
        """Validate, and export the students that are the best so far. Collective.

        Returns:
            None if a stop was requested meanwhile.
        """
        losses = validation_losses(self._session, self._stop_reason, self._at)
        if losses is None:
            return None
        best = {
            student.name: self._best_after(student, losses[student.name])
            for student in self._session.students
        }
        self._at("probe")
        scores: dict[str, float] = {}
        dropped = self._session.dropped  # whose engines a probe would keep in memory
        self._probes = [probe for probe in self._probes if probe.student.name not in dropped]
        for probe in self._probes:
            scores |= probe.scores()
        return Validation(losses, scores, best)

    def _best_after(self, student: Student, loss: float) -> dict[str, Any]:
        """Export a student if its loss is its lowest; return what `Student.best` is then."""
        session = self._session
        # Losses on other held-out rows cannot be compared with this one.
        rows = session.validation_identity()
        comparable = student.best if student.best.get("yardstick") == rows else {}
        if not (math.isfinite(loss) and loss < comparable.get("validation_loss", math.inf)):
            return student.best
        self._at("export")
        try:
            session.export(student, f"{student.name}-best", {"validation loss": loss})
        except (DataError, PeerError) as error:
            kept = (
                "the previous best export is kept"
                if student.best
                else "there is no best export yet"
            )
            if session.ranks.is_main:
                log.warning("%s; training continues, %s", error, kept)
            return student.best
        return {"step": session.step, "validation_loss": loss, "yardstick": rows}
