"""The loss of one student: the relation loss with its settings.

Inputs: Q, K and V of teacher and student for the same tokens. Outputs: a `RelationLoss`. The step,
the trial of a micro-batch, the estimate and the Trainer all compute it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scaledistill.config.schema import DistillConfig
from scaledistill.data.tokens import TokenInputs
from scaledistill.relations import QKV, RelationLoss, relation_loss


@dataclass(frozen=True)
class StudentLoss:
    """Computes a student's loss; see `relation_loss` for the fields."""

    num_heads: int
    pairs: Mapping[str, float]
    backend: str

    @classmethod
    def of(cls, config: DistillConfig, student: str) -> StudentLoss:
        """Return the loss of a student in a run's settings."""
        relations = config.relations
        return cls(config.relation_heads(student), relations.pairs, relations.backend)

    def __call__(self, teacher: QKV, student: QKV, tokens: TokenInputs) -> RelationLoss:
        """Return the loss of a micro-batch."""
        return relation_loss(
            teacher,
            student,
            num_heads=self.num_heads,
            pairs=self.pairs,
            mask_BT=tokens.mask_BT,
            segment_ids_BT=tokens.segment_ids_BT,
            backend=self.backend,
        )
