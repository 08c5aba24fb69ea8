from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_tree
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

from scaledistill.config.load import parse_config
from scaledistill.config.resolved import DTYPES
from scaledistill.config.schema import DistillConfig
from scaledistill.models.architectures import build_encoder
from scaledistill.models.student import build_student, student_config
from scaledistill.models.teacher import Teacher, load_config, load_encoder
from scaledistill.models.view import capture_view, forward_flops
from scaledistill.preflight import checks
from scaledistill.preflight.estimate import Estimate, estimate
from scaledistill.preflight.microbatch import Trial
from scaledistill.preflight.resolve import resolve
from scaledistill.relations.sdpa import TILE_SCORES

CPU = torch.device("cpu")
LARGER = {"larger": {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 4}}


def estimate_of(config: DistillConfig, world_size: int = 1, device_type: str = "cpu") -> Estimate:
    run = replace(resolve(config, world_size, CPU), device_type=device_type)
    teacher = load_config(config.teacher.model)
    return estimate(run, teacher, {"l2": checks.student_shape(config, "l2", teacher)})


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_real_models(tiny_config: Callable[..., DistillConfig]) -> None:
    config = tiny_config(
        students={"l2": {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 3}}
    )
    facts = estimate_of(config)
    teacher = Teacher(load_encoder(config.teacher.model, num_layers=3), 3)
    student = build_encoder(
        student_config(
            load_config(config.teacher.model), num_layers=2, hidden_size=48, num_attention_heads=3
        )
    )
    view = capture_view(student, 2).module
    assert facts.teacher_parameters == teacher.num_parameters
    assert facts.student_parameters == count(student)
    assert facts.students["l2"].trained == count(view)
    assert count(view) == count(student) - (48 * 48 + 48 + 2 * 48) - (
        48 * 192 + 192 + 192 * 48 + 48 + 2 * 48
    )
    teacher_flops, student_flops = forward_flops(teacher.module, 16), 3 * forward_flops(view, 16)
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
        train={"precision": "bf16"},
        engine={"deepspeed": {"zero_optimization": zero}},
        teacher={"dtype": "fp32"},
    )
    facts = estimate_of(config, world_size=4, device_type="cuda")
    trained = facts.students["l2"].trained
    assert facts.weights_and_gradients_bytes == pytest.approx(
        (weights + gradients) * trained, abs=2
    )
    assert facts.optimizer_bytes == pytest.approx(optimizer * trained, abs=2)
    assert facts.optimizer_on_host is on_host
    assert facts.teacher_bytes == 4 * facts.teacher_parameters


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_flops_are_those_of_the_whole_view(
    layer: int, tiny_config: Callable[..., DistillConfig]
) -> None:
    student = {"l2": {"num_layers": 5, "hidden_size": 16, "num_attention_heads": 2}}
    config = tiny_config(teacher={"layer": layer}, students=student)
    model = build_encoder(load_config(config.teacher.model), device="meta")
    teacher = capture_view(model, layer).module
    shape = checks.student_shape(config, "l2", load_config(config.teacher.model))
    flops = forward_flops(teacher, 16) + 3 * forward_flops(
        capture_view(build_encoder(shape), 5).module, 16
    )
    assert estimate_of(config).flops_per_token == flops / 16


def test_where_a_teacher_s_bytes_lie(tiny_config: Callable[..., DistillConfig]) -> None:
    def facts(device_type: str, placement: str, world_size: int = 4) -> Estimate:
        config = tiny_config(
            teacher={"placement": placement, "dtype": "fp32"}, train={"precision": "bf16"}
        )
        return estimate_of(config, world_size=world_size, device_type=device_type)

    view = Teacher(load_encoder(tiny_config().teacher.model, num_layers=3), 3).view
    blocks, whole = [4 * count(block) for block in view.blocks], 4 * count(view.module)
    gathered = whole - sum(blocks) + blocks[0] + blocks[1]
    gpu = facts("cuda", "replicate")
    part = whole // 4
    expected = {"replicate": (whole, 0), "shard": (part + gathered, 0), "offload": (gathered, part)}
    assert gpu.placements == expected
    # There is one memory only.
    assert facts("cpu", "replicate").placements["offload"] == (part + gathered, 0)
    for placement, (on_device, _) in expected.items():
        assert facts("cuda", placement).teacher_bytes == on_device
    assert facts("cuda", "shard", 8).teacher_bytes == whole // 8 + gathered


def test_fsdp_memory(tiny_config: Callable[..., DistillConfig]) -> None:
    def facts(accumulation: int = 1, **fsdp: bool) -> Estimate:
        train = {"precision": "bf16", "global_batch_size": 8, "micro_batch_size": 2 // accumulation}
        config = tiny_config(engine={"name": "fsdp", "fsdp": fsdp}, train=train)
        return estimate_of(config, world_size=4, device_type="cuda")

    trained = facts().students["l2"].trained
    assert facts().weights_and_gradients_bytes == trained  # a quarter of the fp32 gradients
    assert facts(2).weights_and_gradients_bytes == 4 * trained  # whole until the last micro-batch
    assert facts().optimizer_bytes == 3 * trained  # a quarter of fp32 weights and moments
    assert facts().engine_bytes <= (2 + 4) * trained
    gathered = facts(reshard_after_forward=False)
    assert gathered.engine_bytes - facts().engine_bytes == 2 * trained - facts().engine_bytes // 3
    assert (facts().optimizer_on_host, facts(cpu_offload=True).optimizer_on_host) == (False, True)


def test_recomputed_blocks_keep_no_activations(tiny_config: Callable[..., DistillConfig]) -> None:
    students = {"l2": {"num_layers": 12, "hidden_size": 48, "num_attention_heads": 3}}

    def activations(engine: dict[str, Any]) -> int:
        config = tiny_config(engine=engine, students=students)
        return estimate_of(config).activation_bytes_per_sequence

    fsdp: dict[str, Any] = {"name": "fsdp"}
    kept = activations(fsdp)
    assert kept == activations({"name": "deepspeed"})
    recomputed = activations({**fsdp, "fsdp": {"activation_checkpointing": True}})
    assert 3 < kept / recomputed < 12, "about one block of twelve, and the inputs of each"


def test_host_memory_holds_what_was_offloaded(tiny_config: Callable[..., DistillConfig]) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    config = tiny_config(
        engine={
            "deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": 10, **offload}}
        }
    )
    gpu, host = (estimate_of(config, device_type=device_type) for device_type in ("cuda", "cpu"))
    trained = gpu.students["l2"].trained
    assert gpu.engine_bytes == 2 * 10 * 4 + 4 * trained  # two buckets; the weights, gathered
    assert gpu.state_bytes == gpu.teacher_bytes + 4 * trained + gpu.engine_bytes
    assert gpu.memory_bytes(5) == gpu.state_bytes + 5 * gpu.activation_bytes_per_sequence
    assert host.weights_and_gradients_bytes == 8 * trained
    assert host.data_bytes == 4 * 32 * (16 * 2 + 16 // 4)
    assert host.state_bytes > host.teacher_bytes + 20 * trained + host.data_bytes


def test_gradient_buckets(tiny_config: Callable[..., DistillConfig]) -> None:
    def engine_bytes(device_type: str, **zero: Any) -> int:
        config = tiny_config(engine={"deepspeed": {"zero_optimization": {"stage": 2, **zero}}})
        return estimate_of(config, device_type=device_type).engine_bytes

    trained = estimate_of(tiny_config()).students["l2"].trained
    assert engine_bytes("cuda", reduce_bucket_size=10**6, overlap_comm=True) == 8 * 10**6
    # Never touched pages.
    assert engine_bytes("cpu", reduce_bucket_size=10**6, overlap_comm=False) == 4 * trained


def test_relation_memory_grows_as_the_backends_do(
    tiny_config: Callable[..., DistillConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def relation_bytes(backend: str, sequence_length: int) -> int:
        config = tiny_config(
            relations={"backend": "reference"}, data={"sequence_length": sequence_length}
        )
        settled = resolve(config, 1, CPU)
        relations = config.relations.model_copy(update={"backend": backend})
        run = replace(settled, config=settled.config.model_copy(update={"relations": relations}))
        teacher = load_config(config.teacher.model)
        student = checks.student_shape(config, "l2", teacher)
        return estimate(run, teacher, {"l2": student}).relation_bytes

    gradients = 8 * 3 * 16 * 4  # sequences; q, k, v of width 16 in fp32
    maps = 8 * 3 * 4 * 4  # sequences, pairs, relation heads, in fp32
    assert 2 < relation_bytes("reference", 64) / (64 * 64 * maps) < 5
    assert relation_bytes("sdpa", 64) == pytest.approx(64 * gradients, abs=8)
    # Of both models' rows: sums, factors.
    assert relation_bytes("triton", 64) == pytest.approx(64 * 4 * maps, abs=8)
    with monkeypatch.context() as patch:  # heads wider than the kernels take
        patch.setattr("scaledistill.preflight.estimate.MAX_HEAD_WIDTH", 1)
        assert relation_bytes("triton", 64) == relation_bytes("reference", 64)


@pytest.mark.parametrize(
    ("backend", "attention", "dropout", "precision"),
    [
        ("reference", "row", 0.1, "fp32"),
        ("sdpa", "document", 0.0, "fp32"),
        ("sdpa", "row", 0.0, "bf16"),
    ],
)
def test_activations_are_those_that_a_step_allocates(
    backend: str,
    attention: str,
    dropout: float,
    precision: str,
    tiny_config: Callable[..., DistillConfig],
) -> None:
    config = tiny_config(
        students={
            "l2": {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "dropout": dropout}
        },
        relations={"backend": backend},
        data={"attention": attention, "sequence_length": 32},
        train={"precision": precision},
    )
    sequences = 64
    facts = estimate_of(config)
    run = resolve(config, 1, CPU)
    encoder = load_encoder(config.teacher.model, num_layers=3)
    student = build_student(
        encoder, checks.student_shape(config, "l2", encoder.config), dropout=dropout
    )
    teacher = Teacher(encoder, 3, dtype=DTYPES[precision])
    trial = Trial(run, teacher, {"l2": capture_view(student, 3)}, CPU, 0)
    trial(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trial(sequences)
    peak = allocation_peak(profiler)
    least = sequences * facts.activation_bytes_per_sequence
    tiles = 3 * 4 * TILE_SCORES if backend == "sdpa" else 0
    assert peak == pytest.approx(least + tiles, rel=0.03)


def allocation_peak(profiler: profile) -> int:
    """Return the peak of what was allocated under the profiler."""
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = np.cumsum(
        [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    )
    return int(held.max())


def peak_of_a_run(sequences: int, length: int) -> tuple[int, int]:
    """Make two steps of BERT-base → 6×384 under DeepSpeed; return the memory it took, and what was
    expected.
    """
    from transformers import BertConfig

    from scaledistill.distributed.ranks import process_group
    from scaledistill.engines import create_engine
    from scaledistill.models.loss import StudentLoss
    from scaledistill.preflight.estimate import sample_tokens

    def memory_bytes(field: str) -> int:
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(status[field].split()[0]) * 1024

    tree = tiny_tree(Path(), Path("model"), Path("shards"))
    tree["students"] = {"l6": {"num_layers": 6, "hidden_size": 384, "num_attention_heads": 12}}
    tree |= {
        "teacher": {"model": "model", "layer": 12, "dtype": "fp32"},
        "relations": {"num_heads": 48},
    }
    tree["data"] |= {"sequence_length": length}
    tree["train"] |= {"global_batch_size": 2 * sequences, "micro_batch_size": sequences}
    with process_group(60) as ranks:
        run = resolve(parse_config(tree), 1, CPU)
        shape = student_config(BertConfig(), num_layers=6, hidden_size=384, num_attention_heads=12)
        facts = estimate(run, BertConfig(), {"l6": shape})
        before = memory_bytes("VmRSS")
        teacher = Teacher(build_encoder(BertConfig()), 12)
        view = capture_view(build_student(None, shape), 6)
        engine, loss_of = (
            create_engine(run, view, ranks),
            StudentLoss.of(run.config, "l6", (shape, shape)),
        )
        for micro in range(4):
            tokens = sample_tokens(run.config.data, sequences)
            target, student = teacher(tokens), engine.forward(tokens)
            loss = loss_of(target, student, tokens._replace(mask_BT=None)).total
            del target, student
            engine.backward(loss, last=micro % 2 == 1)
            if micro % 2:
                engine.step(1e-4)
        return memory_bytes("VmHWM") - before, facts.memory_bytes(sequences) - facts.data_bytes


@pytest.mark.full
@pytest.mark.parametrize(("sequences", "length"), [(4, 128), (24, 128), (2, 512), (6, 512)])
def test_memory_is_about_what_was_expected(sequences: int, length: int) -> None:
    [(found, expected)] = run_ranks(peak_of_a_run, 1, sequences, length, timeout=200)
    assert 0.9 * found <= expected <= 1.15 * found  # the heap's holes differ from run to run


def save_once(tree: dict[str, Any]) -> tuple[int, Estimate]:
    """Save a run's first checkpoint; return its bytes and what was expected."""
    from scaledistill.checkpoint.saver import Outcome
    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.session import open_session

    with process_group(60) as ranks:
        plan = checks.plan_run(parse_config(tree), 1, ranks.device)
        session = open_session(plan.run, ranks, resume=False)
        session.save()
        assert session.saver.settle(wait=True) == Outcome(0, None)
    return sum(
        path.stat().st_size
        for path in Path(plan.run.config.run.folder).rglob("*")
        if path.is_file()
    ), plan.estimate


def test_checkpoint_is_as_large_as_planned(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards)
    [(found, facts)] = run_ranks(save_once, 1, tree | {"students": LARGER})
    assert facts.checkpoint_bytes > 3_000_000
    assert found == pytest.approx(facts.checkpoint_bytes, rel=0.01)
