"""Damaged checkpoints: each is recognised, and the run resumes from the previous one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from faults.common import WHOLE, Place, Ranks, tail, whole_run
from faults.tally import Tally

CASES, RESUMED, SHORT_CASES = 60, 10, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
MAX_STEPS, EVERY = WHOLE["train"]["max_steps"], 3


def one_of(folder: Path, draw: Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def tensors_of(folder: Path, draw: Random) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def flip_a_bit(folder: Path, draw: Random) -> None:
    path = one_of(folder, draw)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_a_bit_of_a_tensor(folder: Path, draw: Random) -> None:
    path = tensors_of(folder, draw)
    data = bytearray(path.read_bytes())
    data[-1 - draw.randrange(len(data) // 2)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, draw: Random) -> None:
    path = one_of(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lose_the_end(folder: Path, draw: Random) -> None:
    path = tensors_of(folder, draw)
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) - 1024)].ljust(len(data), b"\0"))


def remove_a_file(folder: Path, draw: Random) -> None:
    one_of(folder, draw).unlink()


def empty_a_file(folder: Path, draw: Random) -> None:
    one_of(folder, draw).write_bytes(b"")


def empty_the_manifest(folder: Path, draw: Random) -> None:
    (folder / "manifest.json").write_bytes(b"")


def swap_the_moments(folder: Path, draw: Random) -> None:
    first, second = sorted(folder.glob("*.exp_avg*.safetensors"))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def mix_with_another_step(folder: Path, draw: Random) -> None:
    name = tensors_of(folder, draw).name
    shutil.copy(folder.with_name(f"step-{MAX_STEPS - 3 * EVERY:09d}") / name, folder / name)


def empty_the_folder(folder: Path, draw: Random) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def replace_it_by_a_file(folder: Path, draw: Random) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


DAMAGES: tuple[Callable[[Path, Random], None], ...] = (
    flip_a_bit,
    flip_a_bit_of_a_tensor,
    truncate,
    lose_the_end,
    remove_a_file,
    empty_a_file,
    empty_the_manifest,
    swap_the_moments,
    mix_with_another_step,
    empty_the_folder,
    replace_it_by_a_file,
)


def run(place: Place) -> Tally:
    """Damage the newest checkpoint, in every fourth case the one before too."""
    cases = place.cases(CASES, SHORT_CASES)
    tally = Tally("checkpoint", len(cases), place.say)
    whole = whole_run(place, **WHOLE)
    resumed = 0
    for case in cases:
        draw, damage = place.draw("checkpoint", case), DAMAGES[case % len(DAMAGES)]
        name = f"checkpoint-{case}"
        tree = place.tree(name, **WHOLE, checkpoint={"every_steps": EVERY})
        run_folder = Path(tree["run"]["folder"])
        shutil.copytree(whole.run_folder, run_folder)
        damaged = [MAX_STEPS, MAX_STEPS - EVERY][: 2 if case % 4 == 3 else 1]
        for step in damaged:
            damage(run_folder / "checkpoints" / f"step-{step:09d}", draw)
        problems = falls_back(run_folder, damaged, damaged[-1] - EVERY)
        if place.only is not None or (not place.short and case % (CASES // RESUMED) == 0):
            resumed += 1
            job = Ranks(place.folder / name / "start", tree)
            if job.seconds_until_gone(120) is None or job.exit_codes() != [0, 0]:
                problems.append(f"not resumed, {job.exit_codes()}:\n{tail(job.output())}")
            else:
                problems += whole.differences(run_folder)
        tally.case(f"case {case} ({damage.__name__}, steps {damaged}, seed {place.seed})", problems)
    tally.notes.append(f"{resumed} resumed to the end, to the bit")
    return tally


def falls_back(run_folder: Path, damaged: list[int], expected: int) -> list[str]:
    """Load the newest good checkpoint, as one rank; return what is wrong with that."""
    import torch
    import torch.distributed as dist

    from scaledistill.checkpoint.format import newest_checkpoint, verify
    from scaledistill.distributed.ranks import Ranks as RankFacts

    root = run_folder / "checkpoints"
    problems = [
        f"step {step} passes for good"
        for step in damaged
        if verify(root / f"step-{step:09d}") is None
    ]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        checkpoint = newest_checkpoint(root, RankFacts(0, 1, 0, torch.device("cpu")))
    finally:
        dist.destroy_process_group()
    found = checkpoint and (checkpoint.state["step"], len(checkpoint.tensors("l2.weights")) > 0)
    if found != (expected, True):
        problems.append(f"found step {found}, expected {expected}")
    return problems
