"""Validation during a run: the loss on held-out rows, the best student so far, the probe.

Inputs: a session. Outputs: the loss and the scores, and the best student in `export/<name>-best`.
Not handled here: when to validate (`training.loop`), the loss itself (`training.step`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaledistill.errors import DataError, PeerError
from scaledistill.training.session import Session
from scaledistill.training.step import validation_loss

if TYPE_CHECKING:
    from scaledistill.training.probe import StudentProbe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    loss: float
    scores: dict[str, float]
    """The probe's, on rank 0; {} without one."""
    best: dict[str, Any]
    """The best export after this validation, as in `Session.best`."""

    @property
    def finite_loss(self) -> float | None:
        """The loss, or None if it is not finite."""
        return self.loss if math.isfinite(self.loss) else None


class Validator:
    """Validates the student under training and exports it whenever it is the best so far."""

    def __init__(
        self, session: Session, stop_reason: Callable[[], str | None], at: Callable[[str], None]
    ) -> None:
        """Load the probe if `evaluation.probe` is set. Collective.

        Args:
            stop_reason: returns why to stop, or None.
            at: called with each phase that begins.
        """
        self._session, self._stop_reason, self._at = session, stop_reason, at
        self._probe: StudentProbe | None = None
        evaluation = session.config.evaluation
        if evaluation and evaluation.probe:
            # Imported here because it takes seconds.
            from scaledistill.training.probe import StudentProbe

            self._probe = StudentProbe(session)

    def validate(self) -> Validation | None:
        """Validate, and export the student if it is the best so far. Collective.

        Returns:
            None if a stop was requested meanwhile.
        """
        loss = validation_loss(self._session, self._stop_reason, self._at)
        if loss is None:
            return None
        best = self._best_after(loss)
        self._at("probe")
        return Validation(loss, self._probe.scores() if self._probe else {}, best)

    def _best_after(self, loss: float) -> dict[str, Any]:
        """Export the student if its loss is the lowest; return what `Session.best` is then."""
        session = self._session
        # Losses on other held-out rows cannot be compared with this one.
        rows = session.validation_identity()
        comparable = session.best if session.best.get("yardstick") == rows else {}
        if not (math.isfinite(loss) and loss < comparable.get("validation_loss", math.inf)):
            return session.best
        self._at("export")
        try:
            session.export(f"{session.student.name}-best", {"validation loss": loss})
        except (DataError, PeerError) as error:
            kept = (
                "the previous best export is kept"
                if session.best
                else "there is no best export yet"
            )
            if session.ranks.is_main:
                log.warning("%s; training continues, %s", error, kept)
            return session.best
        return {"step": session.step, "validation_loss": loss, "yardstick": rows}
