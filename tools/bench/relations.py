"""Measure the relation loss alone: time, peak memory and error of each backend.

A step is a forward and a backward, with the same number of tokens at all lengths, but at least one
sequence. The teacher's width is the usual one for the number of relation heads: 1024 for 64, 768
for 12 and 48; the student's width is 384. Q, K and V are slices of one random tensor, as in models.
Backends take turns; the ratios are for 64 heads. The error is that of loss and gradients against
`reference` in float64, on one sequence of full length and two heads (heads are independent).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from scaledistill.metrics.benchmark import Report, add_options, in_turn, ratios

if TYPE_CHECKING:
    import torch

PAIRS = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
STUDENT_WIDTH = 384
RATIO_HEADS = 64
ERROR_HEADS = 2
REFERENCE_MAPS = 10
"""Maps of B x R x T x T in fp32 that `reference` keeps at its peak, with three pairs."""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048], metavar="T"
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[12, 48, 64], metavar="R")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens per step (default: 1024, on a GPU 16384)"
    )
    parser.add_argument(
        "--backends", nargs="+", metavar="NAME",
        help="some of reference, compiled_reference (torch.compile), sdpa, triton (default: those "
        "that run here, on a CPU without compiled_reference)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of Q, K, V (default: fp32, on a GPU bf16)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="rounds per case (default: %(default)s)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=15, metavar="S",
        help="a backend stops measuring a case after S seconds (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-map-bytes", type=float, metavar="BYTES",
        help="skip the references if their maps take more (default: 4e9, on a GPU 0.8 of the free "
        "memory)",
    )  # fmt: skip
    add_options(parser)
    return parser.parse_args()


def main() -> int:
    """Measure, publish the report and return the exit code."""
    options = parse_arguments()
    # The profiler, which measures memory on CPUs, logs its start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    import torch

    from scaledistill.errors import EXIT_DONE
    from scaledistill.relations import BACKENDS

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = torch.device("cuda" if gpu else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        options.dtype or ("bf16" if gpu else "fp32")
    ]
    tokens = options.tokens or (16_384 if gpu else 1024)
    backends = options.backends or (
        ["reference", "compiled_reference", "triton"] if gpu else ["reference", "sdpa"]
    )
    limit = options.max_map_bytes or (0.8 * torch.cuda.mem_get_info()[0] if gpu else 4e9)
    result = Result(backends, str(dtype).removeprefix("torch."))
    for T in options.lengths:
        B = max(1, tokens // T)
        for R in options.heads:
            maps = 4 * B * R * T * T * REFERENCE_MAPS
            fitting = [name for name in backends if maps <= limit or not name.endswith("reference")]
            case = Case(B, T, R, device, dtype)
            if "compiled_reference" in fitting:
                # After a few shapes torch.compile would switch to dynamic shapes, which are slower.
                torch.compiler.reset()
                BACKENDS["compiled_reference"] = torch.compile(BACKENDS["reference"], dynamic=False)
            memory = {name: case.peak_memory_bytes(name) for name in fitting}  # also the warm-up
            seconds = in_turn(
                {name: functools.partial(case.seconds, name) for name in fitting},
                rounds=options.rounds,
                max_seconds=options.max_seconds,
                title=f"{B}x{T}, {R} heads",
            )
            errors = {name: case.error(name) for name in fitting}
            result.add(f"{B}x{T}", R, seconds, memory, errors)
    result.report.publish(options, gpu=gpu)
    return EXIT_DONE


class Case:
    """Inputs of one shape, and the measurements on them."""

    def __init__(self, B: int, T: int, R: int, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        torch.manual_seed(0)
        self._num_heads, self._device = R, device
        widths = (768 if R in (12, 48) else 16 * R, STUDENT_WIDTH)
        self._teacher, self._student = (
            torch.randn(B, T, 3 * width, device=device, dtype=dtype) for width in widths
        )

    def seconds(self, backend: str) -> float:
        """Return the seconds of a forward and backward."""
        self._wait()
        start = time.perf_counter()
        self._loss_and_grad(backend, self._teacher, self._student, self._num_heads)
        self._wait()
        return time.perf_counter() - start

    def peak_memory_bytes(self, backend: str) -> int:
        """Return the peak memory of a forward and backward without its inputs, in bytes.

        PyTorch's allocator reports it.
        """
        import torch

        if self._device.type == "cuda":
            # The first call compiles and autotunes.
            self._loss_and_grad(backend, self._teacher, self._student, self._num_heads)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._loss_and_grad(backend, self._teacher, self._student, self._num_heads)
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            self._loss_and_grad(backend, self._teacher, self._student, self._num_heads)
        events = [
            event
            for event in profile.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(changes))

    def error(self, backend: str) -> float:
        """Return the larger one of the relative errors of the loss and of the gradients."""
        teacher, student = (
            x.unflatten(-1, (3, self._num_heads, -1))[:1, :, :, :ERROR_HEADS].flatten(2)
            for x in (self._teacher, self._student)
        )
        loss, grad = self._loss_and_grad(backend, teacher, student, ERROR_HEADS)
        true_loss, true_grad = self._loss_and_grad(
            "reference", teacher.double(), student.double(), ERROR_HEADS
        )
        errors = (
            (loss - true_loss).abs() / true_loss,
            (grad - true_grad).abs().max() / true_grad.abs().max(),
        )
        return max(error.item() for error in errors)

    def _loss_and_grad(
        self, backend: str, teacher: torch.Tensor, student: torch.Tensor, num_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from scaledistill.relations import QKV, relation_loss

        student = student.detach().requires_grad_()
        sides = [QKV(*x.chunk(3, dim=-1)) for x in (teacher, student)]
        loss = relation_loss(*sides, num_heads=num_heads, pairs=PAIRS, backend=backend).total
        loss.backward()
        return loss.detach(), cast("torch.Tensor", student.grad)

    def _wait(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()


class Result:
    """The figures and tables of all cases."""

    def __init__(self, backends: Sequence[str], dtype: str) -> None:
        self.report = Report()
        self._backends = backends
        columns = (
            "sequences x tokens",
            "heads",
            "backend",
            "time",
            "peak memory",
            "error",
            "rounds",
        )
        self._cases = self.report.table(
            f"Relation loss, forward and backward, {dtype}, medians", columns
        )
        self._ratios = self.report.table(
            f"Side by side, {RATIO_HEADS} heads",
            ("sequences x tokens", "backend", "against", "speed", "memory"),
        )

    def add(
        self,
        shape: str,
        num_heads: int,
        seconds: Mapping[str, list[float]],
        memory: Mapping[str, int],
        errors: Mapping[str, float],
    ) -> None:
        """Add a case: the seconds, bytes and errors by backend; missing backends were skipped."""
        for name in self._backends:
            row = [shape, str(num_heads), name]
            if name not in seconds:
                self._cases.rows.append([*row, "left out", "maps too large", "", ""])
                continue
            prefix = f"relations/{name}/{shape}/{num_heads}"
            ms = self.report.add(
                f"{prefix}/milliseconds", [1000 * each for each in seconds[name]], "ms"
            )
            peak = self.report.add(f"{prefix}/peak_memory_bytes", memory[name], "bytes")
            error = self.report.add(f"{prefix}/error", errors[name], "fraction")
            self._cases.rows.append(
                [
                    *row,
                    f"{ms:,.1f} ms",
                    f"{peak / 1e6:,.1f} MB",
                    f"{error:.1e}",
                    str(len(seconds[name])),
                ]
            )
        for name, base in itertools.product(seconds, seconds) if num_heads == RATIO_HEADS else ():
            if base.endswith("reference") and not name.endswith("reference"):
                prefix = f"relations/{name}/{shape}"
                speedup = self.report.add(
                    f"{prefix}/speedup_vs_{base}", ratios(seconds[base], seconds[name]), "x"
                )
                saving = self.report.add(
                    f"{prefix}/memory_vs_{base}", memory[base] / memory[name], "x"
                )
                self._ratios.rows.append(
                    [shape, name, base, f"{speedup:.1f}x as fast", f"{saving:.1f}x less"]
                )


if __name__ == "__main__":
    sys.exit(main())
