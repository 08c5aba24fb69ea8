from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from scaledistill.config.load import parse_config
from scaledistill.errors import ConfigError
from scaledistill.metrics.stopwatch import PHASES, Lap
from scaledistill.training.loop import distill
from scaledistill.training.profiling import WARMUP_STEPS, phase_table


def profile(tree: dict[str, Any], steps: int) -> tuple[str, int]:
    result = distill(parse_config(tree), profile_steps=steps)
    return result.state, result.step


def test_profile_of_a_run(tiny_config) -> None:
    config = tiny_config(train={"max_steps": 10, "micro_batch_size": 4})
    assert run_ranks(profile, 1, config.model_dump(), 2) == [("dry run", WARMUP_STEPS + 2)]
    folder = Path(config.run.folder)
    assert [path.name for path in folder.iterdir()] == ["profile"]
    table = (folder / "profile" / "table.txt").read_text()
    assert all(f" {phase} " in table for phase in (*PHASES, "rest", "aten::addmm"))
    with gzip.open(folder / "profile" / "trace-rank0.json.gz") as file:
        names = [
            event["name"]
            for event in json.load(file)["traceEvents"]
            if event.get("cat") == "user_annotation"
        ]
    assert {phase: names.count(phase) for phase in PHASES} == {
        **dict.fromkeys(PHASES, 2 * 2),  # steps × micro-batches
        "optimizer": 2,
    }


def test_phases_and_the_rest_make_up_the_step() -> None:
    table = phase_table(Lap(2.0, {"teacher": 1.5, "loss": 0.25}), steps=4)
    assert table.title == "a step: 500.0 ms"
    rows = [list(column.cells) for column in table.columns]
    assert rows == [
        ["teacher", "loss", "rest"],
        ["375.00", "62.50", "62.50"],
        ["75.0%", "12.5%", "12.5%"],
    ]


def test_more_steps_than_the_run_has(tiny_config) -> None:
    with pytest.raises(
        ConfigError, match=r"--profile 4 and 3 steps to warm up are more than train.max_steps=6"
    ):
        distill(tiny_config(), profile_steps=4)
