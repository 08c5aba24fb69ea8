"""Packed documents neither attend to each other nor count their positions on: each gives what it
gives alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ENCODER_SIZES
from encoders import tiny_config
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from scaledistill.data.reader import ShardReader
from scaledistill.data.shards import ShardWriter
from scaledistill.data.stream import Batch, iter_validation
from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError
from scaledistill.models import attention
from scaledistill.models.architectures import (
    ARCHITECTURES,
    architecture_of,
    build_encoder,
    set_depth,
)
from scaledistill.models.attention import VARLEN, use_varlen_attention, varlen_attention_available
from scaledistill.models.student import set_dropout
from scaledistill.models.teacher import Teacher
from scaledistill.models.view import QKVView, capture_view, model_inputs
from scaledistill.relations import relation_loss

# Weights large enough for attention to be far from uniform, so that a token too many would show.
SIZES = {
    **ENCODER_SIZES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.15,
}
SUPPORTED = [
    *(name for name in ARCHITECTURES if not ARCHITECTURES[name].no_documents),
    "eurobert-grouped",
    "llama-bidirectional",
    "mistral-windowed",
    "gemma3_text-bidirectional",
]
CONFIGS: dict[str, PreTrainedConfig] = {name: tiny_config(name, SIZES) for name in SUPPORTED}
# The code of these is not copied from another's, with each attention.
OFTEN = {
    *itertools.product(["bert", "roberta", "electra", "modernbert"], ["sdpa", "eager", VARLEN]),
    *itertools.product(["xlm-roberta", "camembert"], ["sdpa"]),
    ("mpnet", "eager"),
    ("eurobert", VARLEN),
    ("distilbert", VARLEN),
    ("llama", "sdpa"),
    *itertools.product(["mistral-windowed", "gemma3_text"], ["sdpa", VARLEN]),
}
T = 17
DOCUMENTS = [
    [(0, 5), (5, 17)],
    [(2, 9), (9, 10), (12, 17)],
    [],
    [(0, 17)],
    [(0, 3), (3, 7), (7, 8), (8, 15)],
]
SPANS = [(row, *span) for row, spans in enumerate(DOCUMENTS) for span in spans]


def batch_of(folder: Path, spans: list[tuple[int, int, int]]) -> Batch:
    """Five rows as training gets them."""
    ids = (
        torch.randint(5, 97, (5, T), generator=torch.Generator().manual_seed(0))
        .to(torch.int32)
        .numpy()
    )
    tokenizer = {"name": "test", "sha256": "0" * 64}
    with ShardWriter(
        folder, sequence_length=T, vocab_size=97, tokenizer=tokenizer, pad_token_id=0
    ) as writer:
        writer.write(ids, torch.tensor(spans).numpy())
    (batch,) = iter_validation(ShardReader(folder), rows=5, micro_batch_size=5, with_documents=True)
    return batch


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return batch_of(tmp_path_factory.mktemp("shards") / "rows", SPANS)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `varlen_attn` on the CPU, in any dtype."""
    monkeypatch.setattr(attention, "varlen_attn", exact_varlen)
    monkeypatch.setattr(attention, "varlen_attention_available", lambda *_: True)


def exact_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What `varlen_attn` computes, traceable: every token sees the tokens between the same two
    ends, no further away than the window, [N, H, E].
    """
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype is torch.int32
    assert max_q == max_k == T
    position = torch.arange(len(query))
    sequence = torch.searchsorted(cu_seq_q[1:], position, right=True)
    visible = sequence[:, None] == sequence
    back = position[:, None] - position
    for side, distance in zip(window_size, (back, -back), strict=True):
        visible &= (distance <= side) | (side < 0)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, visible, scale=scale)[0].transpose(0, 1)


def student_view(config: PreTrainedConfig, **sizes: int) -> QKVView:
    """A view that trains, of the first of two sizes of student."""
    own = copy.deepcopy(config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, **sizes}
    set_depth(own, sizes.pop("num_hidden_layers"))
    own.update(sizes)
    torch.manual_seed(1)
    student = build_encoder(own).train()
    set_dropout(student, 0.0)
    return capture_view(student, own.num_hidden_layers)


def run(view: QKVView, batch: Batch) -> Tensor:
    return torch.cat(view(batch.tokens), -1)


def alone(view: QKVView, batch: Batch) -> Iterator[tuple[int, int, int, Tensor]]:
    for row, start, end in SPANS:
        ids_BT = batch.input_ids_BT[row : row + 1, start:end]
        yield row, start, end, torch.cat(view(TokenInputs(ids_BT)), -1)[0]


def gradients(view: QKVView, loss: Tensor) -> list[Tensor]:
    view.module.zero_grad()
    loss.backward()
    return [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for weight in view.module.parameters()
    ]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.full)
        for case in itertools.product(CONFIGS, ["sdpa", "eager", VARLEN])
        if case[1] == "eager" or not architecture_of(CONFIGS[case[0]]).eager_only
    ],
)
@pytest.mark.usefixtures("varlen")
def test_packed_documents_give_what_they_give_alone(
    name: str, implementation: str, batch: Batch
) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config._attn_implementation = implementation
    torch.manual_seed(0)
    teacher = Teacher(build_encoder(config), 4)
    found = torch.cat(teacher(batch.tokens), -1)
    assert found.isfinite().all()
    for row, start, end, expected in alone(teacher.view, batch):
        torch.testing.assert_close(found[row, start:end], expected, rtol=0, atol=1e-5)

    view = student_view(config)
    packed = run(view, batch)
    weights_BTD = (
        torch.randn(packed.shape, generator=torch.Generator().manual_seed(2)) / packed.numel()
    )
    expected_loss = torch.zeros(())
    for row, start, end, expected in alone(view, batch):
        torch.testing.assert_close(packed[row, start:end], expected, rtol=0, atol=1e-5)
        expected_loss = expected_loss + (expected * weights_BTD[row, start:end]).sum()
    assert batch.mask_BT is not None
    found_gradients = gradients(view, (packed * weights_BTD)[batch.mask_BT].sum())
    for found, expected in zip(found_gradients, gradients(view, expected_loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_whole_rows_differ(batch: Batch) -> None:
    """What the tests of this file would miss if documents made no difference."""
    view = student_view(CONFIGS["bert"])
    rows = torch.cat(view(TokenInputs(batch.input_ids_BT, batch.mask_BT)), -1)
    difference_BT = (rows - run(view, batch)).abs().amax(-1)
    assert all(
        difference_BT[row, start:end].min() > 0.01
        for row, start, end in SPANS
        if (start, end) != (0, T)
    )
    torch.testing.assert_close(difference_BT[3], torch.zeros(T), rtol=0, atol=1e-5)


def test_loss_is_the_same_under_reference_and_sdpa(batch: Batch) -> None:
    torch.manual_seed(0)
    teacher = Teacher(build_encoder(CONFIGS["bert"]), 4)
    target = teacher(batch.tokens._replace(cu_seqlens=None))
    view = student_view(CONFIGS["bert"])
    found = {}
    for backend in ("reference", "sdpa"):
        loss = relation_loss(
            target,
            view(batch.tokens),
            num_heads=4,
            pairs={"qq": 1.0, "kk": 1.0, "vv": 1.0},
            mask_BT=batch.mask_BT,
            segment_ids_BT=batch.segment_ids_BT,
            backend=backend,
        )
        found[backend] = [loss.total.detach(), *gradients(view, loss.total)]
    assert found["reference"][0] > 0.01
    for expected, other in zip(found["reference"], found["sdpa"], strict=True):
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "modernbert", "mistral-windowed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_looked_at(
    dtype: torch.dtype, implementation: str, name: str, batch: Batch
) -> None:
    """Meta tensors have none: on a GPU nothing would wait. Under VARLEN this is the real operator
    with its checks.
    """
    config = copy.deepcopy(CONFIGS[name])
    config._attn_implementation = implementation
    view = capture_view(build_encoder(config, device="meta").to(dtype), 4)
    hidden = run(view, batch.with_tensors(lambda tensor: tensor.to("meta")))
    assert (hidden.shape, hidden.dtype) == ((5, T, sum(view.widths)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_eager_attention_keep_the_dtype_and_hide_all(
    dtype: torch.dtype, batch: Batch
) -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    view = capture_view(build_encoder(config).to(dtype), 4)
    sdpa = run(view, batch)
    config._attn_implementation = "eager"
    eager = run(view, batch)
    assert eager.dtype is dtype
    assert (eager - sdpa).norm() < 0.02 * sdpa.norm()


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
@pytest.mark.usefixtures("varlen")
def test_rows_without_documents_go_on_as_under_sdpa(
    name: str, batch: Batch, tmp_path: Path
) -> None:
    config = copy.deepcopy(CONFIGS[name])
    view = student_view(config)
    ids_BT, mask_BT, segment_ids_BT, position_ids_BT, _ = batch.tokens
    inputs = (
        TokenInputs(ids_BT),
        TokenInputs(ids_BT, mask_BT),
        TokenInputs(ids_BT, None, segment_ids_BT, position_ids_BT),
    )
    expected = [torch.cat(view(each), -1) for each in inputs]
    view.config.save_pretrained(tmp_path / "before")
    assert use_varlen_attention(view.config, torch.device("cpu"), torch.float32)
    assert view.config._attn_implementation == VARLEN
    for each, hidden in zip(inputs, expected, strict=True):
        assert torch.equal(torch.cat(view(each), -1), hidden)
    view.config.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before/config.json").read_text() == (
        tmp_path / "after/config.json"
    ).read_text()


def test_where_varlen_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    config.hidden_size = 4 * 32
    assert not use_varlen_attention(config, torch.device("cpu"), bf16)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert all(varlen_attention_available(gpu, dtype, 64) for dtype in (bf16, torch.float16))
    assert not varlen_attention_available(gpu, torch.float32, 64)
    assert not any(varlen_attention_available(gpu, bf16, size) for size in (12, 136))
    assert not use_varlen_attention(config, gpu, bf16, dropout=0.1)
    assert config._attn_implementation != VARLEN
    assert use_varlen_attention(config, gpu, bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not varlen_attention_available(gpu, bf16, 64)


def test_refusals(batch: Batch) -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    with pytest.raises(ValueError, match="describe documents together; found one of them"):
        model_inputs(config, batch.tokens._replace(position_ids_BT=None))
    config._attn_implementation = "flex_attention"
    with pytest.raises(
        ConfigError,
        match=r"^segment_ids_BT works with .* eager, found 'flex_attention'; leave",
    ):
        model_inputs(config, batch.tokens)


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Dynamo's own, hidden by it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("implementation", ["sdpa", VARLEN])
@pytest.mark.usefixtures("varlen", "compiler")
def test_equal_blocks_share_one_compiled_graph(
    implementation: str, batch: Batch, tmp_path: Path
) -> None:
    """Two graphs, a block's and the captured one's, for one depth and another, and for other
    documents.
    """
    other = batch_of(
        tmp_path / "rows",
        [(row, start, end) for row in range(5) for start, end in ((0, 9), (9, T))],
    )
    config = copy.deepcopy(CONFIGS["roberta"])
    config._attn_implementation = implementation
    for num_layers in (2, 5):
        view = student_view(config, num_hidden_layers=num_layers)
        compiled = copy.deepcopy(view)
        compiled.compile_blocks(backend="aot_eager")
        for packed in (batch, other):
            weights_BTD = torch.randn(5, T, 96)
            outputs = [run(each, packed) for each in (view, compiled)]
            torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
            expected, found = (
                gradients(each, (output * weights_BTD).mean())
                for each, output in zip((view, compiled), outputs, strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in CONFIGS
        if not architecture_of(CONFIGS[name]).eager_only and name != "gemma3_text-bidirectional"
    ],
)
def test_varlen_attention_on_a_gpu(name: str, batch: Batch) -> None:
    """Teacher and student in bf16 against the block mask in fp32, without a wait for the device."""
    config = tiny_config(name, {**SIZES, "hidden_size": 64, "initializer_range": 0.1})
    view = student_view(config, hidden_size=64).cuda()
    on_gpu = batch.with_tensors(Tensor.cuda)
    assert on_gpu.mask_BT is not None
    expected = run(view, on_gpu)
    expected_gradients = gradients(view, expected[on_gpu.mask_BT].square().mean())
    view.bfloat16()
    assert use_varlen_attention(view.config, torch.device("cuda"), torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(view, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found_gradients = gradients(view, found.float()[on_gpu.mask_BT].square().mean())
    for x, y in zip((found, *found_gradients), (expected, *expected_gradients), strict=True):
        assert (x.float() - y).norm() <= 0.03 * y.norm() + 1e-6
