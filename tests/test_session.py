from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tree
from ranks import run_ranks

from scaledistill.config.load import parse_config
from scaledistill.metrics.recorder import read_rows
from scaledistill.preflight import checks
from scaledistill.preflight.microbatch import MARGIN_FRACTION


@pytest.fixture
def make_tree(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> Callable[..., dict[str, Any]]:
    def make(**blocks: dict[str, Any]) -> dict[str, Any]:
        return tiny_tree(tmp_path, tiny_teacher, tiny_shards, **blocks)

    return make


def distil_with_room_for(sizes_by_rank: list[int], tree: dict[str, Any]) -> tuple[str, int, int]:
    """Run where each rank has memory for so many sequences; return state, step and predicted
    micro-batch.
    """
    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.loop import distill

    config = parse_config(tree)
    with process_group(60) as ranks:
        plain = config.model_copy(
            update={"train": config.train.model_copy(update={"micro_batch_size": None})}
        )
        facts = checks.plan_run(plain, ranks.world_size, ranks.device, writes=False).estimate
        size = sizes_by_rank[ranks.rank]
        between = (facts.memory_bytes(size) + facts.memory_bytes(size + 1)) / 2
        checks.free_bytes = lambda device, ranks_on_node: int(between / (1 - MARGIN_FRACTION))
        predicted = checks.plan_run(
            config, ranks.world_size, ranks.device, writes=False
        ).run.micro_batch_size
        result = distill(config)
    return result.state, result.step, predicted


def micro_batch_of(tree: dict[str, Any]) -> int:
    return json.loads((Path(tree["run"]["folder"]) / "config.json").read_text())["train"][
        "micro_batch_size"
    ]


def test_the_largest_micro_batch_that_fits_all_ranks(
    make_tree: Callable[..., dict[str, Any]],
) -> None:
    train = {"global_batch_size": 16, "max_steps": 2, "warmup_steps": 0, "micro_batch_size": "auto"}
    train |= {"schedule": "warmup_stable_decay", "decay_steps": 1}
    tree = make_tree(train=train, checkpoint={"every_steps": 1})
    ends = run_ranks(distil_with_room_for, 2, [8, 3], tree)
    # Of the divisors of 8 each predicts its own; the smallest is taken.
    assert ends == [("done", 2, 8), ("done", 2, 2)]
    assert micro_batch_of(tree) == 2
    assert run_ranks(distil_with_room_for, 2, [8, 8], tree)[0] == ("done", 2, 8)
    assert micro_batch_of(tree) == 2  # a resumed run keeps what it had, and so its rounding
    # An added student needs memory too. The run goes on from its first step.
    shutil.rmtree(Path(tree["run"]["folder"]) / "checkpoints" / "step-000000002")
    tree["train"]["max_steps"] = 3
    tree["students"] |= {"added": dict(*tree["students"].values())}
    assert run_ranks(distil_with_room_for, 2, [4, 4], tree)[0] == ("done", 3, 4)
    assert micro_batch_of(tree) == 4


def losses_of_run(tree: dict[str, Any]) -> list[float]:
    from scaledistill.training.loop import distill

    assert distill(parse_config(tree)).state == "done"
    if os.environ["RANK"] != "0":
        return []
    rows = read_rows(Path(tree["run"]["folder"]) / "metrics.jsonl")
    assert all(
        row["mfu"] > 0 and 0 < row["teacher_fraction"] < 1 and 0 < row["optimizer_fraction"] < 1
        for row in rows
    )
    return [row[key] for row in rows for key in ("loss", "validation_loss") if key in row]


def test_documents_are_kept_apart_on_any_number_of_ranks(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path, tmp_path: Path
) -> None:
    def run(name: str, attention: str, world_size: int) -> list[float]:
        tree = make_tree(
            run={"folder": str(tmp_path / name)},
            data={"attention": attention, "validation": str(tiny_shards / "validation")},
            train={"micro_batch_size": 2, "validation_every_steps": 3, "validation_rows": 11},
        )
        return run_ranks(losses_of_run, world_size, tree)[0]

    alone = run("alone", "document", 1)
    assert len(alone) == 6 + 2
    assert run("together", "document", 2) == pytest.approx(alone, rel=1e-5)
    assert abs(run("row", "row", 1)[0] - alone[0]) > 1e-3


def dtypes_of(tree: dict[str, Any]) -> tuple[set[str], set[str], list[float]]:
    """Make a step; return the dtypes of the teacher's Q/K/V, of the student's parameters and
    gradients, the losses.
    """
    from scaledistill.distributed.ranks import process_group
    from scaledistill.metrics.stopwatch import Stopwatch
    from scaledistill.training.session import open_session
    from scaledistill.training.step import train_step

    with process_group(60) as ranks:
        session = open_session(
            checks.plan_run(parse_config(tree), 1, ranks.device).run, ranks, resume=False
        )
        teacher: set[str] = set()
        student: set[str] = set()
        session.teacher.module.register_forward_hook(
            lambda module, inputs, output: teacher.add(str(output.last_hidden_state.dtype))
        )
        for parameter in session.students[0].engine._engine.module.parameters():  # type: ignore[attr-defined]
            student.add(str(parameter.dtype))
            parameter.register_hook(lambda grad: student.add(str(grad.dtype)))
        with session.stream() as stream:
            losses = [train_step(session, stream, lambda: None, Stopwatch()).loss for _ in range(3)]
    return teacher, student, losses


def test_a_student_is_fp32_on_every_cpu(
    make_tree: Callable[..., dict[str, Any]], fast_bf16: bool
) -> None:
    [(teacher, student, losses)] = run_ranks(dtypes_of, 1, make_tree(train={"precision": "auto"}))
    assert teacher == {"torch.bfloat16" if fast_bf16 else "torch.float32"}
    assert student == {"torch.float32"}
    [(_, _, exact)] = run_ranks(dtypes_of, 1, make_tree())
    assert losses == pytest.approx(exact, rel=0.02 if fast_bf16 else 1e-6)


def manifests_of(tree: dict[str, Any]) -> tuple[int, list[int]]:
    """Make a run; return how often manifests were read, and the rows of those that stand in memory
    in its last step.
    """
    import gc

    from scaledistill.data.manifest import Manifest
    from scaledistill.training.loop import distill
    from scaledistill.training.step import train_step

    reads, alive = 0, []
    load = Manifest.load.__func__

    def counted(cls: type[Manifest], location: Any) -> Manifest:
        nonlocal reads
        reads += 1
        return load(cls, location)

    def counting(*arguments: Any) -> Any:
        result = train_step(*arguments)
        alive[:] = [found.rows for found in gc.get_objects() if isinstance(found, Manifest)]
        return result

    Manifest.load = classmethod(counted)  # type: ignore[method-assign, assignment]
    distill(parse_config(tree), fresh=True, train_step=counting)
    return reads, alive


def test_a_manifest_is_read_once_and_kept_once(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    validates = {
        "validation_every_steps": 1,
        "validation_rows": 8,
        "max_steps": 2,
        "global_batch_size": 8,
    }
    held_out = {"validation": str(tiny_shards / "validation")}
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, train=validates, data=held_out)
    for reads, alive in run_ranks(manifests_of, 2, tree):
        assert (reads, len(alive)) == (2, 2)  # training and held-out rows
