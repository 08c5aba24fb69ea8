"""What a plan says of any number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console

from scaledistill.config.schema import DistillConfig
from scaledistill.data.order import SampleOrder
from scaledistill.preflight import checks
from scaledistill.preflight import report as plan
from scaledistill.preflight.estimate import StudentSize
from scaledistill.preflight.resolve import resolve

CPU = torch.device("cpu")
MakeConfig = Callable[..., DistillConfig]
TRAINED, TEACHER = 1000, 500


@pytest.mark.parametrize(
    ("engine", "placement", "expected"),
    [  # 4 ranks, 3 micro-batches, bf16: three quarters of a tensor in a ring
        (
            {"deepspeed": {"zero_optimization": {"stage": 1}}},
            "replicate",
            {"weights": 1500, "gradients": 6000},
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            "replicate",
            {"weights": 1500, "gradients": 18000},
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "replicate",
            {"weights": 9000, "gradients": 9000},
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 1}, "communication_data_type": "bf16"}},
            "shard",
            {"weights": 1500, "gradients": 3000, "teacher": 2250},
        ),
        ({"name": "fsdp"}, "offload", {"weights": 9000, "gradients": 3000, "teacher": 2250}),
        (
            {"name": "fsdp", "fsdp": {"reshard_after_forward": False}},
            "replicate",
            {"weights": 4500, "gradients": 3000},
        ),
    ],
)
def test_traffic(
    engine: dict[str, Any], placement: str, expected: dict[str, float], tiny_config: MakeConfig
) -> None:
    config = tiny_config(
        engine=engine,
        teacher={"placement": placement, "dtype": "bf16"},
        train={"global_batch_size": 24, "micro_batch_size": 2, "precision": "bf16"},
    )
    facts = cast(
        Any,
        SimpleNamespace(students={"l2": StudentSize(TRAINED, TRAINED)}, teacher_parameters=TEACHER),
    )
    assert plan.traffic(resolve(config, 4, CPU), facts, placement) == expected
    alone = resolve(config, 1, CPU)
    assert sum(plan.traffic(alone, facts, placement).values()) == 0 or placement != "replicate"


@pytest.mark.parametrize("world_size", [1, 4, 8, 12, 32])
def test_reads_are_those_of_the_order(world_size: int, tiny_config: MakeConfig) -> None:
    """Count the reads of 64 neighbouring rows that each rank makes in the windows of an epoch."""
    order = SampleOrder([4096] * 9, seed=1, num_lanes=8, window_rows=1024)
    blocks = SimpleNamespace(block_rows=(64,) * 64)
    manifest = SimpleNamespace(shards=[blocks] * 9, row_bytes=100)
    shards = SimpleNamespace(
        manifest=manifest, blocks_around=lambda shard, row: range(row // 64, row // 64 + 1)
    )
    config = tiny_config(train={"global_batch_size": 96})
    run = resolve(config, world_size, CPU)
    source = SimpleNamespace(name="train", shards=shards, order=order)
    found = plan.reads(cast(Any, SimpleNamespace(sources=[source], order=order, run=run)))
    samples_N = np.arange(order.rows_per_epoch)
    shard_N, row_N = order.locate(samples_N)
    lane_N, window_N, _ = order.split(samples_N)
    counted = lanes = 0
    for rank in range(world_size):
        own = slice(rank, None, world_size)
        counted += len(set(zip(shard_N[own], row_N[own] // 64, window_N[own], strict=True)))
        lanes = len(set(lane_N[own]))
    assert found.lanes == lanes
    steps = order.rows_per_epoch / 96
    # Blocks cut by windows.
    assert found.reads_per_step * steps * world_size == pytest.approx(counted, rel=0.1)
    assert found.times_over == pytest.approx(counted * 64 / order.rows_per_epoch, rel=0.1)


def planned(config: DistillConfig, world_size: int, width: int = 120, **options: Any) -> str:
    found = checks.plan_run(config, world_size, CPU, gpu_bytes=options.get("memory_bytes"))
    console = Console(width=width)
    with console.capture() as capture:
        console.print(plan.plan_table(found, options.get("tokens_per_second")))
        console.print(plan.placement_table(found, options.get("memory_bytes")))
        console.print("\n".join(plan.warnings_of(found)))
    return capture.get()


def test_a_plan_for_1024_ranks(tiny_config: MakeConfig) -> None:
    config = tiny_config(
        train={"global_batch_size": 2048, "max_steps": 3600}, teacher={"placement": "shard"}
    )
    text = planned(config, 1024, tokens_per_second=64, memory_bytes=48_000_000_000)
    words = " ".join(text.split())
    for part in (
        "DeepSpeed ZeRO-2, 1,024 ranks",
        "2048 sequences × 16 = 32,768 tokens; 1 micro-batch of 2 per rank",
        "7,200 steps and 235.9M tokens an hour, 0.5 hours, at 64 tokens/s per rank",
        "rows from 1 of 4 lanes",
        "data.num_lanes=4 with 1,024 ranks: 256 ranks share a lane",
        "2 shards for 1,024 ranks",
        "a forward has 2 × 16 = 32 tokens",
        "each row is seen",
        "in 48.00 GB",
    ):
        assert part in words, words
    assert words.count(" fits") == 3
    assert max(map(len, planned(config, 1024, width=80).splitlines())) <= 80


def test_a_single_rank_sends_nothing_and_is_not_warned(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    found = checks.plan_run(config, 1, CPU)
    assert plan.warnings_of(found) == []
    assert sum(plan.traffic(found.run, found.estimate, "replicate").values()) == 0


def test_a_window_of_a_whole_lane(tiny_config: MakeConfig) -> None:
    found = checks.plan_run(tiny_config(data={"window_rows": 10_000}), 1, CPU)
    rows = found.sources[0].order.rows_per_lane
    assert plan.warnings_of(found) == [
        f"data.window_rows (10000) is at least the rows per lane ({rows}), so "
        "all lanes read at the same step; lower it or data.num_lanes"
    ]


def test_what_does_not_fit(tiny_config: MakeConfig) -> None:
    found = checks.plan_run(tiny_config(), 2, CPU)
    facts = dataclasses.replace(
        found.estimate, placements={"replicate": (10**10, 0), "shard": (10**9, 0)}
    )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(plan.placement_table(dataclasses.replace(found, estimate=facts), 5 * 10**9))
    rows = [line.split() for line in capture.get().splitlines()]
    assert [row[-2:] == ["too", "large"] for row in rows[1:]] == [True, False]
    assert rows[2][-1] == "fits"


def test_a_run_says_what_it_is_about_to_do(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"global_batch_size": 24, "micro_batch_size": 2, "max_steps": 500})
    found = checks.plan_run(config, 3, CPU)
    rows = found.sources[0].order.rows_per_epoch
    assert plan.start_summary(found, "cpu", step=0, last_step=500) == [
        "student l2: 10,848 parameters in its export, of which 8,384 parameters are trained",
        f"teacher {config.teacher.model}, up to layer 3: 28,832 parameters, fp32, placement "
        "replicate",
        "batch: 3 ranks × 2 × 4 micro-batches = 24 sequences of 16, 384 tokens a step",
        f"steps: 500, 192.0k tokens in all, {500 * 24 / rows:.1f} epochs of {rows} rows",
        "engine: DeepSpeed ZeRO-2, fp32 on cpu, compile off, relations by sdpa",
        f"paths: run {config.run.folder}, training data {config.data.train}",
    ]
    *_, last = plan.start_summary(found, "cpu", step=499, last_step=500)
    assert (
        last == f"resumed from {config.run.folder}/checkpoints/step-000000499: 1 step of 500 left"
    )


def test_a_micro_batch_above_a_ranks_share_is_said_at_the_start(tiny_config: MakeConfig) -> None:
    found = checks.plan_run(tiny_config(train={"micro_batch_size": 4}), 8, CPU)
    [note] = [
        line
        for line in plan.start_summary(found, "cpu", step=0, last_step=6)
        if line.startswith("note: ")
    ]
    assert note == (
        "note: train.micro_batch_size=4 is more than a rank's share of train.global_batch_size=8 "
        "on 8 ranks: 1 is "
        'used; set it to 1 or "auto", or raise train.global_batch_size'
    )
    assert (
        "batch: 8 ranks × 1 × 1 micro-batch = 8"
        in plan.start_summary(found, "cpu", step=0, last_step=6)[2]
    )
    assert plan.warnings_of(found)[0] == note.removeprefix("note: ")


@pytest.mark.parametrize(
    ("precision", "warned"), [("bf16", True), ("auto", False), ("fp32", False)]
)
def test_bf16_on_a_cpu(
    precision: str, warned: bool, fast_bf16: bool, tiny_config: MakeConfig
) -> None:
    config = tiny_config(train={"precision": precision})
    text = " ".join(planned(config, 1).split())
    assert (
        "train.precision=bf16 on a CPU: PyTorch adds the gradients of LayerNorms" in text
    ) is warned
    assert "train.precision=bf16" not in planned(config, 1, memory_bytes=48_000_000_000)
