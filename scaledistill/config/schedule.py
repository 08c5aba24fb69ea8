"""The learning rate as a pure function of the step.

Inputs: steps, counted from 0, and the settings in `train`. Outputs: learning rates, and where two
schedules part. Not handled here: setting the rate in the optimizer (`engines`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scaledistill.config.schema import TrainSettings

SCHEDULE_KEYS = ("schedule", "max_steps", "decay_steps")
"""The settings in `train` that may change on resume if no step made had another learning rate."""


def learning_rate(step: int, train: TrainSettings) -> float:
    """Return the learning rate of a step, counted from 0; from `max_steps` on it is 0.

    Warm-up is linear, and its last step has the peak rate: (step + 1) / warmup_steps of it, where
    transformers' schedules, whose first step has the rate 0, give step / warmup_steps. All later
    steps have the rates of transformers' `get_linear_schedule_with_warmup`,
    `get_cosine_schedule_with_warmup` or `get_wsd_schedule(decay_type="1-sqrt")`.

    Source: the stable phase and its decay, MiniCPM (arXiv:2404.06395); the shape 1 - sqrt, with
    which the loss ended lower than with a linear decay, Hägele et al. (arXiv:2405.18392).
    """
    peak, warmup_steps, max_steps = train.learning_rate, train.warmup_steps, train.max_steps
    if step >= max_steps:
        return 0.0
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if train.schedule == "linear":
        return peak * (max_steps - step) / (max_steps - warmup_steps)
    if train.schedule == "cosine":
        done = (step - warmup_steps) / (max_steps - warmup_steps)
        return peak * (1 + math.cos(math.pi * done)) / 2
    begin = stable_until(train)
    if step < begin:
        return peak
    return peak * (1 - math.sqrt((step - begin) / (max_steps - begin)))


def from_step(train: TrainSettings, first_step: int) -> TrainSettings:
    """Return the settings by a student's own steps, the first of which is the run's `first_step`.

    A student that was added to a run has its warm-up and its decay in the steps that were left.
    """
    return train.model_copy(update={"max_steps": train.max_steps - first_step})


def with_schedule_of(train: TrainSettings, earlier: Mapping[str, Any]) -> TrainSettings:
    """Return the settings with the schedule of an earlier run's `train`, which may lack keys that
    were added since.
    """
    fields = TrainSettings.model_fields
    return train.model_copy(
        update={key: earlier.get(key, fields[key].default) for key in SCHEDULE_KEYS}
    )


def stable_until(train: TrainSettings) -> int:
    """Return the step at which the decay of "warmup_stable_decay" begins.

    By default the decay is a tenth of the steps, or as many as the warm-up leaves.
    """
    decay_steps = train.decay_steps or math.ceil(train.max_steps / 10)
    return max(train.warmup_steps, train.max_steps - decay_steps)


def same_rates(one: TrainSettings, other: TrainSettings, num_steps: int) -> int:
    """Return how many of the first `num_steps` steps precede the first whose rates differ."""
    if one == other:
        return num_steps
    for step in range(num_steps):
        if learning_rate(step, one) != learning_rate(step, other):
            return step
    return num_steps


def schedule_text(train: TrainSettings) -> str:
    """Return the schedule in words: "100 steps of warm-up, cosine decay to 0 at step 3,600"."""
    warmup = f"{train.warmup_steps:,} steps of warm-up, " if train.warmup_steps else ""
    end = f"decay to 0 at step {train.max_steps:,}"
    if train.schedule != "warmup_stable_decay":
        return f"{warmup}{train.schedule} {end}"
    return f"{warmup}stable until step {stable_until(train):,}, 1-sqrt {end}"
