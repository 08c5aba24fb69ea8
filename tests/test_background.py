from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scaledistill.storage.background import Background, ended


def test_calls_are_made_in_order_and_one_at_a_time() -> None:
    go, done = threading.Event(), []
    background = Background("test")
    futures = [background.submit(go.wait, 60)]
    futures += [background.submit(done.append, number) for number in range(100)]
    assert done == []
    assert not ended(futures[-1], 0.0)
    go.set()
    assert ended(futures[-1], 60)
    assert done == list(range(100))
    assert all(future.done() for future in futures)


def test_results_and_errors() -> None:
    background = Background("test")
    assert background.submit(divmod, 7, 3, patience=60).result(0) == (2, 1)
    failed = background.submit(divmod, 7, 0, patience=60)
    with pytest.raises(ZeroDivisionError):
        failed.result(0)
    assert background.submit(str, 1).result(60) == "1", "an error ends nothing"


def test_only_a_call_that_begins_at_once_is_waited_for() -> None:
    go = threading.Event()
    background = Background("test")
    start = time.monotonic()
    first = background.submit(go.wait, 60, patience=0.01)
    second = background.submit(str, patience=60)
    assert time.monotonic() - start < 30
    assert not first.done()
    assert not second.done()
    go.set()
    assert second.result(60) == ""


def test_a_call_that_has_not_begun_is_taken_back() -> None:
    go, done = threading.Event(), []
    background = Background("test")
    first, second = background.submit(go.wait, 60), background.submit(done.append, 2)
    assert second.cancel()
    third = background.submit(done.append, 3)
    go.set()
    assert ended(third, 60)
    assert first.result() is True
    assert done == [3]


def test_the_thread_ends_with_its_work() -> None:
    background = Background("a thread of its own")
    for _ in range(3):
        background.submit(str, patience=60)
        deadline = time.monotonic() + 30
        while any(thread.name == "a thread of its own" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


LEAVES = """
import threading
from scaledistill.storage.background import Background
Background("hangs").submit(threading.Event().wait)
print("leaving")
"""


def test_a_call_that_hangs_does_not_keep_a_process() -> None:
    root = Path(__file__).parent.parent
    child = subprocess.run(
        [sys.executable, "-c", LEAVES],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        timeout=60,
        check=True,
    )
    assert child.stdout == "leaving\n"
