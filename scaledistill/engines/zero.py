"""DeepSpeed at work: ZeRO stages 1 to 3 with offload for students, and sharded teachers.

Inputs: a student's view with its weights; a teacher's view with the weights still on disk. Outputs:
an `Engine`; a teacher to call. Not handled here: checking the settings (`engines.deepspeed`).
Only this module imports DeepSpeed.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from scaledistill.config.resolved import ResolvedRun
from scaledistill.data.tokens import TokenInputs
from scaledistill.distributed.ranks import Ranks, at_leaving
from scaledistill.engines import EngineState, StepOutcome, parameter_groups, place_buffers
from scaledistill.engines.deepspeed import WITHOUT_TIMERS, resolve_block
from scaledistill.errors import ConfigError
from scaledistill.models.view import QKVView
from scaledistill.relations import QKV

log = logging.getLogger(__name__)

# On CPUs DeepSpeed would spend a minute at first use to compile a shared-memory all-reduce; gloo is
# good enough.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine:
    """A student under DeepSpeed's ZeRO; see `Engine` for the methods. Creation is collective."""

    def __init__(self, run: ResolvedRun, view: QKVView, ranks: Ranks) -> None:
        block, train = resolve_block(run), run.config.train
        self._ranks, self._view = ranks, view
        self._accumulation = run.accumulation
        self._optimizer = torch.optim.AdamW(
            parameter_groups(view.module, train.weight_decay),
            lr=0.0,
            betas=(train.adam_betas[0], train.adam_betas[1]),
            eps=train.adam_epsilon,
            fused=True,
        )
        try:
            self._engine, self.close = _initialize(view.module, block, self._optimizer)
        except ValidationError as error:
            item = error.errors()[0]
            path = ".".join(str(part) for part in item["loc"])
            raise ConfigError(
                f"engine.deepspeed.zero_optimization.{path}: {item['msg']} (DeepSpeed's own check)"
            ) from None
        except (ValueError, AssertionError, DeepSpeedConfigError) as error:
            raise ConfigError(f"engine.deepspeed: {error} (DeepSpeed's own check)") from None
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # train.max_skipped_steps decides
        self._create_optimizer_state(next(view.module.parameters()).device)

    def forward(self, tokens: TokenInputs) -> QKV:
        """Return the student's Q, K and V; see `Engine.forward`. Collective."""
        return self._view(tokens, self._engine)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate a micro-batch's gradients. Collective."""
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # only counts the micro-batch

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip and apply the accumulated gradients; see `Engine.step`. Collective."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        zero_optimizer = self._engine.optimizer
        if skipped and getattr(zero_optimizer, "cpu_offload", False):
            # DeepSpeed 0.19.8 keeps the offloaded gradients of a skipped step and would add the
            # next ones to them.
            zero_optimizer.averaged_gradients = dict.fromkeys(zero_optimizer.averaged_gradients)
        return StepOutcome(
            skipped, float("inf") if skipped else self._engine.get_global_grad_norm()
        )

    def train_mode(self, mode: bool) -> None:
        """Switch dropout on (True) or off."""
        self._engine.train(mode)

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 master weights on rank 0's CPU; empty elsewhere. Collective."""
        return self._gather(safe_get_full_fp32_param)

    def state(self) -> EngineState:
        """Return everything that is needed to resume; see `EngineState`. Collective."""
        return EngineState(
            weights=self.weights(),
            exp_avg=self._gather(
                lambda parameter: safe_get_full_optimizer_state(parameter, "exp_avg")
            ),
            exp_avg_sq=self._gather(
                lambda parameter: safe_get_full_optimizer_state(parameter, "exp_avg_sq")
            ),
            optimizer_steps=int(next(iter(self._optimizer.state.values()))["step"]),
            loss_scaler=self._loss_scaler_state(),
        )

    def load_state(self, state: EngineState) -> None:
        """Set everything that is needed to resume; see `Engine.load_state`. Collective."""
        for name, parameter in self._engine.module.named_parameters():
            self._set(parameter, state.weights[name])
            self._set(parameter, state.exp_avg[name], "exp_avg")
            self._set(parameter, state.exp_avg_sq[name], "exp_avg_sq")
        self._set_optimizer_steps(state.optimizer_steps)
        # A constant scale is a setting, which may have changed.
        if "cur_iter" in state.loss_scaler and "cur_iter" in self._loss_scaler_state():
            for key, value in state.loss_scaler.items():
                setattr(self._engine.optimizer.loss_scaler, key, value)

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Set the fp32 weights of a parameter, or one of its moments, from the full tensor."""
        set_weights, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            # DeepSpeed 0.19.8 cannot cut a full tensor whose elements the ranks do not divide.
            set_weights, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
            size: int = cast(Any, parameter).partition_numel()
            own = value.flatten()[self._ranks.rank * size :][:size]
            value = nn.functional.pad(own, (0, size - own.numel()))
        if moment is None:
            set_weights(parameter, value)
        else:
            set_moment(parameter, value, moment)

    def _gather(self, get: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Gather full tensors on rank 0; other ranks hold one full tensor at a time. Collective."""
        gathered = {}
        for name, parameter in self._engine.module.named_parameters():
            value = get(parameter)
            if self._ranks.is_main:
                gathered[name] = (
                    value.detach()
                    .to("cpu", torch.float32, copy=True)
                    .view(parameter_shape(parameter))
                )
        return gathered

    def _create_optimizer_state(self, device: torch.device) -> None:
        """Create Adam's moments by a step with learning rate 0 and zero gradients. Collective.

        The step is not counted.
        """
        self._engine.train()
        tokens = TokenInputs(torch.zeros(1, 2, dtype=torch.long, device=device))
        for micro in range(self._accumulation):
            qkv = self.forward(tokens)
            nothing = torch.stack([each.float().sum() for each in qkv]).sum() * 0.0
            self.backward(nothing, last=micro + 1 == self._accumulation)
        if self.step(0.0).skipped:
            raise ConfigError(
                "the student's first output is not finite; check students.<name>.init and its "
                "weights"
            )
        zero_optimizer = self._engine.optimizer
        if hasattr(zero_optimizer, "_hp_optimizer_states_linked"):
            # DeepSpeed 0.19.8 links the optimizer state once, after the first parameter group's
            # step, when the second group has no state yet ("exp_avg not found"): link it again.
            zero_optimizer._hp_optimizer_states_linked = False
            zero_optimizer._lazy_init_hp_params_optimizer_state()
        self._set_optimizer_steps(0)

    def _set_optimizer_steps(self, steps: int) -> None:
        for entry in self._optimizer.state.values():
            entry["step"].fill_(steps)

    def _loss_scaler_state(self) -> Mapping[str, Any]:
        return (
            scaler_state(self._engine.optimizer.loss_scaler) if self._engine.fp16_enabled() else {}
        )


def shard_teacher(
    run: ResolvedRun, ranks: Ranks, view: QKVView, weights: Iterable[tuple[str, Tensor]]
) -> nn.Module:
    """Shard a teacher by a ZeRO-3 engine of its own; see `engines.shard_teacher`. Collective.

    Each layer's weights are freed before the next layer's are read.
    """
    teacher = run.config.teacher
    elements = max(
        sum(parameter.numel() for parameter in block.parameters()) for block in view.blocks
    )
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "timers": WITHOUT_TIMERS,
        "bf16": {"enabled": teacher.dtype == "bf16"},
        "fp16": {"enabled": teacher.dtype == "fp16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            # While a block runs, gather the next one, but no more.
            "stage3_prefetch_bucket_size": elements,
            "stage3_max_live_parameters": 2 * elements,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            # It would replace torch's linear, for the student too, by one that rounds differently.
            "memory_efficient_linear": False,
        },
    }
    if teacher.placement == "offload":
        pinned = ranks.device.type == "cuda"
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    for layer_name, layer_weights in groupby(weights, lambda item: item[0].rpartition(".")[0]):
        layer = view.module.get_submodule(layer_name)
        for name, weight in layer_weights:
            parameter = nn.Parameter(weight.to(ranks.device), requires_grad=False)
            layer.register_parameter(name.rpartition(".")[2], parameter)
            del weight, parameter
        deepspeed.zero.Init(module=layer, config_dict_or_path=settings)
    place_buffers(view.module, ranks.device)
    engine, _ = _initialize(view.module, settings, None)
    return engine


def _initialize(
    module: nn.Module, block: dict[str, Any], optimizer: torch.optim.Optimizer | None
) -> tuple[Any, Callable[[], None]]:
    """Return DeepSpeed's engine and a function that releases it. Collective.

    At the latest it is released when the process group is left. What DeepSpeed prints goes to the
    debug log.
    """
    linear = torch.nn.functional.linear
    if groups._WORLD_GROUP is None:
        at_leaving(_leave_group)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=block, dist_init_required=False
        )
    log.debug("DeepSpeed: %s", printed.getvalue().strip())
    at_leaving(partial(setattr, torch.nn.functional, "linear", linear))  # ZeRO-3 replaces it
    return engine, at_leaving(partial(_release, engine))


def _leave_group() -> None:
    """Destroy DeepSpeed's copy of the job's group: a later run may be in another group."""
    if groups._WORLD_GROUP is not None:
        deepspeed.comm.destroy_process_group(groups._WORLD_GROUP)


def _release(engine: Any) -> None:
    """Remove what DeepSpeed 0.19.8 would keep of an engine until the process ends."""
    with contextlib.redirect_stdout(io.StringIO()):
        # Removes hooks on autograd's nodes, which hold the optimizer where the garbage collector
        # cannot see it.
        engine.destroy()
    # ZeRO-3's stack of modules keeps the outermost one, and a method's cache keeps every module it
    # was called with.
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


def cpu_adam_error() -> float:
    """Build and load DeepSpeed's CPU Adam, and return how far its step is from PyTorch's AdamW.

    The engine does not use it; `transformers.Trainer` does with offload.

    Raises:
        Exception: whatever the compiler, the loader or DeepSpeed raises.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    found, expected = (torch.linspace(-1, 1, 64).requires_grad_() for _ in range(2))
    for weights in (found, expected):
        weights.grad = torch.linspace(1, 2, 64)
    with contextlib.redirect_stdout(io.StringIO()):
        DeepSpeedCPUAdam([found], lr=1e-2).step()
    torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.0).step()
    return (found - expected).abs().max().item()


def scaler_state(scaler: Any) -> dict[str, Any]:
    """Return the part of DeepSpeed's loss scaler that changes; the rest is configuration."""
    return {key: getattr(scaler, key) for key in SCALER_STATE if hasattr(scaler, key)}


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's full shape; ZeRO-3 empties the tensor and keeps the shape in it."""
    return getattr(parameter, "ds_shape", parameter.shape)
