"""A run goes on where ranks, engine, stage, offload or micro-batch have changed: the same samples
and losses.
"""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tree
from ranks import run_ranks
from test_engine import ENGINES

from scaledistill.config.load import parse_config
from scaledistill.metrics.recorder import read_rows

STEPS = 24
TRAIN = {
    "global_batch_size": 12,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "precision": "fp32",
}


def run_leg(tree: dict[str, Any], last_step: int) -> list[list[int]]:
    """Run up to `last_step`; return the samples of each step that this rank trained on."""
    from scaledistill.training.loop import distill
    from scaledistill.training.step import train_step

    samples: list[list[int]] = []

    def recorded(batch: Any) -> Any:
        samples[-1].extend(batch.samples_B.tolist())
        return batch

    def recording(session: Any, stream: Any, *arguments: Any) -> Any:
        if session.step == last_step - 1 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)  # this step is still made
        samples.append([])
        return train_step(session, map(recorded, stream), *arguments)

    result = distill(parse_config(tree), train_step=recording)
    assert (result.state, result.step) == (("done" if last_step == STEPS else "stopped"), last_step)
    return samples


def run(
    tree: dict[str, Any], legs: list[tuple[int, int, dict[str, Any], dict[str, Any]]]
) -> tuple[list[float], Any]:
    """Run leg by leg, each with ranks, last step, engine and settings of its own; return losses and
    samples by step.
    """
    samples: list[list[int]] = []
    for world_size, last_step, engine, settings in legs:
        leg = {**tree, "engine": engine} | {
            name: {**tree[name], **block} for name, block in settings.items()
        }
        by_rank = run_ranks(run_leg, world_size, leg, last_step)
        samples += [sorted(itertools.chain(*step)) for step in zip(*by_rank, strict=True)]
    rows = read_rows(Path(tree["run"]["folder"]) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows], samples


def test_ranks_and_engines_change_mid_epoch(tmp_path, tiny_teacher, tiny_shards) -> None:
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, train=TRAIN)

    def in_folder(name: str) -> dict[str, Any]:
        return {**tree, "run": {**tree["run"], "folder": str(tmp_path / name)}}

    losses, samples = run(in_folder("whole"), [(1, STEPS, ENGINES["zero1"], {})])
    assert samples == [list(range(12 * step, 12 * step + 12)) for step in range(STEPS)]
    legs: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
        (1, 5, ENGINES["zero2-offload"], {"train": {"micro_batch_size": 4}}),
        (2, 10, ENGINES["zero3"], {"teacher": {"placement": "shard"}}),
        (
            2,
            14,
            ENGINES["fsdp-offload"],
            {"train": {"micro_batch_size": 3}, "teacher": {"placement": "offload"}},
        ),
        # Three ranks divide few of the parameters.
        (3, 16, ENGINES["zero3"], {}),
        (3, 18, ENGINES["zero3"], {"train": {"micro_batch_size": 2}}),
        (1, 19, {"name": "fsdp", "fsdp": {"reshard_after_forward": False}}, {}),
        (2, STEPS, ENGINES["zero1"], {"train": {"micro_batch_size": 2}}),
    ]
    changed, changed_samples = run(in_folder("changed"), legs)
    assert changed_samples == samples
    assert changed == pytest.approx(losses, rel=1e-6)
