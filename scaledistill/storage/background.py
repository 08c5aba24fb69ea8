"""Make calls that may hang, such as those to a file system, in a thread.

Inputs: functions, in order. Outputs: a future for each. Not handled here: what to do about a call
that takes long.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class Background:
    """Makes calls one after another in a thread, in the order of submission.

    The thread ends when there is nothing left to do, and is a daemon: unlike those of a
    `ThreadPoolExecutor`, a call that hangs does not keep the interpreter from exiting.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._calls: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._last: Future[Any] | None = None
        self._is_working = False

    def submit(
        self, function: Callable[..., Any], *arguments: Any, patience: float = 0.0
    ) -> Future[Any]:
        """Queue a call and return its future.

        Args:
            patience: seconds to wait for the call, unless an earlier one is still running.
        """
        future: Future[Any] = Future()
        with self._lock:
            earlier, self._last = self._last, future
            self._calls.append((future, function, arguments))
            if not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        if patience and (earlier is None or earlier.done()):
            wait([future], patience)
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._is_working = False
                    return
                future, function, arguments = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - future.result() re-raises it
                future.set_exception(error)
            else:
                future.set_result(result)


def ended(future: Future[Any], seconds: float) -> bool:
    """Return whether a call is over, waiting up to `seconds` for it."""
    return bool(wait([future], seconds).done)
