"""Engines: each owns one student's parameters, gradients and optimizer, whatever they are sharded
by.

Enters: the student's training view and its settings. Leaves: forward, backward, an optimizer step,
and the whole state by parameter name in fp32. Losses, data, learning-rate schedule and checkpoint
files are left to others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from scaledistill.config.schema import DistillConfig
from scaledistill.distributed.ranks import Ranks


class StepOutcome(NamedTuple):
    """What an optimizer step did."""

    skipped: bool
    """A gradient was not finite on some rank: nothing was updated."""
    grad_norm: float | Tensor
    """Global L2 norm before clipping, perhaps still on the device; infinite where the step was
    skipped."""


@dataclass(frozen=True)
class EngineState:
    """A student's whole training state by parameter name: fp32 on the CPU, on rank 0; other ranks
    hold no tensors.
    """

    weights: Mapping[str, Tensor]
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    optimizer_steps: int
    """Steps that were applied, Adam's own count."""
    loss_scaler: Mapping[str, Any] = field(default_factory=dict)
    """fp16 only."""


class Engine(Protocol):
    """One student under training. Every method is collective but `train_mode`."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the view's output [B, T, D] on its keyword arguments: the student's Q, K and V
        side by side.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; `last` is true on the last micro-batch of a step."""

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip and apply the gradients that were added since the last step, averaged over
        micro-batches and ranks.
        """

    def train_mode(self, mode: bool) -> None:
        """Switch dropout on (True) or off."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return the fp32 master weights by parameter name, on the CPU of rank 0; empty
        elsewhere.
        """

    def state(self) -> EngineState:
        """Return everything that training goes on from."""

    def load_state(self, state: EngineState) -> None:
        """Set everything that training goes on from; every rank passes the same whole state."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: vectors (biases and LayerNorms) are exempt from weight
    decay.
    """
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_engine(
    config: DistillConfig, view: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks
) -> Engine:
    """Return the engine that `engine.name` names, holding `view`, of which `blocks` are parts.
    Collective.

    `config` is resolved: no precision or micro-batch is left open. The module belongs to the engine
    afterwards.

    Raises:
        ConfigError: the engine's block is wrong.
    """
    if config.engine.name == "fsdp":
        from scaledistill.engines.fsdp import FsdpEngine

        return FsdpEngine(config, view, blocks, ranks)
    from scaledistill.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, view, ranks)


def shard_teacher(
    config: DistillConfig,
    ranks: Ranks,
    view: nn.Module,
    blocks: Sequence[nn.Module],
    weights: Iterable[tuple[str, Tensor]],
) -> nn.Module:
    """Put a teacher's weights in parts on the ranks, by the student's kind of engine; return what
    runs it. Collective.

    Args:
        view: its parameters on the meta device.
        blocks: those of `view`.
        weights: by name, whole, in the dtype to run in, in the order of the names; none is kept.
    """
    offload = config.teacher.placement == "offload"
    if config.engine.name == "fsdp":
        from scaledistill.engines import fsdp

        return fsdp.shard_teacher(view, blocks, weights, ranks, offload=offload)
    from scaledistill.engines import deepspeed

    return deepspeed.shard_teacher(
        view, blocks, weights, ranks, dtype=config.teacher.dtype, offload=offload
    )
