"""Fetch shards before they are needed, in a few threads beside the reading one.

Inputs: shard numbers, in the order in which they will be needed. Outputs: none; a shard that could
not be fetched is fetched again when it is read, and its error is raised there. Not handled here:
how a shard is fetched (`data.reader`).
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

DOWNLOADS = 8
"""How many shards a process fetches at the same time."""
POLL_SECONDS = 0.2


class FetchAhead:
    """Call `fetch(shard)` in threads for requested shards, most urgent first, until `stop`.

    The threads are daemons, so one that hangs in a download does not keep the process from exiting.
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
        """Request shards that are needed now, and some that are needed next."""
        for priority, shards in enumerate((now, later)):
            for shard in shards:
                self._tasks.add(priority, shard)

    def wait(self, shard: int) -> None:
        """Wait until a requested shard was fetched or its fetch failed.

        Raises: RuntimeError if `stop` is set meanwhile.
        """
        done = self._tasks.pending(shard)
        while done and not done.wait(POLL_SECONDS):
            if self._stop.is_set():
                raise RuntimeError("closed while a shard was fetched")

    def close(self) -> None:
        """End the threads; one that is in a download ends after it."""
        self._stop.set()
        for _ in self._threads:
            self._tasks.wake()
        for thread in self._threads:
            thread.join(timeout=POLL_SECONDS)


class _Tasks:
    """Requested shards that are not fetched yet; the threads hold this and not their owner."""

    def __init__(self, fetch: Callable[[int], object], stop: threading.Event) -> None:
        self._fetch, self._stop = fetch, stop
        self._lock = threading.Lock()
        self._queue: queue.PriorityQueue[tuple[int, int, int]] = queue.PriorityQueue()
        self._count = itertools.count()
        # Shard -> (priority, event that is set once it was fetched).
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
        """Wake a thread so that it checks `stop` at once."""
        self._queue.put((-1, next(self._count), -1))

    def pending(self, shard: int) -> threading.Event | None:
        """Return the event set once a shard is fetched; None if it is not pending."""
        with self._lock:
            return self._pending[shard][1] if shard in self._pending else None

    def work(self) -> None:
        while not self._stop.is_set():
            try:
                _, _, shard = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            with self._lock:
                # Requested twice, with two priorities: only the first of the entries counts.
                if shard not in self._pending or shard in self._begun:
                    continue
                self._begun.add(shard)
            try:
                self._fetch(shard)
            except Exception as error:  # noqa: BLE001 - reading the shard retries, and raises then
                logger.debug("shard %d was not fetched ahead: %s", shard, error)
            finally:
                with self._lock:
                    self._begun.remove(shard)
                    _, done = self._pending.pop(shard)
                done.set()
