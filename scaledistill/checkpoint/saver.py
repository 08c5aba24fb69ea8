"""Saving in the background: a thread of rank 0 writes the gathered checkpoint during training.

Inputs: a function that gathers a checkpoint. Outputs: checkpoints in the run's folder, copies in
`checkpoint.remote`, and the outcome of each save, the same on every rank. Not handled here: the
format (`checkpoint.format`), when to save (`training.saves`).
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
"""Space for the JSON files."""
ROUND_SECONDS = 5.0
"""Interval of messages to ranks that wait for rank 0's disk, so that no collective times out."""
WORD_SECONDS = 30.0
"""Interval of warnings while the disk is waited for."""
ROOM_SECONDS = 5.0
"""How long a save waits to learn whether the disk has enough space."""
GRACE_SECONDS = 10.0
"""Time given to a write under way when an error ends the run."""

Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    error: str | None
    ended: float = field(default=0.0, compare=False)
    """When it ended, by rank 0's `time.perf_counter`."""
    remedy: str = field(default="", compare=False)
    """What to do about the error."""


class Saver:
    """Saves checkpoints, one at a time; a context manager around the loop.

    `begin` and `settle` are collective.
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
        """Wait briefly for a write under way, except on KeyboardInterrupt. Not collective."""
        if self._thread and (kind is None or issubclass(kind, Exception)):
            self._thread.join(GRACE_SECONDS)

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not settled yet."""
        return self._step is not None

    def begin(
        self, step: int, num_bytes: int, gather: Callable[[], tuple[Groups, Mapping[str, Any]]]
    ) -> None:
        """Gather a checkpoint and start to write it; do neither if the disk is full. Collective.

        Args:
            step: the step of the checkpoint.
            num_bytes: its size.
            gather: returns tensors and a JSON-serialisable state, both empty except on rank 0. The
                tensors are written later, so they must not be changed any more.

        Raises:
            RuntimeError: the previous save is not settled.
        """
        if self.pending:
            raise RuntimeError(f"the save of step {self._step} is not settled")
        self._step, self._error = step, None
        self._ended.clear()
        if self._ranks.is_main:
            # A folder that hangs must not block the ranks; the writing thread then finds out.
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
        """Return the outcome of the pending save; None without one or if not ended. Collective.

        Args:
            wait: wait until it has ended.
        """
        if self._step is None:
            return None
        start = reported = time.monotonic()
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
            if self._ranks.is_main and time.monotonic() > reported + WORD_SECONDS:
                reported = time.monotonic()
                where = (
                    f"{self._root} or checkpoint.remote={self._remote}"
                    if self._remote
                    else self._root
                )
                log.warning(
                    "waiting for the checkpoint of step %d for %.0f s; is %s slow, or gone?",
                    *(self._step, reported - start, where),
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
        """Write and copy a checkpoint; runs in rank 0's thread."""
        with contextlib.suppress(OSError):  # only Linux has priorities per thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            folder = write_checkpoint(self._root, step, groups, state, keep=self._keep)
            if self._remote:
                self._copy(folder, self._remote)
        except OSError as failure:
            self._error = self._refused(failure)
        except Exception as failure:  # reported by the loop, which must not wait forever
            log.exception("the checkpoint of step %d", step)
            self._error, self._remedy = repr(failure), "see the traceback above"
        finally:
            self._ended_at = time.perf_counter()
            self._ended.set()

    def _refused(self, failure: OSError) -> str:
        self._remedy = disk_remedy(failure)
        return f"{failure.strerror or failure} ({failure.filename or self._root})"

    def _copy(self, folder: Path, remote: str) -> None:
        """Copy a checkpoint; only warn on failure, since the run's folder suffices to resume."""
        try:
            mirror.upload(folder, remote, self._keep)
        except (DataError, OSError) as failure:
            log.warning(
                "%s is not copied: %s; training continues and the next save tries again. Check "
                "the network and access rights",
                *(folder, failure),
            )
