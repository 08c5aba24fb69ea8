"""The outcomes of the cases of a kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

REPORT_SECONDS = 10.0
"""How often progress is reported."""


@dataclass
class Tally:
    """How many cases of a kind were tried and survived; what went wrong in the others."""

    kind: str
    planned: int
    say: Callable[[str], None] = lambda line: None
    tried: int = 0
    survived: int = 0
    lost: int = 0
    """Rows lost or repeated; or damaged ones that were used."""
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _reported_at: float = field(default_factory=time.monotonic)

    def case(self, name: str, problems: Iterable[str], *, lost: int = 0) -> None:
        """Count a case; it survived if nothing is wrong with it."""
        failed = [f"{self.kind} {name}: {problem}" for problem in problems]
        self.tried += 1
        self.survived += not failed
        self.lost += lost
        self.failures += failed
        for problem in failed:
            self.say(f"not survived: {problem}")
        if time.monotonic() > self._reported_at + REPORT_SECONDS:
            self._reported_at = time.monotonic()
            self.say(
                f"{self.kind}: {self.tried} of {self.planned}, {self.tried - self.survived} not "
                "survived"
            )

    def need(self, met: bool, what: str) -> None:
        """Fail if the suite did not do what it must have done to prove anything."""
        if not met:
            self.failures.append(f"{self.kind}: the suite itself did not {what}")

    def line(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{self.kind}: {self.tried} tried, {self.survived} survived, {self.lost} rows lost or "
            f"repeated{notes}"
        )
