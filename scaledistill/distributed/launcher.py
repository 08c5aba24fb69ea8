"""What the launcher set for this process: its rank, and where the ranks meet.

Inputs: the environment of `deepspeed`, `torchrun` or `accelerate launch`, or of no launcher.
Outputs: checked numbers. Imports nothing heavy. Not handled here: joining the other ranks
(`distributed.ranks`).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable
from typing import Literal, NamedTuple

from scaledistill.errors import ConfigError

log = logging.getLogger(__name__)

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
LEAST = {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "LOCAL_SIZE": 1,
    "MASTER_PORT": 0,
}
BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
"""Set by `accelerate launch` in all that it starts."""
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
BATCH_STEPS = 0xFFFFFFF0
"""First number of Slurm's steps for batch scripts and shells; those of `srun` count from 0."""
LAUNCHERS = (
    "start the run with `deepspeed`, `torchrun` or `accelerate launch`, which set them all, or "
    "unset them for one process"
)


def heeded(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals to handle: without SIGHUP if it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in signals if number != signal.SIGHUP or not ignored]


class LauncherFacts(NamedTuple):
    """The place of this process in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


ISOLATED = "import sys; sys.path[:] = filter(None, sys.path); "
"""Begins what `python -c` runs in a process of ours. Like the command itself, and unlike `-m`, it
then imports nothing from the working folder, which may have a datasets.py."""


def stated_rank(name: Literal["RANK", "LOCAL_RANK"] = "RANK") -> str:
    """Return a rank as the launcher states it, unchecked; "0" without a launcher.

    For what runs without a process group; what runs in one has its `Ranks`.
    """
    return os.environ.get(name, "0")


def check_numbers() -> None:
    """Check that the launcher's variables, where set, hold valid numbers.

    Raises:
        ConfigError: one does not.
    """
    for name, least in LEAST.items():
        text = os.environ.get(name)
        if text is None or (name in LOCAL_SIZES and name != _local_name()):
            continue
        most = 65535 if name == "MASTER_PORT" else None
        if (
            not (text.isascii() and text.isdecimal())
            or int(text) < least
            or (most and int(text) > most)
        ):
            expected = f"a whole number from {1 if most else least} " + (
                f"to {most}" if most else "up"
            )
            raise ConfigError(
                f"the environment sets {name}={text!r}, expected {expected}; {LAUNCHERS}"
            )


def is_launched() -> bool:
    """Return whether a launcher has started this process as a rank."""
    # accelerate sets no ranks for a single process.
    return has_ranks() or BY_ACCELERATE in os.environ


def has_ranks() -> bool:
    """Return whether a launcher has set ranks."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def launcher_facts() -> LauncherFacts:
    """Return the place of this process in the job; without a launcher, it is the only one.

    Raises:
        ConfigError: the variables are incomplete or contradict each other, or several processes
            were started that do not know of each other.
    """
    check_numbers()
    given = [name for name in NAMES if name in os.environ]
    if not has_ranks():
        _check_alone()
        return LauncherFacts(0, 1, 0, 1)
    if missing := [name for name in NAMES if name not in given]:
        raise ConfigError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; {LAUNCHERS}"
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in NAMES[:3])
    local_name = _local_name()
    local_world_size = int(os.environ[local_name])
    for name, number, size_name, size in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, local_name, local_world_size),
    ):
        if number >= size:
            raise ConfigError(
                f"the environment sets {name}={number} and {size_name}={size}, expected {name} to "
                f"be from 0 to {size - 1}; {LAUNCHERS}"
            )
    # A single rank opens no port, so that any number will do.
    if world_size > 1 and int(os.environ["MASTER_PORT"]) == 0:
        raise ConfigError(
            "the environment sets MASTER_PORT=0, expected a whole number from 1 to 65535; "
            f"{LAUNCHERS}"
        )
    if not os.environ["MASTER_ADDR"].strip():
        raise ConfigError(
            "the environment sets MASTER_ADDR='', expected the name or address of rank 0's host; "
            f"{LAUNCHERS}"
        )
    return LauncherFacts(rank, world_size, local_rank, local_world_size)


def _local_name() -> str:
    """Return the name of the variable with the number of ranks on this machine."""
    return next((name for name in LOCAL_SIZES if os.environ.get(name)), "WORLD_SIZE")


def _check_alone() -> None:
    """Refuse processes that were started together but would each run the whole job.

    Raises:
        ConfigError: this is one of several tasks of Slurm or MPI.
    """
    tasks = _slurm_tasks()
    if tasks > 1:
        raise ConfigError(
            f"this is one of {tasks} tasks of `srun`, none of which knows of the others (RANK and "
            "WORLD_SIZE are not set): each would be a run of its own in the same folder. Use "
            "`sbatch launch/slurm.sbatch --config FILE`, or `srun --ntasks-per-node=1 torchrun …`; "
            "for one process, srun --ntasks=1"
        )
    for name in MPI_SIZES:
        if (size := os.environ.get(name, "")).isdecimal() and int(size) > 1:
            raise ConfigError(
                f"MPI started {size} processes ({name}), none of which knows of the others (RANK "
                "and WORLD_SIZE are not set): each would be a run of its own in the same folder. "
                "Use `torchrun --nproc-per-node N`, or launch/torchrun_multi_node.sh on each node"
            )
    if BY_ACCELERATE in os.environ and "MASTER_PORT" in os.environ:
        log.warning(
            "accelerate launch was asked for several processes and started one: it starts several "
            "on GPUs, or on CPUs by MPI. This run has one rank; `torchrun --nproc-per-node N` or "
            "`deepspeed` start several on CPUs"
        )


def _slurm_tasks() -> int:
    """Return the number of tasks of this process's `srun`; 1 without one, as in a batch script."""
    step, task = (
        os.environ.get("SLURM_STEP_ID") or os.environ.get("SLURM_STEPID", ""),
        os.environ.get("SLURM_PROCID"),
    )
    in_step = (step.isdecimal() and int(step) < BATCH_STEPS) or "SLURM_STEP_NUM_TASKS" in os.environ
    if task is None or not (in_step or task != "0"):
        return 1
    # In a batch script SLURM_NTASKS counts the tasks of the job, not the script itself: that is why
    # batch scripts have returned above.
    sizes = (
        os.environ.get(name, "")
        for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    )
    return next((int(size) for size in sizes if size.isdecimal()), 1)
