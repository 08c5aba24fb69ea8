"""The worker process that fine-tunes, and the object with which the grid controls it.

Inputs: cells, one line of JSON each on the worker's stdin. Outputs: the cells' files, and one line
of JSON per event on its stdout. A separate process has its own GPU and threads, can be killed at
any time, and does not end the grid when it crashes. Not handled here: which worker runs which cell
(`grid`).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from scaledistill.distributed.launcher import ISOLATED
from scaledistill.errors import ConfigError, DataError, DivergedError
from scaledistill.glue.cell import Cell, write_error, write_record

COMMAND = (sys.executable, "-c", f"{ISOLATED}from {__name__} import main; main()")
PROGRESS_SECONDS = 1.0
# Launchers set variables with these prefixes; with them a worker would wait for other ranks.
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
    "GROUP_",
    "ROLE_",
    *("OMPI_", "PMI_", "PMIX_", "MV2_"),
)


class Share(NamedTuple):
    """A worker's share of the machine."""

    gpu: str | None
    """An entry of `CUDA_VISIBLE_DEVICES`; None: no GPU."""
    threads: int


class Worker:
    """A process that fine-tunes one cell after the other.

    Its imports take seconds, so start it early. Use it as a context manager, or call `end`.
    """

    def __init__(self) -> None:
        package = str(Path(__file__).parents[2])
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)
        }
        variables |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        }
        variables |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic algorithms require it
        # Beside other busy processes, spinning threads halve the speed.
        variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Launchers set it to 1; each job carries the number of threads to use.
        variables["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=variables,
            bufsize=0,
        )
        self._rest = b""
        self.cell: Cell | None = None
        self.ready = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def fileno(self) -> int:
        """Return the descriptor of the worker's stdout, for `select`."""
        return cast(IO[bytes], self._process.stdout).fileno()

    def give(
        self,
        cell: Cell,
        output: Path,
        model_folder: Path,
        data_folder: Path | None,
        share: Share,
        scores_each_epoch: bool = False,
    ) -> None:
        """Send the worker a cell and its share of the machine; read its events with `answers`.

        The share must be the same for all of a worker's cells.
        """
        self.cell = cell
        folders = {"output": output, "model_folder": model_folder, "data_folder": data_folder}
        job = {
            "cell": asdict(cell),
            "share": share._asdict(),
            "scores_each_epoch": scores_each_epoch,
        }
        job |= {name: folder and str(folder) for name, folder in folders.items()}
        with contextlib.suppress(BrokenPipeError):  # `answers` returns None once it has ended
            cast(IO[bytes], self._process.stdin).write((json.dumps(job) + "\n").encode())

    def answers(self) -> list[dict[str, Any]] | None:
        """Return the events since the last call; None if the process has ended.

        Blocks until `fileno` is readable.
        """
        received = os.read(self.fileno(), 1 << 16)
        if not received:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def last_words(self) -> tuple[str, str]:
        """Return how the process ended, and the last 4,000 bytes of its stderr."""
        status = self._process.wait()
        how = f"exit status {status}"
        if status < 0:
            how = f"{signal.Signals(-status).name}" + (
                ", often because memory ran out" if status == -signal.SIGKILL else ""
            )
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        return how, self._log.read().decode(errors="replace")

    def end(self) -> None:
        """Kill the process; its finished cells are on the disk. A second call does nothing."""
        if self._log.closed:
            return
        self._process.kill()
        self._process.communicate()
        self._log.close()


def main() -> None:
    """Fine-tune the cells from stdin until it closes; exit after an unexpected error."""
    # Signals are for the process that started this one; it ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with it

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    jobs = _jobs()
    from scaledistill.glue.finetune import fine_tune, take_share

    answer(ready=True)
    for job in jobs:
        take_share(**job["share"])
        cell, output = Cell.from_dict(job["cell"]), Path(job["output"])
        data_folder = None if job["data_folder"] is None else Path(job["data_folder"])
        try:
            record, predictions = fine_tune(
                cell,
                Path(job["model_folder"]),
                data_folder,
                _Progress(answer),
                job["scores_each_epoch"],
            )
            write_record(cell, output, record, predictions)
        except Exception as error:  # noqa: BLE001 - any error is recorded as this cell's
            expected = isinstance(error, (ConfigError, DataError, DivergedError))
            text = str(error) if expected else f"{type(error).__name__}: {error}"
            write_error(cell, output, text, traceback.format_exc())
            # After an unexpected error the process may be in a bad state (a CUDA error stays), so
            # the next cell gets a new one.
            answer(finished=False, leaves=not expected)
            if not expected:
                return
        else:
            answer(finished=True, leaves=False)


class _Progress:
    """Reports the finished fraction of a cell, at most once a second."""

    def __init__(self, answer: Callable[..., None]) -> None:
        self._answer, self._reported = answer, time.monotonic()

    def __call__(self, fraction: float) -> None:
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self._reported = time.monotonic()
            self._answer(fraction=fraction)


def _jobs() -> Iterator[dict[str, Any]]:
    """Return the jobs from stdin; end the process as soon as stdin closes.

    Stdin closes when the process that started this one has ended.
    """
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return map(json.loads, iter(lines.get, ""))


if __name__ == "__main__":
    main()
