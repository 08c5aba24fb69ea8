"""Compute the relation loss in plain PyTorch with whole T×T maps, the oracle of all backends.

Inputs: Q/K/V on any device and a checked request. Outputs: the total, differentiable in the
student, and the losses of the pairs. Not handled here: checks (`relations.spec`), memory and speed
(the other backends).

Legend: B sequences, T tokens, D width, R relation heads, E width per relation head, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaledistill.relations.spec import QKV, RelationSpec


def reference_loss(teacher: QKV, student: QKV, spec: RelationSpec) -> tuple[Tensor, Tensor]:
    """Return the weighted total (scalar) and the unweighted losses (`[P]`, detached).

    Both are of `spec.dtype`.

    Source: MiniLMv2, arXiv 2012.15828, eq. 5–8.
    """
    losses = []
    for pair, _ in spec.pairs:
        kl_BRT = relation_kl(teacher, student, pair, spec)
        losses.append((kl_BRT.sum(1) * spec.share_BT).sum() / spec.num_heads)
    weighted = [weight * loss for (_, weight), loss in zip(spec.pairs, losses, strict=True)]
    return torch.stack(weighted).sum(), torch.stack(losses).detach()


def relation_kl(teacher: QKV, student: QKV, pair: str, spec: RelationSpec) -> Tensor:
    """Return KL(teacher ‖ student) of a pair's relations, `[B, R, T]`, in nats.

    It is differentiable in the student, and meaningless on padding.
    """
    hidden_B1TT = _hidden(spec)
    with torch.no_grad():
        teacher_BRTT = log_relations(teacher, pair, spec)
    student_BRTT = log_relations(student, pair, spec)
    difference_BRTT = (teacher_BRTT - student_BRTT).masked_fill(hidden_B1TT, 0.0)
    return (teacher_BRTT.exp() * difference_BRTT).sum(3)


def log_relations(qkv: QKV, pair: str, spec: RelationSpec) -> Tensor:
    """Return the logarithms of a pair's relations, `[B, R, T, T]`; -inf at hidden positions.

    Rows of padding attend to everything, so that no softmax is empty.
    """

    def heads(x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.to(spec.dtype)
        if spec.keys_BT is not None:
            x_BTD = x_BTD.masked_fill((spec.keys_BT < 0)[:, :, None], 0.0)
        return x_BTD.unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)

    a_BRTE, b_BRTE = (heads(getattr(qkv, letter)) for letter in pair)
    scores_BRTT = a_BRTE @ b_BRTE.mT / a_BRTE.shape[-1] ** 0.5
    return scores_BRTT.masked_fill(_hidden(spec), -torch.inf).log_softmax(-1)


def _hidden(spec: RelationSpec) -> Tensor:
    """Return which positions a row does not attend to: bool, `[B, 1, T, T]`."""
    B, T = spec.share_BT.shape
    if spec.keys_BT is None:
        real_BT = torch.ones_like(spec.share_BT, dtype=torch.bool)
        visible_BTT = real_BT[:, None, :].expand(B, T, T)
    else:
        real_BT = spec.keys_BT >= 0
        visible_BTT = real_BT[:, None, :] & (spec.keys_BT[:, :, None] == spec.keys_BT[:, None, :])
    if spec.causal:
        visible_BTT = visible_BTT.tril()
    return ~(visible_BTT | ~real_BT[:, :, None])[:, None]
