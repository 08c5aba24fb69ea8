"""Map a function over items with spawned processes, in order.

Inputs: a picklable function and items. Outputs: results in the order of the items, whatever the
number of workers. Not handled here: what the function does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from scaledistill.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None
) -> Generator[Result, None, None]:
    """Yield `function(item)` in the order of the items, computed by spawned processes.

    `function` is pickled once per worker. Only a few items are in flight, so `items` may be
    endless. The workers end when the generator is closed or Ctrl-C interrupts it.

    Args:
        workers: one per available core if None; 0 computes in this process.

    Raises:
        DataError: a worker was killed.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers == 0:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(function,)
    )
    in_flight: deque[Future[Any]] = deque()
    try:
        for item in items:
            with _interrupts_held():
                in_flight.append(pool.submit(_work, item))
            if len(in_flight) > 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process (of {workers}) was killed, most likely for lack of memory: each may "
            "take 0.6 GB; use fewer --workers, or free memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT in this thread.

    Processes started meanwhile inherit the mask, so only the parent handles Ctrl-C.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_function: Callable[[Any], Any]


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when the parent is gone; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(item: Any) -> Any:
    return _worker_function(item)
