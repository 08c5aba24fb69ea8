"""One rank of a job that a fault will hit: the command line of a run, with a record of what it
trained on.

Enters: the facts of the job, as JSON. A forked process calls `run`; a launcher runs this file. What
`facts` may ask for: `kill` (die at a stage of a save), `slow` (seconds that a phase takes more, so
that a fault finds it), `disk` (fill it for some saves), `stall` (the step at which a rank's main
thread hangs).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def run(facts_file: str) -> None:
    """Run the command line in this forked rank, its output in a file; never returns."""
    facts = json.loads(Path(facts_file).read_text())
    log = os.open(
        Path(facts["folder"]) / f"log-{os.environ['RANK']}",
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        0o644,
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = command_line(facts)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no queue of the parent's is touched: a killed rank could leave its lock taken


def command_line(facts: dict[str, Any]) -> int:
    """Hook what is asked for into the package, and run it."""
    folder = Path(facts["folder"])
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    phases = Phases(folder, facts.get("slow", {}))
    for stage in facts.get("save_stages", ()):
        hook(stage, before=lambda: phases.enter("save"), after=lambda: phases.leave("save"))
    if kill := facts.get("kill"):
        die_at(folder, **kill)
    full_disk = (
        FullDisk(folder, **facts["disk"]) if "disk" in facts and os.environ["RANK"] == "0" else None
    )
    from scaledistill.cli.distill import main
    from scaledistill.training import loop

    # The command line has no options for these.
    loop.distill = functools.partial(
        loop.distill,
        open_session=session_opener(phases),
        train_step=step_recorder(folder, phases, facts, full_disk),
    )
    return main(["--config", facts["config"]])


class Phases:
    """Says what the rank does by a file that is there meanwhile, and makes it last."""

    def __init__(self, folder: Path, slow: dict[str, float]) -> None:
        self._folder, self._slow = folder, slow

    def enter(self, name: str) -> None:
        self._file(name).touch()
        time.sleep(self._slow.get(name, 0))

    def leave(self, name: str) -> None:
        self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self._folder / f"in-{name}-{os.environ['RANK']}"


def hook(
    name: str, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> None:
    """Call something before and after a function, named module.function, of the package."""
    module_name, _, function_name = name.rpartition(".")
    module = importlib.import_module(f"scaledistill.{module_name}")
    original = getattr(module, function_name)

    def hooked(*arguments: Any, **options: Any) -> Any:
        before()
        result = original(*arguments, **options)
        after()
        return result

    setattr(module, function_name, hooked)


def session_opener(phases: Phases) -> Callable[..., Any]:
    """Return an `open_session` that notes when the run starts, and when the teacher validates."""
    from scaledistill.training.session import open_session

    def opened(*arguments: Any, **options: Any) -> Any:
        phases.enter("start")
        session = open_session(*arguments, **options)
        phases.leave("start")
        session.teacher.register_forward_pre_hook(lambda *call: noted(phases.enter))
        session.teacher.register_forward_hook(lambda *call: noted(phases.leave))
        return session

    def noted(note: Callable[[str], None]) -> None:
        import torch

        if not torch.is_grad_enabled():  # else it is training
            note("validate")

    return opened


def step_recorder(
    folder: Path, phases: Phases, facts: dict[str, Any], full_disk: FullDisk | None
) -> Callable[..., Any]:
    """Return a `train_step` that appends a line for every step that is made: its loss to the bit,
    its samples and the crc32 of their tokens.
    """
    from scaledistill.training.step import train_step

    record = os.open(
        folder / f"steps-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    stall = facts.get("stall")

    def recorded(session: Any, stream: Any, *arguments: Any, **options: Any) -> Any:
        batches = []

        def noted() -> Iterator[Any]:
            for batch in stream:
                batches.append(batch)
                yield batch

        phases.enter("train")
        if stall and session.step == stall["step"] and session.ranks.rank == stall["rank"]:
            time.sleep(1000)
        result = train_step(session, noted(), *arguments, **options)
        samples = [int(sample) for batch in batches for sample in batch.samples_B]
        crc = zlib.crc32(b"".join(batch.input_ids_BT.numpy().tobytes() for batch in batches))
        line = {
            "step": session.step,
            "loss": result.loss.hex(),
            "samples": samples,
            "crc": crc,
        }
        os.write(record, json.dumps(line).encode() + b"\n")
        if full_disk:
            full_disk.after_step(session.step)
        phases.leave("train")
        return result

    return recorded


def die_at(folder: Path, stage: str, side: str, nth: int, ranks: list[int]) -> None:
    """Kill ranks before or after the nth call of a stage of a save, which rank 0 makes."""
    calls = 0

    def strike() -> None:
        nonlocal calls
        calls += 1
        if calls == nth and os.environ["RANK"] == "0":
            (folder / "killed").write_text(f"{side} {stage}, call {nth}")
            for rank in sorted(ranks, reverse=True):  # ourselves last
                os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)

    hook(stage, **{side: strike})


class FullDisk:
    """Fills the disk of a run for some saves, frees it later, and says after each step how the
    checkpoints are.
    """

    def __init__(
        self, folder: Path, mount: str, plan: dict[str, dict[str, Any]], stages: list[str]
    ) -> None:
        self._mount, self._plan = Path(mount), {int(step): how for step, how in plan.items()}
        self._record = (folder / "disk.jsonl").open("a")
        self._how: dict[str, Any] | None = None
        self._full_since = 0
        for stage in stages:
            hook(stage, before=lambda stage=stage: self._at_stage(stage))

    def after_step(self, step: int) -> None:
        # A failed save is tried again with the next step.
        if self._how and step >= self._full_since + 2:
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint of step"):
                    thread.join(10)
            self._free()
        newest = max((self._mount / "run" / "checkpoints").glob("step-*"), default=None)
        row = {
            "step": step,
            "newest": newest and newest.name,
            "damage": newest and self._damage(newest),
        }
        self._record.write(json.dumps(row) + "\n")
        self._record.flush()
        if step in self._plan:
            self._how, self._full_since = self._plan[step], step
            if "stage" not in self._how:
                self._fill()

    def _at_stage(self, stage: str) -> None:
        if self._how and self._how.get("stage") == stage:
            self._how["nth"] -= 1
            if self._how["nth"] == 0:
                self._fill()

    def _fill(self) -> None:
        assert self._how is not None
        if self._how.get("inodes"):
            with contextlib.suppress(OSError):
                for number in range(10_000):
                    (self._mount / f"filling-{number}").touch()
        space = os.statvfs(self._mount)
        taken = space.f_bavail * space.f_frsize - int(self._how.get("leave", 0))
        if not self._how.get("inodes") and taken > 0:
            with (self._mount / "filling").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, taken)

    def _free(self) -> None:
        self._how = None
        for path in self._mount.glob("filling*"):
            path.unlink()

    def _damage(self, newest: Path) -> str | None:
        from scaledistill.checkpoint.format import verify

        damage = verify(newest)
        return damage if newest.exists() else None  # the next one may have pushed it out meanwhile


if __name__ == "__main__":
    del sys.path[0]  # our neighbours are no modules of anybody's
    sys.exit(command_line(json.loads(Path(sys.argv[-1]).read_text())))
