"""Engines: each owns one student's parameters, gradients and optimizer, sharded or not.

Inputs: the student's training view and its settings. Outputs: forward, backward, an optimizer step,
and the full state by parameter name in fp32. Not handled here: losses, data, the learning-rate
schedule, checkpoint files.

The engine `engine.name` is the module of that name in this package, which has the functions of
`EngineModule`. Nothing outside this package asks which engine it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from scaledistill.config.resolved import ResolvedRun
from scaledistill.data.tokens import TokenInputs
from scaledistill.distributed.ranks import Ranks
from scaledistill.models.view import QKVView
from scaledistill.relations import QKV


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

    def forward(self, tokens: TokenInputs) -> QKV:
        """Return the student's Q, K and V, each [B, T, D], for a micro-batch."""

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

    def close(self) -> None:
        """Free the engine, which is not used again, before the process group is left."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, with no weight decay for vectors (biases, LayerNorms)."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def place_buffers(module: nn.Module, device: torch.device) -> None:
    """Move a module's buffers; placing the parameters of a sharded teacher leaves them behind."""
    for buffer_name, buffer in list(module.named_buffers()):
        parent, _, name = buffer_name.rpartition(".")
        module.get_submodule(parent).register_buffer(name, buffer.to(device), persistent=False)


class EngineBytes(NamedTuple):
    """What an engine holds of a student on each rank."""

    weights_and_gradients: int
    """The weights that the forward reads, and the gradients in fp32."""
    buffers: int
    """What it sends from or gathers into, at most."""


class EngineTraits(Protocol):
    """What an engine does with a run's student, known from the settings alone."""

    @property
    def title(self) -> str:
        """The engine's name for people."""

    @property
    def optimizer_on_host(self) -> bool:
        """Whether fp32 weights and moments are offloaded to host memory."""

    @property
    def recomputes_blocks(self) -> bool:
        """Whether the backward runs each block's forward again."""

    @property
    def compiles_student(self) -> bool:
        """Whether the student's blocks can be compiled."""

    @property
    def compiles_sharded_teacher(self) -> bool:
        """Whether a sharded teacher's blocks can be compiled."""

    def memory(self, trained: int, gathered: int) -> EngineBytes:
        """Return what a rank holds, besides the optimizer's fp32 weights and moments.

        Args:
            trained: the student's trained parameters.
            gathered: how many of them are gathered at a time, block by block, at most.
        """

    def traffic(self, trained: int) -> dict[str, float]:
        """Return the bytes that each rank sends and receives per step, by use.

        With ring collectives: an all-gather or a reduce-scatter moves (W - 1) / W of a tensor, an
        all-reduce twice that.
        """


class EngineModule(Protocol):
    """The functions of an engine's module. All but `traits` are collective."""

    def traits(self, run: ResolvedRun) -> EngineTraits:
        """Check the engine's settings and return its traits; without heavy imports.

        Raises:
            ConfigError: the settings are wrong.
        """

    def create(self, run: ResolvedRun, view: QKVView, ranks: Ranks) -> Engine:
        """See `create_engine`."""

    def shard_teacher(
        self, run: ResolvedRun, ranks: Ranks, view: QKVView, weights: Iterable[tuple[str, Tensor]]
    ) -> nn.Module:
        """See `shard_teacher`."""


def _module(run: ResolvedRun) -> EngineModule:
    return cast(EngineModule, import_module(f"{__name__}.{run.config.engine.name}"))


def engine_traits(run: ResolvedRun) -> EngineTraits:
    """Check the settings of the run's engine and return its traits.

    Raises:
        ConfigError: the settings are wrong.
    """
    return _module(run).traits(run)


def create_engine(run: ResolvedRun, view: QKVView, ranks: Ranks) -> Engine:
    """Create the engine that `engine.name` selects. Collective.

    Args:
        view: of the student; it belongs to the engine afterwards.

    Raises:
        ConfigError: the engine's settings are wrong.
    """
    return _module(run).create(run, view, ranks)


def shard_teacher(
    run: ResolvedRun, ranks: Ranks, view: QKVView, weights: Iterable[tuple[str, Tensor]]
) -> nn.Module:
    """Shard a teacher over the ranks with the student's engine. Collective.

    Args:
        view: of the teacher, with parameters on the meta device.
        weights: full weights by name, in the dtype to run in, ordered by name; none is kept.

    Returns:
        The module to call in place of the view's.
    """
    return _module(run).shard_teacher(run, ranks, view, weights)
