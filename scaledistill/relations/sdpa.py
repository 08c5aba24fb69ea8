"""The relation loss on the CPU without T×T maps: flash-style tiles, value and gradient in one pass.

In: Q/K/V on the CPU and a checked request. Out: the total, differentiable in the student, and the losses of the pairs.

A tile of a few heads' scaled dot products stays in cache through softmax, KL and the products with q, k, v. With P and
S the teacher's and the student's softmax and M = S − P, the gradients of a pair (a, b) are dA = c M B and dB = c Mᵀ A,
c = weight / (√E · R · n · B). They need nothing from above but a scalar factor, so forward computes them and backward
scales them: each score is computed once, and nothing of size T² is kept.
PyTorch's own CPU flash attention and its backward (private operators) compose to the same numbers, but in five passes,
each with its scores and two with gradients that nobody needs. That took twice as long; it also wants equal head widths
and a bias for every kind of mask.

Tokens that see each other — the real tokens of a sequence, or of a document in it — are gathered first, so padding and
other documents cost nothing.

Legend: B sequences, T tokens, n gathered tokens, D width, R relation heads, E width per relation head, P pairs; in a
tile h heads, m rows, c columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaledistill.relations.spec import QKV, RelationSpec

# Scores in a tile: few enough for a core's cache, many enough to hide PyTorch's cost per call; flat from 2^17 to 2^19.
TILE_SCORES = 1 << 18
_TILE_ROWS = 128
# Finite, so that the difference of two hidden scores is 0 and not NaN.
_HIDDEN = -1e30


def sdpa_loss(teacher: QKV, student: QKV, spec: RelationSpec) -> tuple[Tensor, Tensor]:
    """Return the weighted total (scalar) and the unweighted losses (`[P]`, detached), both of `spec.dtype`."""
    tensors = [getattr(student, letter) for letter in spec.letters]
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _TiledLoss.apply(teacher, spec, with_grad, *tensors)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: QKV, spec: RelationSpec, with_grad: bool, *student: Tensor) -> tuple[Tensor, Tensor]:
        losses, grads = _losses_and_grads(teacher, dict(zip(spec.letters, student, strict=True)), spec, with_grad)
        losses_P = torch.tensor(losses, dtype=spec.dtype)
        ctx.mark_non_differentiable(losses_P)
        ctx.save_for_backward(*grads.values())
        ctx.dtypes = [x.dtype for x in student]
        return losses_P.new_tensor(sum(w * loss for (_, w), loss in zip(spec.pairs, losses, strict=True))), losses_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [(grad * grad_total).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, None, *grads


def _losses_and_grads(
    teacher: QKV, student: dict[str, Tensor], spec: RelationSpec, with_grad: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of the pairs and, by letter, the total's gradient `[B, T, D]` in `spec.dtype` if wanted."""
    T = spec.share_BT.shape[1]
    losses = [0.0] * len(spec.pairs)
    grads = {letter: torch.zeros(x.shape, dtype=spec.dtype) for letter, x in student.items()} if with_grad else {}
    work = torch.empty(2, max(TILE_SCORES, _TILE_ROWS * T), dtype=spec.dtype)
    for row, tokens_n in _token_groups(spec):
        heads = {letter: _Heads(getattr(teacher, letter)[row], x[row], tokens_n, spec) for letter, x in student.items()}
        grads_RnE = {letter: torch.zeros_like(heads[letter].student) for letter in grads}
        share = spec.share_BT[row, tokens_n[0]].item() / spec.num_heads
        for p, (pair, weight) in enumerate(spec.pairs):
            a, b = tuple(pair)
            grad_sides = (grads_RnE[a], grads_RnE[b]) if with_grad else None
            losses[p] += share * _pair_kl(heads[a], heads[b], grad_sides, weight * share, spec.causal, work)
        for letter, grad_RnE in grads_RnE.items():
            grads[letter][row].index_copy_(0, tokens_n, grad_RnE.transpose(0, 1).flatten(1))
    return losses, grads


def _token_groups(spec: RelationSpec) -> Iterator[tuple[int, Tensor]]:
    """Yield (row of the batch, ascending positions of tokens that see each other)."""
    B, T = spec.share_BT.shape
    for row in range(B):
        if spec.keys_BT is None:
            yield row, torch.arange(T)
            continue
        keys_T = spec.keys_BT[row]
        for key in keys_T.unique().tolist():
            if key >= 0:
                yield row, (keys_T == key).nonzero().squeeze(1)


class _Heads:
    """A letter's tokens in both models, side by side with two columns of ones between: `[R, n, E + 1 + 1 + E]`.

    A product of exponentials with `joined` holds their sums beside the sums that they weight.
    """

    def __init__(self, teacher_TD: Tensor, student_TD: Tensor, tokens_n: Tensor, spec: RelationSpec) -> None:
        teacher_RnE, student_RnE = (
            x.detach().index_select(0, tokens_n).unflatten(-1, (spec.num_heads, -1)).transpose(0, 1)
            for x in (teacher_TD, student_TD)
        )
        self.E = student_RnE.shape[2]
        self.joined = torch.ones(*student_RnE.shape[:2], self.E + 2 + teacher_RnE.shape[2], dtype=spec.dtype)
        self.student = self.joined[..., : self.E].copy_(student_RnE)
        self.teacher = self.joined[..., self.E + 2 :].copy_(teacher_RnE)

    def shifted(self, columns: _Heads) -> Tensor:
        """Return `joined`, scaled, with minus a bound of each row's scores for ones.

        A product with `columns.joined` then gives shifted scores. The bound is that of Cauchy and Schwarz.
        """
        scale_s, scale_t = self.student.shape[2] ** -0.5, self.teacher.shape[2] ** -0.5
        shifted = torch.empty_like(self.joined)
        for x, of_columns, scale, place, shift in (
            (self.student, columns.student, scale_s, slice(0, self.E), self.E),
            (self.teacher, columns.teacher, scale_t, slice(self.E + 2, None), self.E + 1),
        ):
            torch.mul(x, scale, out=shifted[..., place])
            longest_R1 = of_columns.norm(dim=-1).amax(-1, keepdim=True)
            torch.mul(x.norm(dim=-1), -scale * longest_R1, out=shifted[..., shift])
        return shifted


def _pair_kl(
    a: _Heads, b: _Heads, grads: tuple[Tensor, Tensor] | None, weight: float, causal: bool, work: Tensor
) -> float:
    """Return Σ KL(P ‖ S) over heads and rows; add `weight` times its gradients to `grads`. `work` holds two tiles."""
    R, n, _ = a.joined.shape
    E = a.E
    num_rows = min(n, _TILE_ROWS)
    num_heads = min(R, max(1, TILE_SCORES // (num_rows * n)))
    shifted_RnF = a.shifted(b)
    kl = 0.0
    for head in range(0, R, num_heads):
        heads = slice(head, head + num_heads)
        for row in range(0, n, num_rows):
            rows = slice(row, min(row + num_rows, n))
            columns = slice(0, rows.stop if causal else n)
            a_hmF, b_hcF = shifted_RnF[heads, rows], b.joined[heads, columns]
            shape = (len(a_hmF), rows.stop - row, columns.stop)
            s_hmc, t_hmc = (flat[: math.prod(shape)].view(shape) for flat in work)
            for side, tile_hmc in ((slice(0, E + 1), s_hmc), (slice(E + 1, None), t_hmc)):
                _exponentials(a_hmF[..., side], b_hcF[..., side], causal, tile_hmc)
            by_s_hmF = torch.bmm(s_hmc, b_hcF[..., : E + 1])
            by_t_hmF = torch.bmm(t_hmc, b_hcF)
            sum_s_hm1, sum_t_hm1 = by_s_hmF[..., E:], by_t_hmF[..., E : E + 1]
            # KL = Σ p t − Σ p s + log Σ exp s − log Σ exp t, with t and s shifted as they are in the exponentials.
            products_hmF = a_hmF * by_t_hmF
            kl_hm = (products_hmF[..., E + 1 :].sum(-1) - products_hmF[..., : E + 1].sum(-1)) / sum_t_hm1.squeeze(-1)
            kl += (kl_hm.sum() + (sum_s_hm1 / sum_t_hm1).log().sum()).item()
            if grads is None:
                continue
            grad_a, grad_b = grads
            grad_hmE = by_s_hmF[..., :E] / sum_s_hm1 - by_t_hmF[..., :E] / sum_t_hm1
            grad_a[heads, rows].add_(grad_hmE, alpha=weight * E**-0.5)
            grad_b[heads, columns].baddbmm_(s_hmc.mT, a_hmF[..., :E] / sum_s_hm1, alpha=weight)
            grad_b[heads, columns].baddbmm_(t_hmc.mT, a_hmF[..., :E] / sum_t_hm1, alpha=-weight)
    return kl


def _exponentials(a_hmF: Tensor, b_hcF: Tensor, causal: bool, out_hmc: Tensor) -> None:
    """Write the exponentials of the shifted scores."""
    torch.bmm(a_hmF, b_hcF.mT, out=out_hmc).exp_()
