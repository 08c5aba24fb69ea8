"""A model cut at one block: token ids in, that block's Q, K and V out.

Inputs: a transformers encoder, or a task model around one. Outputs: a `QKVView`, which shares the
encoder's parameters and computes nothing above the chosen block's projections. Not handled here:
where an architecture keeps its parts (`models.architectures`), loading, freezing and training
(`models.teacher`, `models.student`).

Legend: B sequences, T tokens, D width of one projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import SettingError, named
from scaledistill.models.architectures import (
    Architecture,
    architecture_of,
    base_encoder,
    build_encoder,
    check_layer,
    first_position,
)
from scaledistill.models.attention import document_attention, row_attention
from scaledistill.models.configs import plain_config
from scaledistill.relations import QKV

_flops: dict[tuple[str, int, int], int] = {}
"""What `view_flops` has counted, by the config's JSON, layers and tokens."""


@dataclass(frozen=True)
class QKVView:
    """A model that is cut at a block and returns that block's Q, K and V.

    `module` shares the model's parameters, under the same names, up to the block's projections; it
    does not contain the upper layers. It takes the inputs of the model and returns Q, K and V
    joined in `last_hidden_state`, [B, T, Dq + Dk + Dv], so that an engine can wrap it.
    """

    module: nn.Module
    config: PreTrainedConfig
    widths: tuple[int, int, int]
    """Dq, Dk and Dv."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of `module`; the last one has projections only."""
        return list(self.module.get_submodule(architecture_of(self.config).blocks).children())

    def copy(self) -> QKVView:
        """Return a view whose module is a copy."""
        return replace(self, module=copy.deepcopy(self.module))

    def recompute_blocks(self) -> None:
        """Let the backward run each block's forward again, instead of keeping its activations."""
        for block in self.blocks:
            checkpoint(block)

    def __call__(
        self, tokens: TokenInputs, module: Callable[..., Any] | None = None, **more: Any
    ) -> QKV:
        """Return Q, K and V, each [B, T, D], for a micro-batch.

        Args:
            module: what an engine returned for `module`, to run in its place.
            more: further inputs of the model.
        """
        inputs = model_inputs(self.config, tokens)
        return self.split((module or self.module)(**inputs, **more).last_hidden_state)

    def split(self, joined: Tensor) -> QKV:
        """Split the output of `module` into Q, K and V, without copying.

        Raises:
            ValueError: the last dimension is not the sum of the widths.
        """
        if joined.shape[-1] != sum(self.widths):
            raise ValueError(
                f"a view of widths {self.widths} returned {tuple(joined.shape)}; expected a last "
                f"size of {sum(self.widths)}"
            )
        return QKV(*joined.split(self.widths, dim=-1))

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compile the blocks for fixed shapes; equal blocks share one compiled graph.

        The blocks are shared with the model. Each new batch shape, and the first call with a mask
        or with gradients, compiles once more.
        """
        # Imported here, because it takes seconds that a run without compilation need not spend.
        from torch._dynamo import config as dynamo

        # The blocks of all models count together; beyond the limit, 8, blocks would run uncompiled
        # with only a warning. Teacher and student, training and validation, with and without a
        # mask, whole and smaller batches make 12.
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)


def capture_view(model: PreTrainedModel, layer: int) -> QKVView:
    """Return a view of `model` whose output is block `layer`'s Q, K and V.

    `model` (or the encoder inside a task model) is not changed.

    Args:
        model: a supported encoder, or a task model around one.
        layer: the block, counted from 1.

    Raises:
        SettingError: the architecture is not supported, or has no such block.
    """
    encoder = base_encoder(model)
    with named(config="model"):
        row = architecture_of(encoder.config)
    if getattr(encoder.config, "is_decoder", False) and not row.causal:
        raise SettingError(
            "model",
            expected="has is_decoder=true in its config, so its tokens do not attend to later ones",
            remedy="use an encoder",
        )
    try:
        blocks = cast(nn.ModuleList, encoder.get_submodule(row.blocks))
        depth = encoder.config.num_hidden_layers if row.repeats_block else len(blocks)
        check_layer(layer, depth)
        last = encoder.get_submodule(row.block_path(layer))
        captured = _CapturedBlock(last, row, encoder.config.num_attention_heads)
    except AttributeError as error:
        raise SettingError(
            "model",
            expected=f"calls itself {encoder.config.model_type!r} but is not built like one: "
            f"{error}",
            remedy="use a model that runs on transformers' own code",
        ) from error
    view = _own_copy(encoder)
    view.config = plain_config(encoder.config)
    parent, name = _own_parent(view, row.blocks)
    if row.repeats_block is None:
        kept = [*blocks[: layer - 1], captured]
    else:
        kept = [captured if layer == 1 else _repeated(last, layer - 1, captured)]
        repeating = view.get_submodule(row.repeats_block)
        repeating.config = copy.copy(repeating.config)
        repeating.config.num_hidden_layers = 1
    parent._modules[name] = nn.ModuleList(kept)
    if row.after_first is not None and layer == 1:
        parent, name = _own_parent(view, row.after_first)
        parent._modules[name] = None
    view._modules.update({name: None for name in row.dropped if name in view._modules})
    if row.final_norm is not None:
        parent, name = _own_parent(view, row.final_norm)
        parent._modules[name] = nn.Identity()
    # Keep the view from installing transformers' recording hooks: its blocks are shared, so the
    # model would install them a second time.
    view._output_capturing_hooks_installed = True
    if row.rotary is not None and view._modules.get(row.rotary) is not None:
        rotary = view._modules[row.rotary] = _own_copy(view.get_submodule(row.rotary))
        rotary.__class__ = type("ExactRotary", (_ExactBuffers, type(rotary)), {})
    return QKVView(view, view.config, captured.widths)


def model_inputs(config: PreTrainedConfig, tokens: TokenInputs) -> dict[str, Any]:
    """Return the arguments that make a model attend to real tokens, or within documents.

    The mask is ignored if documents are given.

    Raises:
        ValueError: only one of segment ids and position ids.
        SettingError: documents are given, but the model has its own kind of attention.
    """
    input_ids_BT, mask_BT, segment_ids_BT, position_ids_BT, cu_seqlens = tokens
    inputs: dict[str, Any] = {"input_ids": input_ids_BT}
    if architecture_of(config).causal:
        inputs["use_cache"] = False  # it would keep all keys and values
    if segment_ids_BT is not None and position_ids_BT is not None:
        inputs["position_ids"] = position_ids_BT + first_position(config)
        inputs |= document_attention(config, segment_ids_BT, cu_seqlens)
    elif segment_ids_BT is not None or position_ids_BT is not None:
        raise ValueError(
            "segment_ids_BT and position_ids_BT describe documents together; found one of them"
        )
    else:
        inputs |= row_attention(config, input_ids_BT, mask_BT)
    return inputs


def capture_qkv(model: PreTrainedModel, layer: int, **inputs: Any) -> QKV:
    """Run `model` on its usual `inputs`; return block `layer`'s Q, K and V, each [B, T, D].

    `layer` counts from 1; upper layers are not run. For one-off use: the mode, hooks, parameters
    and outputs of `model` are not changed. Gradients flow unless the caller disables them.

    Raises:
        SettingError: the architecture is not supported, or has no such block.
    """
    view = capture_view(model, layer)
    return view.split(view.module(**inputs).last_hidden_state)


def forward_flops(module: nn.Module, num_tokens: int) -> int:
    """Return the floating-point operations of one forward on one sequence of `num_tokens`.

    A multiply-add counts as 2. The module's own forward is run on the meta device; no weights are
    read, wherever they are.
    """
    tensors: Mapping[str, Tensor] = {
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    input_ids_BT = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    inputs = model_inputs(cast(PreTrainedConfig, module.config), TokenInputs(input_ids_BT))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(module, shapes, kwargs=inputs)
    return counter.get_total_flops()


def view_flops(config: PreTrainedConfig, num_layers: int, num_tokens: int) -> int:
    """Return the `forward_flops` of a model's view of `num_layers`.

    Those of deep views are extrapolated from shallow ones, because all blocks are alike, and kept
    for the process: counting takes long.
    """
    key = (config.to_json_string(use_diff=False), num_layers, num_tokens)
    if key not in _flops:
        model = build_encoder(config, device="meta")

        def counted(layers: int) -> int:
            """Count the operations of a view of so many layers."""
            return forward_flops(capture_view(model, layers).module, num_tokens)

        deeper = max(0, num_layers - 3)
        shallow = counted(num_layers - deeper)
        _flops[key] = shallow + deeper * (shallow - counted(2)) if deeper else shallow
    return _flops[key]


class _CapturedBlock(nn.Module):
    """A block's projections (and input norm), under the block's own parameter names.

    Its output is [B, T, Dq + Dk + Dv].
    """

    def __init__(self, block: nn.Module, row: Architecture, num_heads: int) -> None:
        super().__init__()
        self.row, self.num_heads = row, num_heads
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type  # by which some models choose a mask
        for path in (*row.projections, *filter(None, [row.input_norm])):
            container, name = self._container(path)
            container.add_module(name, block.get_submodule(path))
        for path in row.fused_biases.values():
            container, name = self._container(path)
            container.register_parameter(name, block.get_parameter(path))

    def _container(self, path: str) -> tuple[nn.Module, str]:
        """Return the module above `path`, made if there is none, and the name below it."""
        *parents, name = path.split(".")
        container: nn.Module = self
        for parent in parents:
            if parent not in container._modules:
                container.add_module(parent, nn.Module())
            container = container.get_submodule(parent)
        return container, name

    @property
    def widths(self) -> tuple[int, int, int]:
        """Dq, Dk and Dv."""
        sizes = [
            cast(nn.Linear, self.get_submodule(path)).out_features for path in self.row.projections
        ]
        if self.row.fused:
            sizes = [sizes[0] // 3] * 3
        return sizes[0], sizes[1], sizes[2]

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        joined = _project(self, self.row, self.num_heads, hidden_states)
        return (joined, None) if self.row.block_returns_tuple else joined


class _RepeatedBlock(nn.Module):
    """A block that is run `passes` times, then projects; the mixin of the block's own class."""

    row: Architecture
    num_heads: int
    passes: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for _ in range(self.passes):
            hidden_states = super().forward(hidden_states, *args, **kwargs)
        return _project(self, self.row, self.num_heads, hidden_states)


def _repeated(block: nn.Module, passes: int, captured: _CapturedBlock) -> nn.Module:
    """Return a copy of `block`, with its parameters, that projects after `passes` passes."""
    repeated = _own_copy(block)
    repeated.row, repeated.num_heads = captured.row, captured.num_heads
    repeated.passes = passes
    repeated.__class__ = type("RepeatedBlock", (_RepeatedBlock, type(block)), {})
    return cast(nn.Module, repeated)


def _project(block: nn.Module, row: Architecture, num_heads: int, hidden_BTD: Tensor) -> Tensor:
    """Return the Q, K and V of a block's input, joined."""
    if row.input_norm is not None:
        hidden_BTD = block.get_submodule(row.input_norm)(hidden_BTD)
    outputs = [block.get_submodule(path)(hidden_BTD) for path in row.projections]
    if row.fused and (row.fused_by_head or row.fused_order != "qkv"):
        if row.fused_by_head:
            heads = outputs[0].unflatten(-1, (num_heads, 3, -1))
            thirds = [each.flatten(-2) for each in heads.unbind(-2)]
        else:
            thirds = outputs[0].chunk(3, dim=-1)
        outputs = [thirds[row.fused_order.index(letter)] for letter in "qkv"]
        for letter, path in row.fused_biases.items():
            outputs["qkv".index(letter)] = outputs["qkv".index(letter)] + attrgetter(path)(block)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class _ExactBuffers(nn.Module):
    """A module whose buffers keep their dtype when the module is cast.

    Rotary frequencies in 16 bits would put tokens at other positions.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
        return self


def _own_copy(module: nn.Module) -> Any:
    """Copy a module object: same children, parameters and hooks, in dictionaries of its own.

    Changing the copy's dictionaries does not change the original.
    """
    clone = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict | set):
            vars(clone)[name] = copy.copy(value)
    return clone


def _own_parent(view: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Give `view` its own copies of the modules above `path`.

    Return the last of them and the name below it.
    """
    *parents, name = path.split(".")
    for parent in parents:
        view._modules[parent] = _own_copy(view.get_submodule(parent))
        view = view.get_submodule(parent)
    return view, name
