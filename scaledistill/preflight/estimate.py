"""What a run will need, from shapes alone: parameters, FLOPs, memory, checkpoint size.

Models are built on the meta device and run on fake tensors: no weights are read and no memory is
taken.

Legend: B sequences, T tokens, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from scaledistill.config.schema import DistillConfig
from scaledistill.engines.deepspeed_block import resolve_block, zero_settings
from scaledistill.models.capture import (
    blocks_of,
    build_encoder,
    capture_view,
    forward_flops,
    split_qkv,
    view_inputs,
)
from scaledistill.models.student import exported, set_dropout
from scaledistill.relations import QKV, relation_loss
from scaledistill.relations.spec import letters_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
# Sequences of the counted micro-batch: so many that what does not grow with them vanishes in the
# quotient.
_COUNTED_SEQUENCES = 4096
# On a CPU the heap adds to what is alive: libraries' buffers, and holes between blocks that glibc
# does not map one by one, those below 32 MB. Measured with BERT-base → 6×384: 180 to 230 MB at 74
# MB of activations, 420 to 540 MB at 450 to 900 MB; a twentieth of the whole more or less from run
# to run.
_HEAP_BYTES = 350_000_000
_MOST_HOLES_BYTES = 500_000_000


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes are per rank, unless said otherwise; memory is the GPU's, or the host's where
    there is none.
    """

    teacher_parameters: int
    """Of the truncated teacher."""
    student_parameters: int
    """Of the full student, as exported."""
    trained_parameters: int
    flops_per_token: float
    """Teacher forward, student forward and backward."""
    teacher_flops_fraction: float
    placements: dict[str, tuple[int, int]]
    """The teacher's bytes for each `teacher.placement`: in memory of the device, and of the host
    beside it."""
    teacher_bytes: int
    """On the device, as it is placed."""
    weights_and_gradients_bytes: int
    optimizer_bytes: int
    """fp32 master weights and both Adam moments."""
    optimizer_on_host: bool
    engine_bytes: int
    """Buckets that gradients are reduced in; where the student is sharded also its gathered
    weights."""
    activation_bytes_per_sequence: int
    """What a sequence more in the micro-batch adds to the peak of teacher, student, relation loss
    and backward."""
    relation_bytes: int
    """The relation loss's part of it, for one micro-batch."""
    data_bytes: int
    """Rows that the data order holds in host memory, at most."""
    checkpoint_bytes: int
    """One checkpoint on disk."""
    on_host: bool
    """The run has no GPU: all of it lies in the host's memory."""

    @property
    def state_bytes(self) -> int:
        """What is held whatever the micro-batch."""
        held = self.teacher_bytes + self.weights_and_gradients_bytes + self.engine_bytes
        if self.on_host:
            return held + self.optimizer_bytes + self.data_bytes + _HEAP_BYTES
        return held + (0 if self.optimizer_on_host else self.optimizer_bytes)

    def memory_bytes(self, sequences: int) -> int:
        """Return the peak with micro-batches of so many sequences."""
        activations = sequences * self.activation_bytes_per_sequence
        return (
            self.state_bytes
            + activations
            + (min(activations // 2, _MOST_HOLES_BYTES) if self.on_host else 0)
        )


def estimate(
    config: DistillConfig,
    name: str,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    world_size: int,
    device_type: str = "cpu",
) -> Estimate:
    """Return what student `name` of a resolved configuration needs on devices of `device_type`,
    "cpu" or "cuda".
    """
    data, length, on_host = config.data, config.data.sequence_length, device_type == "cpu"
    whole_teacher = build_encoder(teacher, device="meta")
    teacher_view = capture_view(whole_teacher, config.teacher.layer)
    full = build_encoder(student, device="meta")
    student_view = capture_view(full, student.num_hidden_layers)
    trained = sum(parameter.numel() for parameter in student_view.parameters())
    whole = sum(parameter.numel() for parameter in full.parameters())
    _, kept = exported(student, dict(full.named_parameters()), config.students[name].num_layers)
    held = sum(parameter.numel() for parameter in teacher_view.parameters())
    teacher_flops = _forward_flops(whole_teacher, config.teacher.layer, length)
    student_flops = 3 * _forward_flops(full, student.num_hidden_layers, length)
    stage, optimizer_on_host, parameters_on_host = zero_settings(config)
    weight_share = world_size if stage == 3 else 1
    gradient_share = world_size if stage >= 2 else 1
    weights = trained * BYTES[config.train.precision] // weight_share
    if config.engine.name == "fsdp" or (parameters_on_host and not on_host):
        # FSDP2 computes on gathered copies of the fp32 weights, which count as the optimizer's.
        weights = 0
    placements = _placements(teacher_view, BYTES[config.teacher.dtype], world_size, on_host)
    # Without a backward two blocks in a row need what many need.
    short_view = capture_view(whole_teacher, min(3, config.teacher.layer))
    activations, relation = _bytes_per_sequence(config, name, short_view, student_view)
    return Estimate(
        teacher_parameters=held,
        student_parameters=sum(parameter.numel() for parameter in kept.values()),
        trained_parameters=trained,
        flops_per_token=(teacher_flops + student_flops) / length,
        teacher_flops_fraction=teacher_flops / (teacher_flops + student_flops),
        placements=placements,
        teacher_bytes=placements[config.teacher.placement][0],
        weights_and_gradients_bytes=weights + trained * 4 // gradient_share,
        optimizer_bytes=trained * 12 // world_size,
        optimizer_on_host=optimizer_on_host,
        engine_bytes=_engine_bytes(config, student_view, world_size, on_host),
        activation_bytes_per_sequence=activations,
        relation_bytes=relation * int(config.train.micro_batch_size or 1),
        data_bytes=data.num_lanes
        * data.window_rows
        * length
        * (9 if teacher.vocab_size <= 1 << 16 else 17)
        // 4,
        checkpoint_bytes=whole * 4 + trained * 8,
        on_host=on_host,
    )


def _forward_flops(model: PreTrainedModel, num_layers: int, length: int) -> int:
    """Return the FLOPs of a view of `num_layers`, counted from shallow ones: blocks are alike,
    counting takes long.
    """
    if num_layers <= 3:
        return forward_flops(capture_view(model, num_layers), length)
    two, three = (forward_flops(capture_view(model, layers), length) for layers in (2, 3))
    return three + (num_layers - 3) * (three - two)


def batch_arguments(
    config: DistillConfig, sequences: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return a micro-batch as `Teacher.forward` and `view_inputs` take it: all that a batch of the
    run may have.
    """
    shape, mode = (sequences, config.data.sequence_length), config.data.attention
    arguments = {"input_ids_BT": torch.zeros(shape, dtype=torch.long, device=device)}
    if mode == "row":
        return arguments | {"mask_BT": torch.ones(shape, dtype=torch.bool, device=device)}
    arguments["segment_ids_BT"] = torch.zeros(shape, dtype=torch.int32, device=device)
    arguments["position_ids_BT"] = torch.arange(shape[1], device=device).expand(shape)
    ends = torch.arange(sequences + 1, dtype=torch.int32, device=device) * shape[1]
    return arguments | {"cu_seqlens": ends}


def _bytes_per_sequence(
    config: DistillConfig, name: str, teacher_view: nn.Module, student_view: nn.Module
) -> tuple[int, int]:
    """Return the peak of what is alive during a micro-batch, and what of it the loss adds, per
    sequence.

    The views are on the meta device; the step is made on fake tensors of the CPU. On the meta
    device attention would not take the fused kernel that it takes on real ones.
    """
    student_view.train()
    set_dropout(student_view, config.students[name].dropout)
    with FakeTensorMode():
        teacher_tensors = _fake_tensors(teacher_view.eval(), DTYPES[config.teacher.dtype])
        student_tensors = _fake_tensors(student_view, DTYPES[config.train.precision])
        batch = batch_arguments(config, _COUNTED_SEQUENCES)
        with _LiveBytes(*teacher_tensors.values(), *student_tensors.values()) as live:
            with torch.no_grad():
                target = _forward(teacher_view, teacher_tensors, batch)
            output = _forward(student_view, student_tensors, batch)
            kept, peak, live.peak = live.now, live.peak, live.now
            loss = _loss(config, name, target, output, batch)
            relation, live.peak = live.peak - kept, max(peak, live.peak)
            del target, output
            loss.backward()
    return -(-live.peak // _COUNTED_SEQUENCES), -(-relation // _COUNTED_SEQUENCES)


def _fake_tensors(view: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    named = [*view.named_parameters(), *view.named_buffers()]
    return {
        name: torch.empty(
            x.shape, dtype=dtype if x.is_floating_point() else x.dtype
        ).requires_grad_(x.requires_grad)
        for name, x in named
    }


def _forward(view: nn.Module, tensors: dict[str, Tensor], batch: dict[str, Tensor]) -> QKV:
    inputs = view_inputs(cast(PretrainedConfig, view.config), **batch)
    output_BTD = torch.func.functional_call(view, tensors, kwargs=inputs).last_hidden_state
    return split_qkv(output_BTD, cast("tuple[int, int, int]", view.qkv_widths))


def _loss(
    config: DistillConfig, name: str, teacher: QKV, student: QKV, batch: dict[str, Tensor]
) -> Tensor:
    heads, pairs, backend = (
        config.relation_heads(name),
        config.relations.pairs,
        config.relations.backend,
    )
    if backend == "reference":
        mask_BT, ids_BT = batch.get("mask_BT"), batch.get("segment_ids_BT")
        return relation_loss(
            teacher,
            student,
            num_heads=heads,
            pairs=pairs,
            mask_BT=mask_BT,
            segment_ids_BT=ids_BT,
            backend=backend,
        ).total
    letters = letters_of(pairs)
    inputs = [getattr(student, letter) for letter in letters]
    # Computes scores again, from both models' tensors and the logarithmic sums of their rows.
    if backend == "triton":
        # And the factors made of them.
        sums = torch.empty(4, len(pairs), heads, *student.q.shape[:2])
        return _LinearLoss.apply(
            [*(getattr(teacher, letter) for letter in letters), *inputs, sums], *inputs
        )
    return _LinearLoss.apply([torch.empty(x.shape) for x in inputs], *inputs)  # the gradients


class _LinearLoss(torch.autograd.Function):
    """Stands for a backend without maps: holds what that one keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, kept: Sequence[Tensor], *student: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.student = [(x.shape, x.dtype) for x in student]
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.student)


class _LiveBytes(TorchDispatchMode):
    """Follows how many bytes of tensors are alive, those of `ignored` ones aside; storages count
    once.
    """

    def __init__(self, *ignored: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage())._cdata not in self._known
            ):
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _placements(
    view: nn.Module, itemsize: int, world_size: int, on_host: bool
) -> dict[str, tuple[int, int]]:
    whole = sum(parameter.numel() for parameter in view.parameters()) * itemsize
    part, gathered = -(-whole // world_size), _gathered_elements(view) * itemsize
    offload = (part + gathered, 0) if on_host else (gathered, part)
    return {"replicate": (whole, 0), "shard": (part + gathered, 0), "offload": offload}


def _gathered_elements(view: nn.Module) -> int:
    """Return the most elements that are whole at a time where parameters are gathered by blocks:
    one and the next.
    """
    blocks = [
        sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(view)
    ]
    rest = sum(parameter.numel() for parameter in view.parameters()) - sum(blocks)
    return rest + sum(sorted(blocks)[-2:])


def _engine_bytes(config: DistillConfig, view: nn.Module, world_size: int, on_host: bool) -> int:
    trained = sum(parameter.numel() for parameter in view.parameters())
    itemsize = BYTES[config.train.precision]
    if config.engine.name == "fsdp":
        gathered = _gathered_elements(view) if config.engine.fsdp.reshard_after_forward else trained
        # And gradients, before they are reduced.
        return gathered * itemsize + 4 * _gathered_elements(view)
    zero = resolve_block(config, world_size)["zero_optimization"]
    bucket = zero["reduce_bucket_size"]
    buckets = (2 if zero["overlap_comm"] else 1) * (min(bucket, trained) if on_host else bucket)
    gathered = trained * itemsize if zero["stage"] == 3 else 0
    return 4 * buckets + gathered
