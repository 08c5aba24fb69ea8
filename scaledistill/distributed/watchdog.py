"""The watchdog: ends a job in which a rank is lost or stalled, with a message that names it.

Inputs: the ranks, the current phase of the main thread. Outputs: nothing while all is well;
otherwise each rank writes the Python stacks of its threads to `<run.folder>/stacks/rank-<rank>.txt`
and ends its process with exit code 3; one of them logs the message and has it written to
`status.json`. Not handled here: the verdict, the same on all ranks (`distributed.peers`; of a
single rank, `distributed.stall`).

One thread talks to the other ranks' store and another one watches that thread. While native code
holds the GIL, both stand still, and the other ranks take this one for lost.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from scaledistill.config.schema import RunSettings
from scaledistill.distributed.failures import explain_lost_peer
from scaledistill.distributed.peers import PeerMonitor
from scaledistill.distributed.ranks import Ranks, private_store
from scaledistill.distributed.stall import StallTimer, Verdict
from scaledistill.errors import EXIT_ENVIRONMENT, DataError, PeerError

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0


class Watchdog:
    """Watches a job from each of its ranks; a context manager around the run."""

    record_failure: Callable[[str], None] | None = None
    """Called with a verdict's message on the rank that reports it, to write `status.json`."""

    def __init__(
        self,
        ranks: Ranks,
        settings: RunSettings,
        *,
        writes: bool = True,
        resume_hint: Callable[[], str],
        store: dist.Store | None = None,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """Create the watchdog. Collective.

        Args:
            writes: write stacks to the run's folder, else to the console.
            resume_hint: returns how to resume, for messages.
            store: shared by the ranks; by default a new one, if there is more than one rank.
            leave: ends the process.
        """
        self._ranks, self._leave = ranks, leave
        self._folder = Path(settings.folder) / "stacks" if writes else None
        self._interval = min(BEAT_SECONDS, settings.lost_rank_seconds / 5)
        self._over = threading.Event()
        self._timer = StallTimer(
            settings.timeout_seconds,
            stacks=self._folder,
            resume_hint=resume_hint,
            longest_tick=2 * self._interval,
            clock=clock,
        )
        self._threads = [threading.Thread(target=self._look_after, name="watchdog", daemon=True)]
        self._peers: PeerMonitor | None = None
        if store or ranks.world_size > 1:
            self._peers = PeerMonitor(
                ranks,
                store or private_store("watchdog"),
                self._timer,
                lost_seconds=settings.lost_rank_seconds,
                interval=self._interval,
                resume_hint=resume_hint,
                over=self._over,
                end=self._end,
                clock=clock,
            )
            self._threads.append(
                threading.Thread(target=self._peers.run, name="watchdog-store", daemon=True)
            )

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._peers:
            self._peers.left = "failed" if kind else "done"
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self._interval + 1)  # the store may no longer answer

    def at(self, phase: str, step: int | None = None) -> None:
        """Report that the main thread makes progress; call it at the same places on all ranks."""
        self._timer.at(phase, step)

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn the error of a collective that lost a peer into one that names the lost rank.

        Raises:
            DataError: on the lowest remaining rank.
            PeerError: on the others.
        """
        try:
            yield
        except RuntimeError as error:
            if self._peers is None or explain_lost_peer(error) is None:
                raise
            verdict = self._peers.explain()
            if verdict is None:
                raise
            if self._peers.reports(verdict):
                raise DataError(verdict.message) from error
            raise PeerError(verdict.message, EXIT_ENVIRONMENT) from error

    def _look_after(self) -> None:
        """End this rank if its store does not answer, or if it is the only rank and has stalled."""
        while not self._over.wait(self._interval):
            if self._peers is None:
                if verdict := self._timer.verdict({0: self._timer.beat()}):
                    self._end(verdict)
            elif self._peers.silent:
                self._end(self._peers.store_lost())

    def _end(self, verdict: Verdict) -> None:
        """Write this rank's stacks, report if this rank is to, and end the process."""
        # A disk that hangs must not keep the process alive.
        backstop = threading.Timer(10, self._leave, [EXIT_ENVIRONMENT])
        backstop.daemon = True
        backstop.start()
        with suppress(OSError, ValueError):
            self._write_stacks(verdict)
        if self._peers is None or self._peers.reports(verdict):
            log.error("%s", verdict.message)
            if self.record_failure:
                self.record_failure(verdict.message)
        backstop.cancel()
        self._over.set()
        self._leave(EXIT_ENVIRONMENT)

    def _write_stacks(self, verdict: Verdict) -> None:
        if self._folder is None:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            return
        beat = self._peers.beat() if self._peers else self._timer.beat()
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank-{self._ranks.rank}.txt").open("w") as file:
            file.write(f"{verdict.message}\n\nrank {self._ranks.rank}: {beat}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
