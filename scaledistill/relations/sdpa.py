"""Compute the relation loss on the CPU in flash-style tiles, without T×T maps.

Inputs: Q/K/V on the CPU and a checked request. Outputs: the total, differentiable in the student,
and the losses of the pairs. Not handled here: checks (`relations.spec`), GPUs (`relations.triton`).

A tile of a few heads' scaled dot products stays in cache through softmax, KL and the products with
q, k, v. With P and S the teacher's and the student's softmax and M = S − P, the gradients of a pair
(a, b) are dA = c M B and dB = c Mᵀ A, c = weight / (√E · R · n · B). They need only a scalar factor
from the layers above, so forward computes them and backward scales them: each score is computed
once, and nothing of size T² is kept. PyTorch's own CPU flash attention and its backward (private
operators) can give the same numbers, but in five passes, each with its scores, and two of them with
unused gradients. That took twice as long; it also needs equal head widths and a bias for every kind
of mask.

Tokens that attend to each other — the real tokens of a sequence, or of a document in it — are
gathered first, so padding and other documents cost nothing.

Legend: B sequences, T tokens, n gathered tokens, D width, R relation heads, E width per relation
head, P pairs; in a tile h heads, m rows, c columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaledistill.relations.spec import QKV, RelationSpec

# Scores in a tile: few enough for a core's cache, many enough to hide PyTorch's cost per call. The
# time is the same from 2^17 to 2^19.
TILE_SCORES = 1 << 18
_TILE_ROWS = 128
# Finite, so that the difference of two hidden scores is 0 and not NaN.
_HIDDEN = -1e30


def sdpa_loss(teacher: QKV, student: QKV, spec: RelationSpec) -> tuple[Tensor, Tensor]:
    """Return the weighted total (scalar) and the unweighted losses (`[P]`, detached).

    Both are of `spec.dtype`.
    """
    tensors = [getattr(student, letter) for letter in spec.letters]
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _TiledLoss.apply(teacher, spec, with_grad, *tensors)


class _TiledLoss(torch.autograd.Function):
    """Compute losses and gradients in forward; backward scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, teacher: QKV, spec: RelationSpec, with_grad: bool, *student: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, grads = _losses_and_grads(
            teacher, dict(zip(spec.letters, student, strict=True)), spec, with_grad
        )
        losses_P = torch.tensor(losses, dtype=spec.dtype)
        ctx.mark_non_differentiable(losses_P)
        ctx.save_for_backward(*grads.values())
        ctx.dtypes = [x.dtype for x in student]
        return losses_P.new_tensor(
            sum(w * loss for (_, w), loss in zip(spec.pairs, losses, strict=True))
        ), losses_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, *grads


def _losses_and_grads(
    teacher: QKV, student: dict[str, Tensor], spec: RelationSpec, with_grad: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of the pairs and, if requested, the total's gradients.

    The gradients are `[B, T, D]` in `spec.dtype`, keyed by letter.
    """
    T = spec.share_BT.shape[1]
    losses = [0.0] * len(spec.pairs)
    grads = (
        {letter: torch.zeros(x.shape, dtype=spec.dtype) for letter, x in student.items()}
        if with_grad
        else {}
    )
    work = torch.empty(3, max(TILE_SCORES, _TILE_ROWS * T), dtype=spec.dtype)
    for row, tokens_n in _token_groups(spec):
        teacher_RnE = {
            letter: _gather(getattr(teacher, letter)[row], tokens_n, spec) for letter in student
        }
        student_RnE = {letter: _gather(x[row], tokens_n, spec) for letter, x in student.items()}
        grads_RnE = (
            {letter: torch.zeros_like(x) for letter, x in student_RnE.items()} if with_grad else {}
        )
        share = spec.share_BT[row, tokens_n[0]].item() / spec.num_heads
        for p, (pair, weight) in enumerate(spec.pairs):
            a, b = tuple(pair)
            sides = _Sides(
                teacher_RnE[a],
                teacher_RnE[b],
                student_RnE[a],
                student_RnE[b],
                grads_RnE.get(a),
                grads_RnE.get(b),
            )
            losses[p] += share * _pair_kl(sides, weight * share, spec.causal, work)
        for letter, grad_RnE in grads_RnE.items():
            grads[letter][row].index_copy_(0, tokens_n, grad_RnE.transpose(0, 1).flatten(1))
    return losses, grads


def _token_groups(spec: RelationSpec) -> Iterator[tuple[int, Tensor]]:
    """Yield (row of the batch, ascending positions of tokens that attend to each other)."""
    B, T = spec.share_BT.shape
    for row in range(B):
        if spec.keys_BT is None:
            yield row, torch.arange(T)
            continue
        keys_T = spec.keys_BT[row]
        for key in keys_T.unique().tolist():
            if key >= 0:
                yield row, (keys_T == key).nonzero().squeeze(1)


def _gather(x_TD: Tensor, tokens_n: Tensor, spec: RelationSpec) -> Tensor:
    """Copy the tokens' rows to `[R, n, E]` in `spec.dtype`."""
    x_nD = x_TD.detach().index_select(0, tokens_n).to(spec.dtype)
    return x_nD.unflatten(-1, (spec.num_heads, -1)).transpose(0, 1).contiguous()


class _Sides(NamedTuple):
    """The two sides of one pair for one group of tokens, each `[R, n, E]`.

    The student's gradients are added to `grad_a` and `grad_b`.
    """

    teacher_a: Tensor
    teacher_b: Tensor
    student_a: Tensor
    student_b: Tensor
    grad_a: Tensor | None
    grad_b: Tensor | None


def _pair_kl(sides: _Sides, weight: float, causal: bool, work: Tensor) -> float:
    """Return Σ KL(P ‖ S) over heads and rows; add `weight` times its gradients to `sides`.

    `work` holds three tiles.
    """
    R, n, _ = sides.student_a.shape
    num_rows = min(n, _TILE_ROWS)
    num_heads = min(R, max(1, TILE_SCORES // (num_rows * n)))
    future_mm = torch.ones(num_rows, num_rows, dtype=torch.bool).triu(1)
    kl = 0.0
    for head in range(0, R, num_heads):
        side = _Sides._make(None if x is None else x[head : head + num_heads] for x in sides)
        for row in range(0, n, num_rows):
            rows = slice(row, min(row + num_rows, n))
            columns = slice(0, rows.stop if causal else n)
            shape = (len(side.student_a), rows.stop - row, columns.stop)
            t_hmc, s_hmc, p_hmc = (flat[: math.prod(shape)].view(shape) for flat in work)
            for scores_hmc, a, b in (
                (t_hmc, side.teacher_a, side.teacher_b),
                (s_hmc, side.student_a, side.student_b),
            ):
                a_hmE, b_hcE = a[:, rows], b[:, columns]
                torch.baddbmm(
                    scores_hmc, a_hmE, b_hcE.mT, beta=0, alpha=a.shape[-1] ** -0.5, out=scores_hmc
                )
                if causal:
                    scores_hmc[:, :, rows].masked_fill_(future_mm[: shape[1], : shape[1]], _HIDDEN)
                scores_hmc -= scores_hmc.amax(-1, keepdim=True)
            # With t and s shifted by their rows' maxima:
            # KL = Σ p (t − s) + log Σ exp s − log Σ exp t.
            torch.exp(t_hmc, out=p_hmc)
            sum_t_hm1 = p_hmc.sum(-1, keepdim=True)
            p_hmc *= sum_t_hm1.reciprocal()
            t_hmc -= s_hmc
            s_hmc.exp_()
            sum_s_hm1 = s_hmc.sum(-1, keepdim=True)
            kl += (
                torch.dot(p_hmc.flatten(), t_hmc.flatten()).item()
                + (sum_s_hm1 / sum_t_hm1).log().sum().item()
            )
            if side.grad_a is None or side.grad_b is None:
                continue
            torch.addcmul(p_hmc, s_hmc, sum_s_hm1.reciprocal(), value=-1, out=s_hmc)  # P − S
            scale = -weight * side.student_a.shape[-1] ** -0.5
            side.grad_a[:, rows].add_(torch.bmm(s_hmc, side.student_b[:, columns]), alpha=scale)
            side.grad_b[:, columns].baddbmm_(s_hmc.mT, side.student_a[:, rows], alpha=scale)
    return kl
