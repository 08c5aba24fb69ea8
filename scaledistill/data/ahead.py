"""Fetching shards before they are due, by a few threads beside the one that reads.

Enters: numbers of shards, in the order in which they will be needed. Leaves: nothing; a shard that
could not be had is fetched again, and its error raised, where it is read. Left to others: what
fetching means (`data.reader`).
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

DOWNLOADS = 8
"""How many shards a process fetches at once."""
POLL_SECONDS = 0.2


class FetchAhead:
    """Calls `fetch(shard)` in threads for shards that are asked for, the soonest needed first,
    until `stop` is set.

    The threads are daemons: one that hangs in a download keeps nobody from leaving.
    """

    def __init__(self, fetch: Callable[[int], object], stop: threading.Event) -> None:
        self._stop = stop
        self._tasks = _Tasks(fetch, stop)
        self._threads = [
            threading.Thread(target=self._tasks.work, name="fetch-ahead", daemon=True)
            for _ in range(DOWNLOADS)
        ]
        for thread in self._threads:
            thread.start()

    def request(self, now: Iterable[int], later: Iterable[int]) -> None:
        """Ask for shards that are due, and for some that will be."""
        for priority, shards in enumerate((now, later)):
            for shard in shards:
                self._tasks.add(priority, shard)

    def wait(self, shard: int) -> None:
        """Wait for a shard that was asked for; whether it could be had is not said.

        Raises: RuntimeError if `stop` is set meanwhile.
        """
        done = self._tasks.pending(shard)
        while done and not done.wait(POLL_SECONDS):
            if self._stop.is_set():
                raise RuntimeError("closed while a shard was fetched")

    def close(self) -> None:
        """End the threads; those that are in a download end after it."""
        self._stop.set()
        for _ in self._threads:
            self._tasks.wake()
        for thread in self._threads:
            thread.join(timeout=POLL_SECONDS)


class _Tasks:
    """What is asked for and not there yet. The threads hold this, and so not their owner."""

    def __init__(self, fetch: Callable[[int], object], stop: threading.Event) -> None:
        self._fetch, self._stop = fetch, stop
        self._lock = threading.Lock()
        self._queue: queue.PriorityQueue[tuple[int, int, int]] = queue.PriorityQueue()
        self._count = itertools.count()
        # Shard -> priority, set when it was fetched.
        self._pending: dict[int, tuple[int, threading.Event]] = {}
        self._begun: set[int] = set()

    def add(self, priority: int, shard: int) -> None:
        with self._lock:
            before, done = self._pending.get(shard, (priority + 1, threading.Event()))
            if before <= priority:
                return
            self._pending[shard] = priority, done
        self._queue.put((priority, next(self._count), shard))

    def wake(self) -> None:
        """Have a thread look at `stop` at once."""
        self._queue.put((-1, next(self._count), -1))

    def pending(self, shard: int) -> threading.Event | None:
        """Return what is set once a shard is fetched; None if nobody waits for it."""
        with self._lock:
            return self._pending[shard][1] if shard in self._pending else None

    def work(self) -> None:
        while not self._stop.is_set():
            try:
                _, _, shard = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            with self._lock:
                if shard not in self._pending or shard in self._begun:  # asked for twice
                    continue
                self._begun.add(shard)
            try:
                self._fetch(shard)
            except Exception as error:  # noqa: BLE001 - reading the shard tries again, and raises then
                logger.debug("shard %d was not fetched ahead: %s", shard, error)
            finally:
                with self._lock:
                    self._begun.remove(shard)
                    _, done = self._pending.pop(shard)
                done.set()
