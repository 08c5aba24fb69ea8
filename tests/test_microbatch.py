from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from ranks import run_ranks

from scaledistill.config.load import parse_config
from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schema import DistillConfig
from scaledistill.errors import ConfigError, PeerError
from scaledistill.models.student import build_student
from scaledistill.models.teacher import Teacher, load_config, load_encoder
from scaledistill.models.view import capture_view
from scaledistill.preflight import checks
from scaledistill.preflight.estimate import estimate, sample_tokens
from scaledistill.preflight.microbatch import (
    MARGIN_FRACTION,
    Trial,
    candidates,
    choose,
    fits,
    free_bytes,
    largest_that_fits,
    predict,
)
from scaledistill.preflight.resolve import resolve

CPU = torch.device("cpu")
GB = 10**9


def resolved(config: DistillConfig, world_size: int = 1) -> ResolvedRun:
    return resolve(config, world_size, CPU)


def test_candidates_divide_the_share(tiny_config: Callable[..., DistillConfig]) -> None:
    config = tiny_config(train={"global_batch_size": 24})
    assert candidates(resolved(config)) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert candidates(resolved(config, 4)) == [1, 2, 3, 6]
    assert candidates(resolved(config, 24)) == [1]


@pytest.mark.parametrize("first", [None, 1, 8, 256, 3])
@pytest.mark.parametrize("most", [1, 2, 5, 64, 255, 256, 1000])
def test_the_largest_is_found_in_few_trials(most: int, first: int | None) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= most

    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert largest_that_fits(sizes, fits, first=first, found="") == max(
        size for size in sizes if size <= most
    )
    assert len(asked) == len(set(asked)) <= 5
    assert first not in sizes or asked[0] == first


def test_nothing_fits() -> None:
    with pytest.raises(ConfigError) as error:
        largest_that_fits([2, 4], lambda size: False, first=4, found="a step was tried on cuda:0")
    message = str(error.value)
    assert message.startswith(
        "train.micro_batch_size='auto': not even 2 fits in memory (a step was tried on cuda:0); "
    )
    assert "data.sequence_length" in message
    assert "engine.deepspeed.zero_optimization.offload_optimizer={'device': 'cpu'}" in message


def test_prediction_fills_the_limit(tiny_config: Callable[..., DistillConfig]) -> None:
    config = tiny_config(train={"global_batch_size": 48})
    teacher = load_config(config.teacher.model)
    student = checks.student_shape(config, "l2", teacher)
    facts = estimate(resolved(config), teacher, {"l2": student})

    def at(limit: float, world_size: int = 1) -> int:
        return predict(resolved(config, world_size), teacher, {"l2": student}, int(limit))

    assert at(facts.memory_bytes(6) / (1 - MARGIN_FRACTION) + 2) == 6
    assert at(facts.memory_bytes(8) / (1 - MARGIN_FRACTION) - 2) == 6
    assert at(1000 * GB, world_size=4) == 12
    with pytest.raises(
        ConfigError,
        match=r"not even 1 fits in memory \(needs 0\.03 GB, 0\.01 GB are free for each rank",
    ):
        at(0.01 * GB)


def test_running_out_of_memory_is_an_answer_other_errors_are_not() -> None:
    def failing_with(error: Exception) -> Callable[[int], None]:
        def attempt(size: int) -> None:
            raise error

        return attempt

    assert fits(lambda size: None, 4)
    assert not fits(
        failing_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), 4
    )
    assert not fits(failing_with(RuntimeError("Triton Error [CUDA]: out of memory")), 4)
    with pytest.raises(RuntimeError, match="device-side assert"):
        fits(failing_with(RuntimeError("CUDA error: device-side assert triggered")), 4)


@pytest.mark.parametrize(
    ("attention", "recomputes"), [("row", False), ("document", False), ("row", True)]
)
def test_a_trial_makes_a_step_and_leaves_the_student_alone(
    attention: str,
    recomputes: bool,
    tiny_config: Callable[..., DistillConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = {"name": "fsdp", "fsdp": {"activation_checkpointing": True}} if recomputes else {}
    config = tiny_config(train={"precision": "bf16"}, data={"attention": attention}, engine=engine)
    encoder = load_encoder(config.teacher.model, num_layers=3)
    student = build_student(encoder, checks.student_shape(config, "l2", encoder.config))
    view = capture_view(student, 2)
    before = {name: parameter.clone() for name, parameter in view.module.named_parameters()}
    teacher = Teacher(encoder, 3, dtype=torch.bfloat16)
    trial = Trial(resolved(config), teacher, {"l2": view}, CPU, held_bytes=1000)
    [(tried, _)] = trial._students
    forwards: list[None] = []
    tried.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(None))
    trial(6)
    assert len(forwards) == 1 + recomputes
    copies = dict(tried.module.named_parameters())
    assert all(
        parameter.grad is None and torch.equal(parameter, before[name])
        for name, parameter in view.module.named_parameters()
    )
    assert all(copy.grad is not None and copy.dtype == torch.bfloat16 for copy in copies.values())
    sizes = []
    monkeypatch.setattr(
        Teacher,
        "forward",
        lambda self, tokens: sizes.append(tokens.input_ids_BT.shape) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        trial(5)
    assert sizes == [(5, 16)]
    assert all(copy.grad is None for copy in copies.values())


def test_batches_that_are_tried_have_all_that_a_run_may_bring(
    tiny_config: Callable[..., DistillConfig],
) -> None:
    row = sample_tokens(tiny_config().data, 2)
    assert row.input_ids_BT.shape == (2, 16)
    assert row.mask_BT is not None
    assert row.mask_BT.shape == (2, 16)
    assert row[2:] == (None, None, None)
    documents = sample_tokens(tiny_config(data={"attention": "document"}).data, 2)
    assert documents.mask_BT is None
    assert documents.segment_ids_BT is not None
    assert documents.position_ids_BT is not None
    assert documents.cu_seqlens is not None
    assert documents.segment_ids_BT.shape == (2, 16)
    assert documents.cu_seqlens.tolist() == [0, 16, 32]
    assert documents.position_ids_BT[1].tolist() == list(range(16))


def choose_with(tree: dict[str, Any], *most: tuple[int, int]) -> list[int | str]:
    """For each pair, choose on a rank that has memory for `most[rank]` sequences."""
    from scaledistill.distributed.ranks import process_group

    def chosen(limit: int) -> int | str:
        def attempt(size: int) -> None:
            if size > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")

        try:
            return choose(run, unused, unused, unused, ranks, attempt)
        except (ConfigError, PeerError) as error:
            return f"{type(error).__name__}: {error}"

    unused: Any = None
    with process_group(60) as ranks:
        run = resolved(parse_config(tree), ranks.world_size)
        return [chosen(limits[ranks.rank]) for limits in most]


def test_ranks_agree_on_what_fits_everywhere(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    tree = tiny_tree(
        tmp_path, tiny_teacher, tiny_shards, train={"global_batch_size": 32, "micro_batch_size": 2}
    )
    main, other = run_ranks(choose_with, 2, tree, (100, 9), (3, 100), (100, 0))
    assert main[:2] == other[:2] == [8, 2]
    assert re.match(
        r"ConfigError: rank 1 on .*: train.micro_batch_size='auto': not even 1 fits", main[2]
    )
    assert "(a step was tried on cpu)" in main[2]
    assert other[2].startswith("PeerError: train.micro_batch_size='auto': not even 1 fits")


def test_without_a_gpu_the_prediction_is_taken(tiny_config: Callable[..., DistillConfig]) -> None:
    from scaledistill.distributed.ranks import process_group

    unused: Any = None
    with process_group(60) as ranks:
        run = resolved(tiny_config(train={"micro_batch_size": 2}))
        assert choose(run, unused, unused, unused, replace(ranks, device=CPU)) == 2


@pytest.mark.parametrize("tried", [False, True])
def test_a_resumed_run_keeps_its_micro_batch_if_it_still_fits(
    tried: bool, tiny_config: Callable[..., DistillConfig], caplog: pytest.LogCaptureFixture
) -> None:
    from scaledistill.distributed.ranks import process_group

    def attempt(size: int) -> None:
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    unused: Any = None
    with process_group(60) as ranks:
        run = resolved(tiny_config(train={"global_batch_size": 16, "micro_batch_size": 4}))

        def chosen(before: int) -> int:
            how = attempt if tried else None
            return choose(
                run, unused, unused, unused, replace(ranks, device=CPU), how, before=before
            )

        assert [chosen(before) for before in (1, 4)] == [1, 4]
        assert "does not fit" not in caplog.text
        assert chosen(8) == 4
    assert "train.micro_batch_size was 8, which does not fit in memory here" in caplog.text


def write_files(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def test_free_memory_of_the_host_and_of_its_cgroups(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\nHugePages_Total: 0"},
    )
    assert free_bytes(CPU, 1, tmp_path) == 32_768_000_000
    assert free_bytes(CPU, 4, tmp_path) == 8_192_000_000
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/mine",
            "sys/fs/cgroup/jobs/memory.max": 20 * GB,
            "sys/fs/cgroup/jobs/memory.current": 15 * GB,
            "sys/fs/cgroup/jobs/memory.stat": f"anon 1\ninactive_file {3 * GB}",
            "sys/fs/cgroup/jobs/mine/memory.max": "max",
        },
    )
    assert free_bytes(CPU, 1, tmp_path) == 8 * GB  # the limit of the group above
    v1 = {
        "limit_in_bytes": 10 * GB,
        "usage_in_bytes": 6 * GB,
        "stat": f"cache 1\ntotal_inactive_file {2 * GB}",
    }
    write_files(tmp_path, {"proc/self/cgroup": "5:cpu,memory:/not/visible/here\n1:cpu:/\n0::/"})
    write_files(
        tmp_path, {f"sys/fs/cgroup/memory/memory.{name}": value for name, value in v1.items()}
    )
    assert free_bytes(CPU, 2, tmp_path) == 3 * GB


def test_free_memory_here() -> None:
    assert 1e7 < free_bytes(CPU, 1) < 1e14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_takes_what_was_chosen_and_no_more(
    tiny_config: Callable[..., DistillConfig],
) -> None:
    from scaledistill.distributed.ranks import process_group

    with process_group(60) as ranks:
        config = tiny_config(train={"global_batch_size": 65_536})
        run = resolve(config, 1, ranks.device)
        encoder = load_encoder(config.teacher.model, num_layers=3)
        student = build_student(encoder, checks.student_shape(config, "l2", encoder.config))
        teacher = Teacher(encoder, 3).to(ranks.device)
        facts = estimate(run, teacher.config, {"l2": student.config})
        view = capture_view(student, 2)
        Trial(run, teacher, {"l2": view}, ranks.device, 0)(1)  # workspaces, kernels
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(ranks.device)
        left = facts.state_bytes - facts.teacher_bytes + 8000 * facts.activation_bytes_per_sequence
        filler = torch.empty(
            free - int(MARGIN_FRACTION * total) - left, dtype=torch.uint8, device=ranks.device
        )
        size = choose(run, teacher, {"l2": view}, facts, ranks)
        assert 1024 <= size <= 16_384
        del filler
