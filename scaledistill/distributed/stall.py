"""The local timer: how long this rank's main thread has made no progress.

Inputs: the phases of the main thread as they begin. Outputs: a heartbeat that says where the thread
is, and the verdict on a job that stands still. Not handled here: other ranks (`distributed.peers`),
ending the process (`distributed.watchdog`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

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


class StallTimer:
    """Times the main thread of this rank; another thread reads it."""

    def __init__(
        self,
        timeout_seconds: float,
        *,
        stacks: Path | None,
        resume_hint: Callable[[], str],
        longest_tick: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the timer.

        Args:
            timeout_seconds: without progress for this long, a rank stands still.
            stacks: the folder where stacks are written, for the message; None for the console.
            resume_hint: returns how to resume, for the message.
            longest_tick: see `Unchanged`.
        """
        self._timeout, self._stacks, self._resume_hint = timeout_seconds, stacks, resume_hint
        self._idle = Unchanged(longest_tick, clock)
        # (progress, step, phase): replaced as a whole, so that no lock is needed.
        self._place = (0, 0, "starting")

    def at(self, phase: str, step: int | None = None) -> None:
        """Report that the main thread makes progress."""
        progress, known_step, _ = self._place
        self._place = (progress + 1, known_step if step is None else step, phase)

    def beat(self, number: int = 0, left: str = "") -> Beat:
        """Return a heartbeat of the main thread."""
        progress, step, phase = self._place
        return Beat(number, socket.gethostname(), step, phase, progress, self._idle_seconds(), left)

    @property
    def expired(self) -> bool:
        """Whether the main thread stands still."""
        return self._idle_seconds() >= self._timeout

    def verdict(self, beats: Mapping[int, Beat]) -> Verdict | None:
        """Return the verdict on a job of which all ranks stand still; None if one does not."""
        if any(beat.idle_seconds < self._timeout for beat in beats.values() if not beat.left):
            return None
        behind = {
            rank
            for rank, beat in beats.items()
            if beat.progress == min(b.progress for b in beats.values())
        }
        beat = beats[min(behind)]
        who = "each rank" if len(behind) == len(beats) > 1 else f"{named(behind)} on {beat.host}"
        where = f"{who} is at step {beat.step}, {beat.phase!r}"
        stacks = (
            f"the stacks of the ranks are in {self._stacks}"
            if self._stacks
            else "the stacks are above"
        )
        message = (
            f"no progress for {self._timeout} s (run.timeout_seconds={self._timeout}): {where}; "
            f"{stacks}; {self._resume_hint()}"
        )
        return Verdict(message, [])

    def _idle_seconds(self) -> float:
        return self._idle.seconds(self._place)


def named(ranks: Collection[int]) -> str:
    """Return the ranks by number, "rank 3" or "ranks 1, 2"; of many, the first `NAMED_RANKS`."""
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    more = f" and {len(numbers) - NAMED_RANKS} more" if len(numbers) > NAMED_RANKS else ""
    return f"ranks {', '.join(map(str, numbers[:NAMED_RANKS]))}{more}"
