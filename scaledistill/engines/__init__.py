"""Engines: each owns one student's parameters, gradients and optimizer, sharded or not.

Inputs: the student's training view and its settings. Outputs: forward, backward, an optimizer step,
and the full state by parameter name in fp32. Not handled here: losses, data, the learning-rate
schedule, checkpoint files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from scaledistill.config.schema import DistillConfig
from scaledistill.distributed.ranks import Ranks


class StepOutcome(NamedTuple):
    """The outcome of an optimizer step."""

    skipped: bool
    """A gradient was not finite on some rank: nothing was updated."""
    grad_norm: float | Tensor
    """Global L2 norm before clipping, possibly on the device; infinite if the step was skipped."""


@dataclass(frozen=True)
class EngineState:
    """A student's full training state by parameter name, fp32 on the CPU.

    `Engine.state` returns tensors on rank 0 only.
    """

    weights: Mapping[str, Tensor]
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    optimizer_steps: int
    """Steps that were applied, as Adam counts them."""
    loss_scaler: Mapping[str, Any] = field(default_factory=dict)
    """fp16 only."""


class Engine(Protocol):
    """One student under training. All methods except `train_mode` are collective."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the view's output [B, T, D] for its inputs: the student's Q, K, V concatenated."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate a micro-batch's gradients; `last` marks the last micro-batch of a step."""

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip and apply the gradients since the last step, averaged over micro-batches and ranks.

        Skips the update if a gradient is not finite on some rank.
        """

    def train_mode(self, mode: bool) -> None:
        """Switch dropout on (True) or off."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return the fp32 master weights by parameter name, on rank 0's CPU; empty elsewhere."""

    def state(self) -> EngineState:
        """Return everything that is needed to resume; only rank 0 gets the tensors."""

    def load_state(self, state: EngineState) -> None:
        """Set everything that is needed to resume; all ranks pass the same full state."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, with no weight decay for vectors (biases, LayerNorms)."""
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
    """Create the engine that `engine.name` selects. Collective.

    Args:
        config: resolved: precision and micro-batch are not "auto".
        view: the student's training view; it belongs to the engine afterwards.
        blocks: the blocks of `view`.

    Raises:
        ConfigError: the engine's settings are wrong.
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
    """Shard a teacher over the ranks with the student's engine. Collective.

    Args:
        view: the teacher's view, with parameters on the meta device.
        blocks: the blocks of `view`.
        weights: full weights by name, in the dtype to run in, ordered by name; none is kept.

    Returns:
        The module to call in place of `view`.
    """
    offload = config.teacher.placement == "offload"
    if config.engine.name == "fsdp":
        from scaledistill.engines import fsdp

        return fsdp.shard_teacher(view, blocks, weights, ranks, offload=offload)
    from scaledistill.engines import deepspeed

    return deepspeed.shard_teacher(
        view, blocks, weights, ranks, dtype=config.teacher.dtype, offload=offload
    )
