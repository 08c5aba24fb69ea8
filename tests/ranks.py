"""Runs a function on one or more forked ranks, each a process of its own with torch and DeepSpeed
already imported.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The process that ranks are forked from finds `preload` by this; it does not get our sys.path.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preload"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """`function(*arguments)` on `world_size` ranks; what it returns must pickle."""

    def __init__(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
        self._results = context.Queue()
        port = free_port()
        # Ranks have the environment of the process that they are forked from, not this one's.
        passed_on = {
            name: value for name, value in os.environ.items() if name.startswith("SCALEDISTILL_")
        }
        self.processes = [
            context.Process(
                target=_enter,
                args=(self._results, function, rank, world_size, port, passed_on, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """Kill the ranks that are still there."""
        for process in self.processes:
            process.kill()
            process.join(10)

    def wait(self, timeout: float = 120) -> list[Any]:
        """Return the results by rank; the first error of any rank fails the test."""
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < len(self.processes):
                try:
                    rank, result, error = self._results.get(timeout=0.2)
                except queue.Empty:
                    dead = [
                        p
                        for r, p in enumerate(self.processes)
                        if r not in results and p.exitcode not in (None, 0)
                    ]
                    if dead and time.monotonic() < deadline - 2:
                        deadline = time.monotonic() + 2  # its last words may be under way
                    if time.monotonic() > deadline:
                        raise AssertionError(
                            f"ranks ended or hung: {[p.exitcode for p in self.processes]}"
                        ) from None
                    continue
                if error:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
                results[rank] = result
        finally:
            if len(results) < len(self.processes):
                self.kill()
            for process in self.processes:
                process.join(10)
        return [results[rank] for rank in range(len(self.processes))]


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120
) -> list[Any]:
    """Run a function on forked ranks and return what each returned, by rank."""
    return Job(function, world_size, *arguments).wait(timeout)


def _enter(
    results: Any,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    passed_on: dict[str, str],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= passed_on
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
    }
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:  # noqa: BLE001 - reported to the test
        results.put((rank, None, traceback.format_exc()))
