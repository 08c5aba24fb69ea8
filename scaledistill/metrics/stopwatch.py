"""The speed of a run: a stopwatch for the phases of a step, and the peaks to compare with.

Inputs: the device, and the phases as they happen. Outputs: seconds per phase, the peak FLOP/s, the
peak memory in bytes.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.profiler import record_function

# Dense 16-bit peak in FLOP/s by part of the device's name, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A6000": 154.8e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
PHASES = ("data wait", "teacher", "student", "loss", "backward", "optimizer")


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's dense bf16 peak in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def measured_matrix_rate(
    device: torch.device, dtype: torch.dtype, *, size: int | None = None
) -> float:
    """Return the best FLOP/s of a few matrix products, `[size, size]` by `[size, 4 size]`.

    Takes about 0.2 s. On a CPU this is what this process's threads reach, whatever else runs.
    """

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if size is None:
        # Where bf16 is emulated, a larger product would take seconds.
        size = 8192 if device.type == "cuda" else 512 if dtype == torch.float32 else 256
    a, b = (torch.ones(size, width, device=device, dtype=dtype) for width in (size, 4 * size))
    tries = [seconds()]
    while len(tries) < 5 and sum(tries) < 0.3:
        tries.append(seconds())
    return 8 * size**3 / min(tries)


def memory_peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of the GPU, or of this process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Lap(NamedTuple):
    """The time since the last lap."""

    seconds: float
    phases: dict[str, float]
    """Seconds for each of `PHASES`; on a GPU, of its stream."""


class Stopwatch:
    """Measures the time since the last lap, in total and by phase of the step.

    Only `lap` waits for the device. Each phase also labels its part of a profiler's trace, and
    `on_phase` is called with its name as it begins.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._on_phase = on_phase
        self._on_gpu = device is not None and device.type == "cuda"
        self._start = time.perf_counter()
        self._spans: list[tuple[str, Callable[[], float]]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to one of `PHASES`."""
        self._on_phase(name)
        with record_function(name):
            # Also for the wait for data: it measures how long the stream idles. The host runs
            # ahead of the GPU, so its own waiting does not count.
            if self._on_gpu:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                yield
                last.record()
                self._spans.append((name, lambda: first.elapsed_time(last) / 1000))
            else:
                start = time.perf_counter()
                yield
                seconds = time.perf_counter() - start
                self._spans.append((name, lambda: seconds))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of a block: what is not a step must not lower the throughput."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def lap(self) -> Lap:
        """Return the time since the last lap and start the next; waits for the GPU to finish."""
        if self._on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        phases = dict.fromkeys(PHASES, 0.0)
        for name, seconds in self._spans:
            phases[name] += seconds()
        lap = Lap(now - self._start, phases)
        self._start, self._spans = now, []
        return lap
