"""A run's probe: scores the student under training as its export would be scored.

Inputs: a session. Outputs: scores for the run's record. Not handled here: when to probe
(`training.loop`), how the score is computed (`glue.probe`).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scaledistill.data.tokenizer import load_tokenizer
from scaledistill.distributed.ranks import failing_together
from scaledistill.glue.plan import positions
from scaledistill.glue.probe import SimilarityProbe
from scaledistill.models.architectures import build_encoder
from scaledistill.models.student import exported
from scaledistill.training.session import Session, Student


class StudentProbe:
    """Scores one of a run's students; rank 0 holds the sentence pairs and computes."""

    def __init__(self, session: Session, student: Student) -> None:
        """Read the sentence pairs from `evaluation.data_folder`. Collective.

        Raises:
            DataError: the pairs cannot be read.
        """
        self._session, self.student, config = session, student, session.config
        folder = config.evaluation.data_folder if config.evaluation else None
        with failing_together():
            if session.ranks.is_main:
                tokenizer = load_tokenizer(config.teacher.model, config.teacher.revision)
                limit = positions(student.config)
                self._probe = SimilarityProbe(tokenizer, Path(folder) if folder else None, limit)

    def scores(self) -> dict[str, float]:
        """Return "probe/<metric>" of the current student on rank 0; {} elsewhere. Collective.

        If the run has several students, "probe/<student>/<metric>".
        """
        session, student = self._session, self.student
        weights, prefix = student.engine.weights(), session.own_metric("probe", student.name)
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
                found = {f"{prefix}/{metric}": value for metric, value in scores.items()}
        return found
