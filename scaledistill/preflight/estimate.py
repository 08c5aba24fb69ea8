"""Estimate what a run needs, from shapes alone: parameters, FLOPs, memory, checkpoint size.

Inputs: a resolved configuration, the model configs and the number of ranks. Outputs: an `Estimate`.
Models are built on the meta device and run on fake tensors: no weights are read and no memory is
allocated.

Legend: B sequences, T tokens, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schema import DataSettings
from scaledistill.data.tokens import TokenInputs
from scaledistill.engines import EngineBytes, engine_traits
from scaledistill.models.architectures import architecture_of, build_encoder
from scaledistill.models.loss import StudentLoss
from scaledistill.models.student import exported, set_dropout
from scaledistill.models.view import QKVView, capture_view, view_flops
from scaledistill.relations import QKV
from scaledistill.relations.spec import MAX_HEAD_WIDTH, letters_of

# Sequences in the micro-batch that is counted: so many that, divided by them, sizes that do not
# depend on their number vanish.
_COUNTED_SEQUENCES = 4096
# On a CPU the heap holds more than live tensors: copies from the start of the engine, libraries'
# buffers, and holes between blocks of less than 32 MB, which glibc does not map separately. Fitted
# to measured peaks: BERT-base → 6×384 (21 M trained) has 180 to 230 MB of it at 74 MB of
# activations, 240 MB at 150 MB, 380 to 540 MB at 450 to 900 MB; 6×512 → 3×256 (10 M) has 120 MB at
# 170 MB. It varies by ±5 % of the total from run to run.
_HEAP_BYTES = 30_000_000
_HEAP_BYTES_PER_PARAMETER = 7
_MOST_HOLES_BYTES = 400_000_000


class StudentSize(NamedTuple):
    """The parameters of a student."""

    parameters: int
    """Of the full student, as exported."""
    trained: int


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Bytes are per rank unless noted otherwise, and of the GPU's memory, or the host's without a GPU.
    """

    teacher_parameters: int
    """Parameters of the truncated teacher."""
    students: Mapping[str, StudentSize]
    """By name."""
    flops_per_token: float
    """Teacher forward, and each student's forward and backward."""
    teacher_flops_fraction: float
    placements: dict[str, tuple[int, int]]
    """The teacher's bytes for each `teacher.placement`: (on the device, on the host as well)."""
    teacher_bytes: int
    """The teacher's bytes on the device, for the configured placement."""
    weights_and_gradients_bytes: int
    optimizer_bytes: int
    """fp32 master weights and both Adam moments."""
    optimizer_on_host: bool
    engine_bytes: int
    """What the engine sends from or gathers into."""
    activation_bytes_per_sequence: int
    """What each sequence of the micro-batch adds to the peak of teacher, student, relation loss and
    backward."""
    relation_bytes: int
    """The relation loss's part of the activations of one micro-batch."""
    data_bytes: int
    """The rows that the data order holds in host memory, at most."""
    checkpoint_bytes: int
    """Size of one checkpoint on disk."""
    on_host: bool
    """The run has no GPU: everything is in host memory."""

    @property
    def student_parameters(self) -> int:
        """Parameters of all students, as exported."""
        return sum(student.parameters for student in self.students.values())

    @property
    def heap_bytes(self) -> int:
        """What the heap of a process without a GPU holds besides tensors."""
        if not self.on_host:
            return 0
        trained = sum(student.trained for student in self.students.values())
        return _HEAP_BYTES + _HEAP_BYTES_PER_PARAMETER * trained

    @property
    def state_bytes(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        held = self.teacher_bytes + self.weights_and_gradients_bytes + self.engine_bytes
        if self.on_host:
            return held + self.optimizer_bytes + self.data_bytes + self.heap_bytes
        return held + (0 if self.optimizer_on_host else self.optimizer_bytes)

    def memory_bytes(self, sequences: int) -> int:
        """Return the peak in bytes with micro-batches of `sequences`."""
        activations = sequences * self.activation_bytes_per_sequence
        holes = min(activations // 2, _MOST_HOLES_BYTES) if self.on_host else 0
        return self.state_bytes + activations + holes


def estimate(
    run: ResolvedRun, teacher: PretrainedConfig, students: Mapping[str, PretrainedConfig]
) -> Estimate:
    """Return what a run needs.

    Args:
        teacher: its full model config.
        students: their model configs under training, by name.
    """
    config, data, length = run.config, run.config.data, run.config.data.sequence_length
    whole_teacher = build_encoder(teacher, device="meta")
    teacher_view = capture_view(whole_teacher, config.teacher.layer)
    teacher_flops = view_flops(teacher, config.teacher.layer, length)
    placements = _placements(run, teacher_view)
    # Without a backward, activations do not add up over layers: two blocks in a row need as much
    # memory as many, unless the model keeps the output of each.
    keeps_all = architecture_of(teacher).keeps_hidden_states
    layer = config.teacher.layer if keeps_all else min(3, config.teacher.layer)
    short_view = capture_view(whole_teacher, layer)
    parts = {
        name: _student_part(run.for_student(name), name, short_view, shape)
        for name, shape in students.items()
    }
    student_flops = sum(part.flops for part in parts.values())
    # Each token of a window takes a 16- or 32-bit id and two bits of layout.
    quarter_bytes_per_token = 9 if teacher.vocab_size <= 1 << 16 else 17
    return Estimate(
        teacher_parameters=_count(teacher_view.module),
        students={name: part.size for name, part in parts.items()},
        flops_per_token=(teacher_flops + student_flops) / length,
        teacher_flops_fraction=teacher_flops / (teacher_flops + student_flops),
        placements=placements,
        teacher_bytes=placements[config.teacher.placement][0],
        weights_and_gradients_bytes=sum(part.held.weights_and_gradients for part in parts.values()),
        optimizer_bytes=sum(part.size.trained * 12 // run.world_size for part in parts.values()),
        optimizer_on_host=any(part.optimizer_on_host for part in parts.values()),
        engine_bytes=sum(part.held.buffers for part in parts.values()),
        # Students take their turns, so that activations of one live at a time.
        activation_bytes_per_sequence=max(part.activations for part in parts.values()),
        relation_bytes=max(part.relation for part in parts.values()) * run.micro_batch_size,
        data_bytes=len(data.sources)
        * (data.num_lanes * data.window_rows * length * quarter_bytes_per_token // 4),
        checkpoint_bytes=sum(part.checkpoint_bytes for part in parts.values()),
        on_host=run.device_type == "cpu",
    )


class _StudentPart(NamedTuple):
    """One student's part of an estimate."""

    size: StudentSize
    flops: int
    """Forward and backward of a sequence."""
    held: EngineBytes
    optimizer_on_host: bool
    activations: int
    """Bytes per sequence, the teacher's included."""
    relation: int
    checkpoint_bytes: int


def _student_part(
    run: ResolvedRun, name: str, teacher_view: QKVView, shape: PretrainedConfig
) -> _StudentPart:
    full = build_encoder(shape, device="meta")
    view = capture_view(full, shape.num_hidden_layers)
    trained = _count(view.module)
    _, kept = exported(shape, dict(full.named_parameters()), run.config.students[name].num_layers)
    engine = engine_traits(run)
    activations, relation = _bytes_per_sequence(run, name, teacher_view, view)
    return _StudentPart(
        size=StudentSize(sum(parameter.numel() for parameter in kept.values()), trained),
        # The backward takes twice the forward: one product for the inputs, one for the weights.
        flops=3 * view_flops(shape, shape.num_hidden_layers, run.config.data.sequence_length),
        held=engine.memory(trained, _gathered_elements(view)),
        optimizer_on_host=engine.optimizer_on_host,
        activations=activations,
        relation=relation,
        checkpoint_bytes=_count(full) * 4 + trained * 8,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sample_tokens(
    data: DataSettings, sequences: int, device: torch.device | str = "cpu"
) -> TokenInputs:
    """Return a micro-batch with every tensor that a batch of the run may have."""
    shape = (sequences, data.sequence_length)
    input_ids_BT = torch.zeros(shape, dtype=torch.long, device=device)
    if data.attention == "row":
        return TokenInputs(input_ids_BT, torch.ones(shape, dtype=torch.bool, device=device))
    return TokenInputs(
        input_ids_BT,
        segment_ids_BT=torch.zeros(shape, dtype=torch.int32, device=device),
        position_ids_BT=torch.arange(shape[1], device=device).expand(shape),
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32, device=device) * shape[1],
    )


def _bytes_per_sequence(
    run: ResolvedRun, name: str, teacher_view: QKVView, student_view: QKVView
) -> tuple[int, int]:
    """Return the peak bytes of live tensors per sequence of a micro-batch, and the loss's part.

    The views are on the meta device, but the step runs on fake CPU tensors: on the meta device,
    attention would not use the fused kernel that it uses on real tensors.
    """
    teacher_view, student_view = teacher_view.copy(), student_view.copy()
    teacher_view.module.eval()
    student_view.module.train()
    set_dropout(student_view.module, run.config.students[name].dropout)
    if engine_traits(run).recomputes_blocks:
        student_view.recompute_blocks()
    # DeBERTa's TorchScript functions, up to transformers 5.22, make small real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher_tensors = _fake_tensors(teacher_view.module, run.teacher_dtype)
        student_tensors = _fake_tensors(student_view.module, run.student_dtype)
        # In the modules themselves, for a forward that is run again in the backward.
        _set_tensors(teacher_view.module, teacher_tensors)
        _set_tensors(student_view.module, student_tensors)
        tokens = sample_tokens(run.config.data, _COUNTED_SEQUENCES)
        with _LiveBytes(*teacher_tensors.values(), *student_tensors.values()) as live:
            with torch.no_grad():
                target = teacher_view(tokens)
            output = student_view(tokens)
            # Restart the peak, to see what the loss's forward adds; the backward raises it further.
            kept, peak, live.peak = live.now, live.peak, live.now
            models = (teacher_view.config, student_view.config)
            loss = _loss(StudentLoss.of(run.config, name, models), target, output, tokens)
            relation, live.peak = live.peak - kept, max(peak, live.peak)
            del target, output
            loss.backward()
    return -(-live.peak // _COUNTED_SEQUENCES), -(-relation // _COUNTED_SEQUENCES)


def _fake_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: torch.empty(
            x.shape, dtype=dtype if x.is_floating_point() else x.dtype
        ).requires_grad_(x.requires_grad)
        for name, x in named
    }


def _set_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        place, _, leaf = name.rpartition(".")
        owner: Any = module.get_submodule(place)
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor


def _loss(loss: StudentLoss, teacher: QKV, student: QKV, tokens: TokenInputs) -> Tensor:
    letters = letters_of(loss.pairs)
    widths = [getattr(model, letter).shape[2] for model in (teacher, student) for letter in letters]
    if loss.backend == "triton" and max(widths) // loss.num_heads > MAX_HEAD_WIDTH:
        loss = replace(loss, backend="reference")
    if loss.backend == "reference":
        return loss(teacher, student, tokens).total
    inputs = [getattr(student, letter) for letter in letters]
    # Triton's backward recomputes the scores from both models' tensors, and from the logarithmic
    # sums of their rows and the factors derived from them.
    if loss.backend == "triton":
        sums = torch.empty(4, len(loss.pairs), loss.num_heads, *student.q.shape[:2])
        return _LinearLoss.apply(
            [*(getattr(teacher, letter) for letter in letters), *inputs, sums], *inputs
        )
    # The sdpa backend keeps only the student's gradients, in fp32.
    return _LinearLoss.apply([torch.empty(x.shape) for x in inputs], *inputs)


class _LinearLoss(torch.autograd.Function):
    """Stands in for a backend that does not store score maps, and keeps what that one keeps."""

    @staticmethod
    def forward(ctx: Any, kept: Sequence[Tensor], *student: Tensor) -> Tensor:
        """Keep the tensors `kept` for the backward and return a scalar."""
        ctx.save_for_backward(*kept)
        ctx.student = [(x.shape, x.dtype) for x in student]
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return empty gradients of the student's shapes and dtypes."""
        return None, *(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.student)


class _LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors except `ignored` ones; each storage counts once."""

    def __init__(self, *ignored: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _placements(run: ResolvedRun, view: QKVView) -> dict[str, tuple[int, int]]:
    itemsize = run.teacher_dtype.itemsize
    whole = _count(view.module) * itemsize
    part, gathered = -(-whole // run.world_size), _gathered_elements(view) * itemsize
    offload = (part + gathered, 0) if run.device_type == "cpu" else (gathered, part)
    return {"replicate": (whole, 0), "shard": (part + gathered, 0), "offload": offload}


def _gathered_elements(view: QKVView) -> int:
    """Return the most elements gathered at a time: two blocks, and what belongs to no block."""
    blocks = [_count(block) for block in view.blocks]
    rest = _count(view.module) - sum(blocks)
    return rest + sum(sorted(blocks)[-2:])
