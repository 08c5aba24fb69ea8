"""The process pool: results in order, and no process outlives its use."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaledistill.data.prepare.docstrings import installed_docs
from scaledistill.data.prepare.pool import parallel_map
from scaledistill.errors import DataError

ROOT = Path(__file__).resolve().parent.parent


def uneven(item: int) -> int:
    time.sleep(0.02 * (item % 3))
    return item


@pytest.mark.parametrize("workers", [0, 2])
def test_results_keep_the_order_of_endless_items(workers: int) -> None:
    results = parallel_map(uneven, itertools.count(), workers=workers)
    assert [next(results) for _ in range(20)] == list(range(20))
    results.close()


def die(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(
        DataError,
        match=(
            r"a worker process \(of 1\) was killed, .* each may take 0.6 GB; use fewer --workers, "
            r"or"
        ),
    ):
        list(parallel_map(die, range(10), workers=1))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import itertools, os\n"
        "from scaledistill.data.prepare.pool import parallel_map\n"
        "def pid(item): return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    for value in parallel_map(pid, itertools.count(), workers=1): print(value, "
        "flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.communicate()
    assert not Path(f"/proc/{worker}/stat").exists()


def test_installed_docs_in_parallel(tmp_path: Path) -> None:
    for i in range(70):
        (tmp_path / f"m{i:02}.py").write_text(
            f'"""Module number {i} of a package of many modules with docstrings."""'
        )
    expected = list(installed_docs(folders=[tmp_path]))
    assert len(expected) == 70
    assert (
        list(
            installed_docs(
                lambda function, items: parallel_map(function, items, workers=1), [tmp_path]
            )
        )
        == expected
    )
