"""The captured Q/K/V is that of the whole model, bit for bit, and the view costs nothing above
it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from conftest import ENCODER_SIZES as SIZES
from encoders import NAMES, tiny_config
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ElectraForPreTraining,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError
from scaledistill.models.architectures import (
    architecture_of,
    build_encoder,
    check_layer,
    max_sequence_length,
)
from scaledistill.models.view import capture_qkv, capture_view, forward_flops, model_inputs

CONFIGS = {name: tiny_config(name, SIZES) for name in NAMES}
# With both dtypes and both kinds of attention.
OFTEN = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "electra-wide", "modernbert")
USUAL = [(torch.float32, "sdpa"), (torch.bfloat16, "eager")]
IDS_BT = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(0))
RIGHT, LEFT_AND_INNER = torch.ones(2, 3, 17, dtype=torch.bool)
RIGHT[0, 9:] = RIGHT[1, 1:] = False
LEFT_AND_INNER[1, :4] = LEFT_AND_INNER[2, 6:8] = False


def encoder(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_encoder(copy.deepcopy(config)).eval()


@pytest.fixture(scope="module")
def bert() -> Iterator[PreTrainedModel]:
    """One model for the tests that must leave it as it was; that they did is checked at the end."""
    model = encoder(CONFIGS["bert"])
    before = snapshot(model)
    yield model
    assert snapshot(model) == before


def snapshot(model: nn.Module) -> list[object]:
    """All that a capture might change: modules, modes, hooks, parameter objects and values."""
    return [
        (
            name,
            id(module),
            type(module),
            module.training,
            [len(value) for key, value in vars(module).items() if key.endswith("_hooks")],
            [
                (key, id(tensor), tensor.sum().item())
                for key, tensor in module.named_parameters(recurse=False)
            ],
            sorted(key for key in vars(module) if not key.startswith("__")),
        )
        for name, module in model.named_modules()
    ]


def hooked_qkv(model: PreTrainedModel, layer: int, **inputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs of the projections: those of the block's first use, or of its `layer`-th if it
    is repeated.
    """
    row = architecture_of(model.base_model.config)
    block = model.base_model.get_submodule(row.block_path(layer))
    found: list[Tensor] = []
    handles = [
        block.get_submodule(path).register_forward_hook(lambda _m, _i, output: found.append(output))
        for path in row.projections
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    if row.fused_by_head:  # DeBERTa v1, in the words of its code
        attention = block.attention.self
        heads, q_bias, v_bias = map(
            attention.transpose_for_scores,
            (found[0], attention.q_bias[None, None, :], attention.v_bias[None, None, :]),
        )
        query, key, value = heads.chunk(3, dim=-1)
        found = [query + q_bias, key, value + v_bias]
        return tuple(each.permute(0, 2, 1, 3).flatten(2) for each in found)
    first = 3 * (layer - 1) if row.repeats_block else 0
    return found[0].chunk(3, dim=-1) if row.fused else tuple(found[first : first + 3])


@pytest.mark.parametrize(
    ("name", "dtype", "attention"),
    [
        pytest.param(*case, marks=() if case[0] in OFTEN or case[1:] in USUAL else pytest.mark.full)
        for case in itertools.product(CONFIGS, [torch.float32, torch.bfloat16], ["sdpa", "eager"])
        if case[2] == "eager" or not architecture_of(CONFIGS[case[0]]).eager_only
    ],
)
def test_bit_equal_to_hooks_on_the_whole_model(
    name: str, dtype: torch.dtype, attention: str
) -> None:
    model = encoder(CONFIGS[name]).to(dtype)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for layer, mask_BT in ((1, None), (3, None), (3, RIGHT), (4, LEFT_AND_INNER)):
            ids_BT = (
                IDS_BT
                if mask_BT is None
                else IDS_BT.masked_fill(~mask_BT, model.config.pad_token_id)
            )
            inputs = {"input_ids": ids_BT} | (
                {} if mask_BT is None else {"attention_mask": mask_BT.long()}
            )
            expected = hooked_qkv(model, layer, **inputs)
            assert all(map(torch.equal, capture_qkv(model, layer, **inputs), expected))
            found = capture_view(model, layer)(TokenInputs(ids_BT, mask_BT))
            assert all(map(torch.equal, found, expected))
            assert found.q.dtype is dtype


@pytest.mark.parametrize(
    "model_class", [BertForMaskedLM, BertForSequenceClassification, ElectraForPreTraining]
)
def test_task_models(model_class: type[PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = model_class(
        CONFIGS["electra" if model_class is ElectraForPreTraining else "bert"]
    ).eval()
    assert all(
        map(
            torch.equal,
            capture_qkv(model, 2, input_ids=IDS_BT),
            hooked_qkv(model, 2, input_ids=IDS_BT),
        )
    )


def test_model_stays_as_it_was() -> None:
    model = encoder(CONFIGS["bert"]).train()
    model.encoder.layer[0].eval()
    model.config.output_hidden_states = True
    before = snapshot(model)
    capture_qkv(model, 2, input_ids=IDS_BT, output_attentions=True)
    view = capture_view(model, 2).module
    view.register_forward_hook(lambda *_: None)
    view.encoder.register_forward_pre_hook(lambda *_: None)
    assert snapshot(model) == before
    model.eval()
    assert len(model(input_ids=IDS_BT).hidden_states) == 5
    capture_qkv(model, 2, input_ids=IDS_BT)
    assert len(model(input_ids=IDS_BT).hidden_states) == 5


def test_view_shares_parameters_under_their_names() -> None:
    model = BertModel(CONFIGS["bert"])
    view = capture_view(model, 3)
    whole = dict(model.named_parameters())
    shared = dict(view.module.named_parameters())
    assert all(whole[name] is parameter for name, parameter in shared.items())
    assert list(view.module.state_dict()) == [name for name in whole if name in shared]
    assert {name for name in whole if name not in shared} == {
        name
        for name in whole
        if name.startswith(("encoder.layer.3", "pooler", "encoder.layer.2."))
        and "layer.2.attention.self" not in name
    }
    assert view.widths == (48, 48, 48)


def test_inputs_embeds(bert: PreTrainedModel) -> None:
    embeds = bert.embeddings.word_embeddings(IDS_BT)
    assert all(
        map(
            torch.equal,
            capture_qkv(bert, 3, inputs_embeds=embeds),
            capture_qkv(bert, 3, input_ids=IDS_BT),
        )
    )


def test_fully_padded_sequence_stays_finite(bert: PreTrainedModel) -> None:
    mask_BT = RIGHT.clone()
    mask_BT[2] = False
    found = capture_view(bert, 3)(TokenInputs(IDS_BT, mask_BT))
    assert all(each.isfinite().all() for each in found)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = encoder(
        BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ).train()
    view = capture_view(model, 4).module

    def gradients() -> list[Tensor]:
        model.zero_grad()
        view(input_ids=IDS_BT).last_hidden_state.square().sum().backward()
        return [parameter.grad for parameter in view.parameters()]

    plain = gradients()
    # Transformers 5.17 has the old name only; newer ones warn about it.
    getattr(view, "activation_checkpointing_enable", view.gradient_checkpointing_enable)()
    assert all(map(torch.equal, gradients(), plain))


def test_compiles_without_graph_breaks(bert: PreTrainedModel) -> None:
    view = capture_view(bert, 2).module
    compiled = torch.compile(view, backend="eager", fullgraph=True)
    inputs = model_inputs(bert.config, TokenInputs(IDS_BT, RIGHT))
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).last_hidden_state, view(**inputs).last_hidden_state)
    torch._dynamo.reset()


# Dynamo's own, hidden by it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@dynamo.patch(recompile_limit=1)
def test_compiled_blocks() -> None:
    """Equal blocks share a graph, in every shape, with and without mask and gradients, beyond
    Dynamo's own limit.
    """
    torch._dynamo.reset()
    counters.clear()
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    view, compiled = (capture_view(encoder(config).train(), 4) for _ in range(2))
    compiled.compile_blocks(backend="aot_eager")
    for ids_BT, mask_BT, graded in (
        (IDS_BT, None, False),
        (IDS_BT, RIGHT, False),
        (IDS_BT[:2], None, False),
        (IDS_BT, RIGHT, True),
        (IDS_BT, LEFT_AND_INNER, False),
    ):
        with torch.set_grad_enabled(graded):
            tokens = TokenInputs(ids_BT, mask_BT)
            hidden, expected = (torch.cat(each(tokens), -1) for each in (compiled, view))
        torch.testing.assert_close(hidden, expected)
    for each in (view, compiled):
        torch.cat(each(tokens), -1).square().sum().backward()
    parameters = (each.module.parameters() for each in (compiled, view))
    for parameter, other in zip(*parameters, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    assert counters["stats"]["unique_graphs"] == 4 + 3  # the captured block takes no mask
    assert not counters["graph_break"]
    assert list(compiled.module.state_dict()) == list(view.module.state_dict())
    torch._dynamo.reset()


def test_bert_large_teacher_size() -> None:
    config = BertConfig(
        num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096
    )
    model = build_encoder(config, device="meta")
    view = capture_view(model, 21).module
    assert round(sum(parameter.numel() for parameter in view.parameters()) / 1e6) == 287
    assert 0.8 < forward_flops(view, 512) / forward_flops(model, 512) <= 0.845


def test_nothing_above_the_projections_is_computed(bert: PreTrainedModel) -> None:
    num_tokens, width = 16, SIZES["hidden_size"]
    three = encoder(BertConfig(**{**SIZES, "num_hidden_layers": 3}))
    projections = 3 * 2 * num_tokens * width * width
    assert (
        forward_flops(capture_view(bert, 4).module, num_tokens)
        == forward_flops(three, num_tokens) + projections
    )


def test_max_sequence_length() -> None:
    assert [max_sequence_length(CONFIGS[name]) for name in ("bert", "roberta", "electra")] == [
        40,
        38,
        40,
    ]
    for name in ("bert", "roberta"):
        view = capture_view(encoder(CONFIGS[name]), 1).module
        longest = max_sequence_length(CONFIGS[name])
        view(input_ids=torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)):
            view(input_ids=torch.full((1, longest + 1), 5))


def test_refusals(bert: PreTrainedModel) -> None:
    with pytest.raises(
        ConfigError, match=r"^layer=30 is beyond the model's 24 layers; use 1 to 24"
    ):
        check_layer(30, 24)
    with pytest.raises(ConfigError, match="layer=0 is below the model's 4 layers; use 1 to 4"):
        capture_view(bert, 0)
    with pytest.raises(ConfigError, match="layer=5 is beyond the model's 4 layers"):
        capture_qkv(bert, 5, input_ids=IDS_BT)
    sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    with pytest.raises(
        ConfigError,
        match=r"type 'gpt2', which is not supported; use a model of type albert, bert, camem.*; "
        "CONTRIBUTING.md has the recipe for adding an architecture$",
    ):
        capture_view(GPT2Model(GPT2Config(vocab_size=97, n_embd=8, n_head=2, n_layer=1)), 1)
    llama = LlamaModel(LlamaConfig(**sizes, pad_token_id=0))
    llama.config.model_type = "bert"
    with pytest.raises(ConfigError, match="calls itself 'bert' but is not built like one"):
        capture_view(llama, 1)
    with pytest.raises(
        ValueError,
        match=r"widths \(48, 48, 48\) returned \(3, 17, 48\); expected a last size of 144",
    ):
        capture_view(bert, 4).split(bert(input_ids=IDS_BT).last_hidden_state)
