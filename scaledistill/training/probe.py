"""The probe of a run: the student under training, scored as its export would be.

Enters: a session. Leaves: figures for the run's record. When to probe is left to `train`, the score
to `glue.probe`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scaledistill.data.tokenizer import load_tokenizer
from scaledistill.distributed.ranks import failing_together
from scaledistill.glue.plan import positions
from scaledistill.glue.probe import SimilarityProbe
from scaledistill.models.capture import build_encoder
from scaledistill.models.student import exported
from scaledistill.training.session import Session


class StudentProbe:
    """Scores a run's student; rank 0 has the pairs and computes."""

    def __init__(self, session: Session) -> None:
        """Read the pairs that `evaluation` names. Collective.

        Raises:
            DataError: they cannot be read.
        """
        self._session, config = session, session.config
        folder = config.evaluation.data_folder if config.evaluation else None
        with failing_together():
            if session.ranks.is_main:
                tokenizer = load_tokenizer(config.teacher.model, config.teacher.revision)
                limit = positions(session.student.config)
                self._probe = SimilarityProbe(tokenizer, Path(folder) if folder else None, limit)

    def scores(self) -> dict[str, float]:
        """Return "probe/<metric>" of the student as it is now, on rank 0; empty elsewhere.
        Collective.
        """
        session = self._session
        student, weights = session.student, session.student.engine.weights()
        found: dict[str, float] = {}
        with failing_together():
            if session.ranks.is_main:
                num_layers = session.config.students[student.name].num_layers
                config, state = exported(
                    student.config, {**student.untrained, **weights}, num_layers
                )
                encoder = build_encoder(config)
                encoder.load_state_dict(state)
                nn.Module.to(encoder, session.ranks.device)
                scores = self._probe.score(encoder.eval())
                found = {f"probe/{metric}": value for metric, value in scores.items()}
        return found
