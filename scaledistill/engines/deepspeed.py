"""The DeepSpeed engine: ZeRO 1 to 3, with optimizer and parameter offload; a teacher in parts. The
only importer.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from typing import Any

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
)
from pydantic import ValidationError
from torch import Tensor, nn

from scaledistill.config.schema import DistillConfig
from scaledistill.distributed.ranks import Ranks, at_leaving
from scaledistill.engines import EngineState, StepOutcome, parameter_groups
from scaledistill.engines.deepspeed_block import resolve_block
from scaledistill.errors import ConfigError

log = logging.getLogger(__name__)

# On CPUs DeepSpeed would compile a shared-memory all-reduce for a minute at first use; gloo serves
# as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine:
    """A student under DeepSpeed's ZeRO; see `Engine` for the methods."""

    def __init__(self, config: DistillConfig, view: nn.Module, ranks: Ranks) -> None:
        block = resolve_block(config, ranks.world_size)
        self._ranks = ranks
        self._accumulation: int = block["gradient_accumulation_steps"]
        self._optimizer = torch.optim.AdamW(
            parameter_groups(view, config.train.weight_decay),
            lr=0.0,
            betas=(config.train.adam_betas[0], config.train.adam_betas[1]),
            eps=config.train.adam_epsilon,
            fused=True,
        )
        try:
            self._engine = _initialize(view, block, self._optimizer)
        except ValidationError as error:
            item = error.errors()[0]
            path = ".".join(str(part) for part in item["loc"])
            raise ConfigError(
                f"engine.deepspeed.zero_optimization.{path}: {item['msg']} (DeepSpeed's own check)"
            ) from None
        except (ValueError, AssertionError, DeepSpeedConfigError) as error:
            raise ConfigError(f"engine.deepspeed: {error} (DeepSpeed's own check)") from None
        self._create_optimizer_state(next(view.parameters()).device)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._engine(**inputs).last_hidden_state

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # counts the micro-batch

    def step(self, learning_rate: float) -> StepOutcome:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        zero_optimizer = self._engine.optimizer
        if skipped and getattr(zero_optimizer, "cpu_offload", False):
            # DeepSpeed 0.19.8 keeps the offloaded gradients of a skipped step and adds the next
            # ones to them.
            zero_optimizer.averaged_gradients = dict.fromkeys(zero_optimizer.averaged_gradients)
        return StepOutcome(
            skipped, float("inf") if skipped else self._engine.get_global_grad_norm()
        )

    def train_mode(self, mode: bool) -> None:
        self._engine.train(mode)

    def weights(self) -> dict[str, Tensor]:
        return self._gather(safe_get_full_fp32_param)

    def state(self) -> EngineState:
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
        for name, parameter in self._engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, state.weights[name])
            safe_set_full_optimizer_state(parameter, state.exp_avg[name], "exp_avg")
            safe_set_full_optimizer_state(parameter, state.exp_avg_sq[name], "exp_avg_sq")
        self._set_optimizer_steps(state.optimizer_steps)
        for key, value in state.loss_scaler.items():
            setattr(self._engine.optimizer.loss_scaler, key, value)

    def _gather(self, get: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Gather parameter by parameter, so that no rank but the first holds more than one whole
        tensor. Collective.
        """
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
        """Make Adam's moments exist by one step with learning rate 0 and zero gradients, and count
        it out again.
        """
        self._engine.train()
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}
        for micro in range(self._accumulation):
            self.backward(
                self.forward(inputs).float().sum() * 0.0, last=micro + 1 == self._accumulation
            )
        if self.step(0.0).skipped:
            raise ConfigError(
                "the student's first output is not finite; check students.<name>.init and its "
                "weights"
            )
        zero_optimizer = self._engine.optimizer
        if hasattr(zero_optimizer, "_hp_optimizer_states_linked"):
            # With two parameter groups DeepSpeed 0.19.8 links after the first group's step only,
            # when the second group has no state yet ("exp_avg not found").
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
    view: nn.Module,
    blocks: Iterable[nn.Module],
    weights: Iterable[tuple[str, Tensor]],
    ranks: Ranks,
    *,
    dtype: str,
    offload: bool,
) -> nn.Module:
    """Put a teacher in parts on the ranks, under ZeRO-3 of its own; return what runs it.
    Collective.

    Args:
        view: its parameters on the meta device.
        weights: by name, whole, in `dtype`, in the order of the names; each layer's are dropped
            before the next's.
        offload: keep the parts in host memory.
    """
    elements = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            # The next block is gathered while one runs, and no more.
            "stage3_prefetch_bucket_size": elements,
            "stage3_max_live_parameters": 2 * elements,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            # Else torch's linear, the student's too, rounds otherwise.
            "memory_efficient_linear": False,
        },
    }
    if offload:
        pinned = ranks.device.type == "cuda"
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    for layer_name, layer_weights in groupby(weights, lambda item: item[0].rpartition(".")[0]):
        layer = view.get_submodule(layer_name)
        for name, weight in layer_weights:
            parameter = nn.Parameter(weight.to(ranks.device), requires_grad=False)
            layer.register_parameter(name.rpartition(".")[2], parameter)
            del weight, parameter
        deepspeed.zero.Init(module=layer, config_dict_or_path=settings)
    return _initialize(view, settings, None)


def _initialize(
    view: nn.Module, block: dict[str, Any], optimizer: torch.optim.Optimizer | None
) -> Any:
    """Return DeepSpeed's engine, which lives until the group is left; what it prints goes to the
    log. Collective.
    """
    linear = torch.nn.functional.linear
    if groups._WORLD_GROUP is None:
        at_leaving(_leave_group)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine, *_ = deepspeed.initialize(
            model=view, optimizer=optimizer, config=block, dist_init_required=False
        )
    log.debug("DeepSpeed: %s", printed.getvalue().strip())
    at_leaving(partial(_release, engine, linear))
    return engine


def _leave_group() -> None:
    """Give up DeepSpeed's copy of the job's group: a later run, perhaps in another group, makes one
    of its own.
    """
    if groups._WORLD_GROUP is not None:
        deepspeed.comm.destroy_process_group(groups._WORLD_GROUP)


def _release(engine: Any, linear: Callable[..., Tensor]) -> None:
    """Remove what DeepSpeed 0.19.8 would keep of an engine for as long as the process lives."""
    with contextlib.redirect_stdout(io.StringIO()):
        # Hooks on autograd's nodes, which hold the optimizer where the garbage collector cannot
        # see.
        engine.destroy()
    torch.nn.functional.linear = linear  # ZeRO-3 replaces it, for every model
    # ZeRO-3's stack of modules keeps the outermost one, and a cache of a method keeps every module
    # it was asked for.
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


def scaler_state(scaler: Any) -> dict[str, Any]:
    """Return what of DeepSpeed's loss scaler changes from step to step; the rest is
    configuration.
    """
    return {key: getattr(scaler, key) for key in SCALER_STATE if hasattr(scaler, key)}


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the whole shape of a parameter, which ZeRO-3 keeps beside the emptied tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)
