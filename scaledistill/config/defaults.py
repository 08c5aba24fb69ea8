"""Defaults that command lines show in --help, apart from `schema`, whose import takes longer."""

from __future__ import annotations

LEARNING_RATES = (2e-5, 5e-5, 1e-4)
EPOCHS = (3, 5)
SEEDS = (1, 2, 3)
BATCH_SIZE = 32
"""Of a grid of fine-tunings, see `schema.EvaluationSettings`."""
