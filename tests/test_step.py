from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.overrides import TorchFunctionMode

import scaledistill
from scaledistill.config.load import parse_config
from scaledistill.distributed.ranks import process_group
from scaledistill.errors import DataError
from scaledistill.metrics.recorder import read_rows
from scaledistill.metrics.stopwatch import Stopwatch
from scaledistill.preflight import checks
from scaledistill.relations import QKV
from scaledistill.training.loop import COMPILING_STEPS, distill
from scaledistill.training.session import Session, open_session
from scaledistill.training.step import (
    ExportProbe,
    StepResult,
    student_loss,
    train_step,
    validation_losses,
)

# What makes the host wait for a GPU: values, or shapes that depend on them.
READS = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.unique,
    Tensor.masked_select, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__,
    Tensor.is_nonzero, Tensor.equal, torch.nonzero, torch.unique, torch.masked_select,
    torch.is_nonzero, torch.equal, torch.allclose,
}  # fmt: skip
PACKAGE = str(Path(scaledistill.__file__).parent)


class HostReads(TorchFunctionMode):
    """Counts the reads by whose code asks for them; those of the engine's library are not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.by_owner: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = (
            func is Tensor.__getitem__
            and isinstance(args[1], Tensor)
            and args[1].dtype == torch.bool
        )
        if func in READS or by_mask:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename and frame.f_back:
                frame = frame.f_back
            owners = ("deepspeed", "transformers")
            file = frame.f_code.co_filename
            owner = next(
                (name for name in owners if f"/{name}/" in file and PACKAGE not in file), "ours"
            )
            self.by_owner[owner] += 1
        return func(*args, **(kwargs or {}))


def reads_of_steps(tree: dict[str, Any]) -> list[dict[str, int]]:
    config = parse_config(tree)
    reads = []
    with process_group(60) as ranks:
        session = open_session(checks.plan_run(config, 1, ranks.device).run, ranks, resume=False)
        with session.stream() as stream:
            for _ in range(3):
                with HostReads() as counted:
                    train_step(session, stream, lambda: None, Stopwatch(ranks.device))
                reads.append(dict(counted.by_owner))
    return reads


def alive_at_forwards(tree: dict[str, Any]) -> list[int]:
    """Return how many Q/K/V of earlier micro-batches, and their losses, live when the teacher
    begins with the next.
    """
    alive: list[int] = []
    references: list[weakref.ref[Any]] = []
    with process_group(60) as ranks:
        session = open_session(
            checks.plan_run(parse_config(tree), 1, ranks.device).run, ranks, resume=False
        )
        teacher, compute = session.teacher.forward, session.students[0].loss

        def watched(*arguments: Any) -> Any:
            alive.append(sum(reference() is not None for reference in references))
            target = teacher(*arguments)
            references.extend(weakref.ref(x.untyped_storage()) for x in target)
            return target

        def remembered(*arguments: Any, **options: Any) -> Any:
            loss = compute(*arguments, **options)
            references.append(weakref.ref(loss.total))
            return loss

        with pytest.MonkeyPatch.context() as monkeypatch, session.stream() as stream:
            monkeypatch.setattr(session.teacher, "forward", watched)
            monkeypatch.setattr(session.students[0], "loss", remembered)
            for _ in range(2):
                train_step(session, stream, lambda: None, Stopwatch())
            validation_losses(session)
    return alive


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_micro_batch_is_gone_before_the_next(tiny_config, tiny_shards: Path, engine: str) -> None:
    train = {"micro_batch_size": 2, "validation_every_steps": 3, "validation_rows": 6}
    data = {"validation": str(tiny_shards / "validation")}
    config = tiny_config(train=train, data=data, engine={"name": engine})
    [alive] = run_ranks(alive_at_forwards, 1, config.model_dump())
    assert len(alive) == 2 * 4 + 3
    assert not any(alive)


@pytest.mark.parametrize("attention", ["row", "document"])
def test_one_wait_for_the_device_per_step(tiny_config, attention: str) -> None:
    config = tiny_config(
        train={"micro_batch_size": 2},
        relations={"backend": "reference"},
        data={"attention": attention},
    )
    [steps] = run_ranks(reads_of_steps, 1, config.model_dump())
    assert len(steps) == 3
    for by_owner in steps:
        assert by_owner.pop("deepspeed") >= 1  # it looks at its gradients: the count works
        assert by_owner == {"ours": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["row", "document"])
def test_a_forward_on_a_gpu_waits_for_nothing(tiny_config, attention: str) -> None:
    config = tiny_config(data={"attention": attention}, train={"compile": False})
    with process_group(60) as ranks:
        session = open_session(checks.plan_run(config, 1, ranks.device).run, ranks, resume=False)
        with session.stream() as stream:
            batch = next(stream)
        for mode in ("default", "error"):  # the first time kernels are compiled, and tried
            torch.cuda.set_sync_debug_mode(mode)
            try:
                student_loss(
                    session.students[0],
                    session.teacher(batch.tokens),
                    batch,
                    Stopwatch(ranks.device),
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")


def compiles_of_run(tree: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Run with a compiler that only counts; return after how many steps something was compiled,
    and the losses.
    """
    steps_made, compiled_after = 0, []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled_after.append(steps_made)
        return graph.forward

    def counted_step(*arguments: Any) -> StepResult:
        nonlocal steps_made
        result = train_step(*arguments)
        steps_made += 1
        return result

    def opened(*arguments: Any, **options: Any) -> Session:
        session = open_session(*arguments, **options)
        if session.config.train.compile:
            for view in (session.teacher.view, session.students[0].engine._view):  # type: ignore[attr-defined]
                view.compile_blocks(backend=backend)  # in place of what has not run yet
        return session

    result = distill(parse_config(tree), open_session=opened, train_step=counted_step)
    assert result.state == "done"
    assert steps_made == COMPILING_STEPS + 4
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert compiled_after.pop() == steps_made, "the run's stance outlived it"
    rows = read_rows(Path(tree["run"]["folder"]) / "metrics.jsonl")
    return compiled_after, [
        row[key] for row in rows for key in ("loss", "validation_loss") if key in row
    ]


def test_nothing_is_compiled_after_the_first_steps(
    tiny_config, tiny_shards, tmp_path: Path
) -> None:
    def run(compile: bool) -> tuple[list[int], list[float]]:
        config = tiny_config(
            run={"folder": str(tmp_path / f"compiled-{compile}")},
            train={
                "max_steps": COMPILING_STEPS + 4,
                "compile": compile,
                "validation_every_steps": COMPILING_STEPS + 1,
                "validation_rows": 11,
            },
            data={"validation": str(tiny_shards / "validation")},
        )
        return run_ranks(compiles_of_run, 1, config.model_dump())[0]

    compiled_after, losses = run(compile=True)
    # Equal blocks share a graph: a whole block and a captured one, of the teacher and of the
    # student. Step 5 has the padded row, whose mask the whole blocks take. The validation of step
    # 11 comes too late for its other shape.
    assert compiled_after == [0, 0, 0, 0, 4, 4]
    plain = run(compile=False)
    assert plain[0] == []
    assert losses == pytest.approx(plain[1], rel=1e-5)


@pytest.mark.parametrize(("in_run", "compared"), [([0.5, math.nan], 1), ([math.inf, math.nan], 0)])
def test_rows_whose_loss_is_not_finite_are_not_compared_with_the_export(
    in_run: list[float],
    compared: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    qkv = QKV(*torch.zeros(3, 1, 2, 4))
    losses = iter([*in_run, 0.5, 0.75])

    def loss(*_: object) -> SimpleNamespace:
        return SimpleNamespace(total=torch.tensor(next(losses)))

    engine = SimpleNamespace(train_mode=lambda on: None, forward=lambda tokens: qkv)
    config = SimpleNamespace(num_hidden_layers=1)
    student: Any = SimpleNamespace(engine=engine, config=config, loss=loss)
    session: Any = SimpleNamespace(
        held_out=True,
        validation_batches=lambda: [SimpleNamespace(tokens=None)] * 2,
        teacher=lambda tokens: qkv,
        ranks=SimpleNamespace(device=torch.device("cpu")),
    )

    class View:
        module = torch.nn.Identity()

        def __call__(self, tokens: object) -> QKV:
            return qkv

    monkeypatch.setattr("scaledistill.training.step.capture_view", lambda model, layer: View())
    model: Any = None
    probe = ExportProbe(session, student)
    probe.check(model)
    assert ("so the export is not compared" in caplog.text) is (compared == 0)
    if compared:
        with pytest.raises(DataError, match=r"is 0\.5000 in the run, but 0\.7500 once exported"):
            probe.check(model)
