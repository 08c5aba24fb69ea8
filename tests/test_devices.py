"""`estimate`: forecasts for GPUs that are not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scaledistill.cli import estimate as command
from scaledistill.config.schema import DistillConfig
from scaledistill.errors import SettingError
from scaledistill.preflight import checks, devices
from scaledistill.preflight.devices import GPUS, Device, Efficiency, forecast
from scaledistill.preflight.estimate import estimate
from scaledistill.preflight.report import traffic

CPU = torch.device("cpu")
SLOW = Device("slow", 10**9, 1e9, 1e6)
EXACT = Efficiency(0.5, 0.5, 0.5, "stated")
MakeConfig = Callable[..., DistillConfig]


def needs(config: DistillConfig, num_gpus: int) -> devices.Needs:
    return devices.needs_on_gpus(config, *devices.models_of(config), num_gpus)


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_a_run_on_gpus_is_not_that_of_this_machine(precision: str, tiny_config: MakeConfig) -> None:
    run, facts = needs(tiny_config(train={"precision": precision}), 2)
    expected = "bf16" if precision == "auto" else precision
    assert (run.config.train.precision, run.config.teacher.dtype) == (expected, expected)
    assert (run.config.relations.backend, run.device_type, run.world_size) == ("triton", "cuda", 2)
    itemsize = 4 if precision == "fp32" else 2
    assert facts.teacher_bytes == itemsize * facts.teacher_parameters
    assert not facts.on_host


def test_a_plan_for_gpus_takes_what_a_cpu_refuses(tiny_config: MakeConfig) -> None:
    config = tiny_config(
        train={"precision": "fp32"}, teacher={"dtype": "fp16"}, relations={"backend": "triton"}
    )
    run = needs(config, 2).run
    planned = checks.plan_run(config, 2, CPU, writes=False, gpu_bytes=80 * 10**9).run
    for each in (run, planned):
        found = each.config
        assert (found.train.precision, found.teacher.dtype) == ("fp32", "fp16")
        assert found.relations.backend == "triton"
    here = devices.needs_here(config, *devices.models_of(config), CPU).run.config
    assert (here.train.precision, here.teacher.dtype) == ("fp32", "fp32")
    assert here.relations.backend == "sdpa"


def test_time_is_that_of_flops_and_network(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"global_batch_size": 16, "micro_batch_size": 4})
    need = needs(config, 2)
    one = forecast(need, SLOW, EXACT, 4)
    computing = 8 * 16 * need.facts.flops_per_token / (0.5 * 1e9)
    sent = sum(traffic(one.run, need.facts, "replicate").values()) / 1e6
    assert one.run.accumulation == 2
    assert one.step_seconds == pytest.approx((computing, computing + sent / 2, computing + sent))
    assert one.seconds == pytest.approx(tuple(6 * x for x in one.step_seconds))
    assert one.tokens_per_second == pytest.approx(16 * 16 / (computing + sent / 2))
    alone = forecast(needs(config, 1), SLOW, EXACT, 4)
    assert len(set(alone.step_seconds)) == 1  # a single rank sends nothing


def test_machines_are_joined_by_a_network(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"global_batch_size": 16})
    fast = SLOW._replace(link_bytes_per_second=1e15)
    for count, slower in ((8, False), (16, True)):
        best, _, worst = forecast(needs(config, count), fast, EXACT).step_seconds
        sent = worst - best
        assert (sent > 1e-9) == slower


def test_the_largest_micro_batch(tiny_config: MakeConfig) -> None:
    need = needs(tiny_config(train={"global_batch_size": 64}), 1)
    facts = need.facts

    def with_room_for(sequences: int) -> Device:
        room = facts.memory_bytes(sequences) + facts.activation_bytes_per_sequence // 2
        return SLOW._replace(memory_bytes=int(room / 0.94))

    for expected in (1, 16, 64):
        one = forecast(need, with_room_for(expected), EXACT)
        assert (one.largest_micro_batch, one.run.micro_batch_size) == (expected, expected)
        assert one.memory_bytes == facts.memory_bytes(expected)
        assert one.fits
    tiny = forecast(need, SLOW._replace(memory_bytes=1000), EXACT, 8)
    assert (tiny.largest_micro_batch, tiny.run.micro_batch_size, tiny.fits) == (None, 8, False)
    small = forecast(need, with_room_for(16), EXACT, None)
    assert (small.largest_micro_batch, small.run.micro_batch_size, small.fits) == (16, 64, False)


def test_parts_add_up(tiny_config: MakeConfig) -> None:
    need = needs(tiny_config(), 4)
    on_device = devices.parts(need.facts)
    per_sequence = on_device.pop("activations per sequence")
    assert sum(on_device.values()) + 2 * per_sequence == need.facts.memory_bytes(2)
    here = devices.needs_here(tiny_config(), *devices.models_of(tiny_config()), CPU)
    on_host = devices.parts(here.facts)
    assert "data and heap" in on_host
    del on_host["activations per sequence"]
    assert sum(on_host.values()) == here.facts.state_bytes
    again = estimate(here.run, *devices.models_of(tiny_config()))
    assert again == here.facts


@pytest.mark.parametrize("precision", ["fp16", "bf16", "auto"])
def test_a_cpu_computes_as_with_auto(precision: str, tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"precision": precision}, teacher={"dtype": precision})
    run, facts = devices.needs_here(config, *devices.models_of(config), CPU)
    # SCALEDISTILL_CPU_BF16=0: a CPU without units for bf16.
    assert (run.config.train.precision, run.config.teacher.dtype) == ("fp32", "fp32")
    assert facts.on_host


def write_rows(folder: Path, values: list[float]) -> Path:
    folder.mkdir()
    rows = [{"step": step, "mfu": value} for step, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_efficiency_of_a_run(tmp_path: Path) -> None:
    measured = Efficiency.of_run(write_rows(tmp_path / "run", [0.01, *[0.4] * 12]))
    assert (measured.low, measured.middle, measured.high) == pytest.approx((0.36, 0.4, 0.44))
    assert "median of 12 rows" in measured.source
    noisy = Efficiency.of_run(write_rows(tmp_path / "noisy", [0.3, 0.5] * 10))
    assert noisy.high - noisy.middle > 0.15
    with pytest.raises(
        SettingError, match=r"has 1 rows with mfu in metrics\.jsonl, expected three"
    ):
        Efficiency.of_run(write_rows(tmp_path / "short", [0.4]))
    stated = Efficiency.stated(0.9)
    assert (stated.low, stated.high) == (pytest.approx(0.765), 1.0)


def test_gpus_by_name() -> None:
    assert [gpu.name for gpu in devices.chosen(["a100", "H200"])] == [
        "A100 40GB",
        "A100 80GB",
        "H200",
    ]
    assert len(devices.chosen(None)) == len(GPUS) == 8
    with pytest.raises(SettingError, match="names='V100' is not known; use RTX 4090, A6000"):
        devices.chosen(["V100"])


def test_the_command_line(
    config_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "measured_matrix_rate", lambda device, dtype: 1e11)
    written = tmp_path / "estimate.json"
    config = str(config_file())
    arguments = ["--config", config, "--gpu", "H100,4090", "--num-gpus", "1,3,4"]
    assert command.main([*arguments, "--efficiency", "0.5", "--json", str(written)]) == 0
    text = capsys.readouterr().out
    for words in (
        "memory per rank",
        "activations per sequence",
        "here: CPU",
        "RTX 4090",
        "efficiency on GPUs: 50% of the 16-bit peak (stated, ± 15 %)",
        "train.global_batch_size=8 is not divisible by 3 ranks; use 6 or 12, or 2 or 4 ranks",
    ):
        assert words in text
    rows: list[dict[str, Any]] = json.loads(written.read_text())
    assert all(set(row) == {"name", "value", "unit", "n"} for row in rows)
    values = {row["name"]: row["value"] for row in rows}
    assert len(values) == len(rows)
    assert values["estimate/h100/4/micro_batch"] == 2
    assert (
        values["estimate/rtx-4090/1/tokens_per_second"]
        < values["estimate/h100/1/tokens_per_second"]
    )
    least, middle, most = (
        values[f"estimate/here/1/{name}_hours"] for name in ("least", "expected", "most")
    )
    assert 0 < least < middle < most


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--num-gpus", "0"], 2, "found '0', expected whole numbers from 1 up"),
        (["--efficiency", "40"], 2, "found '40', expected a number above 0, at most 1"),
        (["--gpu", "V100"], 2, "--gpu 'V100' is not known; use RTX 4090"),
        (["--from-run", "gone"], 2, "--from-run 'gone' has 0 rows with mfu"),
        (["--set", "teacher.model=./gone"], 3, "teacher.model='./gone': no such folder"),
        (["--set", "teacher.layer=99"], 2, "teacher.layer=99"),
    ],
)
def test_wrong_options(
    arguments: list[str],
    code: int,
    message: str,
    config_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        ended = command.main(["--config", str(config_file()), *arguments])
    except SystemExit as error:
        ended = int(error.code or 0)
    assert ended == code
    assert message in capsys.readouterr().err
