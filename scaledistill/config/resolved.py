"""What a run really uses: a configuration without "auto", for so many ranks of a kind of device.

Inputs: a configuration in which `preflight.resolve` has replaced every "auto". Outputs: plain
numbers and dtypes for the engines, the training code and the estimates. Not handled here: deciding
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from scaledistill.config.schema import DistillConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by the names that settings have for them."""


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration as it is used; equal on all ranks, except where paths differ."""

    config: DistillConfig
    """No "auto" is left. This is what config.json and checkpoints record."""
    stated: DistillConfig
    """The configuration as the user gave it."""
    world_size: int
    device_type: str
    """"cpu" or "cuda": of the devices that the run is for, which need not be here."""

    def __post_init__(self) -> None:
        if not isinstance(self.config.train.micro_batch_size, int):
            raise ValueError(
                f"train.micro_batch_size is {self.config.train.micro_batch_size!r}: the "
                "configuration is not resolved; pass it through preflight.resolve.resolve"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a rank's forward."""
        size = self.config.train.micro_batch_size
        assert isinstance(size, int)  # checked above
        return size

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return self.config.train.global_batch_size // (self.world_size * self.micro_batch_size)

    @property
    def student_dtype(self) -> torch.dtype:
        """Dtype of the student's forward and backward."""
        return DTYPES[self.config.train.precision]

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Dtype of the teacher's weights and forward."""
        return DTYPES[self.config.teacher.dtype]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, padding included."""
        return self.config.train.global_batch_size * self.config.data.sequence_length

    @property
    def auto_micro_batch(self) -> bool:
        """Whether the user wants the largest micro-batch that fits."""
        return self.stated.train.micro_batch_size == "auto"

    def for_student(self, name: str) -> ResolvedRun:
        """Return the run as it would be with this student alone."""
        return replace(
            self, config=self.config.for_student(name), stated=self.stated.for_student(name)
        )

    def with_micro_batch(self, size: int) -> ResolvedRun:
        """Return the run with micro-batches of `size` sequences."""
        train = self.config.train.model_copy(update={"micro_batch_size": size})
        return replace(self, config=self.config.model_copy(update={"train": train}))
