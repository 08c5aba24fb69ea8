"""The DeepSpeed engine: what users may set in its block, what we set, and what follows from it.

Inputs: a resolved run. Outputs: the full block for `deepspeed.initialize`, the engine's traits.
Does not import DeepSpeed: `engines.zero` does.

DeepSpeed ignores a misspelt top-level key, reads `"bf16": "auto"` as off and clips at 1.0 by
default; so every key is checked here, and every value that it would guess is set explicitly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from scaledistill.config.resolved import DTYPES, ResolvedRun
from scaledistill.distributed.ranks import Ranks
from scaledistill.engines import Engine, EngineBytes
from scaledistill.errors import ConfigError, near_miss
from scaledistill.models.view import QKVView

REMEDY = "correct the value or remove the key"


class Check(NamedTuple):
    """The values that a key of the block may have."""

    expected: str
    holds: Callable[[Any], bool]
    otherwise: str = REMEDY


def _whole(least: int, remedy: str = REMEDY) -> Check:
    """Return a check for whole numbers; a float such as 5e8 counts."""

    def holds(value: Any) -> bool:
        """Return whether `value` is a whole number of `least` or more."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and value == value // 1 and value >= least

    return Check(f"a whole number, {least} or more", holds, remedy)


def _only(value: Any, why: str) -> Check:
    """Return a check that allows only DeepSpeed's default, which examples often write out."""

    def holds(found: Any) -> bool:
        """Return whether `found` is the default, with bools distinct from numbers."""
        return found == value and isinstance(found, bool) == isinstance(value, bool)

    return Check(repr(value), holds, f"{why}; remove the key")


# In elements. DeepSpeed's default of 500 M holds a whole student, so that its gradients would only
# be sent once the backward is over.
REDUCE_BUCKET_SIZE = 5_000_000
# Dtype of gradients that are sent. In bf16 each hop of a ring rounds the sum, which makes it 1.7 to
# 7 % wrong over 256 ranks.
COMMUNICATION_DTYPE = "fp32"
SWITCH = Check("true or false", lambda value: isinstance(value, bool))
SWITCH_OR_NULL = Check(
    "true, false or null", lambda value: value is None or isinstance(value, bool)
)
BLOCK = Check("a block", lambda value: isinstance(value, dict))
BLOCK_OR_NULL = Check(
    "a block such as {'device': 'cpu'}", lambda value: value is None or isinstance(value, dict)
)
NVME_ONLY = "it is read for device='nvme' only, which is not supported"
NOT_OURS = "DeepSpeed's checkpoints are not used"
FULL_PRECISION = "master weights and moments are fp32"
QUANTIZED = "quantized communication changes the values that the loss is computed with"

WITHOUT_TIMERS = {"throughput": {"enabled": False}}
"""DeepSpeed's own timer would wait for the device in each forward and each step."""

# Every key that DeepSpeed knows is in one of these tables or in REFUSED_KEYS. Keys that may have
# more than one value are tested in `tests/test_engine.py` (save state, load state, export), except
# those of fp16, which need a GPU and do not affect the layout.
TOP_KEYS = {
    "zero_optimization": BLOCK,
    "bf16": BLOCK,
    "fp16": BLOCK,
    "data_types": BLOCK,
    "gradient_clipping": Check(
        "a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    ),
    "communication_data_type": Check(
        "'fp32', 'bf16' or 'fp16'",
        lambda value: value in (None, "fp32", "bf16", "fp16"),
        f"remove it to take {COMMUNICATION_DTYPE!r}",
    ),
    "prescale_gradients": _only(
        False, "ZeRO's stages 2 and 3 cannot, and gradients are averaged in fp32 anyway"
    ),
    "gradient_predivide_factor": _only(
        1.0, "it only acts with prescale_gradients, which ZeRO's stages 2 and 3 lack"
    ),
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": _only(
        False, "DeepSpeed's CPU optimizer cannot be restored exactly"
    ),
    "steps_per_print": Check(
        "null or a whole number, 1 or more", lambda v: v is None or _whole(1).holds(v)
    ),
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "disable_python_gc": _only(False, "models and engines of a run would stay in memory"),
}
BF16_KEYS = {
    "enabled": SWITCH,
    "check_grad_overflow": SWITCH,
    "immediate_grad_update": _only(False, "it is not tested with checkpoints"),
    "bf16_master_weights_and_grads": _only(False, FULL_PRECISION),
    "bf16_optimizer_states": _only(False, FULL_PRECISION),
}
FP16_KEYS = {
    "enabled": SWITCH,
    "auto_cast": _only(False, "token ids must stay whole numbers"),
    "loss_scale": Check(
        "a number, 0 (dynamic) or more",
        lambda value: (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        ),
    ),
    "initial_scale_power": _whole(0),
    "loss_scale_window": _whole(1),
    "hysteresis": _whole(1),
    "consecutive_hysteresis": SWITCH,
    "min_loss_scale": _whole(1),
    "fp16_master_weights_and_grads": _only(False, FULL_PRECISION),
}
DATA_TYPE_KEYS = {
    "grad_accum_dtype": Check(
        "'fp32'", lambda value: value in (None, "fp32"), "gradients are summed in fp32"
    ),
    "param_dtype": _only(None, "set train.precision instead"),
    "buffer_dtype": _only(None, "set train.precision instead"),
    "keep_in_fp32_modules": _only(None, "set train.precision instead"),
}
ZERO_KEYS = {
    "allgather_bucket_size": _whole(1),
    "allgather_partitions": SWITCH,
    "compute_grad_norm": SWITCH,
    "contiguous_gradients": _only(
        True, "gradients that are reduced one by one are not tested with checkpoints"
    ),
    "cpu_offload": _only(None, "DeepSpeed has replaced it by offload_optimizer={'device': 'cpu'}"),
    "cpu_offload_param": _only(
        None, "DeepSpeed has replaced it by offload_param={'device': 'cpu'}"
    ),
    "cpu_offload_use_pin_memory": _only(
        None, "DeepSpeed has replaced it by pin_memory in offload_optimizer"
    ),
    "elastic_checkpoint": _only(False, NOT_OURS),
    "enable_sanity_checks": SWITCH,
    "ignore_unused_parameters": _only(True, "a step may leave parameters without a gradient"),
    "leaf_module": _only(None, "blocks are gathered part by part"),
    "legacy_stage1": _only(False, "DeepSpeed has no other stage 1 any more"),
    "load_from_fp32_weights": _only(True, NOT_OURS),
    "log_trace_cache_warnings": SWITCH,
    "memory_efficient_linear": SWITCH,
    "offload_optimizer": BLOCK_OR_NULL,
    "offload_param": BLOCK_OR_NULL,
    "overlap_comm": SWITCH_OR_NULL,
    "override_module_apply": _only(
        True, "it is for models that are built under ZeRO-3, and students are not"
    ),
    "parameter_alignment": _only(
        False, "it pads the flat buffers that checkpoints and exports are read from"
    ),
    "pipeline_loading_checkpoint": _only(False, NOT_OURS),
    "reduce_bucket_size": _whole(1, f"remove it to take {REDUCE_BUCKET_SIZE}"),
    "reduce_scatter": SWITCH,
    "round_robin_gradients": _only(
        False,
        "DeepSpeed then mixes up weights: checkpoints and exports would be wrong",
    ),
    "save_muon_momentum_buffer_in_memory": _only(False, "the optimizer is AdamW"),
    "stage": Check("1, 2 or 3", lambda value: True),
    "stage3_allgather_sequential": SWITCH,
    "stage3_gather_16bit_weights_on_model_save": SWITCH,
    "stage3_gather_fp16_weights_on_model_save": _only(False, NOT_OURS),
    "stage3_max_live_parameters": _whole(0),
    "stage3_max_reuse_distance": _whole(0),
    "stage3_model_persistence_threshold": _whole(0),
    "stage3_module_granularity_threshold": _only(0, "blocks are gathered part by part"),
    "stage3_param_persistence_threshold": _whole(0),
    "stage3_prefetch_bucket_size": _whole(0),
    "stage3_use_all_reduce_for_fetch_params": SWITCH,
    "sub_group_size": _whole(1),
    "use_multi_rank_bucket_allreduce": SWITCH,
    "zenflow": _only(None, "it updates some weights steps later than the schedule says"),
    "zero_hpz_partition_size": _only(
        1, "a second partition of the weights is not tested with checkpoints"
    ),
    "zero_quantized_gradients": _only(False, QUANTIZED),
    "zero_quantized_nontrainable_weights": _only(False, QUANTIZED),
    "zero_quantized_weights": _only(False, QUANTIZED),
}
DEVICE = Check("'cpu' or 'none'", lambda value: value in ("cpu", "none"), "NVMe is not supported")
OFFLOAD_KEYS = {
    "optimizer": {
        "device": DEVICE,
        "pin_memory": SWITCH,
        "buffer_count": _only(4, NVME_ONLY),
        "cpuadam_cores_perc": _only(0.8, "it is read with super_offload only"),
        "fast_init": _only(False, NVME_ONLY),
        "nvme_path": _only(None, NVME_ONLY),
        "pipeline_read": _only(False, NVME_ONLY),
        "pipeline_write": _only(False, NVME_ONLY),
        "ratio": _only(
            1.0, "a part of the moments cannot be offloaded; offload all, or none by device='none'"
        ),
        "super_offload": _only(
            False, "it steps by DeepSpeed's CPU optimizer, which cannot be restored exactly"
        ),
    },
    "param": {
        "device": DEVICE,
        "pin_memory": SWITCH,
        "buffer_count": _only(5, NVME_ONLY),
        "buffer_size": _only(100_000_000, NVME_ONLY),
        "max_in_cpu": _only(1_000_000_000, NVME_ONLY),
        "nvme_path": _only(None, NVME_ONLY),
    },
}
REFUSED_KEYS = {
    "train_batch_size": "set train.global_batch_size instead",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size instead",
    "gradient_accumulation_steps": (
        "it follows from train.global_batch_size, train.micro_batch_size and the ranks"
    ),
    "managed_gradient_accumulation": "accumulation is ours",
    "optimizer": (
        "the optimizer is AdamW, set by train.learning_rate, train.weight_decay, "
        "train.adam_betas, …"
    ),
    "scheduler": (
        "the learning rate is a function of the step, set by train.learning_rate, "
        "train.warmup_steps and train.schedule"
    ),
    "torch_autocast": "set train.precision instead",
    "activation_checkpointing": (
        "it acts on models that call DeepSpeed's own function; use engine.name=fsdp with "
        "engine.fsdp.activation_checkpointing=true"
    ),
    "aio": NVME_ONLY,
    "comms_logger": "profile a run with --profile instead",
    "compile": "set train.compile instead",
    "flops_profiler": "profile a run with --profile instead",
    "gradient_allreduce_op": "gradients are averaged",
    "timers": "profile a run with --profile instead",
    "zero_optimization.mics_shard_size": "DeepSpeed has removed it",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed has removed it",
    "zero_optimization.zeropp_loco_param": "DeepSpeed has removed it",
}


@dataclass(frozen=True)
class ZeroTraits:
    """See `EngineTraits`. ZeRO-2 shards gradients and optimizer state, ZeRO-3 the weights too."""

    run: ResolvedRun
    block: Mapping[str, Any]
    """For `deepspeed.initialize`."""
    compiles_sharded_teacher = False
    """ZeRO-3 gathers weights by hooks inside blocks: those cannot be compiled."""

    @property
    def stage(self) -> int:
        """ZeRO's stage: 1, 2 or 3."""
        return self.block["zero_optimization"]["stage"]

    @property
    def title(self) -> str:
        """The engine's name for people."""
        return f"DeepSpeed ZeRO-{self.stage}"

    @property
    def optimizer_on_host(self) -> bool:
        """Whether fp32 weights and moments are offloaded."""
        return self._offloads("optimizer")

    recomputes_blocks = False

    @property
    def compiles_student(self) -> bool:
        """Whether weights stay whole during a block, see `compiles_sharded_teacher`."""
        return self.stage < 3

    def memory(self, trained: int, gathered: int) -> EngineBytes:
        """See `EngineTraits.memory`."""
        zero, ranks = self.block["zero_optimization"], self.run.world_size
        on_host, itemsize = self.run.device_type == "cpu", self.run.student_dtype.itemsize
        weights = trained * itemsize // (ranks if self.stage == 3 else 1)
        if self._offloads("param") and not on_host:
            weights = 0
        bucket = zero["reduce_bucket_size"]
        # On a CPU, pages of a bucket that are never touched take no memory.
        buckets = (2 if zero["overlap_comm"] else 1) * (min(bucket, trained) if on_host else bucket)
        return EngineBytes(
            weights + trained * 4 // (ranks if self.stage >= 2 else 1),
            4 * buckets + (trained * itemsize if self.stage == 3 else 0),
        )

    def traffic(self, trained: int) -> dict[str, float]:
        """See `EngineTraits.traffic`.

        Stages 1 and 2 all-reduce gradients in buckets, stage 2 in every micro-batch, and gather the
        new weights once. Stage 3 gathers weights at most once for each forward and once for each
        backward: small ones stay gathered.
        """
        run, ring = self.run, (self.run.world_size - 1) / self.run.world_size
        weights = ring * trained * run.student_dtype.itemsize
        gradients = ring * trained * DTYPES[self.block["communication_data_type"]].itemsize
        sends = {1: 2, 2: 2 * run.accumulation, 3: run.accumulation}[self.stage]
        return {
            "weights": 2 * run.accumulation * weights if self.stage == 3 else weights,
            "gradients": sends * gradients,
        }

    def _offloads(self, what: str) -> bool:
        block = self.block["zero_optimization"].get(f"offload_{what}") or {}
        return block.get("device", "none") != "none"


def traits(run: ResolvedRun) -> ZeroTraits:
    """Check the block and return what DeepSpeed does with a run's student.

    Raises:
        ConfigError: see `resolve_block`.
    """
    return ZeroTraits(run, resolve_block(run))


def create(run: ResolvedRun, view: QKVView, ranks: Ranks) -> Engine:
    """Return the engine of a student. Collective."""
    from scaledistill.engines.zero import ZeroEngine

    return ZeroEngine(run, view, ranks)


def shard_teacher(
    run: ResolvedRun, ranks: Ranks, view: QKVView, weights: Iterable[tuple[str, Tensor]]
) -> nn.Module:
    """Shard a teacher by a ZeRO-3 engine of its own; see `engines.shard_teacher`. Collective."""
    from scaledistill.engines import zero

    return zero.shard_teacher(run, ranks, view, weights)


def resolve_block(run: ResolvedRun) -> dict[str, Any]:
    """Return the full configuration for `deepspeed.initialize`.

    Raises:
        ConfigError: a key is unknown or ours to set, ZeRO's stage is not 1, 2 or 3, or a value
            contradicts `train`.
    """
    config = run.config
    block = copy.deepcopy(config.engine.deepspeed)
    _check_keys(block, TOP_KEYS)
    for part, known in (("bf16", BF16_KEYS), ("fp16", FP16_KEYS), ("data_types", DATA_TYPE_KEYS)):
        _check_keys(block.get(part, {}), known, part)
    train = config.train
    _resolve_zero(
        block, min(student.hidden_size for student in config.students.values()), run.world_size
    )
    for key, precision in (("bf16", "bf16"), ("fp16", "fp16")):
        _settle(
            block.setdefault(key, {}),
            "enabled",
            train.precision == precision,
            f"{key}.enabled",
            "train.precision",
        )
    # This skips steps with non-finite gradients; nothing else protects the weights from them.
    _settle(block["bf16"], "check_grad_overflow", True, "bf16.check_grad_overflow")
    _settle(
        block["zero_optimization"], "compute_grad_norm", True, "zero_optimization.compute_grad_norm"
    )
    _settle(
        block, "gradient_clipping", train.max_grad_norm, "gradient_clipping", "train.max_grad_norm"
    )
    _settle(
        block.setdefault("data_types", {}),
        "grad_accum_dtype",
        "fp32",
        "data_types.grad_accum_dtype",
    )
    block["communication_data_type"] = block.get("communication_data_type") or COMMUNICATION_DTYPE
    # PyTorch's fused AdamW steps offloaded state too, and can be restored exactly.
    block["zero_force_ds_cpu_optimizer"] = False
    block.setdefault("steps_per_print", None)
    block["timers"] = WITHOUT_TIMERS
    block["train_micro_batch_size_per_gpu"] = run.micro_batch_size
    block["train_batch_size"] = train.global_batch_size
    block["gradient_accumulation_steps"] = run.accumulation
    if guessed := list(_autos(block)):
        raise ConfigError(
            f"engine.deepspeed.{guessed[0]}='auto': DeepSpeed does not resolve it; state a value"
        )
    return block


def _resolve_zero(block: dict[str, Any], hidden_size: int, world_size: int) -> None:
    zero = block.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.stage: found {stage!r}, expected 1, 2 or 3; stage "
            "2 sends gradients during the backward and its overflow check protects the weights"
        )
    _check_keys(zero, ZERO_KEYS, "zero_optimization")
    for what in ("optimizer", "param"):
        _check_keys(
            zero.get(f"offload_{what}") or {},
            OFFLOAD_KEYS[what],
            f"zero_optimization.offload_{what}",
        )
    sizes = {  # as transformers resolves them
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, size in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = size
    if zero.get("overlap_comm") is None:
        zero["overlap_comm"] = stage == 3 or world_size > 1
    zero.setdefault("reduce_bucket_size", REDUCE_BUCKET_SIZE)
    device = (zero.get("offload_param") or {}).get("device", "none")
    if device == "cpu" and stage != 3:
        raise ConfigError(
            "engine.deepspeed.zero_optimization.offload_param.device='cpu' needs "
            f"zero_optimization.stage=3, found {stage}; use stage 3 or remove it"
        )


def _check_keys(block: dict[str, Any], known: Mapping[str, Check], path: str = "") -> None:
    """Check the keys of the block at `path` and their values; "auto" is resolved later.

    Raises:
        ConfigError: a key is unknown or not allowed, or its value is.
    """
    for key, value in block.items():
        name = f"{path}.{key}".lstrip(".")
        if name in REFUSED_KEYS:
            raise ConfigError(f"engine.deepspeed.{name}: not allowed here; {REFUSED_KEYS[name]}")
        if key not in known:
            near = near_miss(key, known)
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"engine.deepspeed.{name}: unknown key; {hint}")
        check = known[key]
        left = value == "auto" and check not in (BLOCK, BLOCK_OR_NULL)
        if not left and not check.holds(value):
            raise ConfigError(
                f"engine.deepspeed.{name}: found {value!r}, expected {check.expected}; "
                f"{check.otherwise}"
            )
        if isinstance(value, float) and check.expected.startswith("a whole number"):
            block[key] = int(value)


def _settle(block: dict[str, Any], key: str, value: Any, name: str, owner: str = "") -> None:
    """Set our value for a key.

    Raises:
        ConfigError: the block sets another value.
    """
    if not isinstance(block, dict):
        raise ConfigError(
            f"engine.deepspeed.{name.partition('.')[0]}: found {block!r}, expected a block"
        )
    if block.get(key, "auto") not in ("auto", value):
        expected = f"expected {value!r}" + (
            f" by {owner}; change {owner} or remove the key" if owner else ""
        )
        raise ConfigError(f"engine.deepspeed.{name}: found {block[key]!r}, {expected}")
    block[key] = value


def _autos(tree: Any, path: str = "") -> Any:
    """Yield the dotted paths of all "auto" values."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _autos(value, f"{path}.{key}".lstrip("."))
    elif tree == "auto":
        yield path
