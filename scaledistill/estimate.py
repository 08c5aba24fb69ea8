"""What a run will need, from shapes alone: parameters, FLOPs, memory, checkpoint size.

Models are built on the meta device: no weights are read and no memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from scaledistill.config import DistillConfig
from scaledistill.engines.deepspeed_block import zero_settings
from scaledistill.models.capture import build_encoder, capture_view, forward_flops
from scaledistill.relations.sdpa import TILE_SCORES

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes are per rank, unless said otherwise."""

    teacher_parameters: int
    """Of the truncated teacher."""
    student_parameters: int
    """Of the full student, as exported."""
    trained_parameters: int
    flops_per_token: float
    """Teacher forward, student forward and backward."""
    teacher_flops_fraction: float
    teacher_bytes: int
    weights_and_gradients_bytes: int
    optimizer_bytes: int
    """fp32 master weights and both Adam moments."""
    optimizer_on_host: bool
    relation_bytes: int
    """Working memory of the relation loss for one micro-batch."""
    checkpoint_bytes: int
    """One checkpoint on disk."""


def estimate(
    config: DistillConfig, name: str, teacher: PretrainedConfig, student: PretrainedConfig, world_size: int
) -> Estimate:
    """Return what student `name` of a resolved configuration needs."""
    length = config.data.sequence_length
    teacher_view = capture_view(build_encoder(teacher, device="meta"), config.teacher.layer)
    full = build_encoder(student, device="meta")
    student_view = capture_view(full, student.num_hidden_layers)
    trained = sum(parameter.numel() for parameter in student_view.parameters())
    whole = sum(parameter.numel() for parameter in full.parameters())
    held = sum(parameter.numel() for parameter in teacher_view.parameters())
    teacher_flops, student_flops = forward_flops(teacher_view, length), 3 * forward_flops(student_view, length)
    stage, optimizer_on_host, parameters_on_host = zero_settings(config)
    weight_share = world_size if stage == 3 else 1
    gradient_share = world_size if stage >= 2 else 1
    weights = 0 if parameters_on_host else trained * BYTES[config.train.precision] // weight_share
    return Estimate(
        teacher_parameters=held,
        student_parameters=whole,
        trained_parameters=trained,
        flops_per_token=(teacher_flops + student_flops) / length,
        teacher_flops_fraction=teacher_flops / (teacher_flops + student_flops),
        teacher_bytes=held * BYTES[config.teacher.dtype],
        weights_and_gradients_bytes=weights + trained * 4 // gradient_share,
        optimizer_bytes=trained * 12 // world_size,
        optimizer_on_host=optimizer_on_host,
        relation_bytes=_relation_bytes(config, name, student.hidden_size),
        checkpoint_bytes=whole * 4 + trained * 8,
    )


def _relation_bytes(config: DistillConfig, name: str, student_width: int) -> int:
    """Working memory of the loss: fp32 maps for `reference`, tiles and the student's gradients for `sdpa`."""
    sequences, length = config.train.micro_batch_size or 1, config.data.sequence_length
    if config.relations.backend == "reference":
        maps = 5 * len(config.relations.pairs)  # per pair: both models' scores, their log-softmax, and a product
        return 4 * sequences * config.relation_heads(name) * length * length * maps
    used = len(set("".join(config.relations.pairs)))
    return 4 * sequences * length * used * student_width + 4 * TILE_SCORES * 6
