from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from ranks import run_ranks

from scaledistill import doctor
from scaledistill.config import DistillConfig, parse_config
from scaledistill.estimate import Estimate, estimate
from scaledistill.models.capture import build_encoder, capture_view, forward_flops
from scaledistill.models.student import student_config
from scaledistill.models.teacher import Teacher, load_config, load_encoder

CPU = torch.device("cpu")
LARGER = {"larger": {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 4}}


def estimate_of(config: DistillConfig, world_size: int = 1) -> Estimate:
    return doctor.check(config, world_size, CPU).estimate


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_real_models(tiny_config: Callable[..., DistillConfig]) -> None:
    config = tiny_config(students={"l2": {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 3}})
    facts = estimate_of(config)
    teacher = Teacher(load_encoder(config.teacher.model, num_layers=3), 3)
    student = build_encoder(
        student_config(load_config(config.teacher.model), num_layers=2, hidden_size=48, num_attention_heads=3)
    )
    view = capture_view(student, 2)
    assert facts.teacher_parameters == teacher.num_parameters
    assert facts.student_parameters == count(student)
    assert facts.trained_parameters == count(view)
    assert count(view) == count(student) - (48 * 48 + 48 + 2 * 48) - (48 * 192 + 192 + 192 * 48 + 48 + 2 * 48)
    teacher_flops, student_flops = forward_flops(teacher.view, 16), 3 * forward_flops(view, 16)
    assert facts.flops_per_token == (teacher_flops + student_flops) / 16
    assert facts.teacher_flops_fraction == teacher_flops / (teacher_flops + student_flops)


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer", "on_host"),
    [
        ({"stage": 1}, 2.0, 4.0, 3.0, False),
        ({"stage": 2}, 2.0, 1.0, 3.0, False),
        ({"stage": 3}, 0.5, 1.0, 3.0, False),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 2.0, 1.0, 3.0, True),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, 0.0, 1.0, 3.0, False),
    ],
)
def test_bytes_per_trained_parameter_on_four_ranks(
    zero: dict[str, Any],
    weights: float,
    gradients: float,
    optimizer: float,
    on_host: bool,
    tiny_config: Callable[..., DistillConfig],
) -> None:
    config = tiny_config(
        train={"precision": "bf16"}, engine={"deepspeed": {"zero_optimization": zero}}, teacher={"dtype": "fp32"}
    )
    facts = estimate_of(config, world_size=4)
    trained = facts.trained_parameters
    assert facts.weights_and_gradients_bytes == pytest.approx((weights + gradients) * trained, abs=2)
    assert facts.optimizer_bytes == pytest.approx(optimizer * trained, abs=2)
    assert facts.optimizer_on_host is on_host
    assert facts.teacher_bytes == 4 * facts.teacher_parameters


def test_relation_memory_grows_as_the_backends_do(tiny_config: Callable[..., DistillConfig]) -> None:
    def relation_bytes(backend: str, sequence_length: int) -> int:
        config = doctor.resolve(tiny_config(relations={"backend": backend}), 1, CPU)
        data = config.data.model_copy(update={"sequence_length": sequence_length})
        teacher = load_config(config.teacher.model)
        student = student_config(teacher, num_layers=2, hidden_size=16, num_attention_heads=2)
        return estimate(config.model_copy(update={"data": data}), "l2", teacher, student, 1).relation_bytes

    fp32_map = 8 * 4 * 16 * 16 * 4  # sequences, relation heads, rows, columns, bytes
    assert relation_bytes("reference", 16) == 3 * 5 * fp32_map
    assert relation_bytes("reference", 32) == 4 * relation_bytes("reference", 16)
    assert relation_bytes("sdpa", 64) - relation_bytes("sdpa", 32) == 8 * 32 * 3 * 16 * 4  # q, k, v of width 16


def save_once(tree: dict[str, Any]) -> tuple[int, Estimate]:
    """Save a run's first checkpoint; return its bytes and what was expected."""
    from scaledistill.distributed import process_group
    from scaledistill.session import open_session

    with process_group(60) as ranks:
        plan = doctor.check(parse_config(tree), 1, ranks.device)
        error = open_session(plan.config, ranks, resume=False).save()
        assert error is None, error
    return sum(path.stat().st_size for path in Path(plan.config.run.folder).rglob("*") if path.is_file()), plan.estimate


def test_checkpoint_is_as_large_as_planned(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards)
    [(found, facts)] = run_ranks(save_once, 1, tree | {"students": LARGER})
    assert facts.checkpoint_bytes > 3_000_000
    assert found == pytest.approx(facts.checkpoint_bytes, rel=0.01)
