"""Start the ranks of a run on this machine, by torchrun's API.

Inputs: a command and the number of ranks. Outputs: the ranks' exit code. Not handled here: other
machines (launch/), and what a rank does.

torchrun itself forwards only the first signal, kills ranks that are not gone 30 s later and ends in
a traceback. Here its agent runs in a thread, where it leaves signals alone, and each signal is
passed on to the ranks, which save a checkpoint and stop, however long that takes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import FrameType

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scaledistill.distributed.launcher import heeded
from scaledistill.errors import EXIT_ENVIRONMENT, EXIT_INTERRUPTED, DataError, SettingError

log = logging.getLogger(__name__)

FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal was closed: ranks stop for SIGTERM
}
"""The signals that are passed on, and as which."""
POLL_SECONDS = 0.2
AGENT_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher")


def ranks_to_start(stated: int | None) -> int:
    """Return how many ranks a run on this machine has: the stated number, or one per GPU.

    Raises:
        SettingError: there are fewer GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if stated and 0 < gpus < stated:
        raise SettingError(
            "num_ranks",
            stated,
            f"is more than the {gpus} GPUs that this process sees (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            "each rank needs its own",
        )
    return stated or max(1, gpus)


def start_ranks(arguments: Sequence[str], num_ranks: int, *, quiet: bool = True) -> int:
    """Run Python with `arguments` as each rank of a job; return the exit code once all have ended.

    The code is that of the first rank that failed, or 3 if that rank was killed. Signals are passed
    on to the ranks. Call it in the main thread.

    Args:
        arguments: of the interpreter, such as `["script.py", …]`.
        num_ranks: the number of ranks.
        quiet: hide the messages of torchrun's agent.

    Raises:
        DataError: the ranks could not be started.
    """
    if quiet:
        for name in AGENT_LOGGERS:  # their modules' loggers have levels of their own
            logger = logging.getLogger(name)
            logger.addHandler(logging.NullHandler())
            logger.propagate = False
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # the host's name may resolve to nothing, or elsewhere
        max_restarts=0,
    )
    received: list[int] = []
    requested: set[int] = set()

    def receive(number: int, frame: FrameType | None) -> None:
        requested.add(FORWARDED[signal.Signals(number)])
        received.append(FORWARDED[signal.Signals(number)])

    before = {number: signal.signal(number, receive) for number in heeded(FORWARDED)}
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="torchrun") as pool:
            launch = elastic_launch(config, sys.executable)
            _wait(pool.submit(launch, *arguments), received)
    except ChildFailedError as error:
        return _exit_code(error, requested)
    except OSError as error:
        raise DataError(f"the {num_ranks} ranks cannot be started: {error}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _wait(agent: Future[object], received: list[int]) -> None:
    """Wait for the agent, and pass the received signals on to its ranks."""
    while not wait([agent], timeout=POLL_SECONDS).done:
        # A signal that comes before the ranks run is kept for them.
        ranks = [one for one in psutil.Process().children() if _is_rank(one)] if received else []
        for number in received[:] if ranks else ():
            received.remove(number)
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
    agent.result()


def _is_rank(process: psutil.Process) -> bool:
    """Return whether a child is a rank: the agent makes each the leader of a session."""
    try:
        return os.getsid(process.pid) == process.pid
    except ProcessLookupError:
        return False


def _exit_code(error: ChildFailedError, requested: Collection[int]) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode
    if -failure.exitcode == signal.SIGINT or -failure.exitcode in requested:
        # It came before the rank had set its handlers.
        return EXIT_INTERRUPTED
    name = signal.Signals(-failure.exitcode).name
    reason = ", often because memory ran out" if name == "SIGKILL" else ""
    log.error("rank %d was killed by %s%s; rerun the same command to resume", rank, name, reason)
    return EXIT_ENVIRONMENT
