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
    B, T = spec.share_BT.shape
    if spec.keys_BT is None:
        real_BT = torch.ones_like(spec.share_BT, dtype=torch.bool)
        visible_BTT = real_BT[:, None, :].expand(B, T, T)
    else:
        real_BT = spec.keys_BT >= 0
        visible_BTT = real_BT[:, None, :] & (spec.keys_BT[:, :, None] == spec.keys_BT[:, None, :])
    if spec.causal:
        visible_BTT = visible_BTT.tril()
    # Rows of padding attend to everything, so that no softmax is empty; their share is 0.
    hidden_B1TT = ~(visible_BTT | ~real_BT[:, :, None])[:, None]

    def heads(x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.to(spec.dtype).masked_fill(~real_BT[:, :, None], 0.0)
        return x_BTD.unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)

    def log_relation(qkv: QKV, pair: str) -> Tensor:
        a_BRTE, b_BRTE = (heads(getattr(qkv, letter)) for letter in pair)
        scores_BRTT = a_BRTE @ b_BRTE.mT / a_BRTE.shape[-1] ** 0.5
        return scores_BRTT.masked_fill(hidden_B1TT, -torch.inf).log_softmax(-1)

    losses = []
    for pair, _ in spec.pairs:
        with torch.no_grad():
            teacher_BRTT = log_relation(teacher, pair)
        student_BRTT = log_relation(student, pair)
        difference_BRTT = (teacher_BRTT - student_BRTT).masked_fill(hidden_B1TT, 0.0)
        kl_BT = (teacher_BRTT.exp() * difference_BRTT).sum((1, 3))
        losses.append((kl_BT * spec.share_BT).sum() / spec.num_heads)
    weighted = [weight * loss for (_, weight), loss in zip(spec.pairs, losses, strict=True)]
    return torch.stack(weighted).sum(), torch.stack(losses).detach()
