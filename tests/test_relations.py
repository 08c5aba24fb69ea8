"""The relation loss: `reference` against explicit loops, `sdpa` against `reference`, gradients,
memory, messages.

Legend: B sequences, T tokens, D width, R relation heads, E width per relation head.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scaledistill.errors import named
from scaledistill.relations import (
    QKV,
    RelationLoss,
    check_relation_heads,
    normalise_pairs,
    relation_loss,
    resolve_backend,
    sdpa,
)

BACKENDS = ["reference", "sdpa"]  # those of a CPU; `triton` has a file of its own
PAIRS = {"qq": 1.0, "kk": 0.5, "vv": 2.0, "qk": 0.25}


def random_qkv(
    B: int, T: int, widths: int | tuple[int, int, int], seed: int, **options: Any
) -> QKV:
    widths = (widths,) * 3 if isinstance(widths, int) else widths
    generator = torch.Generator().manual_seed(seed)
    return QKV(
        *(
            torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(**options)
            for D in widths
        )
    )


def with_grad(qkv: QKV) -> QKV:
    return QKV(*(x.detach().clone().requires_grad_() for x in qkv))


def grads_of(loss: RelationLoss, student: QKV) -> list[Tensor]:
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(
            student, torch.autograd.grad(loss.total, student, allow_unused=True), strict=True
        )
    ]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest over q, k, v of |found - expected| / |expected|, in float64."""
    return max(
        ((f.double() - e.double()).norm() / e.double().norm()).item()
        for f, e in zip(found, expected, strict=True)
    )


def loop_loss(
    teacher: QKV,
    student: QKV,
    num_heads: int,
    pair: str,
    mask: list[list[bool]],
    segments: list[list[int]] | None,
    causal: bool,
) -> float:
    """One pair's loss in Python floats: sequence by sequence, head by head, row by row."""

    def log_softmax_row(qkv: QKV, b: int, head: int, i: int, columns: list[int]) -> list[float]:
        rows, cols = (getattr(qkv, letter)[b].tolist() for letter in pair)
        E = len(rows[0]) // num_heads
        here = slice(head * E, (head + 1) * E)
        scores = [
            sum(x * y for x, y in zip(rows[i][here], cols[j][here], strict=True)) / math.sqrt(E)
            for j in columns
        ]
        log_sum = math.log(math.fsum(math.exp(score) for score in scores))
        return [score - log_sum for score in scores]

    losses = []
    for b, real in enumerate(mask):
        kl = 0.0
        for head in range(num_heads):
            for i in range(len(real)):
                columns = [
                    j
                    for j in range(len(real))
                    if real[j]
                    and (segments is None or segments[b][i] == segments[b][j])
                    and (j <= i or not causal)
                ]
                if real[i]:
                    log_p = log_softmax_row(teacher, b, head, i, columns)
                    log_s = log_softmax_row(student, b, head, i, columns)
                    kl += sum(math.exp(p) * (p - s) for p, s in zip(log_p, log_s, strict=True))
        losses.append(kl / (num_heads * sum(real)) if any(real) else 0.0)
    return sum(losses) / len(losses)


# Left, right and inner padding, none, and nothing but padding; T is odd.
MASK = [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1], [1] * 7, [0] * 7]
SEGMENTS = [
    [3, 3, 3, 3, 5, 5, 5],
    [0, 0, 1, 1, 1, 2, 2],
    [1, 1, 1, 1, 1, 1, 2],
    [4, 4, 9, 4, 4, 9, 9],
    [0] * 7,
]
CASES = {
    "plain": {},
    "one-head": {"R": 1},
    "one-number-per-head": {"R": 6},
    "mask": {"mask": True},
    "segments": {"segments": True},
    "causal": {"causal": True},
    "everything": {"mask": True, "segments": True, "causal": True},
    "grouped-query": {
        "mask": True,
        "teacher": (12, 6, 6),
        "student": (6, 12, 12),
        "pairs": {"qq": 1.0, "vk": 3.0},
    },
}


def make_case(
    R: int = 2,
    mask: bool = False,
    segments: bool = False,
    causal: bool = False,
    teacher: int | tuple[int, int, int] = 12,
    student: int | tuple[int, int, int] = 6,
    pairs: dict[str, float] = PAIRS,
) -> tuple[QKV, QKV, dict[str, Any]]:
    options = {
        "num_heads": R,
        "pairs": pairs,
        "mask_BT": torch.tensor(MASK, dtype=torch.bool) if mask else None,
        "segment_ids_BT": torch.tensor(SEGMENTS) if segments else None,
        "causal": causal,
    }
    return random_qkv(5, 7, teacher, 0), with_grad(random_qkv(5, 7, student, 1)), options


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_equals_loops(case: dict[str, Any]) -> None:
    teacher, student, options = make_case(**case)
    loss = relation_loss(teacher, student, **options, backend="reference")
    mask = [[bool(x) for x in row] for row in MASK] if case.get("mask") else [[True] * 7] * 5
    segments = SEGMENTS if case.get("segments") else None
    total = 0.0
    for pair, weight in options["pairs"].items():
        expected = loop_loss(
            teacher, student, options["num_heads"], pair, mask, segments, options["causal"]
        )
        assert loss.by_pair[pair].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        total += weight * expected
    assert loss.total.item() == pytest.approx(total, rel=1e-12)
    assert loss.total.dtype == torch.float64


@pytest.mark.parametrize("tile", [None, (3, 16), (2, 1)], ids=["default", "ragged", "smallest"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sdpa_equals_reference_in_float64(
    case: dict[str, Any], tile: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile:
        monkeypatch.setattr(sdpa, "_TILE_ROWS", tile[0])
        monkeypatch.setattr(sdpa, "TILE_SCORES", tile[1])
    teacher, student, options = make_case(**case)
    expected, found = (
        relation_loss(teacher, student, **options, backend=b) for b in ("reference", "sdpa")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        grads_of(found, student), grads_of(expected, student), rtol=1e-10, atol=1e-15
    )


def test_hand_computed() -> None:
    """Uniform teacher rows; student rows softmax(1, 0) and uniform: KL = ln(1 + e) - 1/2 - ln 2 and
    0.
    """
    teacher = QKV(*(torch.zeros(1, 2, 1) for _ in range(3)))
    student = QKV(*(torch.tensor([[[1.0], [0.0]]]) for _ in range(3)))
    for backend in BACKENDS:
        loss = relation_loss(teacher, student, num_heads=1, pairs={"qq": 3.0}, backend=backend)
        expected = (math.log(1 + math.e) - 0.5 - math.log(2)) / 2
        assert loss.by_pair["qq"].item() == pytest.approx(expected, rel=1e-6)
        assert loss.total.item() == pytest.approx(3 * expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    for causal, segments in ((False, None), (True, torch.tensor([[0, 0, 0, 1, 1]] * 3))):
        teacher = random_qkv(3, 5, 4, 0)
        student = with_grad(random_qkv(3, 5, 2, 1))
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])

        def total(*qkv: Tensor, teacher: QKV = teacher, **options: Any) -> Tensor:
            return relation_loss(
                teacher, QKV(*qkv), num_heads=2, pairs=PAIRS, backend=backend, **options
            ).total

        def checked(
            *qkv: Tensor,
            causal: bool = causal,
            segments: Tensor | None = segments,
            mask: Tensor = mask,
        ) -> Tensor:
            return total(*qkv, mask_BT=mask, segment_ids_BT=segments, causal=causal)

        assert torch.autograd.gradcheck(checked, tuple(student))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "R", "teacher_width", "student_width"),
    [(2, 301, 8, 128, 48), (3, 64, 64, 1024, 384)],
)
def test_sdpa_tolerance_in_fp32(
    B: int, T: int, R: int, teacher_width: int, student_width: int, causal: bool
) -> None:
    teacher = random_qkv(B, T, teacher_width, 0, dtype=torch.float32)
    student = with_grad(random_qkv(B, T, student_width, 1, dtype=torch.float32))
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.8
    expected, found = (
        relation_loss(
            teacher, student, num_heads=R, pairs=PAIRS, mask_BT=mask, causal=causal, backend=backend
        )
        for backend in ("reference", "sdpa")
    )
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert relative_error(grads_of(found, student), grads_of(expected, student)) < 1e-4


@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float32])
def test_sdpa_tolerance_from_bf16(student_dtype: torch.dtype) -> None:
    """The expectation is the reference in float64 on the same bf16 numbers, near the end of a
    training.
    """
    exact = random_qkv(2, 128, 128, 0)
    noise = random_qkv(2, 128, 128, 1)
    teacher = QKV(*(x.to(torch.bfloat16) for x in exact))
    student = with_grad(
        QKV(*((x + 0.14 * y).to(student_dtype) for x, y in zip(exact, noise, strict=True)))
    )
    found = relation_loss(
        teacher, student, num_heads=8, pairs={"qq": 1.0, "kk": 1.0, "vv": 1.0}, backend="sdpa"
    )
    wide = with_grad(QKV(*(x.double() for x in student)))
    expected = relation_loss(
        QKV(*(x.double() for x in teacher)),
        wide,
        num_heads=8,
        pairs=dict.fromkeys(found.by_pair, 1.0),
        backend="reference",
    )
    for pair, kl in expected.by_pair.items():
        assert 0.01 < kl < 0.04
        assert found.by_pair[pair].item() == pytest.approx(kl.item(), rel=1e-3)
    grads = grads_of(found, student)
    assert [g.dtype for g in grads] == [student_dtype] * 3
    assert relative_error(grads, grads_of(expected, wide)) < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_student_equal_to_teacher_gives_zero(backend: str) -> None:
    teacher = random_qkv(2, 33, 32, 0, dtype=torch.float32)
    student = with_grad(teacher)
    loss = relation_loss(teacher, student, num_heads=4, pairs=PAIRS, backend=backend)
    assert abs(loss.total.item()) < 1e-6
    assert max(g.abs().max().item() for g in grads_of(loss, student)) < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend: str) -> None:
    """Padded tokens may hold anything, even NaN, and get no gradient; an empty sequence counts in
    the mean.
    """
    teacher, student = random_qkv(1, 9, 8, 0), with_grad(random_qkv(1, 9, 4, 1))
    alone = relation_loss(teacher, student, num_heads=2, pairs=PAIRS, backend=backend)

    def padded(qkv: QKV) -> QKV:
        wide = [x.new_full((2, 13, x.shape[2]), torch.nan) for x in qkv]
        for x, inner in zip(wide, qkv, strict=True):
            x[0, 3:12] = inner[0].detach()
        return QKV(*wide)

    wide_student = with_grad(padded(student))
    mask = torch.zeros(2, 13, dtype=torch.int64)
    mask[0, 3:12] = 1
    loss = relation_loss(
        padded(teacher), wide_student, num_heads=2, pairs=PAIRS, mask_BT=mask, backend=backend
    )
    torch.testing.assert_close(2 * loss.total, alone.total)
    for wide, inner in zip(grads_of(loss, wide_student), grads_of(alone, student), strict=True):
        torch.testing.assert_close(2 * wide[0, 3:12], inner[0])
        assert wide.count_nonzero() == inner.count_nonzero()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_padding(backend: str) -> None:
    teacher, student = random_qkv(2, 5, 8, 0), with_grad(random_qkv(2, 5, 4, 1))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    loss = relation_loss(teacher, student, num_heads=2, pairs=PAIRS, mask_BT=mask, backend=backend)
    assert loss.total.item() == 0.0
    assert all(g.count_nonzero() == 0 for g in grads_of(loss, student))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend: str) -> None:
    teacher = QKV(*(100 * x for x in random_qkv(1, 17, 8, 0, dtype=torch.float32)))
    student = with_grad(QKV(*(100 * x for x in random_qkv(1, 17, 4, 1, dtype=torch.float32))))
    loss = relation_loss(teacher, student, num_heads=2, pairs=PAIRS, causal=True, backend=backend)
    assert loss.total.isfinite()
    assert all(g.isfinite().all() for g in grads_of(loss, student))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_contract(backend: str) -> None:
    """Only the total carries a gradient, scaled by what is above it, to the student alone; weight 0
    only reports.
    """
    teacher, student = with_grad(random_qkv(2, 5, 8, 0)), with_grad(random_qkv(2, 5, 4, 1))
    pairs = {"qq": 2.0, "vv": 0.0}
    loss = relation_loss(teacher, student, num_heads=2, pairs=pairs, backend=backend)
    assert list(loss.by_pair) == ["qq", "vv"]
    assert not any(x.requires_grad for x in loss.by_pair.values())
    assert loss.by_pair["vv"] > 0
    torch.testing.assert_close(loss.total, 2 * loss.by_pair["qq"])
    (loss.total / 4).backward()
    assert all(x.grad is None for x in teacher)
    assert student.k.grad is None
    assert student.v.grad is None or student.v.grad.count_nonzero() == 0
    again = relation_loss(teacher, student, num_heads=2, pairs=pairs, backend=backend)
    torch.testing.assert_close(4 * student.q.grad, grads_of(again, student)[0])
    with torch.no_grad():
        silent = relation_loss(teacher, student, num_heads=2, pairs=pairs, backend=backend)
    assert not silent.total.requires_grad
    assert silent.total == loss.total


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_one_tensor_under_autocast(backend: str) -> None:
    """Q/K/V as a captured block returns them, strided, in a bf16 autocast region: still float32
    mathematics.
    """
    teacher = random_qkv(2, 21, 32, 0, dtype=torch.float32)
    student = random_qkv(2, 21, 16, 1, dtype=torch.float32)
    joined = torch.cat(student, dim=-1).requires_grad_()
    plain = with_grad(student)
    expected = relation_loss(teacher, plain, num_heads=4, pairs=PAIRS, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_loss(
            teacher, QKV(*joined.split(16, -1)), num_heads=4, pairs=PAIRS, backend=backend
        )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss.total, joined)
    assert relative_error([grad], [torch.cat(grads_of(expected, plain), dim=-1)]) < 1e-5


MEMORY_SCRIPT = """
import json, re, sys
import torch
from scaledistill.relations import QKV, relation_loss

def status_bytes(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def step(B, T, backend, *pairs):
    teacher = QKV(*(torch.randn(B, T, 1024) for _ in range(3)))
    student = QKV(*(torch.randn(B, T, 384, requires_grad=True) for _ in range(3)))
    before = status_bytes("VmRSS")
    weights = dict.fromkeys(pairs, 1.0)
    loss = relation_loss(teacher, student, num_heads=64, pairs=weights, backend=backend)
    loss.total.backward()
    return status_bytes("VmHWM") - before

for backend in ("sdpa", "reference"):
    step(1, 8, backend, "qq", "kk", "vv")
bytes_of = {
    "sdpa": step(4, 512, "sdpa", "qq", "kk", "vv"),
    "reference": step(2, 512, "reference", "qq"),
}
print(json.dumps(bytes_of))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from Linux"
)
def test_sdpa_memory() -> None:
    """Peak of forward + backward beyond the inputs; reference, for time, gets half the batch and
    one pair of three.
    """
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True
    )
    peak_bytes = json.loads(run.stdout)
    assert peak_bytes["sdpa"] * 8 < peak_bytes["reference"], peak_bytes


def test_sdpa_keeps_nothing_of_size_t_squared() -> None:
    kept: dict[int, int] = {}
    for T in (64, 128):
        teacher, student = random_qkv(1, T, 8, 0), with_grad(random_qkv(1, T, 4, 1))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            relation_loss(
                teacher, student, num_heads=2, pairs=PAIRS, segment_ids_BT=torch.zeros(1, T).long()
            )
        kept[T] = sum(sizes)
    assert kept == {64: 64 * 12, 128: 128 * 12}


def bad_call(**changes: Any) -> None:
    call: dict[str, Any] = {
        "teacher": random_qkv(2, 5, 8, 0),
        "student": random_qkv(2, 5, 4, 1),
        "num_heads": 2,
        "pairs": {"qq": 1.0, "vv": 1.0},
    }
    relation_loss(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 3},
            "num_heads=3 does not divide the teacher's width 8; use 2 or 4",
        ),
        (
            {"student": random_qkv(2, 5, (6, 4, 4), 1), "num_heads": 4},
            "does not divide the student's q width 6; use 2",
        ),
        (
            {"teacher": random_qkv(2, 5, (8, 4, 4), 1), "pairs": {"qk": 1.0}},
            "pairs: 'qk' needs q and k of equal width, but the teacher's are 8 and 4; "
            "leave 'qk' out",
        ),
        ({"pairs": {}}, "pairs is empty; name at least one pair"),
        (
            {"pairs": {"qo": 1.0}},
            "pairs has 'qo'; a pair is two of the letters q, k and v",
        ),
        ({"pairs": {"q": 1.0}}, "pairs has 'q'; a pair is two of the letters"),
        (
            {"pairs": {"qq": -1.0}},
            "pairs.qq=-1.0; a weight is a finite number, 0 or more",
        ),
        ({"pairs": {"qq": math.nan}}, "pairs.qq=nan; a weight is a finite number"),
        ({"pairs": {"qq": 0.0}}, "pairs has only zero weights"),
        (
            {"student": random_qkv(2, 6, 4, 1)},
            "student.q has shape [2, 6, 4], teacher.q has [2, 5, 8]; expected [B, T, D]",
        ),
        (
            {"student": QKV(*(x[0] for x in random_qkv(2, 5, 4, 1)))},
            "student.q has shape [5, 4], teacher.q has [2, 5, 8]",
        ),
        (
            {"student": random_qkv(2, 5, 4, 1, dtype=torch.int64)},
            "student.q is torch.int64 on cpu; expected a floating",
        ),
        (
            {"mask_BT": torch.ones(2, 5)},
            "mask_BT is torch.float32 of shape [2, 5] on cpu; expected bool or integers",
        ),
        (
            {"mask_BT": torch.ones(5).bool()},
            "mask_BT is torch.bool of shape [5] on cpu; expected bool or integers of shape",
        ),
        (
            {"segment_ids_BT": torch.ones(2, 5)},
            "segment_ids_BT is torch.float32 of shape [2, 5] on cpu; expected integers",
        ),
        ({"backend": "flash"}, "backend='flash'; expected auto, reference, sdpa, triton"),
        (
            {
                "teacher": random_qkv(2, 5, 8, 0, device="meta"),
                "student": random_qkv(2, 5, 4, 1, device="meta"),
                "backend": "sdpa",
            },
            "backend='sdpa' computes on the CPU, found meta; use auto or reference",
        ),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        bad_call(**changes)
    assert message in str(error.value)


def test_settings_checked_without_tensors() -> None:
    widths = {"teacher": 1024, "student l6": 384}
    check_relation_heads(64, widths)
    with pytest.raises(ValueError) as error:
        check_relation_heads(48, widths)
    assert str(error.value) == "num_heads=48 does not divide the teacher's width 1024; use 32 or 64"
    with pytest.raises(
        ValueError,
        match=r"^num_heads=256 does not divide the student l6's width 384; use 128",
    ):
        check_relation_heads(256, widths)
    grouped = {"teacher": {"q": 1024, "k": 256, "v": 256}, "student": 384}
    check_relation_heads(128, grouped)
    with (
        pytest.raises(
            ValueError,
            match=r"students\.s\.relation_heads=96 .* the teacher's q width 1024; use 64 or 128",
        ),
        named(num_heads="students.s.relation_heads"),
    ):
        check_relation_heads(96, grouped)
    check_relation_heads(12, {"teacher": {"q": 1024, "k": 768, "v": 768}}, ["kv"])
    assert normalise_pairs({"vv": 1, "qk": 0.5}) == (("vv", 1.0), ("qk", 0.5))


def test_auto_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, on_gpu in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(
            "scaledistill.relations._triton_installed", lambda installed=installed: installed
        )
        assert resolve_backend("auto", "cpu") == "sdpa"
        assert resolve_backend("auto", "cuda") == on_gpu
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert resolve_backend("auto", "cuda") == "reference", "Triton's launches are CUDA's"
