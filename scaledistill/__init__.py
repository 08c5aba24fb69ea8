"""Distil large frozen encoders into small students with MiniLMv2's self-attention relation loss."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaledistill.config import DistillConfig as DistillConfig
    from scaledistill.models.capture import capture_qkv as capture_qkv
    from scaledistill.prepare import prepare_dataset as prepare_dataset
    from scaledistill.relations import QKV as QKV
    from scaledistill.relations import RelationLoss as RelationLoss
    from scaledistill.relations import relation_loss as relation_loss
    from scaledistill.train import distill as distill
    from scaledistill.trainer import MiniLMTrainer as MiniLMTrainer
    from scaledistill.trainer import MiniLMTrainingArguments as MiniLMTrainingArguments
    from scaledistill.trainer import create_student as create_student

__version__ = "0.1.0"

_HOMES = {  # imported on first use: `import scaledistill` and --help stay quick
    "DistillConfig": "config",
    "MiniLMTrainer": "trainer",
    "MiniLMTrainingArguments": "trainer",
    "QKV": "relations",
    "RelationLoss": "relations",
    "capture_qkv": "models.capture",
    "create_student": "trainer",
    "distill": "train",
    "prepare_dataset": "prepare",
    "relation_loss": "relations",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
