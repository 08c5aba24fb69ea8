"""The fused kernels against `reference`: on a GPU where there is one, else in Triton's interpreter
on the CPU.

Legend: B sequences, T tokens, D width, R relation heads, E width per relation head.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from test_decoders import check_later_tokens_are_not_seen
from torch import Tensor

from scaledistill.relations import QKV, relation_loss, resolve_backend
from scaledistill.relations.triton_launch import Launch, Winners, candidates

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
with pytest.MonkeyPatch.context() as environment:
    if not CUDA:
        # What TRITON_INTERPRET decides, it decides when a function is decorated. Other tests may
        # have imported Triton.
        environment.setenv("TRITON_INTERPRET", "1")
        importlib.reload(tl.standard)
        importlib.reload(tl)
    from scaledistill.relations import triton as fused
    from scaledistill.relations import triton_kernels

# Entries that are dropped may overflow: scores of tokens that don't see each other.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
# What a GPU's fused multiply-add leaves where a row has one token, whose gradient is 0.
ROUNDING = 2e-6 if CUDA else 0.0
R = 2
LENGTHS = [1, 7, 64, 100, 129]
WIDTHS = {"16/6": (16, 6), "64/24": (64, 24), "4/4": (4, 4), "24/64": (24, 64), "6/16": (6, 16)}
PAIRS = {
    "symmetric": {"qq": 1.0, "kk": 0.5, "vv": 2.0},
    "mixed": {"qk": 1.0, "vv": 0.25},
    "both ways": {"qk": 0.5, "kq": 3.0, "qq": 1.0},
    "zero weight": {"kk": 0.0, "vq": 2.0, "qv": 0.0, "kq": 0.0},
}
VISIBILITIES = [
    "all",
    "right",
    "left",
    "holes",
    "empty",
    "documents",
    "unordered documents",
]
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
# Relative errors of the student's gradients, as norms, against float64 on the same numbers: sums of
# float32 products, or S − P and the result rounded to the student's dtype, half an ulp each (2^-12,
# 2^-9).
GRAD_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Of the losses: cancellation between float32 numbers as large as the scores, summed over rows.
LOSS_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend run on the CPU, three times faster than Triton's interpreter does by
    itself.
    """
    if CUDA:
        return
    from triton.runtime import interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Two tiles at most: fewer, larger steps.
    monkeypatch.setattr(
        fused, "candidates", lambda *of: [Launch(64 if of[-1] <= 128 else 128, 1, 1)]
    )
    # Once a launch is enough to patch the language: it does so again at each call of a function.
    monkeypatch.setattr(triton_kernels, "core", tl.core, raising=False)
    monkeypatch.setattr(
        interpreter.InterpretedFunction, "__call__", lambda self, *args: self.rewrite()(*args)
    )
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(
        builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)
    )


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
                        values,
                        key=lambda x, name=name: sum(
                            frozenset({(name, x), c}) in missing for c in case.items()
                        ),
                    )
            missing -= {frozenset(two) for two in itertools.combinations(case.items(), 2)}
            yield {name: case[name] for name in axes}


def visible(visibility: str, T: int) -> tuple[int, dict[str, Tensor]]:
    """Return B and the arguments of `relation_loss` that say who sees whom."""
    generator = torch.Generator().manual_seed(T)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, (T + 1) // 2 :] = False
    documents = torch.stack([torch.arange(T) // (1 + T // 4), 3 * torch.arange(T) // T - 5])
    return 2, {
        "all": {},
        "right": {"mask_BT": mask},
        "left": {"mask_BT": mask.flip(1)},
        "holes": {"mask_BT": torch.rand(2, T, generator=generator) < 0.6},
        "empty": {"mask_BT": mask & torch.tensor([[False], [True]])},
        "documents": {"segment_ids_BT": documents, "mask_BT": mask},
        "unordered documents": {
            "segment_ids_BT": documents[:, torch.randperm(T, generator=generator)]
        },
    }[visibility]


def padding(B: int, T: int, arguments: dict[str, Tensor]) -> Tensor:
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
    T: int,
    visibility: str,
    widths: str,
    pairs: str,
    dtypes: str,
    causal: bool,
    layout: str,
    scale: float = 1.0,
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
        laid_out(teacher.double(), layout),
        laid_out(exact_student, layout),
        **options,
        backend="reference",
    )
    found = relation_loss(
        laid_out(teacher, layout), laid_out(student, layout), **options, backend="triton"
    )
    torch.testing.assert_close(
        (found.total, found.by_pair),
        (expected.total, expected.by_pair),
        rtol=LOSS_TOLERANCE,
        atol=(1e-6 + ROUNDING) * scale**2,
        check_dtype=False,
    )
    (expected_grad,) = torch.autograd.grad(3 * expected.total, exact_student)
    (grad,) = torch.autograd.grad(3 * found.total, student)
    assert grad.dtype == student_dtype
    assert not grad[nan_BT.to(DEVICE)].count_nonzero()
    error = (grad.double() - expected_grad).norm()
    bound = GRAD_TOLERANCE[student_dtype] * expected_grad.norm() + ROUNDING
    assert error <= bound * scale**2 + 1e-9


@pytest.mark.parametrize(
    "case", list(covering(AXES)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_kernels_equal_reference(case: dict[str, Any]) -> None:
    check(**case)


@pytest.mark.full
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("T", LENGTHS)
def test_whole_table(T: int, visibility: str, widths: str, pairs: str, causal: bool) -> None:
    for dtypes in DTYPES if CUDA else ["fp32"]:
        check(T, visibility, widths, pairs, dtypes, causal, "slices")


def test_tiles_that_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles of 16 tokens, of which documents of 17 tokens meet two or three."""
    monkeypatch.setattr(fused, "candidates", lambda *_: [Launch(16, 1, 1)])
    keys_BT = torch.arange(65, dtype=torch.int32)[None] // 17
    ranges = fused._tokens(keys_BT, torch.ones(1, 65), 16)
    assert ranges.first_BG.tolist() == [[0, 0, 1, 2, 3]]
    assert ranges.end_BG.tolist() == [[2, 3, 4, 5, 5]]
    padded = fused._tokens(keys_BT.where(keys_BT == 1, -1), torch.ones(1, 65), 16)
    assert (padded.end_BG - padded.first_BG).clamp(min=0).tolist() == [[0, 2, 2, 0, 0]]
    check(65, "documents", "16/6", "mixed", "fp32", False, "slices")
    # Causal, with whole tiles in the future.
    check(48, "all", "16/6", "mixed", "fp32", True, "slices")


def test_two_runs_are_bit_equal() -> None:
    teacher = tokens(2, 100, 16, torch.float16, torch.zeros(2, 100, dtype=torch.bool), 0)
    runs = []
    for _ in range(2):
        student = tokens(
            2, 100, 6, torch.float16, torch.zeros(2, 100, dtype=torch.bool), 1
        ).requires_grad_()
        loss = relation_loss(
            laid_out(teacher, "slices"),
            laid_out(student, "slices"),
            num_heads=R,
            pairs={"qq": 1.0, "qk": 0.5},
            backend="triton",
        )
        loss.total.backward()
        runs.append((loss.total.detach(), loss.by_pair, student.grad))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


ONE_WAY_AND_BOTH = [{"qq": 1.0, "qk": 0.5, "kq": 2.0}, {"qk": 1.0}, {"kq": 2.0}]


@pytest.mark.parametrize("pairs", ONE_WAY_AND_BOTH, ids="-".join)
@pytest.mark.parametrize("causal", [False, True])
def test_normalisers_far_apart(causal: bool, pairs: dict[str, float]) -> None:
    """Heads of which one's normalisers span 200 nats, where a product of factors would overflow,
    and one's few.
    """
    ramp_T = torch.linspace(0.1, 10, 40)
    scale_TD = torch.cat([ramp_T[:, None].expand(40, 8), torch.full((40, 8), 0.5)], dim=1)
    x = [
        torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(seed)) * scale_TD
        for seed in range(4)
    ]
    normalisers_T = (x[0][0, :, :8] @ x[0][0, :, :8].T / 8**0.5).logsumexp(-1)
    assert normalisers_T.max() - normalisers_T.min() > 200
    teacher = QKV(x[0].to(DEVICE), x[1].to(DEVICE), x[1].to(DEVICE))
    student = QKV(*(y.to(DEVICE).requires_grad_() for y in (x[2], x[3], x[3])))
    exact = QKV(*(y.detach().double().requires_grad_() for y in student))
    options: dict[str, Any] = {"num_heads": 2, "pairs": pairs, "causal": causal}
    expected = relation_loss(
        QKV(*(y.double() for y in teacher)), exact, **options, backend="reference"
    )
    found = relation_loss(teacher, student, **options, backend="triton")
    torch.testing.assert_close(
        found.by_pair, expected.by_pair, rtol=1e-4, atol=0, check_dtype=False
    )
    letters = sorted(set("".join(pairs)))
    for y, z in zip(
        torch.autograd.grad(found.total, [getattr(student, letter) for letter in letters]),
        torch.autograd.grad(expected.total, [getattr(exact, letter) for letter in letters]),
        strict=True,
    ):
        assert (y - z).norm() < 1e-4 * z.norm()


HIDING: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal documents": {"causal": True, "segment_ids_BT": torch.arange(24)[None] // 9},
    "causal, padding in front": {"causal": True, "mask_BT": torch.arange(24)[None] >= 5},
    "documents": {"segment_ids_BT": torch.arange(24)[None] // 23},
}


@pytest.mark.parametrize(
    "backend", ["triton", pytest.param("sdpa", marks=pytest.mark.skipif(CUDA, reason="a GPU"))]
)
@pytest.mark.parametrize("pairs", [{"qk": 1.0}, {"kq": 1.0}, {"vk": 0.5, "qk": 1.0}], ids="-".join)
@pytest.mark.parametrize("hiding", HIDING)
def test_hidden_scores_do_not_count(hiding: str, pairs: dict[str, float], backend: str) -> None:
    """The last token's key meets all queries but its own: 2^outlier times what a row's normaliser
    holds.
    """
    arguments = {
        name: x if isinstance(x, bool) else x.to(DEVICE) for name, x in HIDING[hiding].items()
    }
    options: dict[str, Any] = {"num_heads": 2, "pairs": pairs, **arguments}
    for outlier in (60.0, 90.0, 200.0):
        x = [
            torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(seed)) / 2
            for seed in range(6)
        ]
        for query, key in (x[:2], x[3:5]):
            query[..., 0] = 3.0
            query[:, -1] = 0.0
            key[:, -1, 0] += outlier if "kq" not in pairs else 0.0
        if "kq" in pairs:  # there the rows are keys, and the last token's query is hidden from them
            for query, key in (x[:2], x[3:5]):
                key[..., 0], key[:, -1] = 3.0, 0.0
                query[:, -1, 0] = outlier
        teacher = QKV(*(y.to(DEVICE) for y in x[:3]))
        student = QKV(*(y.to(DEVICE).requires_grad_() for y in x[3:]))
        exact = QKV(*(y.detach().double().requires_grad_() for y in student))
        expected = relation_loss(
            QKV(*(y.double() for y in teacher)), exact, **options, backend="reference"
        )
        found = relation_loss(teacher, student, **options, backend=backend)
        torch.testing.assert_close(
            found.by_pair, expected.by_pair, rtol=1e-4, atol=1e-6, check_dtype=False
        )
        letters = sorted(set("".join(pairs)))
        for y, z in zip(
            torch.autograd.grad(found.total, [getattr(student, letter) for letter in letters]),
            torch.autograd.grad(expected.total, [getattr(exact, letter) for letter in letters]),
            strict=True,
        ):
            assert (y - z).norm() < 1e-4 * z.norm() + 1e-7 * outlier, outlier


def test_the_backward_frees_what_the_loss_holds() -> None:
    teacher = QKV(*(torch.randn(1, 5, 8).to(DEVICE) for _ in range(3)))
    student = torch.randn(1, 5, 24, device=DEVICE, requires_grad=True)
    held = weakref.ref(teacher.q.untyped_storage())
    loss = relation_loss(
        teacher, laid_out(student * 1, "slices"), num_heads=2, pairs={"qq": 1.0}, backend="triton"
    )
    del teacher
    assert held() is not None
    loss.total.backward()
    gc.collect()  # Triton's interpreter leaves cycles
    assert held() is None
    assert loss.total.isfinite()


def test_widths_that_differ_by_letter() -> None:
    """Grouped-query models: one launch per width; only what needs a gradient gets one."""
    generator = torch.Generator().manual_seed(0)
    teacher = QKV(*(torch.randn(2, 9, D, generator=generator).to(DEVICE) for D in (12, 6, 6)))
    student = QKV(*(torch.randn(2, 9, D, generator=generator).to(DEVICE) for D in (6, 12, 12)))
    student.q.requires_grad_()
    student.v.requires_grad_()
    grads = {}
    for backend in ("reference", "triton"):
        loss = relation_loss(
            teacher,
            student,
            num_heads=R,
            pairs={"vk": 3.0, "qq": 1.0, "kk": 0.5, "kv": 0.0},
            backend=backend,
        )
        grads[backend] = loss, torch.autograd.grad(loss.total, (student.q, student.v))
    torch.testing.assert_close(grads["triton"], grads["reference"], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        silent = relation_loss(teacher, student, num_heads=R, pairs={"qq": 1.0}, backend="triton")
    assert not silent.total.requires_grad


@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float64, 8), (torch.float32, 2 * R * fused.MAX_HEAD_WIDTH)]
)
def test_what_the_kernels_leave_to_reference(dtype: torch.dtype, D: int) -> None:
    x = torch.randn(1, 5, D, dtype=dtype, device=DEVICE)
    teacher, student = QKV(x, x, x), QKV(2 * x, x, x)
    losses = [
        relation_loss(teacher, student, num_heads=R, pairs={"qk": 1.0}, backend=backend)
        for backend in ("reference", "triton")
    ]
    assert losses[0] == losses[1]
    assert losses[1].total.dtype == dtype


def test_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = "backend='triton' computes on CUDA GPUs, found cpu; use auto"
    with pytest.raises(ValueError, match=message):
        resolve_backend("triton", "cpu")
    assert resolve_backend("triton", "cuda") == "triton"


def test_winners_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    among = candidates("forward", 16, False, 512)
    timed: list[Launch] = []

    def seconds(launch: Launch) -> float:
        timed.append(launch)
        return {among[0]: 2.0, among[2]: 1.0}.get(launch, math.inf)

    def winners(
        hardware: str = "one", file: Path = tmp_path / "cache" / "launches.json"
    ) -> Winners:
        return Winners(file, hardware)

    first = winners()
    assert [first.choose("key", among, seconds) for _ in range(2)] == [among[2]] * 2
    assert timed == among
    assert winners().choose("key", among, seconds) == among[2]
    assert timed == among, "the next process reads what this one measured"
    winners("two").choose("key", among, seconds)
    winners().choose("other key", among, seconds)
    assert timed == among * 3
    kept = json.loads((tmp_path / "cache" / "launches.json").read_text())
    assert {hardware: list(keys) for hardware, keys in kept.items()} == {
        "one": ["key", "other key"],
        "two": ["key"],
    }
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / "launches.json"]

    short = winners()
    for _ in range(2):
        assert short.choose("never runs", among, lambda _: math.inf) == among[0]
    assert "never runs: no launch could be measured, often because memory is short" in caplog.text
    assert short.choose("never runs", among, seconds) == among[0], "not measured in each step"
    assert short.choose("key", among[:2], seconds) == among[0]
    late = winners()
    assert late.choose("nothing runs", among, lambda _: math.inf) == among[0]
    assert late.choose("nothing runs", among, seconds) == among[2], "memory that was short is back"
    assert winners().choose("key", among[:2], seconds) == among[0], (
        "a launch that is no longer in the table"
    )
    (tmp_path / "cache" / "launches.json").write_text("{")
    assert winners().choose("key", among, seconds) == among[2]
    assert (
        winners(file=tmp_path / "cache" / "launches.json" / "below").choose("key", among, seconds)
        == among[2]
    )
    assert "kernel launches are measured again in the next run" in caplog.text


def test_candidates_suit_the_length() -> None:
    for kernel, width, in_float32 in itertools.product(
        ("forward", "backward"), (4, 16, 64, 128), (False, True)
    ):
        assert candidates(kernel, width, in_float32, 512)
        assert {launch.block for launch in candidates(kernel, width, in_float32, 7)} <= {16, 32}


COMPILE_SCRIPT = """
import json, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from scaledistill.relations import QKV, spec, triton as fused, triton_launch

capability, cases = json.loads(sys.argv[1])
kernels = []
compile_or_launch = triton.JITFunction.run

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def compile_only(self, *args, **options):
    kernels.append(compile_or_launch(self, *args, **{**options, "warmup": True}))

triton.runtime.driver.set_active(Driver())
triton.JITFunction.run = compile_only
for choice, teacher_E, student_E, dtype, T, keyed, causal in cases:
    fused.candidates = lambda *of: [triton_launch.candidates(*of)[choice]]
    real = getattr(torch, dtype)
    models = [
        QKV(*torch.zeros(1, T, 6 * E, dtype=real, requires_grad=True).chunk(3, dim=-1))
        for E in (teacher_E, student_E)
    ]
    mask = torch.ones(1, T, dtype=torch.bool) if keyed else None
    pairs = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
    request = spec.make_spec(*models, 2, pairs, mask, None, causal)
    fused.triton_loss(*models, request)[0].backward()
found = []
for kernel in kernels:
    with tempfile.NamedTemporaryFile() as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(re.search(f"{name}:([0-9]+)", usage)[1]) for name in ("REG", "STACK")}
    found.append({**numbers, "shared": kernel.metadata.shared, "name": kernel.metadata.name})
print(json.dumps(found))
"""


def compiled(capability: int, cases: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Compile the backend's launches as it makes them, without a GPU, and return what the kernels
    use. The first number of a case is the launch's place in the table of candidates.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", "-c", COMPILE_SCRIPT, json.dumps([capability, cases])]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    cases = [(choice, 16, 6, "bfloat16", 512, False, False) for choice in (0, 1)]
    kernels = compiled(90, cases, tmp_path)
    assert [kernel["name"] for kernel in kernels] == ["relation_forward", "relation_backward"] * 2
    for kernel in kernels:
        assert kernel["STACK"] == 0, kernel  # nothing spilled
        assert kernel["shared"] < 32 << 10, kernel
    for kernel in (kernels[0], kernels[3]):
        assert kernel["REG"] <= 168, kernel  # three programs to a multiprocessor


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90])
def test_all_defaults_compile(capability: int, tmp_path: Path) -> None:
    widths = [(16, 6), (4, 4), (64, 24), (64, 64), (128, 128)]
    cases = [
        (0, *width, dtype, T, keyed, causal)
        for width in widths
        for dtype, T, keyed, causal in (
            ("bfloat16", 512, True, False),
            ("bfloat16", 129, True, True),
            ("float16", 7, False, False),
            ("float32", 512, False, True),
        )
    ]
    for kernel in compiled(capability, [*cases, (0, 1, 1, "float32", 1, False, False)], tmp_path):
        assert kernel["STACK"] <= 256, kernel
        assert kernel["shared"] <= 99 << 10, kernel  # of compute capability 8.6 and 8.9


@pytest.mark.skipif(not CUDA, reason="asks a GPU")
def test_nothing_waits_for_the_gpu() -> None:
    x = torch.randn(2, 100, 3 * R * 16, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 100, dtype=torch.bool, device="cuda")
    for backend in ("triton", "reference"):
        for mode in ("default", "error"):  # the first round compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                student = x.detach().clone().requires_grad_()
                relation_loss(
                    laid_out(x, "slices"),
                    laid_out(student, "slices"),
                    num_heads=R,
                    pairs={"qq": 1.0, "qk": 0.5},
                    backend=backend,
                    mask_BT=mask,
                    segment_ids_BT=mask.int(),
                ).total.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_later_tokens_leave_the_loss_of_earlier_rows() -> None:
    check_later_tokens_are_not_seen("qwen3", "triton", DEVICE)
