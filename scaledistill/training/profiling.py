"""Profiling: `--profile N` writes a trace for a viewer and tables of where a step's time goes.

Inputs: the steps as they run, and their stopwatch. Outputs: `<run.folder>/profile/` with
`trace-rank0.json.gz` (open it at https://ui.perfetto.dev) and `table.txt`: the phases of the step,
and the operators that take the most time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import profile

from scaledistill.errors import ConfigError, DataError
from scaledistill.metrics.stopwatch import Lap, Stopwatch
from scaledistill.storage.files import disk_remedy
from scaledistill.training.session import Session
from scaledistill.training.step import train_step

log = logging.getLogger(__name__)

WARMUP_STEPS = 3
"""Steps before profiling starts: they allocate, compile and autotune."""
NUM_OPERATORS = 20


class StepProfiler:
    """Profiles the steps after the warm-up; a context manager around the loop.

    Call `after_step` after every step.
    """

    def __init__(self, folder: Path, watch: Stopwatch) -> None:
        """Create the profiler; `watch` times the steps, and nobody else may read it meanwhile."""
        self._folder = folder / "profile"
        self._watch = watch
        self._made = 0
        self._profile = profile()  # by default of every kind of device that is present

    def __enter__(self) -> StepProfiler:
        return self

    def after_step(self) -> None:
        """Count a step; start recording after the last warm-up step."""
        self._made += 1
        if self._made == WARMUP_STEPS:
            self._watch.lap()
            self._profile.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        steps = self._made - WARMUP_STEPS
        if error or steps < 1:
            return
        lap = self._watch.lap()
        self._profile.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._folder / "trace-rank0.json.gz"))
            with (self._folder / "table.txt").open("w") as file:
                console = Console(file=file, width=120)
                for table in (phase_table(lap, steps), self._operator_table(steps)):
                    console.print(table)
        except OSError as failure:
            raise DataError(
                f"run.folder={self._folder.parent}: the profile could not be written: {failure}; "
                f"{disk_remedy(failure)}"
            ) from None
        log.info(
            "%s\nprofile of %d steps in %s",
            (self._folder / "table.txt").read_text(),
            steps,
            self._folder,
        )

    def _operator_table(self, steps: int) -> Table:
        """Return the operators by their own time: on the GPU if there is one, else on the CPU."""
        table = Table(
            "operator", "ms per step", "calls per step", title="operators by their own time"
        )
        events = [event for event in self._profile.key_averages() if not event.is_user_annotation]
        on_gpu = any(event.device_type != DeviceType.CPU for event in events)
        events = [event for event in events if (event.device_type != DeviceType.CPU) == on_gpu]

        def own_time(event: object) -> float:
            return getattr(event, "self_device_time_total" if on_gpu else "self_cpu_time_total")

        for event in sorted(events, key=own_time, reverse=True)[:NUM_OPERATORS]:
            table.add_row(
                event.key[:80],
                f"{own_time(event) / 1000 / steps:.2f}",
                f"{event.count / steps:.1f}",
            )
        return table


def phase_table(lap: Lap, steps: int) -> Table:
    """Return a step's phases with their times and shares; "rest" is the time outside of them."""
    table = Table(
        "phase", "ms per step", "share", title=f"a step: {1000 * lap.seconds / steps:.1f} ms"
    )
    for name, seconds in {**lap.phases, "rest": lap.seconds - sum(lap.phases.values())}.items():
        table.add_row(name, f"{1000 * seconds / steps:.2f}", f"{seconds / lap.seconds:.1%}")
    return table


def profile_run(session: Session, last_step: int, at: Callable[[str], None]) -> Path:
    """Run the steps up to `last_step` and profile them. Collective.

    Rank 0 profiles those after the warm-up. Returns the run folder.
    """
    folder, watch = Path(session.config.run.folder), Stopwatch(session.ranks.device, at)
    with ExitStack() as stack:
        stream = stack.enter_context(session.stream())
        profiler = (
            stack.enter_context(StepProfiler(folder, watch)) if session.ranks.is_main else None
        )
        while session.step < last_step:
            train_step(session, stream, lambda: None, watch)
            if profiler:
                profiler.after_step()
    return folder


def check_trial_steps(last_step: int, max_steps: int, dry_run_steps: int | None) -> None:
    """Check that a dry run, or a profile with its warm-up, fits in `max_steps`.

    Raises:
        ConfigError: it has more steps.
    """
    if last_step > max_steps:
        what = (
            f"--dry-run {dry_run_steps} is"
            if dry_run_steps
            else f"--profile {last_step - WARMUP_STEPS} and {WARMUP_STEPS} steps to warm up are"
        )
        raise ConfigError(f"{what} more than train.max_steps={max_steps}; make fewer steps")
