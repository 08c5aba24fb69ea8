"""8-bit linears: how near to fp32, that rounding stays inside a token, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ENCODER_SIZES as SIZES
from torch import Tensor, nn
from transformers import BertConfig, ElectraConfig, PreTrainedConfig, RobertaConfig

from scaledistill.errors import ConfigError
from scaledistill.models import int8
from scaledistill.models.capture import build_encoder
from scaledistill.models.int8 import Int8Linear, quantize_linears
from scaledistill.models.teacher import Teacher
from scaledistill.relations import relation_loss

IDS_BT = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    if not int8.integer_products_are_exact(torch.device("cpu")):
        pytest.skip("this CPU has no integer dot products")


def linear_and_int8(inputs: int, outputs: int, *, bias: bool = True) -> tuple[nn.Linear, Int8Linear]:
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return linear, Int8Linear(linear)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 1, 1024), (2, 17, 384), (3, 5, 33), (64, 8), (7,)])
@pytest.mark.parametrize("outputs", [1, 24, 130])
def test_near_to_fp32(shape: tuple[int, ...], outputs: int) -> None:
    """Steps are range / 254, a standard error of 0.3 of it: on normal rows below 0.8 % each for inputs and weights."""
    linear, quantized = linear_and_int8(shape[-1], outputs, bias=outputs != 24)
    inputs = torch.randn(shape)
    found = quantized(inputs)
    assert found.shape == (*shape[:-1], outputs)
    assert found.dtype is torch.float32
    assert found.is_contiguous()
    assert relative_error(found, linear(inputs)) < 0.016


def test_equals_its_formula() -> None:
    """Integers times scales: the result is that of the rounded weight on inputs rounded in steps of range / 254."""
    linear, quantized = linear_and_int8(96, 40)
    inputs = torch.randn(5, 96, dtype=torch.float64) * 3 + 1
    weight = quantized.weight_NK.double() * quantized.scale_N.double()[:, None]
    assert (weight - linear.weight).abs().max() <= quantized.scale_N.max() / 2 * (1 + 1e-5)
    low, high = inputs.amin(-1, keepdim=True), inputs.amax(-1, keepdim=True)
    step, middle = (high - low) / 254, (high + low) / 2
    rounded = ((inputs - middle) / step).round() * step + middle
    expected = rounded @ weight.t() + linear.bias
    torch.testing.assert_close(quantized(inputs.float()).double(), expected, rtol=1e-5, atol=1e-5)


def test_one_sided_inputs_keep_all_levels() -> None:
    """GELU's outputs lie above -0.17: rounding around zero would waste half of the integers."""
    linear, quantized = linear_and_int8(512, 64, bias=False)
    inputs = nn.functional.gelu(torch.randn(32, 512) * 2)
    step = inputs.abs().amax(-1, keepdim=True) / 127
    around_zero = linear((inputs / step).round() * step)
    assert relative_error(quantized(inputs), linear(inputs)) < 0.8 * relative_error(around_zero, linear(inputs))


def test_tokens_without_a_range() -> None:
    linear, quantized = linear_and_int8(16, 8)
    for value in (0.0, 3.0, -1e-30, 1e30):
        inputs = torch.full((2, 16), value)
        torch.testing.assert_close(quantized(inputs), linear(inputs), rtol=0.02, atol=0.02 * abs(value))
    nn.init.zeros_(linear.weight)
    assert torch.equal(Int8Linear(linear)(inputs), linear.bias.expand(2, 8))
    assert quantized(torch.empty(0, 16)).shape == (0, 8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_shows(bad: float) -> None:
    _, quantized = linear_and_int8(16, 8)
    inputs = torch.randn(3, 16)
    clean = quantized(inputs)
    inputs[1, 4] = bad
    found = quantized(inputs)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("config_class", [BertConfig, RobertaConfig, ElectraConfig])
def test_teacher(config_class: type[PreTrainedConfig]) -> None:
    """Against fp32 on random weights; the sha256 and the size are those of the weights as they came."""
    encoder = build_encoder(config_class(**SIZES))
    exact, teacher = Teacher(copy.deepcopy(encoder), 3), Teacher(encoder, 3)
    sha256, num_parameters = teacher.sha256, teacher.num_parameters
    quantize_linears(teacher.view)
    assert not any(type(module) is nn.Linear for module in teacher.modules())
    assert (teacher.sha256, teacher.num_parameters) == (sha256, num_parameters) == (exact.sha256, exact.num_parameters)
    mask_BT = torch.arange(17) < torch.tensor([[17], [9], [1]])
    expected, found = exact(IDS_BT, mask_BT), teacher(IDS_BT, mask_BT)
    for name, one, other in zip("qkv", expected, found, strict=True):
        assert (other.shape, other.dtype, other.requires_grad) == (one.shape, torch.float32, False), name
        assert relative_error(other[mask_BT], one[mask_BT]) < 0.02, name
    assert all(map(torch.equal, teacher(IDS_BT, mask_BT), found)), "two runs differ"
    assert not any(tensor.requires_grad for tensor in teacher.state_dict().values())
    loss = relation_loss(expected, found, num_heads=4, pairs={"qq": 1.0, "kk": 1.0, "vv": 1.0}, mask_BT=mask_BT)
    assert 0 < loss.total < 1e-3


def test_a_token_depends_on_no_other_row() -> None:
    """Other sequences, also ones of another magnitude, change no integer."""
    _, quantized = linear_and_int8(64, 48)
    inputs = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    assert torch.equal(torch.cat([quantized(row[None]) for row in inputs]), quantized(inputs))


def test_refuses_a_cpu_whose_products_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    quantize_linears(model)
    assert [type(module) for module in model] == [Int8Linear, nn.GELU, Int8Linear]
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(-(2**15), 2**15 - 1))
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        ConfigError, match=r"teacher.dtype='int8' needs a CPU with integer dot .*; use 'fp32' or 'bf16'"
    ):
        quantize_linears(model)
    assert type(model[0]) is nn.Linear
