"""The watchdog: ends a job in which a rank is lost or stalled, with a message that names it.

Inputs: the ranks, a store that they share, the current phase of the main thread. Outputs: nothing
while all is well; otherwise a verdict, the same on all ranks: each writes the Python stacks of its
threads to `<run.folder>/stacks/rank-<rank>.txt` and ends its process with exit code 3; one of them
logs the message and has it written to `status.json`.

Every rank writes its heartbeat to the store and reads only that of the next rank, so that traffic
grows linearly with the ranks. A verdict is stored under a single key, which each rank reads with
every heartbeat. Calls to a store whose host is stopped never return, whatever their timeout, so one
thread talks to the store and another one watches that thread. While native code holds the GIL, both
stand still, and the other ranks take this one for lost.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from scaledistill.config.schema import RunSettings
from scaledistill.distributed.ranks import Ranks, explain_lost_peer, private_store
from scaledistill.errors import EXIT_ENVIRONMENT, DataError, PeerError

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
NAMED_RANKS = 8


class Beat(NamedTuple):
    """A rank's heartbeat."""

    number: int
    host: str
    step: int
    phase: str
    progress: int
    """How many times the main thread has reported progress. Ranks report at the same places, so the
    rank with the lowest number is furthest behind."""
    idle_seconds: float
    left: str = ""
    """"done" or "failed" if the rank has left the run by itself."""


class Verdict(NamedTuple):
    """Why the job ends."""

    message: str
    lost: list[int]


class Unchanged:
    """Measures for how long a value has not changed.

    The time between two looks counts for `longest_tick` seconds at most: if the whole job was
    suspended, no rank is lost.
    """

    def __init__(self, longest_tick: float, clock: Callable[[], float]) -> None:
        self._longest_tick = longest_tick
        self._clock = clock
        self._value: object = None
        self._looked = clock()
        self._seconds = 0.0

    def seconds(self, value: object) -> float:
        """Return for how many seconds `value` has not changed, as far as was looked at."""
        now = self._clock()
        self._seconds += min(now - self._looked, self._longest_tick)
        self._looked = now
        if value != self._value:
            self._value, self._seconds = value, 0.0
        return self._seconds


class Watchdog:
    """Watches a job from each of its ranks; a context manager around the run."""

    tell: Callable[[str], None] | None = None
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
        self._ranks, self._settings, self._clock, self._leave = ranks, settings, clock, leave
        self._resume_hint = resume_hint
        self._folder = Path(settings.folder) / "stacks" if writes else None
        self._store = store or (private_store("watchdog") if ranks.world_size > 1 else None)
        self._interval = min(BEAT_SECONDS, settings.lost_rank_seconds / 5)
        self._next = (ranks.rank + 1) % ranks.world_size
        # (progress, step, phase): replaced as a whole, so that no lock is needed.
        self._place = (0, 0, "starting")
        self._beats, self._left = 0, ""
        self._known: dict[int, Beat] = {}
        self._neighbour, self._idle, self._silence = (
            Unchanged(2 * self._interval, clock) for _ in range(3)
        )
        self._over, self._asked, self._decided = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._verdict: Verdict | None = None
        self._threads = [threading.Thread(target=self._look_after, name="watchdog", daemon=True)]
        if self._store:
            self._threads.append(
                threading.Thread(target=self._talk, name="watchdog-store", daemon=True)
            )

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._left = "failed" if kind else "done"
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self._interval + 1)  # the store may no longer answer

    def at(self, phase: str, step: int | None = None) -> None:
        """Report that the main thread makes progress; call it at the same places on all ranks."""
        progress, known_step, _ = self._place
        self._place = (progress + 1, known_step if step is None else step, phase)

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
            if self._store is None or explain_lost_peer(error) is None:
                raise
            self._asked.set()
            self._decided.wait(self._settings.lost_rank_seconds + 10 * self._interval)
            if self._verdict is None:
                raise
            if self._speaks(self._verdict):
                raise DataError(self._verdict.message) from error
            raise PeerError(self._verdict.message, EXIT_ENVIRONMENT) from error

    def _look_after(self) -> None:
        """End this rank if its store does not answer, or if it is the only rank and has stalled."""
        while not self._over.wait(self._interval):
            if self._store is None:
                if self._idle.seconds(self._place) >= self._settings.timeout_seconds:
                    self._end(self._stalled({0: self._beat()}))
            elif (
                self._silence.seconds(self._beats) >= self._settings.lost_rank_seconds
                and not self._verdict
            ):
                self._end(self._store_lost())

    def _talk(self) -> None:
        """Exchange heartbeats until the run is over; runs in the store's thread."""
        try:
            while True:
                self._round()
                if self._over.wait(self._interval):
                    return self._publish()
        except RuntimeError:  # the connection to the store is broken for good
            while not self._over.wait(self._interval):
                if self._asked.is_set():
                    self._verdict = self._verdict or self._store_lost()
                    return self._decided.set()

    def _round(self) -> None:
        """Publish a heartbeat, check the next rank, and act on a verdict."""
        assert self._store is not None
        self._publish()
        if 0 not in self._known:
            self._read(0)  # rank 0 may hold the store; its host is named if the store is lost
        asked = self._asked.is_set()
        self._verdict = self._known_verdict() or self._judge(asked)
        if self._verdict:
            self._let_all_read()
            if not self._asked.is_set() and not self._over.is_set():
                self._end(self._verdict)
        if self._verdict or asked:
            self._decided.set()

    def _judge(self, asked: bool) -> Verdict | None:
        """Return a verdict if one is due; `asked` means that our main thread lost some rank."""
        next_beat = self._read(self._next)
        silent = self._neighbour.seconds(next_beat and next_beat.number)
        lost = silent >= self._settings.lost_rank_seconds and not _done(next_beat)
        if lost or asked:
            gone = self._gone()
            if self._next in gone or (gone and asked):
                return self._publish_verdict(self._lost(gone, silent if lost else None))
        stands_still = self._idle.seconds(self._place) >= self._settings.timeout_seconds
        if self._ranks.is_main and stands_still:  # only rank 0 reads all heartbeats
            beats = self._read_all()
            if all(
                beat.idle_seconds >= self._settings.timeout_seconds
                for beat in beats.values()
                if not beat.left
            ):
                return self._publish_verdict(self._stalled(beats))
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

    def _beat(self) -> Beat:
        progress, step, phase = self._place
        idle = self._idle.seconds(self._place)
        return Beat(self._beats, socket.gethostname(), step, phase, progress, idle, self._left)

    def _publish(self) -> None:
        assert self._store is not None
        self._store.set(str(self._ranks.rank), json.dumps(self._beat()))
        self._beats += 1

    def _read(self, rank: int) -> Beat | None:
        assert self._store is not None
        if rank not in self._known and not self._store.check([str(rank)]):
            return None
        self._known[rank] = Beat(*json.loads(self._store.get(str(rank))))
        return self._known[rank]

    def _read_all(self) -> dict[int, Beat]:
        beats = ((rank, self._read(rank)) for rank in range(self._ranks.world_size))
        return {rank: beat for rank, beat in beats if beat}

    def _known_verdict(self) -> Verdict | None:
        assert self._store is not None
        return (
            Verdict(*json.loads(self._store.get("verdict")))
            if self._store.check(["verdict"])
            else None
        )

    def _publish_verdict(self, verdict: Verdict) -> Verdict:
        """Publish a verdict if there is none yet; return the one that was published first."""
        assert self._store is not None
        return Verdict(*json.loads(self._store.compare_set("verdict", "", json.dumps(verdict))))

    def _let_all_read(self) -> None:
        """Wait on rank 0, which may hold the store, until the other ranks have read the verdict."""
        assert self._store is not None
        assert self._verdict is not None
        self._store.add("read", 1)
        left = self._ranks.world_size - len(self._verdict.lost)
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
            limit = f"run.lost_rank_seconds={self._settings.lost_rank_seconds}"
            why = (
                f"no heartbeat for {silent:.0f} s ({limit}): killed, stopped, or the machine or "
                "its network is down"
            )
        last = max(beats, key=lambda beat: beat.progress, default=None)
        seen = f"last seen at step {last.step}, {last.phase!r}" if last else "never seen"
        return Verdict(
            f"{_named(gone)} on {hosts} is lost: {why}; {seen}; {self._resume_hint()}", sorted(gone)
        )

    def _stalled(self, beats: Mapping[int, Beat]) -> Verdict:
        limit = self._settings.timeout_seconds
        behind = {
            rank
            for rank, beat in beats.items()
            if beat.progress == min(b.progress for b in beats.values())
        }
        beat = beats[min(behind)]
        who = "each rank" if len(behind) == len(beats) > 1 else f"{_named(behind)} on {beat.host}"
        where = f"{who} is at step {beat.step}, {beat.phase!r}"
        stacks = (
            f"the stacks of the ranks are in {self._folder}"
            if self._folder
            else "the stacks are above"
        )
        message = (
            f"no progress for {limit} s (run.timeout_seconds={limit}): {where}; {stacks}; "
            f"{self._resume_hint()}"
        )
        return Verdict(message, [])

    def _store_lost(self) -> Verdict:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            who, lost = "torchrun's agent, which holds the job's store,", []
        else:
            host = (
                self._known[0].host
                if 0 in self._known
                else os.environ.get("MASTER_ADDR", "its host")
            )
            who, lost = f"rank 0 on {host}, which holds the job's store,", [0]
        limit = f"run.lost_rank_seconds={self._settings.lost_rank_seconds}"
        why = f"no longer answers ({limit}): killed, stopped, or the machine or its network is down"
        here = f"this rank was at step {self._place[1]}, {self._place[2]!r}"
        return Verdict(f"{who} {why}; {here}; {self._resume_hint()}", lost)

    def _speaks(self, verdict: Verdict) -> bool:
        """Return whether this rank reports the verdict: the lowest of those left.

        If rank 0 is lost, and the store perhaps with it, the ranks cannot agree, and the lowest
        rank of each machine reports.
        """
        if verdict.lost == [0] and self._ranks.world_size > 1:
            zero = self._known.get(0)
            return self._ranks.local_rank == (
                1 if zero and zero.host == socket.gethostname() else 0
            )
        return self._ranks.rank == min(set(range(self._ranks.world_size)) - set(verdict.lost))

    def _end(self, verdict: Verdict) -> None:
        """Write this rank's stacks, report if this rank is to, and end the process."""
        # A disk that hangs must not keep the process alive.
        backstop = threading.Timer(10, self._leave, [EXIT_ENVIRONMENT])
        backstop.daemon = True
        backstop.start()
        with suppress(OSError, ValueError):
            self._write_stacks(verdict)
        if self._speaks(verdict):
            log.error("%s", verdict.message)
            if self.tell:
                self.tell(verdict.message)
        backstop.cancel()
        self._over.set()
        self._leave(EXIT_ENVIRONMENT)

    def _write_stacks(self, verdict: Verdict) -> None:
        if self._folder is None:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank-{self._ranks.rank}.txt").open("w") as file:
            file.write(f"{verdict.message}\n\nrank {self._ranks.rank}: {self._beat()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)


def _done(beat: Beat | None) -> bool:
    return beat is not None and beat.left == "done"


def _named(ranks: Collection[int] | Mapping[int, Any]) -> str:
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    more = f" and {len(numbers) - NAMED_RANKS} more" if len(numbers) > NAMED_RANKS else ""
    return f"ranks {', '.join(map(str, numbers[:NAMED_RANKS]))}{more}"
