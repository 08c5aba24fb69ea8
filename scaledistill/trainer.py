"""Distil with `transformers.Trainer`; see `integrations.transformers`."""

from scaledistill.integrations.transformers import (
    MiniLMTrainer,
    MiniLMTrainingArguments,
    create_student,
)

__all__ = ["MiniLMTrainer", "MiniLMTrainingArguments", "create_student"]
