"""Saving beside training: a thread of rank 0 writes what was gathered, while the loop goes on.

Enters: a way to gather a checkpoint. Leaves: checkpoints in the run's folder and copies in
`checkpoint.remote`, and how each save ended, the same on every rank. What a checkpoint is,
`checkpoint` knows; when one is due, `train`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from scaledistill.checkpoint import mirror
from scaledistill.checkpoint.format import write_checkpoint
from scaledistill.distributed.ranks import Ranks, broadcast_object
from scaledistill.errors import DataError
from scaledistill.storage.background import Background
from scaledistill.storage.files import disk_remedy

log = logging.getLogger(__name__)

NICENESS = 10
SPARE_BYTES = 1 << 16
"""For the JSON files."""
ROUND_SECONDS = 5.0
"""Ranks that wait for rank 0's disk hear from it this often, so that nothing of theirs times
out."""
WORD_SECONDS = 30.0
"""People hear this often."""
ROOM_SECONDS = 5.0
"""How long a save waits to hear whether the disk has room."""
GRACE_SECONDS = 10.0
"""What a write under way gets where an error ends the run."""

Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    error: str | None
    ended: float = field(default=0.0, compare=False)
    """When, by rank 0's `time.perf_counter`."""
    remedy: str = field(default="", compare=False)
    """What to do about the error."""


class Saver:
    """Saves, at most one in flight. Used as a context manager around the loop; its methods are
    collective.
    """

    def __init__(self, root: Path, ranks: Ranks, *, keep: int, remote: str | None = None) -> None:
        self._root, self._ranks, self._keep, self._remote = root, ranks, keep, remote
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._error: str | None = None
        self._remedy = ""
        self._ended_at = 0.0
        self._disk = Background("room for checkpoints")

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Give a write under way a moment, unless someone wants to leave at once. Not
        collective.
        """
        if self._thread and (kind is None or issubclass(kind, Exception)):
            self._thread.join(GRACE_SECONDS)

    @property
    def pending(self) -> bool:
        """Whether a save was begun that is not settled."""
        return self._step is not None

    def begin(
        self, step: int, num_bytes: int, gather: Callable[[], tuple[Groups, Mapping[str, Any]]]
    ) -> None:
        """Gather a checkpoint of `num_bytes` and have it written; where the disk has no room,
        neither. Collective.

        Args:
            gather: returns tensors and a JSON-able state, both empty on all ranks but the first.
                The tensors are written later: nobody may change them any more.
        """
        if self.pending:
            raise RuntimeError(f"the save of step {self._step} is not settled")
        self._step, self._error = step, None
        self._ended.clear()
        if self._ranks.is_main:
            # A folder that hangs must not hold up the ranks: then the thread that writes finds out.
            asked = self._disk.submit(self._no_room, num_bytes, patience=ROOM_SECONDS)
            self._error = asked.result() if asked.done() else None
            if self._error:
                self._ended.set()
        if broadcast_object(self._ended.is_set()):
            return
        groups, state = gather()
        if self._ranks.is_main:
            text = json.dumps(state, indent=2, allow_nan=False) + "\n"
            self._thread = threading.Thread(
                target=self._write,
                args=(step, groups, text),
                name=f"checkpoint of step {step}",
                daemon=True,
            )
            self._thread.start()

    def settle(self, *, wait: bool) -> Outcome | None:
        """Return how the save that was begun ended; None where there is none, or it is not over
        yet. Collective.
        """
        if self._step is None:
            return None
        start = told = time.monotonic()
        while True:
            over = (
                self._ended.wait(ROUND_SECONDS if wait else 0.0) if self._ranks.is_main else False
            )
            over, error, at, remedy = broadcast_object(
                (over, self._error, self._ended_at, self._remedy)
            )
            if over:
                outcome, self._step, self._thread = (
                    Outcome(self._step, error, at, remedy),
                    None,
                    None,
                )
                return outcome
            if not wait:
                return None
            if self._ranks.is_main and time.monotonic() > told + WORD_SECONDS:
                told = time.monotonic()
                where = (
                    f"{self._root} or checkpoint.remote={self._remote}"
                    if self._remote
                    else self._root
                )
                log.warning(
                    "waiting for the checkpoint of step %d since %.0f s; is %s slow, or gone?",
                    *(self._step, told - start, where),
                )

    def _no_room(self, num_bytes: int) -> str | None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            free, needed = shutil.disk_usage(self._root).free, num_bytes + SPARE_BYTES
        except OSError as failure:
            return self._refused(failure)
        if free >= needed:
            return None
        self._remedy = "free some space"
        return f"{free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} MB needed ({self._root})"

    def _write(self, step: int, groups: Groups, state: str) -> None:
        """Be the thread of rank 0."""
        with contextlib.suppress(OSError):  # Linux alone has a priority for each thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            folder = write_checkpoint(self._root, step, groups, state, keep=self._keep)
            if self._remote:
                self._copy(folder, self._remote)
        except OSError as failure:
            self._error = self._refused(failure)
        except Exception as failure:  # told by the loop, which must not wait for ever
            log.exception("the checkpoint of step %d", step)
            self._error, self._remedy = repr(failure), "see the traceback above"
        finally:
            self._ended_at = time.perf_counter()
            self._ended.set()

    def _refused(self, failure: OSError) -> str:
        self._remedy = disk_remedy(failure)
        return f"{failure.strerror or failure} ({failure.filename or self._root})"

    def _copy(self, folder: Path, remote: str) -> None:
        """Copy a checkpoint; where that fails the save did not: what is needed to go on stands in
        the run's folder.
        """
        try:
            mirror.upload(folder, remote, self._keep)
        except (DataError, OSError) as failure:
            log.warning(
                "%s is not copied: %s; training goes on and the next save tries again. Check "
                "network and access rights",
                *(folder, failure),
            )
