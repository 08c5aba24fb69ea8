"""The largest micro-batch that fits in memory, for `train.micro_batch_size="auto"`.

Inputs: a configuration and models, as shapes or as modules. Outputs: a number of sequences that
divides the rank's share of the global batch, the same on all ranks. It is predicted, and on GPUs
also tried; not on CPUs, where a process that takes too much memory is killed.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from scaledistill.config.resolved import ResolvedRun
from scaledistill.distributed.failures import is_out_of_memory
from scaledistill.distributed.ranks import Ranks, failing_together, gather_objects
from scaledistill.engines import engine_traits
from scaledistill.errors import ConfigError
from scaledistill.models.loss import StudentLoss
from scaledistill.models.teacher import Teacher
from scaledistill.models.view import QKVView
from scaledistill.preflight.estimate import Estimate, estimate, sample_tokens

log = logging.getLogger(__name__)

MARGIN_FRACTION = 0.06
"""Part of a GPU's memory, or of a host's free memory, that is left for fragmentation, communication
and variation between steps."""


def predict(
    run: ResolvedRun,
    teacher: PretrainedConfig,
    students: Mapping[str, PretrainedConfig],
    limit_bytes: int,
) -> int:
    """Return the largest micro-batch predicted to fit, without running anything.

    Args:
        run: its micro-batch is not read.
        teacher: its model config.
        students: their model configs, by name.
        limit_bytes: free memory per rank; see `free_bytes`.

    Raises:
        ConfigError: not even the smallest fits.
    """
    return largest(run, estimate(run.with_micro_batch(1), teacher, students), limit_bytes)


def largest(run: ResolvedRun, facts: Estimate, limit_bytes: int) -> int:
    """Return what `predict` does, from an estimate for any micro-batch.

    Raises:
        ConfigError: not even the smallest fits.
    """
    room = limit_bytes * (1 - MARGIN_FRACTION)
    found = (
        f"needs {facts.memory_bytes(1) / 1e9:.2f} GB, {room / 1e9:.2f} GB are free for each rank"
    )
    return largest_that_fits(
        candidates(run), lambda size: facts.memory_bytes(size) <= room, found=found
    )


def choose(
    run: ResolvedRun,
    teacher: Teacher,
    students: Mapping[str, QKVView],
    facts: Estimate,
    ranks: Ranks,
    attempt: Callable[[int], None] | None = None,
    *,
    before: int | None = None,
) -> int:
    """Return the largest micro-batch that every rank has memory for. Collective.

    Call it before blocks are compiled: they would be compiled again for each size that is tried.

    Args:
        run: its micro-batch is the prediction, which is tried first on a GPU and returned on a
            CPU.
        teacher: on the rank's device.
        students: on any device, by name; they are not changed.
        facts: the estimate for this run; memory for its states is reserved while a size is tried.
        ranks: this process and its device.
        attempt: tries a size and raises `torch.OutOfMemoryError` if it does not fit (default: on a
            GPU a `Trial`). With a sharded teacher, the default is to return the prediction, since
            all ranks would have to run its forward together.
        before: that of the run that is resumed, with as many ranks. If it still fits, it is
            returned, so that sums are rounded as before.

    Raises:
        ConfigError: not even the smallest fits.
    """
    size, device = run.micro_batch_size, ranks.device
    with failing_together():
        whole_teacher = run.config.teacher.placement == "replicate"
        if attempt is None and device.type == "cuda" and whole_teacher:
            margin = int(MARGIN_FRACTION * torch.cuda.mem_get_info(device)[1])
            held_bytes = facts.state_bytes - facts.teacher_bytes + margin
            attempt = Trial(run, teacher, students, device, held_bytes)
        if attempt:
            if before and fits(attempt, before):
                size = before
            else:
                sizes, found = candidates(run), f"a step was tried on {device}"
                size = largest_that_fits(sizes, partial(fits, attempt), first=size, found=found)
            del attempt
            _release(device)
        elif before:
            size = min(size, before)
    size = min(gather_objects(size))
    if ranks.is_main:
        why = "as before" if size == before else "the most that fit"
        log.info("train.micro_batch_size: %d sequences, %s", size, why)
        if before and size < before:
            log.warning(
                "train.micro_batch_size was %d, which does not fit in memory here: the losses "
                "differ from those of an uninterrupted run by rounding, and with dropout by its "
                "masks",
                before,
            )
    return size


def candidates(run: ResolvedRun) -> list[int]:
    """Return the micro-batches that divide a rank's share of the global batch, ascending."""
    share = max(1, run.config.train.global_batch_size // run.world_size)
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
        if is_out_of_memory(error):
            return False
        raise
    return True


class Trial:
    """Runs a micro-batch through the teacher and, in turn, a copy of each student, loss, backward.

    Meanwhile `held_bytes` of memory are reserved.
    """

    def __init__(
        self,
        run: ResolvedRun,
        teacher: Teacher,
        students: Mapping[str, QKVView],
        device: torch.device,
        held_bytes: int,
    ) -> None:
        self._data, self._teacher = run.config.data, teacher
        self._device, self._held_bytes = device, held_bytes
        self._students: list[tuple[QKVView, StudentLoss]] = []
        for name, view in students.items():
            tried = view.copy()
            tried.module.to(device, run.student_dtype)
            if engine_traits(run).recomputes_blocks:
                tried.recompute_blocks()
            loss = StudentLoss.of(run.config, name, (teacher.config, view.config))
            self._students.append((tried, loss))

    def __call__(self, size: int) -> None:
        """Try a micro-batch of `size` sequences.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        for view, _ in self._students:
            view.module.zero_grad()
        _release(self._device)
        held = torch.empty(self._held_bytes, dtype=torch.uint8, device=self._device)
        tokens = sample_tokens(self._data, size, self._device)
        target = self._teacher(tokens)
        for view, compute in self._students:
            output = view(tokens)
            loss = compute(target, output, tokens)
            del output
            loss.total.backward()
            del loss
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
