"""The FSDP2 engine: student and teacher sharded evenly over the ranks, gathered block by block.

Inputs: a student's view with its weights; a teacher's view with the weights still on disk. Outputs:
an `Engine`; a teacher to call. Only this module imports FSDP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from scaledistill.config.resolved import ResolvedRun
from scaledistill.data.tokens import TokenInputs
from scaledistill.distributed.ranks import Ranks, all_reduce_sum
from scaledistill.engines import (
    EngineBytes,
    EngineState,
    StepOutcome,
    parameter_groups,
    place_buffers,
)
from scaledistill.errors import ConfigError
from scaledistill.models.view import QKVView
from scaledistill.relations import QKV


@dataclass(frozen=True)
class FsdpTraits:
    """See `EngineTraits`."""

    run: ResolvedRun
    title = "FSDP2"
    compiles_student = compiles_sharded_teacher = True

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the shards are kept in host memory."""
        return self.run.config.engine.fsdp.cpu_offload

    @property
    def recomputes_blocks(self) -> bool:
        """See `EngineTraits`."""
        return self.run.config.engine.fsdp.activation_checkpointing

    def memory(self, trained: int, gathered: int) -> EngineBytes:
        """See `EngineTraits.memory`. Forwards read gathered copies of the fp32 weights."""
        copied = gathered if self.run.config.engine.fsdp.reshard_after_forward else trained
        # The gathered weights, and their fp32 gradients before they are reduced.
        buffers = copied * self.run.student_dtype.itemsize + 4 * gathered
        # Gradients that wait for the last micro-batch are not reduced, hence whole.
        kept = trained if self.run.accumulation > 1 else trained // self.run.world_size
        return EngineBytes(4 * kept, buffers)

    def traffic(self, trained: int) -> dict[str, float]:
        """See `EngineTraits.traffic`. Gradients are sent in fp32, after the last micro-batch."""
        run, ring = self.run, (self.run.world_size - 1) / self.run.world_size
        gathers = 2 if run.config.engine.fsdp.reshard_after_forward else 1
        weights = ring * trained * run.student_dtype.itemsize
        return {
            "weights": gathers * run.accumulation * weights,
            "gradients": ring * trained * 4,
        }


def traits(run: ResolvedRun) -> FsdpTraits:
    """Return what FSDP2 does with a run's student.

    Raises:
        ConfigError: the precision needs loss scaling.
    """
    if run.config.train.precision == "fp16":
        raise ConfigError(
            "train.precision=fp16 with engine.name=fsdp: it has no loss scaling; use bf16, or "
            "deepspeed"
        )
    return FsdpTraits(run)


def create(run: ResolvedRun, view: QKVView, ranks: Ranks) -> FsdpEngine:
    """Return the engine of a student. Collective."""
    return FsdpEngine(run, view, ranks)


class FsdpEngine:
    """A student under FSDP2, with weights and moments in fp32; see `Engine` for the methods.

    Creation is collective.
    """

    def __init__(self, run: ResolvedRun, view: QKVView, ranks: Ranks) -> None:
        settings, train = run.config.engine.fsdp, run.config.train
        self._ranks, self._view = ranks, view
        self._accumulation = run.accumulation
        self._max_grad_norm = train.max_grad_norm
        computes_in = None if run.student_dtype == torch.float32 else run.student_dtype
        view.module.to(ranks.device)
        self._module = _shard(
            view,
            init_device_mesh(ranks.device.type, (ranks.world_size,)),
            keep_gathered=not settings.reshard_after_forward,
            offload=settings.cpu_offload,
            precision=MixedPrecisionPolicy(computes_in, torch.float32),
            recompute=settings.activation_checkpointing,
        )
        betas = (train.adam_betas[0], train.adam_betas[1])
        groups = parameter_groups(view.module, train.weight_decay)
        self._optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=betas, eps=train.adam_epsilon, fused=True
        )
        # A step with learning rate 0 and zero gradients creates Adam's moments.
        for parameter in view.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._set_optimizer_steps(0)

    def forward(self, tokens: TokenInputs) -> QKV:
        """Return the student's Q, K and V; see `Engine.forward`. Collective."""
        return self._view(tokens, self._module)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate a micro-batch's gradients. Collective."""
        self._module.set_requires_gradient_sync(last)
        (loss / self._accumulation).backward()

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip and apply the accumulated gradients; see `Engine.step`. Collective."""
        gradients = [
            cast(DTensor, parameter.grad).to_local() for parameter in self._module.parameters()
        ]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum().to(self._ranks.device)
        norm = all_reduce_sum(squares).sqrt()
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            # The same as clip_grads_with_norm_, which does not accept local shards.
            if self._max_grad_norm:
                factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(gradients, factor.to(gradients[0].device))
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()
        return StepOutcome(skipped, float("inf") if skipped else norm)

    def train_mode(self, mode: bool) -> None:
        """Switch dropout on (True) or off."""
        self._module.train(mode)

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights on rank 0's CPU; empty elsewhere. Collective."""
        return self._gather(self._shards())

    def state(self) -> EngineState:
        """Return everything that is needed to resume; see `EngineState`. Collective."""
        moments = {
            name: self._optimizer.state[parameter] for name, parameter in self._shards().items()
        }
        return EngineState(
            weights=self.weights(),
            exp_avg=self._gather({name: entry["exp_avg"] for name, entry in moments.items()}),
            exp_avg_sq=self._gather({name: entry["exp_avg_sq"] for name, entry in moments.items()}),
            optimizer_steps=int(next(iter(moments.values()))["step"]),
        )

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        """Set everything that is needed to resume; see `Engine.load_state`. Collective."""
        for name, parameter in self._shards().items():
            entry = self._optimizer.state[parameter]
            _fill(parameter, state.weights[name])
            _fill(entry["exp_avg"], state.exp_avg[name])
            _fill(entry["exp_avg_sq"], state.exp_avg_sq[name])
        self._set_optimizer_steps(state.optimizer_steps)

    def close(self) -> None:
        """Do nothing; see `Engine.close`."""

    def _shards(self) -> dict[str, Tensor]:
        """Return the parameters, of which this rank has its shards.

        Without `reshard_after_forward`, a forward without backward leaves them gathered.
        """
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return dict(self._module.named_parameters())

    def _gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather full tensors on rank 0; other ranks hold one full tensor at a time. Collective."""
        gathered = {}
        for name, part in parts.items():
            whole = cast(DTensor, part.detach().to(self._ranks.device)).full_tensor()
            if self._ranks.is_main:
                gathered[name] = whole.to("cpu", copy=True)
        return gathered

    def _set_optimizer_steps(self, steps: int) -> None:
        for entry in self._optimizer.state.values():
            entry["step"].fill_(steps)


def shard_teacher(
    run: ResolvedRun, ranks: Ranks, view: QKVView, weights: Iterable[tuple[str, Tensor]]
) -> nn.Module:
    """Shard a teacher over the ranks, weight by weight; see `engines.shard_teacher`. Collective.

    Each weight is freed before the next is read.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    offload, policy = run.config.teacher.placement == "offload", MixedPrecisionPolicy()
    module = _shard(view, mesh, keep_gathered=False, offload=offload, precision=policy)
    place_buffers(module, ranks.device)
    parameters = dict(module.named_parameters())
    for name, weight in weights:
        part = cast(DTensor, parameters[name])
        placed: Tensor = distribute_tensor(weight, mesh, part.placements, src_data_rank=None)
        placed = placed.to("cpu") if offload else placed
        module.load_state_dict(
            {name: nn.Parameter(placed, requires_grad=False)}, strict=False, assign=True
        )
        del weight, placed
    return module


def _shard(
    view: QKVView,
    mesh: DeviceMesh,
    *,
    keep_gathered: bool,
    offload: bool,
    precision: MixedPrecisionPolicy,
    recompute: bool = False,
) -> Any:
    """Shard a view's module by its blocks, and the rest (the embeddings) as one more unit.

    The next block is gathered while one runs.
    """
    on_host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": precision,
        "reshard_after_forward": not keep_gathered,
    }
    options["offload_policy"] = on_host if offload else OffloadPolicy()
    if recompute:
        view.recompute_blocks()
    blocks = view.blocks
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(view.module, **options)
    for block, following in pairwise(cast("list[Any]", blocks)):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    return view.module


def _fill(part: Tensor, whole: Tensor) -> None:
    """Set a rank's shard of a tensor from the full tensor, without communication."""
    target = cast(DTensor, part)
    source = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(source.to_local())
