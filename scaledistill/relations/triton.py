"""Compute the relation loss on GPUs without T×T maps, by two fused kernels.

Inputs: Q/K/V on a GPU, read in place (usually slices of one captured tensor), and a checked
request. Outputs: the total, differentiable in the student, and the losses of the pairs. Not handled
here: the kernels (`relations.triton_kernels`), the choice of launches (`relations.triton_launch`).
A kernel is launched once for all pairs of equal width.

The host never waits for the GPU, except at the first call with new widths, dtypes or lengths, which
may time a few launches. Two calls give the same bits: partial sums are stored and added in a fixed
order, without atomics.

Tokens of padding and of other documents cost next to nothing: a tile meets only the tiles from the
first to the last whose range of keys overlaps its own. That is exact if keys ascend along a row, as
those of packed documents do. Otherwise some tiles are computed only to be masked.

Legend: B sequences, T tokens, D width, R relation heads, E width per relation head, P pairs, G
tiles of a sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import triton
from packaging.version import Version
from torch import Tensor
from triton.runtime.errors import OutOfResources

from scaledistill.relations.reference import reference_loss
from scaledistill.relations.spec import MAX_HEAD_WIDTH, QKV, RelationSpec
from scaledistill.relations.triton_kernels import (
    NO_PAIR,
    Model,
    Tokens,
    relation_backward,
    relation_forward,
)
from scaledistill.relations.triton_launch import Launch, Winners, cache_file, candidates

MOST_PROGRAMS = 8192
"""More fill every GPU alike."""
# Triton 3.6 fails to compile a pipeline of this kernel's loads for compute capability 9.0.
PIPELINED_BACKWARD = Version(triton.__version__) >= Version("3.7")
Result = TypeVar("Result")


def triton_loss(teacher: QKV, student: QKV, spec: RelationSpec) -> tuple[Tensor, Tensor]:
    """Return the weighted total (scalar) and the unweighted losses (`[P]`, detached).

    Both are float32. `reference` computes float64 and heads wider than `MAX_HEAD_WIDTH`.
    """
    teacher_tensors, student_tensors = _readable(teacher, spec), _readable(student, spec)
    widest = (
        max(x.shape[2] for x in (*teacher_tensors.values(), *student_tensors.values()))
        // spec.num_heads
    )
    if spec.dtype == torch.float64 or widest > MAX_HEAD_WIDTH:
        return reference_loss(teacher, student, spec)
    # Widths are compiled into the kernels. Letters of unequal width (grouped-query models) never
    # form a pair.
    by_widths: dict[tuple[int, int], list[int]] = {}
    for number, (pair, _) in enumerate(spec.pairs):
        widths = teacher_tensors[pair[0]].shape[2], student_tensors[pair[0]].shape[2]
        by_widths.setdefault(widths, []).append(number)
    totals: list[Tensor] = []
    losses: dict[int, Tensor] = {}
    for numbers in by_widths.values():
        part = spec._replace(pairs=tuple(spec.pairs[number] for number in numbers))
        targets = [teacher_tensors[letter].detach() for letter in part.letters]
        total, losses_P = _FusedLoss.apply(
            part, targets, *(student_tensors[letter] for letter in part.letters)
        )
        totals.append(total)
        losses.update(zip(numbers, losses_P.unbind(), strict=True))
    return torch.stack(totals).sum(), torch.stack([losses[number] for number in sorted(losses)])


def _readable(model: QKV, spec: RelationSpec) -> dict[str, Tensor]:
    """Return the tensors that the pairs use in a form that the kernels read.

    Usually they have that form already.
    """
    tensors = {letter: getattr(model, letter) for letter in spec.letters}
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors.values()))
    # Triton's interpreter multiplies the bits of bf16 as if they were integers.
    interpreted = not isinstance(relation_forward, triton.JITFunction)
    low = (torch.float16,) if interpreted else (torch.float16, torch.bfloat16)
    dtype = dtype if dtype in low else torch.float32
    return {
        letter: x.to(dtype) if x.stride(2) == 1 else x.to(dtype).contiguous()
        for letter, x in tensors.items()
    }


class _FusedLoss(torch.autograd.Function):
    """The loss of the pairs of one width in each model."""

    @staticmethod
    def forward(
        ctx: Any, spec: RelationSpec, teacher: list[Tensor], *student: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses_P, lse_2PBRT = _forward(spec, teacher, student)
        ctx.spec = spec
        ctx.save_for_backward(lse_2PBRT, *teacher, *student)  # all freed by the backward
        ctx.mark_non_differentiable(losses_P)
        largest, weights_P = _weights(spec, losses_P.device)
        return (losses_P * weights_P).sum() * largest, losses_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        lse_2PBRT, *tensors = ctx.saved_tensors
        teacher, student = tensors[: len(ctx.spec.letters)], tensors[len(ctx.spec.letters) :]
        pairs = [pair for pair, weight in ctx.spec.pairs if weight]
        wanted = [
            letter
            for letter, needed in zip(ctx.spec.letters, ctx.needs_input_grad[2:], strict=True)
            if needed and any(letter in pair for pair in pairs)
        ]
        grads = (
            _backward(ctx.spec, teacher, student, lse_2PBRT, grad_total, wanted) if wanted else {}
        )
        return None, None, *(grads.get(letter) for letter in ctx.spec.letters)


def _forward(
    spec: RelationSpec, teacher: Sequence[Tensor], student: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the pairs' losses `[P]` and the softmax normalisers of all rows."""
    B, T = spec.share_BT.shape
    P = len(spec.pairs)

    def run(launch: Launch) -> tuple[Tensor, Tensor]:
        programs = triton.cdiv(T, launch.block) * spec.num_heads * B
        loss_PG = spec.share_BT.new_empty(P, programs)
        lse_2PBRT = spec.share_BT.new_empty(2, P, B, spec.num_heads, T)
        relation_forward[(programs, P)](
            _model(spec, teacher),
            _model(spec, student),
            _tokens(spec.keys_BT, spec.share_BT, launch.block),
            loss_PG,
            lse_2PBRT,
            _nibbles(_pair_code(pair) for pair, _ in spec.pairs),
            B,
            T,
            spec.num_heads,
            **_compiled_in(spec, teacher, student, launch),
        )
        return loss_PG.sum(1), lse_2PBRT

    return _run_fastest("forward", spec, teacher, student, run)


def _backward(
    spec: RelationSpec,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    lse_2PBRT: Tensor,
    grad_total: Tensor,
    letters: Sequence[str],
) -> dict[str, Tensor]:
    """Return the gradients of the student's tensors named by `letters`, in their dtype."""
    B, T = spec.share_BT.shape
    # Normalisers are split into a centre per head and a factor per row, which saves one 2^x per
    # score: see `relations.triton_kernels`.
    lowest_2PBR, highest_2PBR = lse_2PBRT.aminmax(dim=-1)
    centre_2PBR, reach_2PBR = (highest_2PBR + lowest_2PBR) / 2, (highest_2PBR - lowest_2PBR) / 2
    factor_2PBRT = torch.exp2(centre_2PBR[..., None] - lse_2PBRT)
    largest, weights_P = _weights(spec, lse_2PBRT.device)
    numbers = {
        _pair_code(pair): number for number, (pair, weight) in enumerate(spec.pairs) if weight
    }
    boost = 2.0**14 if student[0].dtype == torch.float16 else 1.0
    scale = largest / (boost * spec.num_heads * math.sqrt(student[0].shape[2] // spec.num_heads))

    def run(launch: Launch) -> dict[str, Tensor]:
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in student]
        relation_backward[(triton.cdiv(T, launch.block) * spec.num_heads * B, len(letters))](
            _model(spec, teacher),
            _model(spec, student),
            _tokens(spec.keys_BT, spec.share_BT, launch.block),
            lse_2PBRT,
            factor_2PBRT,
            centre_2PBR,
            reach_2PBR,
            weights_P,
            grad_total,
            _model(spec, grads)._replace(scale=scale),
            _nibbles("qkv".index(letter) for letter in letters),
            _nibbles(numbers.get(code, NO_PAIR) for code in range(9)),
            len(spec.pairs),
            B,
            T,
            spec.num_heads,
            BOOST=boost,
            **_compiled_in(spec, teacher, student, launch),
        )
        return dict(zip(spec.letters, grads, strict=True))

    found = _run_fastest("backward", spec, teacher, student, run)
    return {letter: found[letter] for letter in letters}


def _model(spec: RelationSpec, tensors: Sequence[Tensor]) -> Model:
    """Describe the tensors of `spec.letters` to a kernel.

    The first tensor is a placeholder for letters that no pair uses.
    """
    by_letter = dict(zip(spec.letters, tensors, strict=True))
    qkv = tuple(by_letter.get(letter, tensors[0]) for letter in QKV._fields)
    strides_B, strides_T, _ = zip(*(x.stride() for x in qkv), strict=True)
    width = tensors[0].shape[2] // spec.num_heads
    return Model(qkv, strides_B, strides_T, math.log2(math.e) / math.sqrt(width))


def _tokens(keys_BT: Tensor | None, share_BT: Tensor, block: int) -> Tokens:
    """Describe to a kernel, with tiles of `block` tokens, which tokens attend to each other."""
    if keys_BT is None:
        return Tokens(share_BT, None, None, None, None)
    B, T = keys_BT.shape
    tiles = triton.cdiv(T, block)
    keys_BGK = torch.nn.functional.pad(keys_BT, (0, tiles * block - T), value=-1).view(
        B, tiles, block
    )
    # Two tiles meet if their ranges of keys, from low to high without padding, overlap.
    no_key = torch.iinfo(torch.int32).max
    low_BG = keys_BGK.masked_fill(keys_BGK < 0, no_key).amin(2)
    high_BG = keys_BGK.amax(2)
    common_BG = torch.where(keys_BGK.amin(2) == high_BG, high_BG, -1)
    touch_BGG = (low_BG[:, :, None] <= high_BG[:, None, :]) & (
        low_BG[:, None, :] <= high_BG[:, :, None]
    )
    numbers_G = torch.arange(tiles, dtype=torch.int32, device=keys_BT.device)
    first_BG = numbers_G.where(touch_BGG, tiles).amin(2)
    end_BG = (numbers_G + 1).where(touch_BGG, 0).amax(2)
    return Tokens(share_BT, keys_BT, common_BG, first_BG, end_BG)


def _compiled_in(
    spec: RelationSpec, teacher: Sequence[Tensor], student: Sequence[Tensor], launch: Launch
) -> dict[str, Any]:
    return {
        "TEACHER_E": teacher[0].shape[2] // spec.num_heads,
        "STUDENT_E": student[0].shape[2] // spec.num_heads,
        "BLOCK": launch.block,
        "CAUSAL": spec.causal,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **({"maxnreg": launch.max_registers} if launch.max_registers else {}),
        "enable_fp_fusion": True,  # explicit, because the default depends on Triton's version
    }


def _pair_code(pair: str) -> int:
    """Return the number of a pair, 0 to 8: 3 · first letter + second."""
    return 3 * "qkv".index(pair[0]) + "qkv".index(pair[1])


def _nibbles(numbers: Iterable[int]) -> int:
    """Pack numbers below 16 into one, the first lowest.

    A kernel gets this table as an argument, without a copy to the GPU.
    """
    return sum(number << 4 * place for place, number in enumerate(numbers))


def _weights(spec: RelationSpec, device: torch.device) -> tuple[float, Tensor]:
    """Return the largest weight, and all weights relative to it, `[P]`."""
    weights = tuple(weight for _, weight in spec.pairs)
    largest = max(weights) or 1.0
    return largest, _on_device(tuple(weight / largest for weight in weights), device)


@functools.lru_cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the numbers as a float32 tensor, copied once: a copy waits for the GPU."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _run_fastest(
    kernel: str,
    spec: RelationSpec,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    run: Callable[[Launch], Result],
) -> Result:
    """Run a kernel with its fastest launch.

    If results must not depend on a measurement, the table's default is used.
    """
    E_T, E_S = (x[0].shape[2] // spec.num_heads for x in (teacher, student))
    length = spec.share_BT.shape[1]
    in_float32 = torch.float32 in (teacher[0].dtype, student[0].dtype)
    among = candidates(kernel, max(E_T, E_S), in_float32, length)
    if kernel == "backward" and not PIPELINED_BACKWARD:
        among = [launch._replace(num_stages=1) for launch in among]
    device = student[0].device
    with torch.cuda.device_of(student[0]):
        if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            return run(among[0])
        kind = f"{kernel}{' causal' * spec.causal}{' keyed' * (spec.keys_BT is not None)}"
        models = f"teacher {E_T} {teacher[0].dtype} student {E_S} {student[0].dtype}"
        # A launch that suits a few programs need not suit many.
        programs = spec.share_BT.shape[0] * spec.num_heads * triton.cdiv(length, 64)
        programs = min(triton.next_power_of_2(programs), MOST_PROGRAMS)
        key = f"{kind} T{triton.next_power_of_2(length)} {models} programs {programs}"
        return run(
            _winners(device).choose(key, among, lambda launch: _seconds(lambda: run(launch)))
        )


@functools.cache
def _winners(device: torch.device) -> Winners:
    return Winners(
        cache_file(), f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}"
    )


def _seconds(run: Callable[[], object]) -> float:
    """Return the median run time in seconds; infinity if the launch exceeds the GPU's resources."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median") / 1000
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf
