"""A run's folder: who owns it, its resolved configuration, `status.json`, and requests to stop.

Layout: `config.json`, `status.json`, `metrics.jsonl`, `loss.png`, `checkpoints/`,
`export/<student>/`, the best by validation loss, `export/<student>-best/`, those of `--export`,
`export/<student>-step-N/`, and, with trackers that a resumed run goes on with, `trackers.json`.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from scaledistill.distributed.ranks import Ranks, explain_lost_peer, failing_together
from scaledistill.errors import (
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    ConfigError,
    DataError,
    DivergedError,
    PeerError,
)
from scaledistill.storage.background import Background, ended
from scaledistill.storage.files import locked, read_json, write_json

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOOK_SECONDS = 0.25
"""A step waits for the run's folder this long, once: a folder that is slow to answer is not waited
for again."""
AT_ONCE_SECONDS = 0.05
"""A folder that answers in less is waited for at the next step too."""
WRITE_SECONDS = 30.0
"""How long a state that is not one of many waits for the disk."""
REMOVE_SECONDS = 5.0
"""How long a run that stops waits until the STOP file is removed."""


_writers: dict[Path, Background] = {}


class Status:
    """`status.json`: the authority on how a run stands or ended.

    Keys: `state` ("running", "evaluating", "done", "stopped", "failed", "diverged"), `step`,
    `max_steps`, `exit_code` (null while running or evaluating), `message`, `updated`, `host`,
    `pid`.
    """

    def __init__(self, folder: Path, max_steps: int) -> None:
        self.path = folder / "status.json"
        self.max_steps = max_steps
        # Of the run before, until this one takes over.
        self.step = (read_json(self.path) or {}).get("step", 0)
        self.started = False
        # One a file, whoever writes it, so that what was given last stands in the end.
        self._writer = _writers.setdefault(self.path.absolute(), Background("status.json"))
        self._soon: Future[None] | None = None

    def write(self, state: str, message: str, exit_code: int | None = None) -> None:
        """Write, after what was given before.

        Raises:
            OSError: the disk refused it, or has not taken it yet after half a minute.
        """
        self._finish(
            self._writer.submit(write_json, self.path, self._content(state, message, exit_code))
        )

    def write_soon(self, state: str, message: str) -> None:
        """Write as soon as the disk takes it, without waiting: for a state that is written again
        and again.

        One that was not begun yet is left out; what is written later stands in the end.
        """
        if self._soon:
            self._soon.cancel()
        self._soon = self._writer.submit(
            self._write_if_possible, self._content(state, message, None)
        )

    def write_failure(self, state: str, message: str, exit_code: int) -> None:
        """Write an end, unless another rank's cause stands there already."""
        content = self._content(state, message, exit_code)

        def write_first_cause() -> None:
            known = read_json(self.path)
            if not (self.started and known and known["state"] in ("failed", "diverged")):
                write_json(self.path, content)

        with self._survived():
            self._finish(self._writer.submit(write_first_cause))

    def write_if_possible(self, state: str, message: str, exit_code: int | None) -> None:
        """Write, but survive a full disk, and one that hangs."""
        with self._survived():
            self.write(state, message, exit_code)

    def _content(self, state: str, message: str, exit_code: int | None) -> dict[str, Any]:
        return {
            "state": state,
            "step": self.step,
            "max_steps": self.max_steps,
            "exit_code": exit_code,
            "message": message,
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _finish(self, written: Future[None]) -> None:
        if not ended(written, WRITE_SECONDS):
            raise OSError(
                errno.ETIMEDOUT,
                f"the disk has not answered for {WRITE_SECONDS:.0f} s",
                str(self.path),
            )
        written.result()

    def _write_if_possible(self, content: Mapping[str, Any]) -> None:
        """Be the thread."""
        with self._survived():
            write_json(self.path, content)

    @contextmanager
    def _survived(self) -> Iterator[None]:
        """Log an error of the disk: it must not hide why the run ended."""
        try:
            yield
        except OSError as error:
            log.error("%s could not be written: %s", self.path, error.strerror)


@contextmanager
def owned(folder: Path, max_steps: int, ranks: Ranks, *, fresh: bool) -> Iterator[Status]:
    """Hold a run's folder while the run lasts, and leave how it ended in `status.json`. Collective.

    Args:
        fresh: set an existing folder aside first.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
    """
    with ExitStack() as stack:
        with failing_together():
            if ranks.is_main:
                try:
                    if fresh and folder.exists():
                        with locked(folder, "run.folder"):
                            log.info("--fresh: the old run is kept as %s", set_aside(folder))
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(folder, "run.folder"))
                except OSError as error:
                    raise ConfigError(
                        f"run.folder={str(folder)!r} cannot be written: {error.strerror}"
                    ) from None
        status = Status(folder, max_steps)
        # A refused resume says nothing about the run that stands there.
        with failures_told(status, of_settings=not status.path.exists()):
            yield status


@contextmanager
def failures_told(status: Status, *, of_settings: bool) -> Iterator[None]:
    """Write into `status.json` which error ends what is done meanwhile.

    Args:
        of_settings: those of the configuration too.
    """
    try:
        yield
    except PeerError:
        raise
    except ConfigError as error:
        if of_settings:
            status.write_failure("failed", str(error), error.exit_code)
        raise
    except DataError as error:
        status.write_failure("failed", str(error), error.exit_code)
        raise
    except DivergedError as error:
        status.write_failure("diverged", str(error), error.exit_code)
        raise
    except BaseException as error:
        lost = explain_lost_peer(error)
        message, code = (
            (lost, EXIT_ENVIRONMENT) if lost else (f"{type(error).__name__}: {error}", 1)
        )
        status.write_failure(
            "failed", message, EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
        )
        raise


def described(folder: Path) -> str:
    """Return who holds a run's folder, and where that run stands, as its `status.json` says."""
    status = read_json(folder / "status.json") or {}
    who = f"pid {status.get('pid', '?')} on {status.get('host', '?')}"
    return (
        f"{who}, {status.get('state', 'starting')}, step {status.get('step', '?')} of "
        f"{status.get('max_steps', '?')}"
    )


def set_aside(folder: Path) -> Path:
    """Rename a run folder to the first free `<name>.1`, `<name>.2`, …; nothing is deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def job_seconds() -> float:
    """Return how long ago the job's process started: ours, or torchrun's, which outlives restarts
    of ours.
    """
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StopRequest:
    """Whether the run is to stop: for a signal, a file named STOP in the run's folder, or the job's
    age.

    A STOP file that lies there when a run starts counts; it is removed when the run stops. A thread
    looks for it: a folder that hangs must not hold up the step, and with it all ranks.
    """

    def __init__(
        self,
        folder: Path,
        *,
        watch_file: bool,
        speaks: bool = False,
        max_hours: float | None = None,
        answer: str = "stopping as soon as the ranks agree",
    ) -> None:
        self._file = folder / "STOP" if watch_file else None
        self._max_hours = max_hours
        self._deadline = (
            math.inf if max_hours is None else time.monotonic() + max_hours * 3600 - job_seconds()
        )
        self._speaks = speaks
        # What a signal is answered by; it says what is saved, which depends on how far the run is.
        self.answer = answer
        self._signal: int | None = None
        self._since = 0.0
        self._background = Background("STOP file")
        self._look: Future[None] | None = None
        self._found, self._answers_at_once = False, True  # by the last look

    def reason(self) -> str | None:
        """Return why to stop, or None."""
        if self._signal is not None:
            return f"got {signal.Signals(self._signal).name}"
        if self._file is not None and self._look_for(self._file):
            return f"found {self._file}"
        if time.monotonic() >= self._deadline:
            return f"run.max_hours={self._max_hours:g} are over"
        return None

    def acknowledge(self) -> str | None:
        """Return why to stop, and remove the STOP file, so that the same command goes on."""
        reason = self.reason()
        if self._file is not None:
            self._background.submit(self._remove, self._file, patience=REMOVE_SECONDS)
        return reason

    def _look_for(self, file: Path) -> bool:
        """Return whether the file was there at the last look, and take another look."""
        if self._look is None or self._look.done():
            patience = LOOK_SECONDS if self._answers_at_once else 0.0
            self._look = self._background.submit(self._take_look, file, patience=patience)
            if patience and not self._look.done():
                self._answers_at_once = False
        return self._found

    def _take_look(self, file: Path) -> None:
        """Be the thread."""
        start = time.monotonic()
        try:
            self._found = file.exists()
        except OSError:  # a folder that cannot be read now: the next look may tell
            self._found = False
        self._answers_at_once = time.monotonic() - start < AT_ONCE_SECONDS

    def _remove(self, file: Path) -> None:
        """Be the thread."""
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            log.warning(
                "%s cannot be removed: %s; remove it before you rerun the command",
                file,
                error.strerror,
            )
        self._found = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests; a second SIGINT, a second or more after the first signal,
        leaves at once.

        Python gives signals to the main thread alone: in another one they stay with whoever started
        it.
        """
        if threading.current_thread() is not threading.main_thread():
            if self._speaks:
                where = f"{self._file} or run.max_hours" if self._file else "run.max_hours"
                log.info("not in the main thread: signals do not stop this run, use %s", where)
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: not set by Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._since = number, now
            if self._speaks:
                name = signal.Signals(number).name
                again = "; press Ctrl-C again to quit at once" if number == signal.SIGINT else ""
                os.write(2, f"\ngot {name}: {self.answer}{again}\n".encode())  # safe in a handler
        elif number == signal.SIGINT and now - self._since >= 1:
            raise KeyboardInterrupt
