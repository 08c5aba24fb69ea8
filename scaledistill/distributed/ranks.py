"""Ranks: the process group, collectives, errors across ranks, and the precision of a device.

Inputs: the environment of a launcher (`deepspeed`, `torchrun`, `accelerate launch`) or of none
(plain `python`: one rank). Outputs: `Ranks`. Not handled here: the launcher's variables
(`distributed.launcher`), lost or stalled ranks (`distributed.watchdog`).
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from scaledistill.distributed.failures import explain_lost_peer
from scaledistill.distributed.launcher import LauncherFacts, launcher_facts
from scaledistill.errors import (
    EXIT_ENVIRONMENT,
    ConfigError,
    DataError,
    DivergedError,
    PeerError,
    SettingError,
    plain_type,
)

log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
"""How long a rank waits for rank 0 to report a failure that both have."""
CPU_BF16_VARIABLE = "SCALEDISTILL_CPU_BF16"
"""Environment variable: 1 or 0 overrides whether the CPU has fast bf16; tests set both."""
BF16_ON_CPU = (
    "train.precision=bf16 on a CPU: PyTorch adds the gradients of LayerNorms and of the token "
    "types over tokens in bf16, 10 to 80 % off; use fp32 or auto (teacher.dtype may stay bf16)"
)
LEAVE_SECONDS = 30
"""How long leaving a process group may take: NCCL waits for peers that have died."""

_at_leaving: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the job, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    """Ranks on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0


@contextmanager
def process_group(timeout_seconds: int) -> Iterator[Ranks]:
    """Join the job's process group, and leave it at the end. Collective.

    Uses NCCL with one GPU per rank if there are GPUs, else gloo on the CPU. A group that already
    exists is used and not left. Groups created during the block have the same timeout.

    Raises:
        ConfigError: a launcher's variables are wrong, or there are more ranks than GPUs on this
            machine.
        DataError: the ranks cannot meet: the port is in use, or rank 0 cannot be reached.
    """
    rank, world_size, local_rank, local_world_size = facts_here = launcher_facts()
    # Needed for run.deterministic; must be set before any CUDA work.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        # With Slurm's --gpus-per-task=1, each task sees only its own GPU.
        own_gpu = (
            num_gpus == 1
            and "SLURM_PROCID" in os.environ
            and "TORCHELASTIC_RUN_ID" not in os.environ
        )
        if local_rank >= num_gpus and not own_gpu:
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own: this process sees {num_gpus} "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); "
                "start at most one process per GPU"
            )
        index = 0 if own_gpu else local_rank
        torch.cuda.set_device(index)
        device, backend = torch.device("cuda", index), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        # DeepSpeed warns if it has to detect this itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not _threads_are_chosen():  # on GPUs, for an optimizer state in host memory
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    # DeepSpeed reads these even if the group already exists, and requires MPI without them. It
    # takes the GPU that LOCAL_RANK names.
    facts = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank if device.index is None else device.index,
        "LOCAL_SIZE": local_world_size,
    }
    address = {
        name: os.environ.get(name, value)
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"))
    }
    timeout = timedelta(seconds=timeout_seconds)
    with _environment({**facts, **address}), _default_timeout(timeout):
        if dist.is_initialized():  # the caller's own group, which stays as it is
            with _callbacks_at_leaving():
                yield Ranks(
                    dist.get_rank(), dist.get_world_size(), local_rank, device, local_world_size
                )
            return
        if world_size == 1:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        elif (
            local_world_size == world_size
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        ):
            # The agent's store survives a restart, and a rank that read a dead rank's address from
            # it would never connect: so each attempt has its own prefix. Several agents count
            # restarts separately; there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes new stores.
            with _meeting(facts_here):
                store, *_ = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(
                f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
            )
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
        else:
            with _meeting(facts_here):
                dist.init_process_group(backend, timeout=timeout)
        backstop = threading.Timer(LEAVE_SECONDS, os._exit, [EXIT_ENVIRONMENT])
        backstop.daemon = True
        try:
            with _callbacks_at_leaving(backstop.start):
                yield Ranks(rank, world_size, local_rank, device, local_world_size)
        finally:
            # DeepSpeed keeps groups of its own, which the next run would otherwise reuse.
            comm = sys.modules.get("deepspeed.comm")
            leave = (
                comm.destroy_process_group
                if comm and comm.is_initialized()
                else dist.destroy_process_group
            )
            leave()
            backstop.cancel()


def at_leaving(callback: Callable[[], None]) -> Callable[[], None]:
    """Call `callback` when the process group is left; in a caller's own group, when the run ends.

    It is not called if another rank is lost: waiting for the device would then wait for that rank.

    Returns:
        A function that calls it now instead.
    """
    _at_leaving.append(callback)

    def now() -> None:
        _at_leaving.remove(callback)
        callback()

    return now


def _threads_are_chosen() -> bool:
    """Whether OMP_NUM_THREADS is set, other than by torchrun: to 1, if it starts several ranks."""
    name = "OMP_NUM_THREADS"
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get(name) == "1":
        with suppress(OSError):  # torchrun, with the variables with which it was started
            variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            return any(variable.startswith(f"{name}=".encode()) for variable in variables)
    return name in os.environ


@contextmanager
def _callbacks_at_leaving(leaving: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call `leaving` after the block, then the block's `at_leaving` callbacks, last one first."""
    outer = len(_at_leaving)
    alone = False
    try:
        yield
    except BaseException as error:
        alone = any(
            cause is not None and explain_lost_peer(cause) for cause in (error, error.__cause__)
        )
        raise
    finally:
        leaving()
        callbacks = _at_leaving[outer:]
        del _at_leaving[outer:]
        for callback in [] if alone else reversed(callbacks):
            try:
                callback()
            except Exception as error:  # noqa: BLE001 - the run's own end is what must be reported
                log.warning("an engine could not be released: %s", error)


@contextmanager
def _default_timeout(timeout: timedelta) -> Iterator[None]:
    """Make `timeout` the default of new process groups.

    DeepSpeed creates groups of its own without one, and NCCL's default is only 10 minutes.
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


@contextmanager
def _meeting(facts: LauncherFacts) -> Iterator[None]:
    """Explain why the ranks' store cannot be reached.

    Raises:
        DataError: the port is in use, or rank 0 does not answer.
    """
    try:
        yield
    except dist.DistError as error:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise DataError(
                f"port {port} on {socket.gethostname()}, where the ranks are to meet, is in use by "
                "another process. Give a free one: --master_port for deepspeed, --master-port for "
                "torchrun, --main_process_port for accelerate launch, or MASTER_PORT; the scripts "
                "in launch/ find one"
            ) from error
        if facts.rank and facts.local_world_size == facts.world_size:
            # Rank 0 is on this machine and reports its own failure; the launcher then ends this
            # rank.
            time.sleep(REPORT_SECONDS)
        reason = str(error).splitlines()[0][:200]
        raise DataError(
            f"rank {facts.rank} on {socket.gethostname()} cannot meet the other ranks at "
            f"{host}:{port} ({reason}); check that rank 0 runs there, that MASTER_ADDR and "
            "MASTER_PORT are its address, and that no firewall blocks it"
        ) from error


@contextmanager
def _environment(values: Mapping[str, object]) -> Iterator[None]:
    """Set environment variables during the block, and restore the previous ones afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= {name: str(value) for name, value in values.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device computes bf16 faster than fp32.

    $SCALEDISTILL_CPU_BF16 overrides what is detected on a CPU.

    Raises:
        ConfigError: the variable is neither 0 nor 1.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    stated = os.environ.get(CPU_BF16_VARIABLE, "")
    if stated not in ("", "0", "1"):
        raise ConfigError(
            f"{CPU_BF16_VARIABLE}={stated!r} in the environment; expected 0 or 1, or unset it"
        )
    return (
        stated == "1"
        if stated
        else torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the student's "fp32", "bf16" or "fp16" for a stated precision or "auto".

    "auto" is fp32 on all CPUs: PyTorch's CPU backward of LayerNorm and Embedding sums over tokens
    in bf16, which makes these gradients 10 % wrong over 512 tokens and 80 % over 16,384.

    Raises:
        ConfigError: fp16 on a CPU, which DeepSpeed refuses.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" and has_fast_bf16(device) else "fp32"
    return _possible("precision", precision, device)


def resolve_teacher_dtype(dtype: str, precision: str, device: torch.device) -> str:
    """Return the teacher's "fp32", "bf16" or "fp16" for a stated dtype or "auto".

    "auto" takes the student's stated `precision`. If that is "auto" too, it is bf16 if that is
    fast, on CPUs too, since a forward sums in fp32.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    if dtype == "auto" == precision:
        return "bf16" if has_fast_bf16(device) else "fp32"
    return _possible("dtype", precision if dtype == "auto" else dtype, device)


def _possible(field: str, dtype: str, device: torch.device) -> str:
    if dtype == "fp16" and device.type == "cpu":
        raise SettingError(field, dtype, "needs a GPU, found only a CPU", "use bf16 or fp32")
    return dtype


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum over ranks. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on some rank. Collective."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item())


def private_store(name: str) -> dist.Store:
    """Return an empty store that all ranks share, with its own connection. Collective."""
    group_store = distributed_c10d._get_default_store()
    # A random prefix: torchrun's store survives restarts, and restart counts may differ.
    token = broadcast_object(secrets.token_hex(8))
    return dist.PrefixStore(f"{name}-{token}", group_store.clone())  # type: ignore[attr-defined]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` on every rank. Collective."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, by rank. Collective."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def reported_once(ranks: Ranks) -> Iterator[None]:
    """Run a block that fails on all ranks alike or on none: only rank 0 keeps the error.

    Raises:
        PeerError: on the other ranks.
    """
    try:
        yield
    except (ConfigError, DataError, DivergedError) as error:
        if ranks.is_main:
            raise
        raise PeerError(str(error), error.exit_code) from error


@contextmanager
def failing_together() -> Iterator[None]:
    """Run a block without collectives; if it fails on any rank, fail on all. Collective.

    Raises:
        ConfigError, DataError: on rank 0, its own error or else the first failing rank's, with that
            rank and its host.
        PeerError: on the other ranks.
        Exception: any other error, on the rank that has it.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - no error may leave the other ranks waiting
        error = caught
    expected = isinstance(error, ConfigError | DataError)
    failure = None
    if isinstance(error, ConfigError | DataError):
        failure = (plain_type(error), str(error), socket.gethostname())
    elif error:
        failure = (DataError, repr(error), socket.gethostname())
    failures = gather_objects(failure)
    failed = next((rank for rank, failure in enumerate(failures) if failure), None)
    if failed is None:
        return
    if error and not expected:
        raise error
    kind, message, host = failures[failed]
    if dist.get_rank() != 0:
        raise PeerError(message, kind.exit_code) from error
    raise error or kind(f"rank {failed} on {host}: {message}")
