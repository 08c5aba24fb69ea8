"""A run's folder: its lock, `status.json`, and requests to stop.

Inputs: the folder, the number of steps, signals. Outputs: the lock on the folder, `status.json`,
and why to stop. Not handled here: the folder's other files.

Layout: `config.json`, `status.json`, `metrics.jsonl`, `events.jsonl`, `loss.png`, `maps.json`,
`report.html`, `checkpoints/`, the final student in `export/<student>/`, the best by validation loss
in `export/<student>-best/`, those written by `--export` in `export/<student>-step-N/`, and
`trackers.json` if a resumed run needs it to continue its trackers.
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
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from scaledistill.distributed.failures import explain
from scaledistill.distributed.launcher import heeded
from scaledistill.distributed.ranks import Ranks, failing_together
from scaledistill.errors import (
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    ConfigError,
    DataError,
    DivergedError,
    PeerError,
    SettingError,
    named,
)
from scaledistill.storage.background import Background, ended
from scaledistill.storage.files import locked, read_json, write_json

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOOK_SECONDS = 0.25
"""How long a step waits for the run's folder; the next steps do not wait for a slow one."""
AT_ONCE_SECONDS = 0.05
"""A folder that answers faster than this is waited for at the next step too."""
WRITE_SECONDS = 30.0
"""How long `Status.write` waits for the disk."""
REMOVE_SECONDS = 5.0
"""How long a stopping run waits for the STOP file to be removed."""


_writers: dict[Path, Background] = {}


class Status:
    """`status.json`: the authority on the state of a run and on how it ended.

    Keys: `state` ("running", "evaluating", "done", "stopped", "failed", "diverged"), `step`,
    `max_steps`, `exit_code` (null while running or evaluating), `message`, `updated`, `host`,
    `pid`; `dropped`, the students that diverged and were taken out, if there are any; `epochs` by
    source if the training data has several.
    """

    def __init__(self, folder: Path, max_steps: int) -> None:
        self.path = folder / "status.json"
        self.max_steps = max_steps
        # The previous run's step, until this run starts.
        previous = read_json(self.path) or {}
        self.step = previous.get("step", 0)
        self.epochs: dict[str, float] = previous.get("epochs", {})
        self.started = False
        self.dropped: Mapping[str, Mapping[str, Any]] = previous.get("dropped", {})
        # One writer per file, so that the last status submitted is the last one written.
        self._writer = _writers.setdefault(self.path.absolute(), Background("status.json"))
        self._soon: Future[None] | None = None

    def reached(self, step: int, epochs: Mapping[str, float] | None = None) -> None:
        """Note that the run has started, and its step; the next status written says so.

        Args:
            epochs: of each source of the training data, if there are several.
        """
        self.step, self.epochs, self.started = step, dict(epochs or {}), True

    def write(self, state: str, message: str, exit_code: int | None = None) -> None:
        """Write a status, after those submitted earlier, and wait for the disk.

        Raises:
            OSError: the disk refused it, or has not answered for `WRITE_SECONDS`.
        """
        self._finish(
            self._writer.submit(write_json, self.path, self._content(state, message, exit_code))
        )

    def write_soon(self, state: str, message: str) -> None:
        """Write a status without waiting for the disk: for one that is written again and again.

        It replaces an earlier one that is still waiting.
        """
        if self._soon:
            self._soon.cancel()
        self._soon = self._writer.submit(
            self._write_if_possible, self._content(state, message, None)
        )

    def write_failure(self, state: str, message: str, exit_code: int) -> None:
        """Write how the run failed, unless another rank has written its cause already."""
        content = self._content(state, message, exit_code)

        def write_first_cause() -> None:
            """Write the content if the file holds no failure of this run."""
            known = read_json(self.path)
            if not (self.started and known and known["state"] in ("failed", "diverged")):
                write_json(self.path, content)

        with self._survived():
            self._finish(self._writer.submit(write_first_cause))

    def write_if_possible(self, state: str, message: str, exit_code: int | None) -> None:
        """Write a status, but only log an error if the disk is full or hangs."""
        with self._survived():
            self.write(state, message, exit_code)

    def _content(self, state: str, message: str, exit_code: int | None) -> dict[str, Any]:
        return {
            "state": state,
            "step": self.step,
            "max_steps": self.max_steps,
            **({"epochs": self.epochs} if self.epochs else {}),
            "exit_code": exit_code,
            "message": message,
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **({"dropped": dict(self.dropped)} if self.dropped else {}),
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
        """Write the content; runs in the background thread."""
        with self._survived():
            write_json(self.path, content)

    @contextmanager
    def _survived(self) -> Iterator[None]:
        """Log a disk error instead of raising it: it must not hide why the run ended."""
        try:
            yield
        except OSError as error:
            log.error("%s could not be written: %s", self.path, error.strerror)


@contextmanager
def owned(folder: Path, max_steps: int, ranks: Ranks, *, fresh: bool) -> Iterator[Status]:
    """Lock a run's folder during the run and write failures to `status.json`. Collective.

    Args:
        fresh: set an existing folder aside first.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
    """
    with ExitStack() as stack:
        with failing_together():
            if ranks.is_main:
                try:
                    with named(folder="run.folder"):
                        if fresh and Path.cwd().is_relative_to(os.path.realpath(folder)):
                            raise SettingError(
                                "folder",
                                str(folder),
                                "holds the working folder, which --fresh cannot rename",
                                "start the run from another folder",
                            )
                        if fresh and folder.exists():
                            with locked(folder):
                                log.info("--fresh: the old run is kept as %s", set_aside(folder))
                        folder.mkdir(parents=True, exist_ok=True)
                        stack.enter_context(locked(folder))
                except OSError as error:
                    raise ConfigError(
                        f"run.folder={str(folder)!r} cannot be written: {error.strerror}"
                    ) from None
        status = Status(folder, max_steps)
        # A refused resume must not overwrite the status of the run that is in the folder.
        with failures_told(status, of_settings=not status.path.exists()):
            yield status


@contextmanager
def failures_told(status: Status, *, of_settings: bool) -> Iterator[None]:
    """Write the error that ends the block to `status.json` and raise it again.

    Args:
        of_settings: write configuration errors too.
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
        text = explain(error)
        message, code = (
            (text, EXIT_ENVIRONMENT) if text else (f"{type(error).__name__}: {error}", 1)
        )
        status.write_failure(
            "failed", message, EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
        )
        raise


def described(folder: Path) -> str:
    """Return who holds a run's folder, its state and its step, from `status.json`."""
    status = read_json(folder / "status.json") or {}
    who = f"pid {status.get('pid', '?')} on {status.get('host', '?')}"
    return (
        f"{who}, {status.get('state', 'starting')}, step {status.get('step', '?')} of "
        f"{status.get('max_steps', '?')}"
    )


def set_aside(folder: Path) -> Path:
    """Rename a run folder to the first free `<name>.1`, `<name>.2`, …; nothing is deleted.

    If the folder is a link, what it leads to is renamed, and the link leads to a new folder.
    """
    if folder.is_symlink():
        target = Path(os.path.realpath(folder))
        aside = set_aside(target)
        target.mkdir()
        return aside
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def job_seconds() -> float:
    """Return the seconds since the job's process started.

    That is torchrun's process, if there is one, since it survives restarts of ours.
    """
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StopRequest:
    """Requests to stop a run: by a signal, by a file STOP in its folder, or by the job's age.

    A STOP file that exists when the run starts counts too; it is removed when the run stops. A
    thread checks for it, so that a folder that hangs cannot block the step, and with it all ranks.
    """

    def __init__(
        self,
        folder: Path,
        *,
        watch_file: bool,
        logs: bool = False,
        max_hours: float | None = None,
        answer: str = "stopping as soon as the ranks agree",
    ) -> None:
        self._file = folder / "STOP" if watch_file else None
        self._max_hours = max_hours
        self._deadline = (
            math.inf if max_hours is None else time.monotonic() + max_hours * 3600 - job_seconds()
        )
        self._logs = logs
        # Printed in answer to a signal; it says what will be saved, which depends on the phase.
        self.answer = answer
        # A live display shows `notice` itself, since a line printed into it would be overwritten.
        self.prints_notice, self.notice = True, ""
        self._signal: int | None = None
        self._since = 0.0
        self._background = Background("STOP file")
        self._look: Future[None] | None = None
        self._found, self._answers_at_once = False, True  # results of the last check

    def reason(self) -> str | None:
        """Return why to stop, or None."""
        if self._signal is not None:
            return f"got {signal.Signals(self._signal).name}"
        if self._file is not None and self._look_for(self._file):
            return f"found {self._file}"
        if time.monotonic() >= self._deadline:
            return f"run.max_hours={self._max_hours:g} reached"
        return None

    def acknowledge(self) -> str | None:
        """Return why to stop, and remove the STOP file, so that rerunning the command resumes."""
        reason = self.reason()
        if self._file is not None:
            self._background.submit(self._remove, self._file, patience=REMOVE_SECONDS)
        return reason

    def _look_for(self, file: Path) -> bool:
        """Return whether the file existed at the last check, and start another check."""
        if self._look is None or self._look.done():
            patience = LOOK_SECONDS if self._answers_at_once else 0.0
            self._look = self._background.submit(self._take_look, file, patience=patience)
            if patience and not self._look.done():
                self._answers_at_once = False
        return self._found

    def _take_look(self, file: Path) -> None:
        """Check for the file and time the check; runs in the background thread."""
        start = time.monotonic()
        try:
            self._found = file.exists()
        except OSError:  # the folder cannot be read now; the next check may succeed
            self._found = False
        self._answers_at_once = time.monotonic() - start < AT_ONCE_SECONDS

    def _remove(self, file: Path) -> None:
        """Remove the STOP file; runs in the background thread."""
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
        """Handle signals as requests to stop during the block.

        A SIGINT a second or more after the first signal raises KeyboardInterrupt. Python delivers
        signals to the main thread only: in another thread, the caller's handlers stay in place.
        """
        if threading.current_thread() is not threading.main_thread():
            if self._logs:
                where = f"{self._file} or run.max_hours" if self._file else "run.max_hours"
                log.info("not in the main thread: signals do not stop this run, use %s", where)
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in heeded(STOP_SIGNALS)}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: the handler was not installed from Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._since = number, now
            if self._logs:
                name = signal.Signals(number).name
                again = "; press Ctrl-C again to quit at once" if number == signal.SIGINT else ""
                self.notice = f"got {name}: {self.answer}{again}"
                if self.prints_notice:
                    # Safe in a handler. Ctrl-C may have ended `tee`, or the terminal was closed.
                    with suppress(OSError):
                        os.write(2, f"\n{self.notice}\n".encode())
        elif number == signal.SIGINT and now - self._since >= 1:
            raise KeyboardInterrupt
