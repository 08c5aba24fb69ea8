"""The fused kernels against `reference`: on a GPU where there is one, else in Triton's interpreter on the CPU.

Legend: B sequences, T tokens, D width, R relation heads, E width per relation head.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from scaledistill.relations import QKV, relation_loss, resolve_backend
from scaledistill.relations.triton_launch import Launch, Winners, candidates

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
with pytest.MonkeyPatch.context() as environment:
    if not CUDA:
        # What TRITON_INTERPRET decides, it decides when a function is decorated. Other tests may have imported Triton.
        environment.setenv("TRITON_INTERPRET", "1")
        importlib.reload(tl.standard)
        importlib.reload(tl)
    from scaledistill.relations import triton as fused
    from scaledistill.relations import triton_kernels

# Entries that are dropped may overflow: scores of tokens that don't see each other.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
R = 2
LENGTHS = [1, 7, 64, 100, 129]
WIDTHS = {"16/6": (16, 6), "64/24": (64, 24), "4/4": (4, 4), "24/64": (24, 64), "6/16": (6, 16)}
PAIRS = {
    "symmetric": {"qq": 1.0, "kk": 0.5, "vv": 2.0},
    "mixed": {"qk": 1.0, "vv": 0.25},
    "both ways": {"qk": 0.5, "kq": 3.0, "qq": 1.0},
    "zero weight": {"kk": 0.0, "vq": 2.0, "qv": 0.0, "kq": 0.0},
}
VISIBILITIES = ["all", "right", "left", "holes", "empty", "documents", "unordered documents", "end to end"]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16/fp32": (torch.bfloat16, torch.float32),
    "fp16/bf16": (torch.float16, torch.bfloat16),
}
AXES: dict[str, list[Any]] = {
    "T": LENGTHS,
    "visibility": VISIBILITIES,
    "widths": list(WIDTHS),
    "pairs": list(PAIRS),
    "dtypes": list(DTYPES),
    "causal": [False, True],
    "layout": ["tensors", "slices", "strided"],
}
# Relative errors of the student's gradients, as norms, against float64 on the same numbers: sums of float32 products,
# or S − P and the result rounded to the student's dtype, half an ulp each (2^-12, 2^-9).
GRAD_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Of the losses: cancellation between float32 numbers as large as the scores, summed over rows.
LOSS_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend run on the CPU, three times faster than Triton's interpreter does by itself."""
    if CUDA:
        return
    from triton.runtime import interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Two tiles at most: fewer, larger steps.
    monkeypatch.setattr(fused, "candidates", lambda *_: [Launch(64 if _[-1] <= 128 else 128, 1, 1)])
    # Once a launch is enough to patch the language: it does so again at each call of a function.
    monkeypatch.setattr(triton_kernels, "core", tl.core, raising=False)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *args: self.rewrite()(*args))
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def covering(axes: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield cases in which every two values of two axes meet."""
    missing = {
        frozenset(pair)
        for one, two in itertools.combinations(axes, 2)
        for pair in itertools.product(((one, x) for x in axes[one]), ((two, x) for x in axes[two]))
    }
    for pair in sorted(missing, key=lambda pair: sorted(map(str, pair))):
        if pair in missing:
            case = dict(pair)
            for name, values in axes.items():
                if name not in case:
                    case[name] = max(
                        values, key=lambda x, name=name: sum(frozenset({(name, x), c}) in missing for c in case.items())
                    )
            missing -= {frozenset(two) for two in itertools.combinations(case.items(), 2)}
            yield {name: case[name] for name in axes}


def visible(visibility: str, T: int) -> tuple[int, dict[str, Tensor]]:
    """Return B and the arguments of `relation_loss` that say who sees whom."""
    generator = torch.Generator().manual_seed(T)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, (T + 1) // 2 :] = False
    documents = torch.stack([torch.arange(T) // (1 + T // 4), 3 * torch.arange(T) // T - 5])
    if visibility == "end to end":
        bounds = torch.tensor([0, T // 3, T // 3, T - T // 5], dtype=torch.int32)
        return 1, {"cu_seqlens": bounds}
    return 2, {
        "all": {},
        "right": {"mask_BT": mask},
        "left": {"mask_BT": mask.flip(1)},
        "holes": {"mask_BT": torch.rand(2, T, generator=generator) < 0.6},
        "empty": {"mask_BT": mask & torch.tensor([[False], [True]])},
        "documents": {"segment_ids_BT": documents, "mask_BT": mask},
        "unordered documents": {"segment_ids_BT": documents[:, torch.randperm(T, generator=generator)]},
    }[visibility]


def padding(B: int, T: int, arguments: dict[str, Tensor]) -> Tensor:
    if "cu_seqlens" in arguments:
        return (torch.arange(T) >= arguments["cu_seqlens"][-1])[None]
    return ~arguments.get("mask_BT", torch.ones(B, T, dtype=torch.bool))


def tokens(B: int, T: int, E: int, dtype: torch.dtype, nan_BT: Tensor, seed: int) -> Tensor:
    """Return q, k and v side by side, NaN on padding."""
    x = torch.randn(B, T, 3 * R * E, generator=torch.Generator().manual_seed(seed))
    return x.masked_fill(nan_BT[:, :, None], math.nan).to(dtype=dtype, device=DEVICE)


def laid_out(joined: Tensor, layout: str) -> QKV:
    q, k, v = joined.chunk(3, dim=-1)
    if layout == "tensors":
        return QKV(q.contiguous(), k.contiguous(), v.contiguous())
    if layout == "slices":
        return QKV(q, k, v)
    return QKV(*(x.repeat_interleave(2, dim=-1)[..., ::2] for x in (q, k, v)))


def check(
    T: int, visibility: str, widths: str, pairs: str, dtypes: str, causal: bool, layout: str, scale: float = 1.0
) -> None:
    B, arguments = visible(visibility, T)
    nan_BT = padding(B, T, arguments)
    options = {
        "num_heads": R,
        "pairs": PAIRS[pairs],
        "causal": causal,
        **{name: x.to(DEVICE) for name, x in arguments.items()},
    }
    (teacher_E, student_E), (teacher_dtype, student_dtype) = WIDTHS[widths], DTYPES[dtypes]
    teacher = scale * tokens(B, T, teacher_E, teacher_dtype, nan_BT, 0)
    student = (scale * tokens(B, T, student_E, student_dtype, nan_BT, 1)).requires_grad_()
    exact_student = student.detach().double().requires_grad_()
    expected = relation_loss(
        laid_out(teacher.double(), layout), laid_out(exact_student, layout), **options, backend="reference"
    )
    found = relation_loss(laid_out(teacher, layout), laid_out(student, layout), **options, backend="triton")
    torch.testing.assert_close(
        (found.total, found.by_pair),
        (expected.total, expected.by_pair),
        rtol=LOSS_TOLERANCE,
        atol=1e-6 * scale**2,
        check_dtype=False,
    )
    (expected_grad,) = torch.autograd.grad(3 * expected.total, exact_student)
    (grad,) = torch.autograd.grad(3 * found.total, student)
    assert grad.dtype == student_dtype
    assert not grad[nan_BT.to(DEVICE)].count_nonzero()
    error = (grad.double() - expected_grad).norm()
    assert error <= GRAD_TOLERANCE[student_dtype] * scale**2 * expected_grad.norm() + 1e-9


@pytest.mark.parametrize("case", list(covering(AXES)), ids=lambda case: "-".join(map(str, case.values())))
def test_kernels_equal_reference(case: dict[str, Any]) -> None:
    check(**case)
