"""Distil large frozen encoders into small students with MiniLMv2's self-attention relation loss."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaledistill.config.schema import DistillConfig as DistillConfig
    from scaledistill.integrations.datasets import prepare_dataset as prepare_dataset
    from scaledistill.integrations.transformers import MiniLMTrainer as MiniLMTrainer
    from scaledistill.integrations.transformers import (
        MiniLMTrainingArguments as MiniLMTrainingArguments,
    )
    from scaledistill.integrations.transformers import create_student as create_student
    from scaledistill.models.view import capture_qkv as capture_qkv
    from scaledistill.relations import QKV as QKV
    from scaledistill.relations import RelationLoss as RelationLoss
    from scaledistill.relations import relation_loss as relation_loss
    from scaledistill.training.loop import distill as distill

__version__ = "0.1.0"

# Modules are imported on first use, so that `import scaledistill` and --help stay fast.
_HOMES = {
    "DistillConfig": "config",
    "MiniLMTrainer": "integrations.transformers",
    "MiniLMTrainingArguments": "integrations.transformers",
    "QKV": "relations",
    "RelationLoss": "relations",
    "capture_qkv": "models.view",
    "create_student": "integrations.transformers",
    "distill": "training.loop",
    "prepare_dataset": "integrations.datasets",
    "relation_loss": "relations",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
