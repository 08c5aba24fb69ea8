from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaledistill.metrics.stopwatch import (
    PEAK_FLOPS,
    PHASES,
    Stopwatch,
    measured_matrix_rate,
    memory_peak_bytes,
    peak_flops,
)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Some GPU of the future", None),
    ],
)
def test_peak_of_a_device(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_no_peak_is_hidden_by_a_shorter_name() -> None:
    for number, part in enumerate(PEAK_FLOPS):
        assert not [earlier for earlier in list(PEAK_FLOPS)[:number] if earlier in part]


def test_memory_peak_is_in_bytes() -> None:
    before = memory_peak_bytes(torch.device("cpu"))
    status = Path("/proc/self/status").read_text()
    [kibibytes] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    assert before == pytest.approx(kibibytes * 1024, rel=0.02)


def test_stopwatch_tells_phases_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("scaledistill.metrics.stopwatch.time.perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    watch = Stopwatch()
    for phase, seconds in (("teacher", 3.0), ("optimizer", 0.5), ("teacher", 1.0)):
        with watch.phase(phase):
            pass_time(seconds)
    with watch.paused():
        pass_time(100.0)
    pass_time(0.25)
    seconds, phases = watch.lap()
    assert seconds == 4.75
    assert phases == {**dict.fromkeys(PHASES, 0.0), "teacher": 4.0, "optimizer": 0.5}
    pass_time(1.0)
    assert watch.lap() == (1.0, dict.fromkeys(PHASES, 0.0))


def test_matrix_rate_counts_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(
        "scaledistill.metrics.stopwatch.time.perf_counter", lambda: float(next(now))
    )
    assert measured_matrix_rate(torch.device("cpu"), torch.float32, size=4) == 2 * 4 * 4 * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_phases_of_a_gpu_are_those_of_its_stream() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    watch = Stopwatch(device)
    a = torch.ones(8192, 8192, device=device)
    with watch.phase("teacher"):
        for _ in range(20):
            a = torch.mm(a, a)
    with watch.phase("optimizer"):
        pass
    seconds, phases = watch.lap()
    assert 0.5 * seconds < phases["teacher"] <= seconds
    assert phases["optimizer"] < 0.1 * seconds
