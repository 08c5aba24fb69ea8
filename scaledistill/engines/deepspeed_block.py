"""The DeepSpeed block of a configuration: what a user may set in it, and what we set. Imports nothing of DeepSpeed.

DeepSpeed ignores a misspelt top-level key, reads `"bf16": "auto"` as off and clips at 1.0 where nothing is said; so
every key is checked here, and every value that it would guess is written out.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

from scaledistill.config import DistillConfig
from scaledistill.errors import ConfigError

ALLOWED_KEYS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "gradient_clipping",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "activation_checkpointing",
    "comms_logger",
    "flops_profiler",
    "timers",
    "aio",
    "compile",
    "disable_python_gc",
)
ZERO_KEYS = (  # a test compares them with DeepSpeed's own
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "leaf_module",
    "legacy_stage1",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "override_module_apply",
    "parameter_alignment",
    "pipeline_loading_checkpoint",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory",
    "stage",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zenflow",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)
OFFLOAD_KEYS = {
    "optimizer": (
        "buffer_count",
        "cpuadam_cores_perc",
        "device",
        "fast_init",
        "nvme_path",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "ratio",
        "super_offload",
    ),
    "param": ("buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"),
}
# Elements. DeepSpeed's 500 M hold a whole student: its gradients would travel only when the backward is over.
REDUCE_BUCKET_SIZE = 5_000_000
# Of gradients that travel. In bf16 each hop of a ring rounds the sum: 1.7 to 7 % off over 256 ranks.
COMMUNICATION_DTYPE = "fp32"
REFUSED_KEYS = {
    "train_batch_size": "set train.global_batch_size instead",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size instead",
    "gradient_accumulation_steps": "it follows from train.global_batch_size, train.micro_batch_size and the ranks",
    "managed_gradient_accumulation": "accumulation is ours",
    "optimizer": "the optimizer is AdamW, set by train.learning_rate, train.weight_decay, train.adam_betas, …",
    "scheduler": "the learning rate is a function of the step, set by train.learning_rate and train.warmup_steps",
    "torch_autocast": "set train.precision instead",
}


def resolve_block(config: DistillConfig, world_size: int) -> dict[str, Any]:
    """Return the whole configuration for `deepspeed.initialize`; precision and micro-batch of `config` are resolved.

    Raises:
        ConfigError: a key is unknown or ours to set, ZeRO's stage is not 1, 2 or 3, or a value contradicts `train`.
    """
    block = copy.deepcopy(config.engine.deepspeed)
    for key in block:
        if key in REFUSED_KEYS:
            raise ConfigError(f"engine.deepspeed.{key}: not allowed here; {REFUSED_KEYS[key]}")
    _check_keys(block, ALLOWED_KEYS, "engine.deepspeed")
    train = config.train
    _resolve_zero(block, min(student.hidden_size for student in config.students.values()), world_size)
    for key, precision in (("bf16", "bf16"), ("fp16", "fp16")):
        _settle(block.setdefault(key, {}), "enabled", train.precision == precision, f"{key}.enabled", "train.precision")
    # What skips a step with non-finite gradients, which is all that protects the weights from them.
    _settle(block["bf16"], "check_grad_overflow", True, "bf16.check_grad_overflow")
    _settle(block["zero_optimization"], "compute_grad_norm", True, "zero_optimization.compute_grad_norm")
    _settle(block, "gradient_clipping", train.max_grad_norm, "gradient_clipping", "train.max_grad_norm")
    _settle(block.setdefault("data_types", {}), "grad_accum_dtype", "fp32", "data_types.grad_accum_dtype")
    block["communication_data_type"] = communication_dtype(config)
    block["zero_force_ds_cpu_optimizer"] = False  # PyTorch's fused AdamW also steps offloaded state: exact to restore
    block.setdefault("steps_per_print", None)
    micro_batch_size = int(train.micro_batch_size or 1)
    block["train_micro_batch_size_per_gpu"] = micro_batch_size
    block["train_batch_size"] = train.global_batch_size
    block["gradient_accumulation_steps"] = train.global_batch_size // (world_size * micro_batch_size)
    if guessed := list(_autos(block)):
        raise ConfigError(f"engine.deepspeed.{guessed[0]}='auto': DeepSpeed does not resolve it; state a value")
    if block["communication_data_type"] not in ("fp32", "bf16", "fp16"):
        raise ConfigError(
            f"engine.deepspeed.communication_data_type: found {block['communication_data_type']!r}, expected 'fp32', "
            f"'bf16' or 'fp16'; remove it to take {COMMUNICATION_DTYPE!r}"
        )
    return block


def communication_dtype(config: DistillConfig) -> Any:
    """Return the dtype that gradients travel in under DeepSpeed: fp32 unless the block names another."""
    return config.engine.deepspeed.get("communication_data_type") or COMMUNICATION_DTYPE


def zero_settings(config: DistillConfig) -> tuple[int, bool, bool]:
    """Return (ZeRO stage, optimizer state offloaded, parameters offloaded); FSDP2 shards what stage 3 does."""
    if config.engine.name == "fsdp":
        return 3, config.engine.fsdp.cpu_offload, config.engine.fsdp.cpu_offload
    zero = config.engine.deepspeed.get("zero_optimization", {})
    offloads = [(zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")]
    return zero.get("stage", 0), offloads[0], offloads[1]


def _resolve_zero(block: dict[str, Any], hidden_size: int, world_size: int) -> None:
    zero = block.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.stage: found {stage!r}, expected 1, 2 or 3; stage 2 "
            "sends gradients during the backward and its overflow check protects the weights"
        )
    _check_keys(zero, ZERO_KEYS, "engine.deepspeed.zero_optimization")
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
    bucket = zero.setdefault("reduce_bucket_size", REDUCE_BUCKET_SIZE)
    if isinstance(bucket, bool) or not isinstance(bucket, int | float) or bucket != int(bucket) or bucket < 1:
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.reduce_bucket_size: found {bucket!r}, expected a number of elements, "
            f"1 or more; remove it to take {REDUCE_BUCKET_SIZE}"
        )
    zero["reduce_bucket_size"] = int(bucket)
    for what in ("optimizer", "param"):
        offload = zero.get(f"offload_{what}") or {}
        where = f"engine.deepspeed.zero_optimization.offload_{what}"
        if not isinstance(offload, dict):
            raise ConfigError(f"{where}: found {offload!r}, expected a block such as {{'device': 'cpu'}}")
        _check_keys(offload, OFFLOAD_KEYS[what], where)
        device, where = offload.get("device", "none"), f"{where}.device"
        if device not in ("none", "cpu"):
            raise ConfigError(f"{where}: found {device!r}, expected 'cpu' or 'none'")
        if what == "param" and device == "cpu" and stage != 3:
            raise ConfigError(f"{where}='cpu' needs zero_optimization.stage=3, found {stage}; use stage 3 or remove it")


def _check_keys(block: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in block:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}.{key}: unknown key; {hint}")


def _settle(block: dict[str, Any], key: str, value: Any, name: str, owner: str = "") -> None:
    """Write our value; a stated other one is an error."""
    if not isinstance(block, dict):
        raise ConfigError(f"engine.deepspeed.{name.partition('.')[0]}: found {block!r}, expected a block")
    if block.get(key, "auto") not in ("auto", value):
        expected = f"expected {value!r}" + (f" by {owner}; change {owner} or remove the key" if owner else "")
        raise ConfigError(f"engine.deepspeed.{name}: found {block[key]!r}, {expected}")
    block[key] = value


def _autos(tree: Any, path: str = "") -> Any:
    """Yield the dotted paths of all "auto" values."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _autos(value, f"{path}.{key}".lstrip("."))
    elif tree == "auto":
        yield path
