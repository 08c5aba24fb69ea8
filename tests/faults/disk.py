"""A small disk that is full in different ways while a run saves: training goes on, the newest good
checkpoint stays.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from faults.common import WHOLE, Place, Ranks, misplaced_rows, tail, whole_run
from faults.tally import Tally

SAVES, SHORT_SAVES = 30, 3
EVERY = 3
DISK_BYTES, CHECKPOINT_BYTES = 1_500_000, 130_000
STAGES = (
    "checkpoint.format.write_group",
    "checkpoint.format.write_state",
    "checkpoint.format.write_manifest",
)
WAYS: tuple[dict[str, Any], ...] = (
    {"leave": 0},
    {"stage": STAGES[0], "nth": 2},
    {"inodes": True},
    {"leave": 4096},
    {"leave": CHECKPOINT_BYTES // 2},
    {"leave": CHECKPOINT_BYTES // 10},
    {"stage": STAGES[0], "nth": 1},
    {"stage": STAGES[0], "nth": 3},
    {"stage": STAGES[1], "nth": 1},
    {"stage": STAGES[2], "nth": 1},
)


def run(place: Place) -> Tally:
    """Fill the disk for every second save of one run."""
    saves = SHORT_SAVES if place.short else SAVES
    tally, mount = Tally("disk", saves, place.say), place.folder / "disk"
    mount.mkdir()
    options = f"size={DISK_BYTES},nr_inodes=200"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)], capture_output=True, text=True
    )
    if mounted.returncode:
        tally.notes.append(f"SKIPPED: a tmpfs needs the right to mount ({mounted.stderr.strip()})")
        return tally
    try:
        fill(place, tally, mount, saves)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)
    return tally


def fill(place: Place, tally: Tally, mount: Path, saves: int) -> None:
    plan = {2 * EVERY * (number + 1): WAYS[number % len(WAYS)] for number in range(saves)}
    blocks: dict[str, dict[str, Any]] = {
        **WHOLE,
        "train": {"max_steps": max(plan) + 2 * EVERY},
        "checkpoint": {"every_steps": EVERY, "keep": 2, "max_failed_saves": 20},
    }
    whole = whole_run(place, **blocks)
    tree = place.tree("disk", **blocks)
    job = Ranks(
        place.folder / "disk-start",
        tree,
        disk={"mount": str(mount), "plan": plan, "stages": STAGES},
    )
    problems = []
    if job.seconds_until_gone(300) is None or job.exit_codes() != [0, 0]:
        problems.append(f"the run ended with {job.exit_codes()}:\n{tail(job.output())}")
    else:
        problems += whole.differences(job.run_folder)
    lost = misplaced_rows(place, tree, [job.steps(0), job.steps(1)])
    rows = [json.loads(line) for line in (job.folder / "disk.jsonl").read_text().splitlines()]
    failed = {
        int(step): reason
        for step, reason in re.findall(r"checkpoint of step (\d+) not saved: (.*)", job.output())
    }
    for number, (step, way) in enumerate(plan.items()):
        found = list(problems)
        after = [row for row in rows if step < row["step"] <= step + EVERY]
        if step not in failed:
            found.append(f"the save of step {step} did not fail, or nothing said so")
        if damage := [row for row in after if row["newest"] is None or row["damage"]]:
            found.append(f"no good newest checkpoint: {damage[0]}")
        if len(after) < EVERY:
            found.append(f"training ended in step {rows[-1]['step']}")
        tally.case(f"save {number} ({way})", found, lost=lost if number == 0 else 0)
    tally.notes.append(
        "reasons given: "
        f"{'; '.join(sorted({reason.split('(')[0].strip() for reason in failed.values()}))}"
    )
