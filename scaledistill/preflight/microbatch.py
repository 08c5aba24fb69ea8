"""The largest micro-batch that fits in memory, for `train.micro_batch_size="auto"`.

Inputs: a configuration and models, as shapes or as modules. Outputs: a number of sequences that
divides the rank's share of the global batch, the same on all ranks. It is predicted, and on GPUs
also tried; not on CPUs, where a process that takes too much memory is killed.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from scaledistill.config.schema import DistillConfig
from scaledistill.distributed.ranks import Ranks, failing_together, gather_objects
from scaledistill.errors import ConfigError
from scaledistill.models.capture import split_qkv, view_inputs
from scaledistill.models.teacher import Teacher
from scaledistill.preflight.estimate import DTYPES, Estimate, batch_arguments, estimate
from scaledistill.relations import relation_loss

log = logging.getLogger(__name__)

MARGIN_FRACTION = 0.06
"""Part of a GPU's memory, or of a host's free memory, that is left for fragmentation, communication
and variation between steps."""
_OUT_OF_MEMORY = (
    *("CUDA out of memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory"),
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def predict(
    config: DistillConfig,
    name: str,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    world_size: int,
    limit_bytes: int,
    device_type: str = "cpu",
) -> int:
    """Return the largest micro-batch predicted to fit, without running anything.

    Args:
        config: resolved, except for the micro-batch.
        name: the student.
        teacher: its model config.
        student: its model config.
        world_size: the number of ranks.
        limit_bytes: free memory per rank; see `free_bytes`.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: not even the smallest fits.
    """
    facts = estimate(with_micro_batch(config, 1), name, teacher, student, world_size, device_type)
    room = limit_bytes * (1 - MARGIN_FRACTION)
    found = (
        f"needs {facts.memory_bytes(1) / 1e9:.2f} GB, {room / 1e9:.2f} GB are free for each rank"
    )
    return largest_that_fits(
        candidates(config, world_size), lambda size: facts.memory_bytes(size) <= room, found=found
    )


def choose(
    config: DistillConfig,
    name: str,
    teacher: Teacher,
    student: nn.Module,
    facts: Estimate,
    ranks: Ranks,
    attempt: Callable[[int], None] | None = None,
) -> int:
    """Return the largest micro-batch that every rank has memory for. Collective.

    Call it before blocks are compiled: they would be compiled again for each size that is tried.

    Args:
        config: resolved; its micro-batch is the prediction, which is tried first on a GPU and
            returned on a CPU.
        name: the student.
        teacher: on the rank's device.
        student: the training view for the engine, on any device; it is not changed.
        facts: the estimate for this run; memory for its states is reserved while a size is tried.
        ranks: this process and its device.
        attempt: tries a size and raises `torch.OutOfMemoryError` if it does not fit (default: on a
            GPU a `Trial`). With a sharded teacher, the default is to return the prediction, since
            all ranks would have to run its forward together.

    Raises:
        ConfigError: not even the smallest fits.
    """
    size, device = cast(int, config.train.micro_batch_size), ranks.device
    with failing_together():
        if attempt is None and device.type == "cuda" and config.teacher.placement == "replicate":
            margin = int(MARGIN_FRACTION * torch.cuda.mem_get_info(device)[1])
            held_bytes = facts.state_bytes - facts.teacher_bytes + margin
            attempt = Trial(config, name, teacher, student, device, held_bytes)
        if attempt:
            sizes, found = candidates(config, ranks.world_size), f"a step was tried on {device}"
            size = largest_that_fits(sizes, partial(fits, attempt), first=size, found=found)
            del attempt
            _release(device)
    size = min(gather_objects(size))
    if ranks.is_main:
        log.info("train.micro_batch_size: %d sequences, the most that fit", size)
    return size


def with_micro_batch(config: DistillConfig, size: int | Literal["auto"]) -> DistillConfig:
    """Return the configuration with a micro-batch of `size` sequences."""
    return config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch_size": size})}
    )


def candidates(config: DistillConfig, world_size: int) -> list[int]:
    """Return the micro-batches that divide a rank's share of the global batch, ascending."""
    share = max(1, config.train.global_batch_size // world_size)
    return [size for size in range(1, share + 1) if share % size == 0]


def largest_that_fits(
    sizes: Sequence[int], fits: Callable[[int], bool], *, first: int | None = None, found: str
) -> int:
    """Return the largest of the ascending `sizes` that fits, by bisection; `first` is tried first.

    Raises:
        ConfigError: none fits; `found` is the reason in the message.
    """
    fitting, failing = -1, len(sizes)
    index = sizes.index(first) if first in sizes else len(sizes) // 2
    while failing - fitting > 1:
        if fits(sizes[index]):
            fitting = index
        else:
            failing = index
        index = (fitting + failing) // 2
    if fitting < 0:
        raise ConfigError(
            f"train.micro_batch_size='auto': not even {sizes[0]} fits in memory ({found}); use "
            "shards with a smaller data.sequence_length, a smaller student, teacher.dtype='bf16' "
            "or, on a GPU, engine.deepspeed.zero_optimization.offload_optimizer={'device': 'cpu'}"
        )
    return sizes[fitting]


def fits(attempt: Callable[[int], None], size: int) -> bool:
    """Return whether `attempt(size)` does not run out of memory; other errors are raised."""
    try:
        attempt(size)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(
            text in str(error) for text in _OUT_OF_MEMORY
        ):
            return False
        raise
    return True


class Trial:
    """Runs a micro-batch through teacher, a copy of the student, loss and backward.

    Meanwhile `held_bytes` of memory are reserved.
    """

    def __init__(
        self,
        config: DistillConfig,
        name: str,
        teacher: Teacher,
        student: nn.Module,
        device: torch.device,
        held_bytes: int,
    ) -> None:
        self._config, self._name, self._teacher = config, name, teacher
        self._device, self._held_bytes = device, held_bytes
        self._student = copy.deepcopy(student).to(device, DTYPES[config.train.precision])

    def __call__(self, size: int) -> None:
        """Try a micro-batch of `size` sequences.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        config, student = self._config, self._student
        student.zero_grad()
        _release(self._device)
        held = torch.empty(self._held_bytes, dtype=torch.uint8, device=self._device)
        batch = batch_arguments(config, size, self._device)
        target = self._teacher(**batch)
        inputs = view_inputs(cast(PretrainedConfig, student.config), **batch)
        output = split_qkv(
            student(**inputs).last_hidden_state, cast("tuple[int, int, int]", student.qkv_widths)
        )
        loss = relation_loss(
            target,
            output,
            num_heads=config.relation_heads(self._name),
            pairs=config.relations.pairs,
            mask_BT=batch.get("mask_BT"),
            segment_ids_BT=batch.get("segment_ids_BT"),
            backend=config.relations.backend,
        )
        del target, output
        loss.total.backward()
        del held


def _release(device: torch.device) -> None:
    """Return unused memory to the GPU, and reset its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def free_bytes(device: torch.device, ranks_on_node: int, root: Path = Path("/")) -> int:
    """Return the bytes that this rank may still allocate.

    That is the GPU's free memory, or this rank's share of what the host and its cgroups have left.
    `root` is the folder with `proc` and `sys`.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _numbers(root / "proc/meminfo")["MemAvailable:"] * 1024
    return min([available, *_cgroup_rooms(root)]) // ranks_on_node


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Yield limit − usage in bytes of each memory cgroup of this process, v1 or v2.

    File cache counts as free, since the kernel evicts it.
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, files, cache = (
                root / "sys/fs/cgroup",
                ("memory.max", "memory.current"),
                "inactive_file",
            )
        elif "memory" in controllers.split(","):
            base, cache = root / "sys/fs/cgroup/memory", "total_inactive_file"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container, `path` may be the host's, of which only the top is visible.
        inside = Path(path.lstrip("/"))
        for folder in (base / part for part in (inside, *inside.parents)):
            if not (folder / files[0]).exists():
                continue
            limit = (folder / files[0]).read_text().strip()
            if limit != "max":
                used = int((folder / files[1]).read_text())
                used -= _numbers(folder / "memory.stat")[cache]
                yield max(0, int(limit) - used)


def _numbers(path: Path) -> dict[str, int]:
    """Read lines of a name, a number and perhaps a unit, which is dropped."""
    numbers = {}
    for line in path.read_text().splitlines():
        name, value, *_ = line.split()
        numbers[name] = int(value)
    return numbers
