"""The monitor of lost ranks: heartbeats to the next rank, and the verdict that ends a job.

Inputs: a store that all ranks share, this rank's timer. Outputs: a verdict, the same on all ranks,
once a rank is lost or all stand still. Not handled here: the timer (`distributed.stall`), ending
the process (`distributed.watchdog`).

Every rank writes its heartbeat to the store and reads only that of the next rank, so that traffic
grows linearly with the ranks. A verdict is stored under a single key, which each rank reads with
every heartbeat.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

from scaledistill.distributed.ranks import Ranks
from scaledistill.distributed.stall import Beat, StallTimer, Unchanged, Verdict, named


class PeerMonitor:
    """Exchanges heartbeats with the other ranks, from a thread of its own, until the run is over.

    Calls to a store whose host is stopped never return, whatever their timeout; another thread has
    to look at `silent`.
    """

    left = ""
    """"done" or "failed" once this rank leaves the run by itself."""
    verdict: Verdict | None = None

    def __init__(
        self,
        ranks: Ranks,
        store: dist.Store,
        timer: StallTimer,
        *,
        lost_seconds: float,
        interval: float,
        resume_hint: Callable[[], str],
        over: threading.Event,
        end: Callable[[Verdict], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the monitor.

        Args:
            store: used by this object alone, and by its peers on the other ranks.
            timer: of this rank's main thread.
            lost_seconds: without heartbeat for this long, a rank is lost.
            interval: seconds between heartbeats.
            resume_hint: returns how to resume, for messages.
            over: set when the run is over.
            end: called with a verdict, in the monitor's thread, to end this process.
        """
        self._ranks, self._store, self._timer, self._clock = ranks, store, timer, clock
        self._lost_seconds, self._interval = lost_seconds, interval
        self._resume_hint, self._over, self._end = resume_hint, over, end
        self._next = (ranks.rank + 1) % ranks.world_size
        self._beats = 0
        self._known: dict[int, Beat] = {}
        self._neighbour, self._silence = (Unchanged(2 * interval, clock) for _ in range(2))
        self._asked, self._decided = threading.Event(), threading.Event()

    def run(self) -> None:
        """Exchange heartbeats until the run is over."""
        try:
            while True:
                self.round()
                if self._over.wait(self._interval):
                    return self._publish()
        except RuntimeError:  # the connection to the store is broken for good
            while not self._over.wait(self._interval):
                if self._asked.is_set():
                    self.verdict = self.verdict or self.store_lost()
                    return self._decided.set()

    def round(self) -> None:
        """Publish a heartbeat, check the next rank, and act on a verdict."""
        self._publish()
        if 0 not in self._known:
            self._read(0)  # rank 0 may hold the store; its host is named if the store is lost
        asked = self._asked.is_set()
        self.verdict = self._known_verdict() or self._judge(asked)
        if self.verdict:
            self._let_all_read(self.verdict)
            if not self._asked.is_set() and not self._over.is_set():
                self._end(self.verdict)
        if self.verdict or asked:
            self._decided.set()

    def explain(self) -> Verdict | None:
        """Wait for the verdict on the rank that a collective of the main thread has lost.

        Returns:
            None if no rank is lost.
        """
        self._asked.set()
        self._decided.wait(self._lost_seconds + 10 * self._interval)
        return self.verdict

    @property
    def silent(self) -> bool:
        """Whether the monitor hangs in a call to the store; for the thread that watches it."""
        return self._silence.seconds(self._beats) >= self._lost_seconds and not self.verdict

    def beat(self) -> Beat:
        """Return this rank's heartbeat."""
        return self._timer.beat(self._beats, self.left)

    def store_lost(self) -> Verdict:
        """Return the verdict if the store does not answer."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            who, lost = "torchrun's agent, which holds the job's store,", []
        else:
            host = (
                self._known[0].host
                if 0 in self._known
                else os.environ.get("MASTER_ADDR", "its host")
            )
            who, lost = f"rank 0 on {host}, which holds the job's store,", [0]
        limit = f"run.lost_rank_seconds={self._lost_seconds}"
        why = f"no longer answers ({limit}): killed, stopped, or the machine or its network is down"
        own = self.beat()
        here = f"this rank was at step {own.step}, {own.phase!r}"
        return Verdict(f"{who} {why}; {here}; {self._resume_hint()}", lost)

    def reports(self, verdict: Verdict) -> bool:
        """Return whether this rank reports the verdict: the lowest of those left.

        If rank 0 is lost, and the store perhaps with it, the ranks cannot agree, and the lowest
        rank of each machine reports.
        """
        if verdict.lost == [0]:
            zero = self._known.get(0)
            return self._ranks.local_rank == (
                1 if zero and zero.host == socket.gethostname() else 0
            )
        return self._ranks.rank == min(set(range(self._ranks.world_size)) - set(verdict.lost))

    def _judge(self, asked: bool) -> Verdict | None:
        """Return a verdict if one is due; `asked` means that our main thread lost some rank."""
        next_beat = self._read(self._next)
        silent = self._neighbour.seconds(next_beat and next_beat.number)
        lost = silent >= self._lost_seconds and not _done(next_beat)
        if lost or asked:
            gone = self._gone()
            if self._next in gone or (gone and asked):
                return self._publish_verdict(self._lost(gone, silent if lost else None))
        if self._ranks.is_main and self._timer.expired:  # only rank 0 reads all heartbeats
            stalled = self._timer.verdict(self._read_all())
            return self._publish_verdict(stalled) if stalled else None
        return None

    def _gone(self) -> dict[int, Beat | None]:
        """Return the ranks that failed, or else those without a heartbeat during a short wait."""
        before = self._read_all()
        if failed := {rank: beat for rank, beat in before.items() if beat.left == "failed"}:
            return dict(failed)
        end = self._clock() + max(3 * self._interval, 2.0)
        while self._clock() < end and not self._over.wait(self._interval):
            self._publish()
        now, others = self._read_all(), set(range(self._ranks.world_size)) - {self._ranks.rank}
        return {
            rank: now.get(rank)
            for rank in others
            if now.get(rank) == before.get(rank) and not _done(now.get(rank))
        }

    def _publish(self) -> None:
        self._store.set(str(self._ranks.rank), json.dumps(self.beat()))
        self._beats += 1

    def _read(self, rank: int) -> Beat | None:
        if rank not in self._known and not self._store.check([str(rank)]):
            return None
        self._known[rank] = Beat(*json.loads(self._store.get(str(rank))))
        return self._known[rank]

    def _read_all(self) -> dict[int, Beat]:
        beats = ((rank, self._read(rank)) for rank in range(self._ranks.world_size))
        return {rank: beat for rank, beat in beats if beat}

    def _known_verdict(self) -> Verdict | None:
        if not self._store.check(["verdict"]):
            return None
        return Verdict(*json.loads(self._store.get("verdict")))

    def _publish_verdict(self, verdict: Verdict) -> Verdict:
        """Publish a verdict if there is none yet; return the one that was published first."""
        return Verdict(*json.loads(self._store.compare_set("verdict", "", json.dumps(verdict))))

    def _let_all_read(self, verdict: Verdict) -> None:
        """Wait on rank 0, which may hold the store, until the other ranks have read the verdict."""
        self._store.add("read", 1)
        left = self._ranks.world_size - len(verdict.lost)
        for _ in range(6 if self._ranks.is_main else 0):
            if self._store.add("read", 0) >= left:
                return
            time.sleep(self._interval / 2)

    def _lost(self, gone: Mapping[int, Beat | None], silent: float | None) -> Verdict:
        """Return the verdict on lost ranks; `silent`: seconds without heartbeat, None if ended."""
        beats = [beat for beat in gone.values() if beat]
        hosts = ", ".join(sorted({beat.host for beat in beats})) or "a host that is not known"
        if silent is None:
            why = "it ended or was killed" if len(gone) == 1 else "they ended or were killed"
        else:
            limit = f"run.lost_rank_seconds={self._lost_seconds}"
            why = (
                f"no heartbeat for {silent:.0f} s ({limit}): killed, stopped, or the machine or "
                "its network is down"
            )
        last = max(beats, key=lambda beat: beat.progress, default=None)
        seen = f"last seen at step {last.step}, {last.phase!r}" if last else "never seen"
        return Verdict(
            f"{named(gone)} on {hosts} is lost: {why}; {seen}; {self._resume_hint()}", sorted(gone)
        )


def _done(beat: Beat | None) -> bool:
    return beat is not None and beat.left == "done"
