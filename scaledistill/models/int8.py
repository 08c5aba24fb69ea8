"""Linear layers in 8-bit integers, for a frozen teacher on CPUs with integer dot products (VNNI) but no fast bf16.

Enters: a teacher's view with fp32 weights. Leaves: the same view, its `nn.Linear`s replaced by `Int8Linear`; all else
(embeddings, attention, LayerNorm, GELU, residuals, the captured Q, K and V) stays fp32.

Legend: M tokens of all sequences, K inputs, N outputs; the suffix 1 is a dimension to broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scaledistill.errors import ConfigError

LEVELS = 127
"""Integers are -127 … 127: products of two sum exactly in int32 for K up to 133,000."""


class Int8Linear(nn.Module):
    """A linear layer without gradients: int8 weights with a scale per output, inputs rounded token by token.

    A token's inputs are taken relative to the middle of their range, which suits GELU's one-sided outputs and outliers:
    measured on an encoder's Q, K and V, it halves the divergence for 7 % more time. Integer sums are exact,
    and a token's result depends on no other token.
    """

    weight_NK: Tensor
    scale_N: Tensor
    row_sum_N: Tensor
    bias_N: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_NK = linear.weight.detach()
        scale_N1 = _scale(weight_NK.abs().amax(-1, keepdim=True))
        rounded_NK = (weight_NK / scale_N1).round_().to(torch.int8)
        scale_N = scale_N1[:, 0].contiguous()
        self.register_buffer("weight_NK", rounded_NK)
        self.register_buffer("scale_N", scale_N)
        self.register_buffer("row_sum_N", rounded_NK.sum(-1).to(scale_N.dtype) * scale_N)
        self.register_buffer("bias_N", torch.zeros_like(scale_N) if linear.bias is None else linear.bias.detach())

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Return fp32 [..., N] for fp32 `inputs` [..., K]. Every pass over a large tensor counts: most are in place."""
        inputs_MK = inputs.flatten(0, -2) if inputs.dim() > 1 else inputs[None]
        low_M1, high_M1 = inputs_MK.amin(-1, keepdim=True), inputs_MK.amax(-1, keepdim=True)
        middle_M1 = torch.lerp(low_M1, high_M1, 0.5)
        scale_M1 = _scale((high_M1 - low_M1) / 2)
        rounded_MK = torch.sub(inputs_MK, middle_M1).mul_(scale_M1.reciprocal()).round_().to(torch.int8)
        sums_MN = torch._int_mm(rounded_MK, self.weight_NK.t()).to(inputs.dtype).mul_(self.scale_N)
        outputs_MN = torch.addcmul(self.bias_N, sums_MN, scale_M1, out=sums_MN)
        return outputs_MN.addcmul_(middle_M1, self.row_sum_N).view(*inputs.shape[:-1], len(self.bias_N))


def quantize_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside a frozen fp32 `module` by an `Int8Linear`, in place.

    Raises:
        ConfigError: integer products are not exact on the device of its weights.
    """
    linears = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for device in {linear.weight.device for _, _, linear in linears}:
        if not integer_products_are_exact(device):
            raise ConfigError(
                "teacher.dtype='int8' needs a CPU with integer dot products (AVX512-VNNI); sums of 8-bit products "
                f"overflow on this {device.type}; use 'fp32' or 'bf16'"
            )
    for parent, name, linear in linears:
        setattr(parent, name, Int8Linear(linear))


def integer_products_are_exact(device: torch.device) -> bool:
    """Multiply two small matrices: older x86 CPUs add pairs of products in 16 bits, which saturate."""
    rows = torch.full((32, 64), LEVELS, dtype=torch.int8, device=device)
    rows[1::2] = -LEVELS
    expected = rows.double() @ rows.double().t()
    return torch.equal(torch._int_mm(rows, rows.t()).double(), expected)


def _scale(peak: Tensor) -> Tensor:
    """Return the step between integers that reaches `peak`; where that is 0, any that can be divided by."""
    return (peak / LEVELS).clamp_(min=torch.finfo(peak.dtype).tiny)
