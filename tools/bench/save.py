"""Measure what a checkpoint costs the training loop: pause, slower steps and memory.

The real training loop runs on random models, with the configuration's student and a teacher of
`--teacher` layers and width, and saves every few steps. Steps during a write are compared with
steps without one. Exit code 1 if a pause is longer than a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from step import _shape, configure, write_models, write_rows

from scaledistill.metrics.benchmark import Report, add_options

ROOT = Path(__file__).parents[2]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        metavar="BxT",
        help="sequences x tokens per step (default: 8x128; on a GPU 256x128)",
    )
    parser.add_argument(
        "--teacher",
        type=_shape,
        default=(24, 1024),
        metavar="LxD",
        help="layers x width (default: 24x1024)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "large_to_l6.json",
        metavar="FILE",
        help="the other settings (default: configs/large_to_l6.json)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting",
    )
    parser.add_argument("--saves", type=int, default=3, help="measured saves (default: 3)")
    parser.add_argument(
        "--every", type=int, default=4, help="steps from one save to the next (default: 4)"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="create models, shards and checkpoints here"
    )
    add_options(parser)
    options = parser.parse_args()
    options.teacher_dtype, options.precision = "auto", "auto"
    return options


def main() -> int:
    """Measure, publish the report and return the exit code."""
    options = parse_arguments()
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it looks for it
    options.shape = options.shape or ((256, 128) if gpu else (8, 128))
    options.shapes = [options.shape]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_models(options, folder)
        config = configure(options, folder, options.shape)
        write_rows(config, folder / "tokens.npy")
        figures = measure(config, options.saves, options.every)
    report = Report()
    table = report.table("A save beside training", ("figure", "median", "lowest", "highest"))
    for figure, (unit, values) in figures.items():
        median = report.add(f"save/{figure}", values, unit)
        cells = [
            f"{value / 1e6:,.1f} MB" if unit == "bytes" else f"{value:,.3f} s"
            for value in (median, min(values), max(values))
        ]
        table.rows.append((figure.replace("_", " "), *cells))
    report.publish(options, gpu=gpu)
    pause, step = (
        statistics.median(figures[name][1]) for name in ("pause_seconds", "step_seconds")
    )
    return int(pause > step)


def measure(config: Any, saves: int, every: int) -> dict[str, tuple[str, list[float]]]:
    """Run the steps; return each figure's unit and values."""
    from scaledistill.distributed.ranks import process_group
    from scaledistill.metrics.stopwatch import Stopwatch
    from scaledistill.preflight.resolve import resolve
    from scaledistill.training.session import open_session
    from scaledistill.training.step import train_step

    found: dict[str, list[float]] = {
        name: [] for name in ("pause", "write", "beside", "without", "growth")
    }
    with process_group(config.run.timeout_seconds) as ranks:
        session = open_session(resolve(config, ranks.world_size, ranks.device), ranks, resume=False)
        watch, memory = Stopwatch(ranks.device), Memory()
        with session.stream() as stream, session.saver, memory:
            for number in range(2 + saves * every):
                due = number >= 2 and (number - 2) % every == 0
                if due:
                    before, start = memory.now(), time.perf_counter()
                    session.save()
                    begun = time.perf_counter()
                    found["pause"].append(begun - start)
                    memory.peak = memory.now()
                start, writing = time.perf_counter(), session.saver.pending
                train_step(session, stream, lambda: None, watch)
                if number >= 2:
                    found["beside" if writing else "without"].append(time.perf_counter() - start)
                if writing and (outcome := session.saver.settle(wait=(number - 1) % every == 0)):
                    if outcome.error:
                        raise RuntimeError(f"the save failed: {outcome.error}")
                    found["write"].append(outcome.ended - begun)
                    found["growth"].append(memory.peak - before)
    return {
        "pause_seconds": ("s", found["pause"]),
        "step_seconds": ("s", found["without"]),
        "step_beside_write_seconds": ("s", found["beside"]),
        "write_seconds": ("s", found["write"]),
        "memory_growth_bytes": ("bytes", found["growth"]),
    }


class Memory:
    """Records the peak of the process's resident memory, in bytes, as a context manager."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> int:
        """Return the resident memory in bytes."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main())
