"""Several students of one teacher pass: each is trained as if it were alone, bit for bit."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, run_ranks
from safetensors.torch import load_file
from test_engine import ENGINES
from test_train import (
    LONG,
    distil,
    distil_and_die,
    losses_of,
    make_tree,
    once_made,
    rows_of,
    status_of,
)

from scaledistill.checkpoint.format import write_manifest, write_state
from scaledistill.config.load import parse_config
from scaledistill.config.schedule import learning_rate
from scaledistill.errors import EXIT_STOPPED
from scaledistill.metrics.events import read_events
from scaledistill.models.export import export_student
from scaledistill.models.student import build_student, student_config
from scaledistill.models.teacher import load_config
from scaledistill.preflight.roster import student_states
from scaledistill.storage.files import sha256_of
from scaledistill.training.exports import export_checkpoint

__all__ = ["make_tree"]

MakeTree = Callable[..., dict[str, Any]]
SMALL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
STUDENTS: dict[str, dict[str, Any]] = {
    "a": {**SMALL, "init": "teacher", "dropout": 0.1},
    "b": {**SMALL, "num_layers": 1, "relation_heads": 2, "learning_rate": 5e-3, "warmup_steps": 4},
    "c": {**SMALL, "tap": "extra", "init": "teacher", "max_grad_norm": 0.01, "weight_decay": 0.5},
}


def tree_of(make: MakeTree, names: str, **blocks: dict[str, Any]) -> dict[str, Any]:
    """A run of the students that `names` holds."""
    tree = make(f"run-{names}", **blocks)
    return {**tree, "students": {name: STUDENTS[name] for name in names}}


def weights_of(tree: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(tree["run"]["folder"]) / "export" / name / "model.safetensors")


def own_metrics(tree: dict[str, Any], name: str) -> list[dict[str, float]]:
    """Return a student's metrics by the names that they have if it is alone."""
    renamed = {
        f"loss/{name}": "loss",
        f"lr/{name}": "lr",
        f"grad_norm/{name}": "grad_norm",
        f"validation_loss/{name}": "validation_loss",
    }
    alone = len(tree["students"]) == 1
    return [
        {
            key if alone else renamed.get(key, key): value
            for key, value in row.items()
            if key.startswith(f"loss/{name}/")
            or (key in renamed.values() if alone else key in renamed)
        }
        for row in rows_of(tree)
    ]


def distil_each(trees: list[dict[str, Any]]) -> list[str]:
    from scaledistill.distributed.ranks import process_group

    with process_group(60):
        return [distil(tree)[0] for tree in trees]


def assert_as_alone(together: dict[str, Any], alone: dict[str, dict[str, Any]]) -> None:
    for name, tree in alone.items():
        assert own_metrics(together, name) == own_metrics(tree, name), name
        found, expected = weights_of(together, name), weights_of(tree, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), name


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        ("zero2", 2),
        *(
            pytest.param(engine, world_size, marks=pytest.mark.full)
            for engine in ENGINES
            for world_size in (1, 2)
            if (engine, world_size) != ("zero2", 2)
        ),
    ],
)
def test_students_together_are_as_alone(
    make_tree: MakeTree, tiny_shards: Path, engine: str, world_size: int
) -> None:
    blocks: dict[str, Any] = {
        "engine": ENGINES[engine],
        "data": {"validation": str(tiny_shards / "validation")},
        "train": {
            **LONG,
            "max_steps": 6,
            "micro_batch_size": 2,
            "validation_every_steps": 3,
            "validation_rows": 11,
        },
    }
    together = tree_of(make_tree, "abc", **blocks)
    alone = {name: tree_of(make_tree, name, **blocks) for name in STUDENTS}
    ends = run_ranks(distil_each, world_size, [together, *alone.values()])
    assert ends[0] == ["done"] * 4
    assert_as_alone(together, alone)
    for row in rows_of(together):
        assert row["loss"] == sum(row[f"loss/{name}"] for name in STUDENTS)
        assert "lr" not in row
    folder = Path(together["run"]["folder"])
    assert {path.name for path in (folder / "export").iterdir()} == {
        *STUDENTS,
        *(f"{name}-best" for name in STUDENTS),
    }
    card = (folder / "export" / "b" / "README.md").read_text()
    assert "2 heads" in card


def test_killed_students_resume_bit_for_bit(make_tree: MakeTree) -> None:
    blocks: dict[str, Any] = {
        "train": {**LONG, "max_steps": 20},
        "checkpoint": {"every_steps": 7},
        "engine": ENGINES["zero2"],
    }
    killed = tree_of(make_tree, "ab", **blocks)
    whole = {**killed, "run": {**killed["run"], "folder": f"{killed['run']['folder']}-whole"}}
    job = Job(distil_and_die, 2, killed, 12)
    job.processes[1].join(120)
    job.kill()
    assert status_of(killed)["state"] in ("running", "failed")
    assert run_ranks(distil_each, 2, [killed, whole])[0] == ["done", "done"]
    assert losses_of(killed) == losses_of(whole)
    assert own_metrics(killed, "b") == own_metrics(whole, "b")
    for name in "ab":
        assert all(
            torch.equal(weight, weights_of(whole, name)[key])
            for key, weight in weights_of(killed, name).items()
        )


def test_every_student_of_a_checkpoint_is_exported(make_tree: MakeTree) -> None:
    tree = tree_of(make_tree, "ac", train={**LONG, "max_steps": 4})
    assert run_ranks(distil, 1, tree)[0][0] == "done"
    folders = export_checkpoint(parse_config(tree), "newest")
    assert [folder.name for folder in folders] == ["a-step-4", "c-step-4"]
    for folder, name in zip(folders, "ac", strict=True):
        found, expected = load_file(folder / "model.safetensors"), weights_of(tree, name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def distil_with_a_diverging_student(tree: dict[str, Any], **options: Any) -> tuple[str, int, str]:
    """Run with a student "b" whose training losses are not finite from the third step on."""
    from scaledistill.training.session import open_session

    def opened(*arguments: Any, **options: Any) -> Any:
        session = open_session(*arguments, **options)
        student = session.students[1]
        compute = student.loss

        def bad(*inputs: Any) -> Any:
            loss = compute(*inputs)
            diverges = session.step >= 2 and loss.total.requires_grad
            return loss._replace(total=loss.total * float("nan")) if diverges else loss

        student.loss = bad
        return session

    return distil(tree, open_session=opened, **options)


def test_a_student_that_diverges_is_named_and_the_others_go_on(make_tree: MakeTree) -> None:
    train = {**LONG, "max_steps": 6, "max_skipped_steps": 2}
    tree = tree_of(make_tree, "ab", train=train)
    alone = tree_of(make_tree, "a", train=train)
    kind, code, message = run_ranks(distil_with_a_diverging_student, 1, tree)[0]
    assert (kind, code) == ("DivergedError", 4)
    assert message.startswith("3 steps in a row of student b had a non-finite loss or gradient")
    assert run_ranks(distil, 1, alone)[0][0] == "done"
    found = own_metrics(tree, "a")
    assert len(found) >= 4
    assert found == own_metrics(alone, "a")[: len(found)], "its steps were made all the same"
    assert [row["skipped_steps"] for row in rows_of(tree)][:4] == [0, 0, 1, 2]
    assert 'or set train.on_divergence to "drop" to train the others on' in message


def stopping_after(step: int) -> Callable[..., Any]:
    """Return a run's `train_step` that asks the run to stop after its step `step`."""
    return once_made(step - 1, lambda: signal.raise_signal(signal.SIGTERM))


def with_engines_counted(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Check before each step that no engine is kept besides those of the session's students."""

    def counted(session: Any, *rest: Any) -> Any:
        names = [type(held).__name__ for held in gc.get_objects()]
        counts = [names.count(name) for name in ("DeepSpeedEngine", "FsdpEngine")]
        assert sorted(counts) == [0, len(session.students)]
        return train_step(session, *rest)

    return counted


def distil_and_drop(tree: dict[str, Any], alone: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Run until step 7, with a student that diverges, then rerun; then run the other one alone."""
    from scaledistill.distributed.ranks import process_group

    with process_group(60):
        return [
            distil_with_a_diverging_student(
                tree, train_step=with_engines_counted(stopping_after(7))
            ),
            distil(tree),
            distil(alone),
        ]


RESUMED = [("zero2", 2), pytest.param("fsdp", 2, marks=pytest.mark.full)]


@pytest.mark.parametrize(("engine", "world_size"), RESUMED)
def test_a_student_that_diverges_is_dropped_for_good(
    make_tree: MakeTree, tiny_shards: Path, engine: str, world_size: int
) -> None:
    blocks: dict[str, Any] = {
        "engine": ENGINES[engine],
        "data": {"validation": str(tiny_shards / "validation")},
        "train": {
            **LONG,
            "max_steps": 9,
            "max_skipped_steps": 2,
            "on_divergence": "drop",
            "validation_every_steps": 2,
            "validation_rows": 11,
        },
    }
    tree, alone = (tree_of(make_tree, names, **blocks) for names in ("ab", "a"))
    stopped, done, _ = run_ranks(distil_and_drop, world_size, tree, alone)[0]
    assert stopped[:2] == ("stopped", EXIT_STOPPED)
    assert done[:2] == ("done", 0)
    assert done[2].endswith("; b was dropped at step 5")
    assert_as_alone(tree, {"a": alone})
    rows = {row["step"]: row for row in rows_of(tree)}
    assert rows[5]["loss/b"] is None
    for step in range(6, 10):
        assert rows[step].keys().isdisjoint({"loss/b", "lr/b", "validation_loss/b"})
        assert rows[step]["loss"] == rows[step]["loss/a"]
        assert (rows[step]["dropped_students"], rows[step]["skipped_steps"]) == (1, 3)
    folder = Path(tree["run"]["folder"])
    assert {path.name for path in (folder / "export").iterdir()} == {
        *("a", "a-best", "b-best", "b-step-5")
    }
    [(name, found)] = status_of(tree)["dropped"].items()
    assert (name, found["step"], found["skipped_steps"]) == ("b", 5, 3)
    assert found["reason"].startswith("3 steps in a row of student b had a non-finite loss")
    assert [path.name for path in export_checkpoint(parse_config(tree), "newest")] == ["a-step-9"]


def distil_others(
    before: dict[str, Any], after: dict[str, Any], alone: dict[str, Any]
) -> list[tuple[str, int, str]]:
    """Run one configuration until step 5, then another in its folder to step 8, then to its end."""
    from scaledistill.distributed.ranks import process_group

    with process_group(60):
        return [
            distil(before, train_step=stopping_after(5)),
            distil(after, train_step=stopping_after(8)),
            distil(after),
            distil(alone),
        ]


@pytest.mark.parametrize(("engine", "world_size"), RESUMED)
def test_students_are_added_and_left_out_on_a_resume(
    make_tree: MakeTree, engine: str, world_size: int
) -> None:
    blocks: dict[str, Any] = {"engine": ENGINES[engine], "train": {**LONG, "max_steps": 11}}
    before, alone = (tree_of(make_tree, names, **blocks) for names in ("ab", "a"))
    after = {**before, "students": {name: STUDENTS[name] for name in "ac"}}
    ends = run_ranks(distil_others, world_size, before, after, alone)[0]
    assert [end[0] for end in ends] == ["stopped", "stopped", "done", "done"]
    assert_as_alone(after, {"a": alone})
    rows = rows_of(after)
    assert [row["step"] for row in rows if "loss/b" in row] == [1, 2, 3, 4, 5]
    own = parse_config(after).for_student("c").train.model_copy(update={"max_steps": 6})
    assert {row["step"]: row["lr/c"] for row in rows if "lr/c" in row} == {
        6 + step: learning_rate(step, own) for step in range(6)
    }
    assert rows[-1]["loss/c"] < rows[5]["loss/c"]
    states = [
        json.loads((folder / "state.json").read_text())
        for folder in sorted((Path(after["run"]["folder"]) / "checkpoints").iterdir())
    ]
    assert [
        {name: (own["first_step"], own["optimizer_steps"]) for name, own in s["students"].items()}
        for s in states
    ] == [{"a": (0, 8), "c": (5, 3)}, {"a": (0, 11), "c": (5, 6)}]


def distil_from_the_form_of_before(tree: dict[str, Any], whole: dict[str, Any]) -> list[Any]:
    """Run until step 3, write the state of its checkpoint as it was before runs of several
    students, and rerun; then make the whole run. Return how they ended, and the student's part of
    the state.
    """
    from scaledistill.distributed.ranks import process_group

    with process_group(60):
        ends = [distil(tree, train_step=stopping_after(3))[0]]
        [folder] = (Path(tree["run"]["folder"]) / "checkpoints").iterdir()
        state = json.loads((folder / "state.json").read_text())
        own = state.pop("students")["a"]
        by_student = ("optimizer_steps", "loss_scaler")
        before = {**state, **{key: {"a": own[key]} for key in by_student}}
        later = ("first_step", "validated_at", "model_config")
        before |= {key: own[key] for key in own.keys() - {*by_student, *later}}
        digests = {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}
        digests["state.json"] = write_state(folder / "state.json", json.dumps(before))
        write_manifest(folder, digests)
        found = student_states(before)["a"]
        assert found == {key: own[key] for key in own.keys() - set(later)}
        return [*ends, distil(tree)[0], distil(whole)[0], found]


def test_a_checkpoint_of_one_student_as_it_was_before_can_be_resumed(make_tree: MakeTree) -> None:
    tree = tree_of(make_tree, "a", train={**LONG, "max_steps": 6})
    whole = {**tree, "run": {**tree["run"], "folder": f"{tree['run']['folder']}-whole"}}
    *ends, own = run_ranks(distil_from_the_form_of_before, 1, tree, whole)[0]
    assert ends == ["stopped", "done", "done"]
    events = read_events(Path(tree["run"]["folder"]) / "events.jsonl")
    assert [event.step for event in events if event.kind == "resumed"] == [3]
    assert own["optimizer_steps"] == 3
    assert_as_alone(tree, {"a": whole})


def distil_and_lose_the_start(tree: dict[str, Any], start: Path) -> list[Any]:
    """Make a run, lose its last checkpoint and the folder that it started from, and resume without
    validation.
    """
    from scaledistill.distributed.ranks import process_group

    with process_group(60):
        ends = [distil(tree)]
        shutil.rmtree(Path(tree["run"]["folder"]) / "checkpoints" / "step-000000002")
        start.rename(start.with_name("moved"))
        tree["train"]["validation_every_steps"] = 0
        # On another machine, which has the copies of the checkpoints alone.
        checkpoint = {"every_steps": 1, "remote": f"{tree['run']['folder']}/checkpoints"}
        run = {**tree["run"], "folder": f"{tree['run']['folder']}-moved"}
        moved = distil({**tree, "checkpoint": checkpoint, "run": run})
        return [*ends, moved, distil(tree), torch.are_deterministic_algorithms_enabled()]


@pytest.mark.parametrize("architecture", [None, "distilbert"])
def test_a_resume_needs_no_folder_that_a_student_started_from(
    architecture: str | None,
    make_tree: MakeTree,
    tiny_teacher: Path,
    tiny_shards: Path,
    tmp_path: Path,
) -> None:
    config = student_config(load_config(tiny_teacher), architecture=architecture, **SMALL)
    config.initializer_range = 0.03  # of the folder's model, no default
    student = build_student(None, config, seed=3)
    start = export_student(
        tmp_path / "start",
        student.config,
        student.state_dict(),
        tokenizer_source=tiny_teacher,
        card={"init": "random"},
    )
    students = {"l2": {**SMALL, "init": str(start), "architecture": architecture}}
    blocks = {
        "train": {"max_steps": 2, "warmup_steps": 0, "validation_every_steps": 1},
        "checkpoint": {"every_steps": 1},
        "data": {"validation": str(tiny_shards / "validation")},
        "run": {"deterministic": True},
    }
    tree = {**make_tree(**blocks), "students": students}
    *ends, is_deterministic = run_ranks(distil_and_lose_the_start, 1, tree, start)[0]
    assert [end[0] for end in ends] == ["done", "done", "done"], ends
    assert [row["step"] for row in rows_of(tree)] == [1, 2]
    export = Path(tree["run"]["folder"]) / "export" / "l2"
    assert architecture is None or load_config(export).initializer_range == 0.03
    card = (export / "README.md").read_text()
    assert f"| validation loss at step 1 | {rows_of(tree)[0]['validation_loss']:.4f} |" in card
    assert not is_deterministic, "that is over with the run"
