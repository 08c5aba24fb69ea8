"""The loss of one student: the relation loss with its settings.

Inputs: Q, K and V of teacher and student for the same tokens. Outputs: a `RelationLoss`. The step,
the trial of a micro-batch, the estimate and the Trainer all compute it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from scaledistill.config.schema import DistillConfig
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import SettingError, named
from scaledistill.models.architectures import architecture_of
from scaledistill.relations import QKV, RelationLoss, relation_loss


@dataclass(frozen=True)
class StudentLoss:
    """Computes a student's loss; see `relation_loss` for the fields."""

    num_heads: int
    pairs: Mapping[str, float]
    backend: str
    causal: bool = False

    @classmethod
    def of(
        cls,
        config: DistillConfig,
        student: str,
        models: tuple[PreTrainedConfig, PreTrainedConfig],
    ) -> StudentLoss:
        """Return the loss of a student in a run's settings.

        Args:
            models: the configs of the teacher and of the student.

        Raises:
            SettingError: see `causal_relations`.
        """
        relations, num_heads = config.relations, config.relation_heads(student)
        with named(student=f"students.{student}"):
            causal = causal_relations(*models)
        return cls(num_heads, relations.pairs, relations.backend, causal)

    def __call__(self, teacher: QKV, student: QKV, tokens: TokenInputs) -> RelationLoss:
        """Return the loss of a micro-batch."""
        return relation_loss(
            teacher,
            student,
            num_heads=self.num_heads,
            pairs=self.pairs,
            mask_BT=tokens.mask_BT,
            segment_ids_BT=tokens.segment_ids_BT,
            causal=self.causal,
            backend=self.backend,
        )


def causal_relations(teacher: PreTrainedConfig, student: PreTrainedConfig) -> bool:
    """Return whether the relations of two models are those of causal attention.

    Raises:
        SettingError: only one of the models is causal: a row of its Q, K and V knows no later
            token, while the other's depends on all of them.
    """
    causal = [architecture_of(each).is_causal(each) for each in (teacher, student)]
    if causal[0] != causal[1]:
        which = ("the teacher", "the student") if causal[0] else ("the student", "the teacher")
        raise SettingError(
            "student",
            expected=f": tokens of {which[0]} attend to earlier ones only, those of {which[1]} to "
            "the whole row, so their relations cannot be compared",
            remedy="give two models that are causal, or two that are not",
        )
    return causal[0]
