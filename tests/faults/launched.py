"""A run under a launcher: found and counted by a mark in the environment of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faults import rank
from faults.common import wait_for, write_facts
from ranks import free_port

MARK = "SCALEDISTILL_FAULT"
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
}


class Launched:
    """Two ranks under `torchrun` or `deepspeed`, in a session of their own, as a terminal would
    start them.
    """

    def __init__(self, launcher: str, folder: Path, tree: Mapping[str, Any], **facts: Any) -> None:
        self.folder, self.run_folder = folder, Path(tree["run"]["folder"])
        self._mark = uuid.uuid4().hex
        bin_folder = Path(sys.executable).parent
        program, *options = LAUNCHERS[launcher]
        words = [str(bin_folder / program), *options, str(free_port())]
        environment = {
            key: text
            for key, text in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment |= {
            "PATH": f"{bin_folder}{os.pathsep}{environment['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        facts_file = write_facts(folder, tree, **facts)
        with (folder / "log-launcher").open("wb") as log:
            self.process = subprocess.Popen(
                [*words, rank.__file__, facts_file],
                env={**environment, MARK: self._mark},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def all_alive(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, condition: Any, seconds: float = 90) -> bool:
        """Wait until a condition holds; false if the launcher is gone or the time is over first."""
        return wait_for(lambda: condition() or not self.all_alive(), seconds) and condition()

    def pid(self, number: int) -> int:
        return int((self.folder / f"pid-{number}").read_text())

    def interrupt(self) -> None:
        """Press Ctrl-C: every process of the terminal's group gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def seconds_until_gone(self, limit: float) -> float | None:
        """Wait for the end of every process of the job; return how long it took, or None, and kill
        what is left.
        """
        start = time.monotonic()
        gone = wait_for(lambda: not self.pids(), limit)
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        return time.monotonic() - start if gone else None

    def pids(self) -> list[int]:
        """Return the processes of the job that run."""
        self.process.poll()  # or it stays as a zombie
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self._mark}".encode() in (path / "environ").read_bytes().split(
                    b"\0"
                )
                if marked and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(path.name))
            except OSError:
                continue  # gone meanwhile, or not ours to see
        return found

    def output(self) -> str:
        return (self.folder / "log-launcher").read_text(errors="replace")
