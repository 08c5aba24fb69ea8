from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS
from rich.console import Console

from scaledistill import doctor
from scaledistill.config import DistillConfig
from scaledistill.data.make import make_shards
from scaledistill.data.text import load_tokenizer
from scaledistill.errors import ConfigError, DataError

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
MakeConfig = Callable[..., DistillConfig]


@pytest.fixture
def teacher(tmp_path: Path, tiny_teacher: Path) -> Path:
    """A copy of the teacher, to be spoilt."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


@pytest.fixture
def shards(tmp_path: Path, tiny_shards: Path) -> Path:
    """A copy of the training shards, to be spoilt."""
    return Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))


def problems_of(config: DistillConfig, error: type[Exception], world_size: int = 1) -> list[str]:
    """Check a configuration that is wrong; return the lines of its error."""
    with pytest.raises(error) as caught:
        doctor.check(config, world_size, CPU)
    return str(caught.value).splitlines()


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_plan(tiny_config: MakeConfig, tiny_shards: Path) -> None:
    config = tiny_config(
        data={"validation": str(tiny_shards / "validation")},
        train={"global_batch_size": 24, "precision": "bf16", "max_steps": 50},
        logging={"trackers": []},
    )
    plan = doctor.check(config, 3, CPU)
    assert (plan.config.train.precision, plan.config.teacher.dtype) == ("bf16", "bf16")
    assert plan.config.train.micro_batch_size == 8
    assert plan.shards.manifest.rows == sum(shard.rows for shard in plan.shards.manifest.shards)
    assert plan.free_bytes == pytest.approx(shutil.disk_usage(tiny_shards).free, rel=0.2)
    text = shown(plan)
    rows = plan.shards.manifest.rows
    for part in (
        "l2: 7,120 parameters, of which ",
        "4 heads, pairs qq, kk, vv",
        "DeepSpeed ZeRO-1, 3 ranks",
        "24 sequences × 16 = 384 tokens; 1 micro-batches of 8 per rank",
        f"50 steps, 0.00 G tokens, {1200 / plan.order.rows_per_epoch:.1f} epochs",
        f"{rows} rows in {len(plan.shards.manifest.shards)} shards, {len(plan.shards.manifest.shards) / 3:.1f} per rank",
        f"{plan.order.dropped_rows_per_epoch} rows left out of an epoch",
        "up to layer 3: ",
        ", 2 kept; ",
    ):
        assert part in text, part


def shown(plan: doctor.Plan) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(doctor.plan_table(plan))
    return capture.get()


def test_no_weights_are_read(tiny_config: MakeConfig, teacher: Path) -> None:
    (teacher / "model.safetensors").write_bytes(b"")
    config = tiny_config(teacher={"model": str(teacher)})
    assert doctor.check(config, 1, CPU).estimate.student_parameters == 7120


SETTINGS: dict[str, tuple[dict[str, Any], int, str]] = {
    "relation heads of the teacher": (
        {"relations": {"num_heads": 12}},
        1,
        r"relations\.num_heads=12 does not divide the teacher's width 32; use .*",
    ),
    "relation heads of the student": (
        {"relations": {"num_heads": 32}},
        1,
        r"relations\.num_heads=32 does not divide the student l2's width 16; use .*",
    ),
    "relation heads of one student": (
        {"students": {"l2": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "relation_heads": 5}}},
        1,
        r"students\.l2\.relation_heads=5 does not divide the teacher's width 32; use .*",
    ),
    "attention heads": (
        {"students": {"l2": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 3}}},
        1,
        r"students\.l2\.num_attention_heads=3 does not divide students\.l2\.hidden_size=16; use 2 or 4",
    ),
    "layer": ({"teacher": {"layer": 5}}, 1, r"teacher\.layer=5 is beyond the model's 4 layers; use 1 to 4"),
    "more layers than the teacher": (
        {"students": {"l2": {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "init": "teacher"}}},
        1,
        r"students\.l2\.num_layers=4 is more than the 3 teacher layers to start from; .*",
    ),
    "batch and ranks": ({}, 3, r"train\.global_batch_size=8 is not divisible by 3 ranks × .*"),
    "more ranks than sequences": ({}, 16, r"train\.global_batch_size=8 is not divisible by 16 ranks; use 16"),
    "batch and micro-batch": (
        {"train": {"micro_batch_size": 3}},
        2,
        r"train\.global_batch_size=8 is not divisible by 2 ranks × train\.micro_batch_size=3; use 6 or 12",
    ),
    "rows of another length": (
        {"data": {"sequence_length": 32}},
        1,
        r"data\.sequence_length=32, but the shards in data\.train=.*/train have rows of 16 tokens; set it to 16 or .*",
    ),
    "positions": (
        {"data": {"sequence_length": 65}},
        1,
        r"data\.sequence_length=65 is more than the 64 positions of teacher\.model=.*; make shards with at most 64",
    ),
    "precision": ({"train": {"precision": "fp16"}}, 1, r"train\.precision=fp16 needs a GPU, found only a CPU; .*"),
    "engine": (
        {"engine": {"deepspeed": {"zero_optimization": {"stage": 4}}}},
        1,
        r"engine\.deepspeed\.zero_optimization\.stage: found 4, expected 1, 2 or 3; .*",
    ),
    "tracker": ({"logging": {"trackers": ["wandbb"]}}, 1, r"logging\.trackers: unknown tracker 'wandbb'; known: .*"),
    "lanes": ({"data": {"num_lanes": 4000}}, 1, r".*data\.num_lanes=4000.*"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_fit(case: str, tiny_config: MakeConfig) -> None:
    blocks, world_size, message = SETTINGS[case]
    lines = problems_of(tiny_config(**blocks), ConfigError, world_size)
    assert_one(lines, message)


def assert_one(lines: list[str], pattern: str) -> None:
    import re

    assert [line for line in lines if re.fullmatch(pattern, line)], lines


def rename(shards: Path) -> None:
    (shards / "000000.tar").rename(shards / "elsewhere.tar")
