"""What the kinds of faults share: a place with tiny models and data, and jobs on forked ranks to
hurt.
"""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny_tree
from faults import rank
from ranks import Job

WHOLE: dict[str, dict[str, Any]] = {
    "engine": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "train": {"max_steps": 24},
}
"""What kinds share that need a run of a few steps."""
ENGINES: dict[str, dict[str, Any]] = {
    **{
        f"zero{stage}": {"deepspeed": {"zero_optimization": {"stage": stage}}}
        for stage in (1, 2, 3)
    },
    "fsdp": {"name": "fsdp"},
}


@dataclass(frozen=True)
class WholeRun:
    """A run that nothing happened to."""

    run_folder: Path
    losses: list[str]
    """By step, to the bit."""

    def differences(self, run_folder: Path) -> list[str]:
        """Say how a run that something happened to ended otherwise."""
        differences = []
        if losses_of(run_folder) != losses_of(self.run_folder):
            differences.append("metrics.jsonl differs from the whole run's")
        if end_state(run_folder) != end_state(self.run_folder):
            differences.append("the last checkpoint differs from the whole run's")
        return differences


@dataclass
class Place:
    """Where the faults happen, and how many."""

    folder: Path
    teacher: Path
    shards: Path
    seed: int
    short: bool
    only: int | None = None
    """The one case to repeat."""
    say: Callable[[str], None] = lambda line: None
    whole_runs: dict[str, WholeRun] = field(default_factory=dict)

    def cases(self, number: int, short: Iterable[int] | int) -> list[int]:
        """Return the numbers of the cases to run: all of `number`, or those of the short form."""
        if self.only is not None:
            return [self.only]
        if not self.short:
            return list(range(number))
        return list(range(short) if isinstance(short, int) else short)

    def draw(self, kind: str, case: int) -> random.Random:
        """Return the randomness of a case."""
        return random.Random(f"{self.seed} {kind} {case}")

    def tree(self, name: str, **blocks: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration of a run in a folder of its own."""
        run = {
            "folder": str(self.folder / name / "run"),
            "timeout_seconds": 60,
            **blocks.pop("run", {}),
        }
        return tiny_tree(self.folder, self.teacher, self.shards, run=run, **blocks)

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """The training rows as they were written, by shard: ids [N, T]."""
        return true_rows(self.shards / "train")


def true_rows(folder: Path) -> list[np.ndarray]:
    """Return the rows of a data set that is sound, by shard: ids [N, T]."""
    from scaledistill.data.reader import ShardReader

    reader = ShardReader(folder)
    return [
        np.concatenate([ids for _, ids, _ in reader.read(shard, range(len(entry.block_rows)))])
        for shard, entry in enumerate(reader.manifest.shards)
    ]


class Ranks:
    """A run on forked ranks: `folder` holds their output, their process numbers and the record of
    their steps.
    """

    def __init__(
        self, folder: Path, tree: Mapping[str, Any], *, world_size: int = 2, **facts: Any
    ) -> None:
        self.folder = folder
        self.run_folder = Path(tree["run"]["folder"])
        self._job = Job(rank.run, world_size, write_facts(folder, tree, **facts))
        self.processes = self._job.processes

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> bool:
        """Wait until a condition holds; false if a rank is gone or the time is over first."""
        return wait_for(lambda: condition() or not self.all_alive(), seconds) and condition()

    def all_alive(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def seconds_until_gone(self, limit: float) -> float | None:
        """Wait for the end of all ranks and return how long it took; None, and kill them, where
        they do not end.
        """
        start = time.monotonic()
        for process in self.processes:
            process.join(max(0.0, start + limit - time.monotonic()))
        took = time.monotonic() - start
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            return None
        return took

    def kill(self, which: Iterable[int] = (0, 1)) -> None:
        for number in which:
            if number < len(self.processes):
                self.processes[number].kill()

    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def steps(self, number: int = 0) -> list[dict[str, Any]]:
        """Return what a rank trained on, a row for each step."""
        path = self.folder / f"steps-{number}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("log-*")))


def whole_run(place: Place, **blocks: dict[str, Any]) -> WholeRun:
    """Return the run that nothing happens to, with a checkpoint every third step; made once for
    each configuration.
    """
    key = json.dumps([blocks["engine"], blocks["train"]])
    if key not in place.whole_runs:
        name = f"whole-{len(place.whole_runs)}"
        tree = place.tree(name, **{**blocks, "checkpoint": {"every_steps": 3, "keep": 9}})
        job = Ranks(place.folder / name / "start", tree)
        if job.seconds_until_gone(300) is None or job.exit_codes() != [0, 0]:
            raise RuntimeError(
                f"a run that nothing happens to ended with {job.exit_codes()}:\n{job.output()}"
            )
        if wrong := misplaced_rows(place, tree, [job.steps(0), job.steps(1)]):
            raise RuntimeError(
                f"{wrong} rows of a run that nothing happens to are not in their places"
            )
        place.whole_runs[key] = WholeRun(job.run_folder, [row["loss"] for row in job.steps()])
    return place.whole_runs[key]


def write_facts(folder: Path, tree: Mapping[str, Any], **facts: Any) -> str:
    """Write the configuration of a run and what is to happen in it; return the file for `rank`."""
    folder.mkdir(parents=True)
    config, path = folder / "config.json", folder / "facts.json"
    config.write_text(json.dumps(tree))
    path.write_text(json.dumps({"folder": str(folder), "config": str(config), **facts}))
    return str(path)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def status_of(run_folder: Path) -> dict[str, Any]:
    from scaledistill.storage.files import read_json

    return read_json(run_folder / "status.json") or {}


def good_checkpoints(run_folder: Path) -> list[int]:
    """Return the steps of the committed checkpoints whose hashes hold, newest first."""
    from scaledistill.checkpoint.format import verify

    folders = sorted((run_folder / "checkpoints").glob("step-*"), reverse=True)
    return [int(folder.name.removeprefix("step-")) for folder in folders if verify(folder) is None]


def losses_of(run_folder: Path) -> list[tuple[int, float]]:
    from scaledistill.metrics.recorder import read_rows

    return [(row["step"], row["loss"]) for row in read_rows(run_folder / "metrics.jsonl")]


def end_state(run_folder: Path) -> dict[str, str]:
    """Return the hashes of the newest checkpoint's tensors."""
    folder = max((run_folder / "checkpoints").glob("step-*"))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}


def misplaced_rows(
    place: Place, tree: Mapping[str, Any], records: list[list[dict[str, Any]]]
) -> int:
    """Count the samples that ranks trained on and the order does not give them, or gives and they
    did not train on.

    `records`: for each rank, one row for each step of the history that survived.
    """
    from scaledistill.data.reader import ShardReader

    data, batch = tree["data"], tree["train"]["global_batch_size"]
    order = ShardReader(data["train"]).order(
        seed=tree["run"].get("seed", 1),
        num_lanes=data["num_lanes"],
        window_rows=data["window_rows"],
    )
    wrong = 0
    for number, rows in enumerate(records):
        for step, row in enumerate(rows):
            samples = list(range(step * batch + number, (step + 1) * batch, len(records)))
            where = zip(*order.locate(np.array(samples)), strict=True)
            tokens = b"".join(
                place.rows[shard][at].astype(np.int64).tobytes() for shard, at in where
            )
            if (
                row["step"] != step + 1
                or row["samples"] != samples
                or row["crc"] != zlib.crc32(tokens)
            ):
                wrong += len(samples)
        wrong += (tree["train"]["max_steps"] - len(rows)) * batch // len(records)
    return wrong


def tail(text: str, lines: int = 6) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
