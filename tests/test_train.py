from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree, write_tiny_shards
from ranks import Job, run_ranks
from safetensors.torch import load_file
from test_engine import ENGINES
from transformers import AutoModel

from scaledistill.config.load import parse_config
from scaledistill.errors import ConfigError, DataError, DivergedError, PeerError
from scaledistill.metrics.recorder import read_rows
from scaledistill.models.student import build_student, student_config
from scaledistill.models.teacher import load_config

LONG = {
    "global_batch_size": 8,
    "max_steps": 30,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "precision": "fp32",
}


@pytest.fixture
def make_tree(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> Callable[..., dict[str, Any]]:
    """Return a function that makes the configuration of a run in `tmp_path / name`."""

    def make(name: str = "run", **blocks: dict[str, Any]) -> dict[str, Any]:
        tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, **blocks)
        tree["run"] |= {"folder": str(tmp_path / name), **blocks.get("run", {})}
        return tree

    return make


def distil(tree: dict[str, Any], **options: Any) -> tuple[str, int, str]:
    """Run `distill` in this rank; return how it ended, the exit code and the message, also of an
    error.
    """
    from scaledistill.training.loop import distill

    try:
        result = distill(parse_config(tree), **options)
        return result.state, result.exit_code, result.message
    except (ConfigError, DataError, DivergedError, PeerError) as error:
        return type(error).__name__, error.exit_code, str(error)


def distil_all(trees: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    from scaledistill.distributed.ranks import process_group

    with process_group(60):
        return [distil(tree) for tree in trees]


def once_made(step: int, act: Callable[[], None]) -> Callable[..., Any]:
    """Return a run's `train_step` that calls `act` when `step` steps are made, and all that is due
    after the last of them.
    """
    from scaledistill.training.step import train_step

    def acting(session: Any, *arguments: Any) -> Any:
        if session.step == step:
            act()
        return train_step(session, *arguments)

    return acting


def distil_and_die(tree: dict[str, Any], step: int) -> None:
    """Run until rank 1 has made `step` steps, then kill it; what the other rank makes of that is
    not looked at.
    """

    def die() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    distil(tree, train_step=once_made(step, die))


def flip_a_bit(shard: Path) -> None:
    """Damage a shard's first block."""
    content = bytearray(shard.read_bytes())
    content[700] ^= 4
    shard.write_bytes(content)


def disks_of_two_nodes(shards: Path, split: str, folder: Path) -> list[Path]:
    """Return the disks of two nodes, each with a copy of the data set."""
    nodes = [folder / "node0", folder / "node1"]
    for node in nodes:
        shutil.copytree(shards / split, node / split)
    return nodes


def rows_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return read_rows(Path(tree["run"]["folder"]) / "metrics.jsonl")


def losses_of(tree: dict[str, Any]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows_of(tree)]


def status_of(tree: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(tree["run"]["folder"]) / "status.json").read_text())


def test_a_whole_run(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(
        data={"validation": str(tiny_shards / "validation")},
        train={
            **LONG,
            "max_steps": 20,
            "learning_rate": 1e-2,
            "validation_every_steps": 8,
            "validation_rows": 13,
        },
        checkpoint={"every_steps": 5, "keep": 2},
        logging={"every_steps": 5},
    )
    assert run_ranks(distil, 2, tree)[0][:2] == ("done", 0)
    folder, rows = Path(tree["run"]["folder"]), rows_of(tree)
    assert [row["step"] for row in rows] == [1, 5, 8, 10, 15, 16, 20]
    assert [row["step"] for row in rows if "validation_loss" in row] == [8, 16, 20]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(
        sum(rows[0][f"loss/l2/{pair}"] for pair in ("qq", "kk", "vv")), rel=1e-6
    )
    assert status_of(tree)["state"] == "done"
    assert status_of(tree)["exit_code"] == 0
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-000000015",
        "step-000000020",
    ]
    assert (
        parse_config(json.loads((folder / "config.json").read_text())).train.micro_batch_size == 4
    )
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    check_report(folder, parse_config(tree), monkeypatch)
    best = min(
        (row for row in rows if "validation_loss" in row), key=lambda row: row["validation_loss"]
    )
    state = json.loads((folder / "checkpoints" / "step-000000020" / "state.json").read_text())
    own = state["students"]["l2"]["best"]
    assert (own["step"], own["validation_loss"]) == (
        best["step"],
        best["validation_loss"],
    )
    assert (folder / "export" / "l2-best" / "model.safetensors").exists()
    # The same command again has nothing to do.
    before = losses_of(tree)
    assert run_ranks(distil, 1, {**tree, "train": {**tree["train"], "micro_batch_size": 4}})[0][
        :2
    ] == ("done", 0)
    assert losses_of(tree) == before
    check_export(
        folder / "export" / "l2",
        folder / "checkpoints" / "step-000000020" / "l2.weights.safetensors",
    )


def check_report(folder: Path, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what a finished run of 20 steps leaves for the report, and that its checkpoint has the
    same relation maps.
    """
    from scaledistill.metrics.events import read_events
    from scaledistill.training import maps

    events = read_events(folder / "events.jsonl")
    assert [(event.kind, event.step) for event in events] == [
        ("started", 0),
        *(("saved", step) for step in (5, 10, 15, 20)),
        ("done", 20),
    ]
    facts = events[0].details
    assert facts["environment"]["ranks"] == 2
    assert facts["data"]["validation"]["location"] == config.data.validation
    assert facts["data"]["training"]["source"]["kind"] == "test"
    page = (folder / "report.html").read_text()
    assert facts["data"]["training"]["sha256 of the manifest"] in page
    measured = json.loads((folder / "maps.json").read_text())
    assert measured["step"] == 20
    assert all(
        word.startswith(("w", "[CLS]", "[SEP]"))
        for sentence in measured["sentences"]
        for word in sentence
    )
    own = measured["students"]["l2"]
    monkeypatch.setattr(maps, "KL_ROWS", own["num_rows"])  # the rows of rank 0
    maps.write_checkpoint_maps(config)
    again = json.loads((folder / "maps.json").read_text())
    assert again["sentences"] == measured["sentences"]
    for pair in ("qq", "kk", "vv"):
        other = again["students"]["l2"]
        assert other["kl"][pair] == pytest.approx(own["kl"][pair], rel=1e-3, abs=1e-5)
        for one, two in zip(other["maps"][pair], own["maps"][pair], strict=True):
            assert one["head"] == two["head"]
            assert one["student"] == [pytest.approx(values, abs=1) for values in two["student"]]


def distil_from_memory(tree: dict[str, Any], umask: int) -> tuple[str, int, str]:
    """Copy the shards to memory, as to a bucket, and run on them through the cache under
    `umask`.
    """
    import fsspec

    os.umask(umask)
    local = Path(tree["data"]["train"])
    fsspec.filesystem("memory").put(str(local / "train"), "/modes", recursive=True)
    tree["data"] |= {"train": "memory://modes", "validation": str(local / "validation")}
    return distil(tree)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_that_is_written_follows_the_umask(
    make_tree: Callable[..., dict[str, Any]], umask: int, tmp_path: Path, tiny_teacher: Path
) -> None:
    tree = make_tree(
        "out/run",
        data={
            "train": str(tmp_path / "out" / "shards"),
            "cache_folder": str(tmp_path / "out" / "cache"),
        },
        train={**LONG, "max_steps": 4, "validation_every_steps": 2, "validation_rows": 9},
        checkpoint={"every_steps": 2},
    )
    before = os.umask(umask)
    try:
        write_tiny_shards(tmp_path / "out" / "shards", tiny_teacher)
    finally:
        os.umask(before)
    assert run_ranks(distil_from_memory, 1, tree, umask)[0][:2] == ("done", 0)
    written = list((tmp_path / "out").rglob("*"))
    names = {path.name for path in written}
    assert {
        "state.json",
        "metrics.jsonl",
        "loss.png",
        "status.json",
        "l2-best",
        "l2",
        "config.json",
    } <= names
    assert sum(path.suffix == ".safetensors" for path in written) >= 4
    assert any(path.is_file() for path in (tmp_path / "out" / "cache").rglob("*"))
    wrong = {
        str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in written
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong


def check_export(export: Path, weights: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(export, add_pooling_layer=False)
    masters = load_file(weights)
    assert masters.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, masters[name]), name
    ids = AutoTokenizer.from_pretrained(export)("w001 w002", return_tensors="pt")
    assert model(input_ids=ids["input_ids"]).last_hidden_state.isfinite().all()


QUICK_CASES = [("zero3", 2)]


@pytest.mark.parametrize(
    ("engine", "accumulation"),
    [
        pytest.param(*case, marks=() if case in QUICK_CASES else pytest.mark.full)
        for case in itertools.product(ENGINES, (1, 2))
    ],
)
def test_killed_runs_resume_bit_for_bit(
    make_tree: Callable[..., dict[str, Any]], engine: str, accumulation: int
) -> None:
    blocks: dict[str, dict[str, Any]] = {
        "train": {**LONG, "max_steps": 20, "micro_batch_size": 4 // accumulation},
        "engine": ENGINES[engine],
        "checkpoint": {"every_steps": 7},
    }
    whole, killed = make_tree("whole", **blocks), make_tree("killed", **blocks)
    assert run_ranks(distil, 2, whole)[0][0] == "done"
    job = Job(distil_and_die, 2, killed, 18)
    job.processes[1].join(60)
    assert job.processes[1].exitcode == -signal.SIGKILL
    job.kill()
    assert losses_of(killed)[-1][0] >= 17
    assert status_of(killed)["state"] in ("running", "failed")
    assert run_ranks(distil, 2, killed)[0][0] == "done"
    assert len(losses_of(killed)) == 20
    assert losses_of(killed) == losses_of(whole)
    ends = [
        Path(tree["run"]["folder"]) / "checkpoints" / "step-000000020" for tree in (whole, killed)
    ]
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        first, second = (load_file(end / f"l2.{group}.safetensors") for end in ends)
        assert all(torch.equal(first[name], second[name]) for name in first), group


def test_max_steps_may_grow_while_the_rate_warms_up(
    make_tree: Callable[..., dict[str, Any]],
) -> None:
    long = {**LONG, "warmup_steps": 4, "max_steps": 8}
    whole, grown = (
        make_tree("whole", train=long),
        make_tree("grown", train={**long, "max_steps": 4}),
    )
    ends = run_ranks(
        distil_all,
        1,
        [whole, grown, {**grown, "train": long}, {**grown, "train": {**long, "max_steps": 9}}],
    )
    assert [state for state, *_ in ends[0][:3]] == ["done"] * 3
    assert losses_of(grown) == losses_of(whole)
    assert (
        "train.max_steps: 8 -> 9. The learning rate decays to 0 at train.max_steps" in ends[0][3][2]
    )


def test_a_stable_run_is_extended_and_decayed(make_tree: Callable[..., dict[str, Any]]) -> None:
    """From a step of the stable phase, a run of another length is the same as from the start."""
    ten = {**LONG, "max_steps": 10, "schedule": "warmup_stable_decay", "decay_steps": 4}
    longer, shorter = {**ten, "max_steps": 14}, {**ten, "max_steps": 7, "decay_steps": 2}
    saves = {"checkpoint": {"every_steps": 5}}
    decayed, extended, branch = (
        make_tree(name, train=ten, **saves) for name in ("decayed", "extended", "branch")
    )
    whole, short = make_tree("whole", train=longer), make_tree("short", train=shorter)
    ends = run_ranks(distil_all, 1, [decayed, whole, short])
    assert [state for state, *_ in ends[0]] == ["done"] * 3
    run_ranks(stop_after, 1, extended, 4)
    assert losses_of(extended) == losses_of(decayed)[:5] == losses_of(whole)[:5]
    folder, name = Path(decayed["run"]["folder"]), "step-000000005"
    kept = folder / "checkpoints" / name
    shutil.copytree(kept, Path(branch["run"]["folder"]) / "checkpoints" / name)
    ends = run_ranks(
        distil_all,
        1,
        [{**extended, "train": longer}, {**branch, "train": shorter}, {**decayed, "train": longer}],
    )
    assert [state for state, *_ in ends[0]] == ["done", "done", "ConfigError"]
    for resumed, like, made in ((extended, whole, 0), (branch, short, 5)):
        assert losses_of(resumed) == losses_of(like)[made:]
        rates = [[row["lr"] for row in rows_of(tree)] for tree in (resumed, like)]
        assert rates[0] == rates[1][made:]
    assert ends[0][2][2] == (
        f"{folder} holds a run at step 10 with other settings: train.max_steps: 10 -> 14. With "
        "them, the steps made after step 7 would have had another learning rate. Set "
        f"train.max_steps=10 to go on; to train on with the new schedule, copy {kept} to the "
        "folder checkpoints of another run.folder"
    )


def test_dropout_resumes_bit_for_bit(make_tree: Callable[..., dict[str, Any]]) -> None:
    student = {"l2": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "dropout": 0.3}}
    blocks = {"students": student, "checkpoint": {"every_steps": 3}}
    whole, stopped = make_tree("whole", **blocks), make_tree("stopped", **blocks)
    run_ranks(distil, 1, whole)
    run_ranks(stop_after, 1, stopped, 3)
    assert [step for step, _ in losses_of(stopped)] == [1, 2, 3, 4]
    run_ranks(distil, 1, stopped)
    assert losses_of(stopped) == losses_of(whole)
    plain = make_tree(
        "plain", checkpoint={"every_steps": 3}, students={"l2": {**student["l2"], "dropout": 0.0}}
    )
    run_ranks(distil, 1, plain)
    assert losses_of(plain) != losses_of(whole)


def distil_with_misplaced_weights(tree: dict[str, Any]) -> tuple[str, int, str]:
    """Run with a setting under which DeepSpeed hands out weights in each other's places."""
    from scaledistill.engines import deepspeed

    deepspeed.ZERO_KEYS["round_robin_gradients"] = deepspeed.SWITCH
    return distil(tree)


@pytest.mark.parametrize(("rows", "tap"), [("validation", "last"), ("train", "extra")])
def test_an_export_that_computes_something_else_fails_the_run(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path, rows: str, tap: str
) -> None:
    student = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "init": "teacher",
        "tap": tap,
    }
    blocks: dict[str, Any] = {
        "students": {"l2": student},
        "train": {**LONG, "max_steps": 3, "learning_rate": 1e-2},
    }
    if rows == "validation":
        blocks["data"] = {"validation": str(tiny_shards / "validation")}
        blocks["train"] |= {"validation_every_steps": 2, "validation_rows": 11}
    tree = make_tree(**blocks)
    assert run_ranks(distil, 2, tree)[0][0] == "done"  # the comparison holds where nothing is wrong
    export = Path(tree["run"]["folder"]) / "export" / "l2" / "model.safetensors"
    before = export.read_bytes()
    shutil.rmtree(Path(tree["run"]["folder"]) / "checkpoints")
    tree["engine"] = {
        "deepspeed": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    }
    (state, code, message), (other, _, _) = run_ranks(distil_with_misplaced_weights, 2, tree)
    assert (state, code, other) == ("DataError", 3, "PeerError")
    assert re.match(
        rf"the student's loss on rows of data\.{rows} is 0\.\d{{4}} in the run, but 0\.\d{{4}} "
        r"once",
        message,
    )
    assert "expected equal losses within 1%. The export was not put in place" in message
    assert export.read_bytes() == before
    assert (
        json.loads((Path(tree["run"]["folder"]) / "status.json").read_text())["state"] == "failed"
    )


def test_the_extra_tap_trains_every_block_and_is_not_exported(
    make_tree: Callable[..., dict[str, Any]],
) -> None:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    students = {"l2": {**sizes, "init": "teacher", "tap": "extra"}}

    def export_of(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
        return load_file(Path(tree["run"]["folder"]) / "export" / "l2" / "model.safetensors")

    blocks: dict[str, Any] = {"students": students, "checkpoint": {"every_steps": 3}}
    whole, stopped = make_tree("whole", **blocks), make_tree("stopped", **blocks)
    first = make_tree("first", students=students, train={"learning_rate": 1e-30})
    run_ranks(distil_all, 1, [whole, first])
    run_ranks(stop_after, 1, stopped, 3)
    run_ranks(distil, 1, stopped)
    assert losses_of(stopped) == losses_of(whole)
    found, start = map(export_of, (whole, first))
    config = student_config(load_config(whole["teacher"]["model"]), **sizes, tap="last")
    plain = build_student(None, config, tap="last").state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }
    top = [name for name in found if name.startswith("encoder.layer.1.output")]
    assert top
    assert not any(torch.equal(found[name], start[name]) for name in top)
    model, info = AutoModel.from_pretrained(
        Path(whole["run"]["folder"]) / "export" / "l2",
        add_pooling_layer=False,
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
    card = (Path(whole["run"]["folder"]) / "export" / "l2" / "README.md").read_text()
    assert "projection after the last layer, which is not part of this" in card


def stop_after(
    tree: dict[str, Any], step: int, signal_number: int = signal.SIGTERM
) -> tuple[str, int, str]:
    """Run, and have the last rank get a signal once `step` steps are made."""

    def signal_last() -> None:
        if is_last_rank():
            os.kill(os.getpid(), signal_number)

    return distil(tree, train_step=once_made(step, signal_last))


def is_last_rank() -> bool:
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


@pytest.mark.parametrize(
    "how",
    [
        "SIGINT",
        "STOP",
        pytest.param("SIGTERM", marks=pytest.mark.full),
        pytest.param("SIGUSR1", marks=pytest.mark.full),
    ],
)
def test_stop_requests_end_all_ranks_with_a_checkpoint(
    make_tree: Callable[..., dict[str, Any]], how: str
) -> None:
    tree = make_tree(train={**LONG, "max_steps": 12}, checkpoint={"every_steps": 100})
    folder = Path(tree["run"]["folder"])
    if how == "STOP":
        folder.mkdir()
        (folder / "STOP").touch()
        ends = run_ranks(distil, 2, tree)
    else:
        ends = run_ranks(stop_after, 2, tree, 5, getattr(signal, how))
    assert [end[:2] for end in ends] == [("stopped", 75)] * 2
    step = 0 if how == "STOP" else 6
    assert (status_of(tree)["state"], status_of(tree)["exit_code"], status_of(tree)["step"]) == (
        "stopped",
        75,
        step,
    )
    assert [path.name for path in folder.glob("checkpoints/*")] == [f"step-{step:09d}"][
        : how != "STOP"
    ]
    assert run_ranks(distil, 2, tree)[0][0] == "done"
    assert [step for step, _ in losses_of(tree)] == list(range(1, 13))


def distil_while_the_disk_hangs(tree: dict[str, Any]) -> tuple[Any, list[int], str]:
    """Run with a disk that takes neither rows nor states in steps 3 to 9, nor says whether there is
    a STOP file; return how it ended, the rows on the disk when step 9 was made, and the state then.
    """
    import threading

    from scaledistill.metrics import recorder as metrics
    from scaledistill.run import folder as runfolder
    from scaledistill.training.step import train_step

    answers, seen = threading.Event(), []
    answers.set()
    write, write_json, exists = metrics.Recorder._write, runfolder.write_json, Path.exists

    def written(self: Any, row: Any) -> None:
        assert answers.wait(60)
        write(self, row)

    def replaced(path: Path, content: Any) -> None:
        assert answers.wait(60)
        write_json(path, content)

    def looked(path: Path, **options: Any) -> bool:
        assert path.name != "STOP" or answers.wait(60)
        return exists(path, **options)

    def hanging(session: Any, *arguments: Any) -> Any:
        if session.step == 9:
            seen.extend([[step for step, _ in losses_of(tree)], status_of(tree)["state"]])
            answers.set()
        result = train_step(session, *arguments)
        if session.step == 3:
            answers.clear()
        return result

    metrics.Recorder._write, runfolder.write_json = written, replaced  # type: ignore[method-assign]
    Path.exists = looked  # type: ignore[assignment,method-assign]
    return (distil(tree, train_step=hanging)[:2], *seen)


def test_steps_go_on_while_the_disk_hangs(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree(train={**LONG, "max_steps": 12}, checkpoint={"every_steps": 100})
    end, rows, state = run_ranks(distil_while_the_disk_hangs, 1, tree)[0]
    assert (end, rows, state) == (("done", 0), [1, 2], "running")
    assert [step for step, _ in losses_of(tree)] == list(range(1, 13)), (
        "no row is lost, and all are in order"
    )
    assert (status_of(tree)["state"], status_of(tree)["step"]) == ("done", 12)


def distil_with_bad_loss(
    tree: dict[str, Any], first: int, last: int, value: float
) -> tuple[str, int, str]:
    """Run with a loss of `value` on the last rank in the steps from `first` to `last`."""
    from scaledistill.training.session import open_session

    calls = 0

    def opened(*arguments: Any, **options: Any) -> Any:
        session = open_session(*arguments, **options)
        compute = session.students[0].loss

        def bad(*tensors: Any) -> Any:
            nonlocal calls
            calls += 1
            loss = compute(*tensors)
            return loss._replace(total=loss.total + value) if first <= calls <= last else loss

        session.students[0].loss = bad  # type: ignore[assignment]
        return session

    return distil(tree, **({"open_session": opened} if is_last_rank() else {}))


def distil_all_with_bad_loss(trees: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Run each, with NaN as the loss of its third forward."""
    from scaledistill.distributed.ranks import process_group

    with process_group(60):
        return [distil_with_bad_loss(tree, 3, 3, float("nan")) for tree in trees]


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_engine_recovers_from_a_skipped_step(
    make_tree: Callable[..., dict[str, Any]], precision: str
) -> None:
    trees = [
        make_tree(
            f"{name}-{accumulation}",
            train={
                **LONG,
                "max_steps": 5,
                "micro_batch_size": 8 // accumulation,
                "precision": precision,
            },
            engine=engine,
        )
        for name, engine in ENGINES.items()
        for accumulation in (1, 2)
    ]
    assert {end[0] for end in run_ranks(distil_all_with_bad_loss, 1, trees)[0]} == {"done"}
    for tree in trees:
        skipped = [0, 0, 1, 1, 1] if tree["train"]["micro_batch_size"] == 8 else [0, 1, 1, 1, 1]
        assert [row["skipped_steps"] for row in rows_of(tree)] == skipped, tree["run"]["folder"]
        assert rows_of(tree)[-1]["loss"] is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_losses_are_skipped_on_all_ranks(
    make_tree: Callable[..., dict[str, Any]], value: float
) -> None:
    tree = make_tree(checkpoint={"every_steps": 1, "keep": 9})
    assert run_ranks(distil_with_bad_loss, 2, tree, 3, 4, value)[0][:2] == ("done", 0)
    rows = rows_of(tree)
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2]
    folders = sorted((Path(tree["run"]["folder"]) / "checkpoints").iterdir())
    word = "embeddings.word_embeddings.weight"
    weights = [load_file(folder / "l2.weights.safetensors")[word] for folder in folders]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert (
        json.loads((folders[-1] / "state.json").read_text())["students"]["l2"]["optimizer_steps"]
        == 4
    )


def test_too_many_non_finite_losses_end_the_run(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree(
        train={**LONG, "max_skipped_steps": 2},
        checkpoint={"every_steps": 3},
        run={"timeout_seconds": 60},
    )
    [(kind, code, message)] = run_ranks(distil_with_bad_loss, 1, tree, 5, 99, float("nan"))
    assert (kind, code) == ("DivergedError", 4)
    assert (
        "3 steps in a row had a non-finite loss or gradient, the last on samples 48 to 55"
        in message
    )
    assert "train.max_skipped_steps=2" in message
    assert "where the loss, though neither model's output, was not finite" in message
    assert message.endswith(
        "Lower train.learning_rate or lengthen train.warmup_steps; the last checkpoint is step 6"
    )
    assert (status_of(tree)["state"], status_of(tree)["exit_code"]) == ("diverged", 4)


def distil_with_bad_values(tree: dict[str, Any], where: str) -> tuple[str, int, str]:
    """Run with a NaN on the last rank from the first step on: in an output, or in a gradient behind
    the loss.
    """
    from scaledistill.training.session import open_session

    def bad_target(module: Any, inputs: Any, target: Any) -> Any:
        return target._replace(k=torch.full_like(target.k, float("inf")))

    def opened(*arguments: Any, **options: Any) -> Any:
        session = open_session(*arguments, **options)
        engine = session.students[0].engine
        forward = engine.forward

        def bad_output(inputs: Any) -> Any:
            found = forward(inputs)
            if where == "student":
                return type(found)(*(values * float("nan") for values in found))
            if found.k.requires_grad:
                found.k.register_hook(lambda gradient: gradient * float("nan"))
            return found

        if where == "teacher":
            session.teacher.register_forward_hook(bad_target)
        else:
            engine.forward = bad_output  # type: ignore[method-assign]
        return session

    return distil(tree, **({"open_session": opened} if is_last_rank() else {}))


@pytest.mark.parametrize(
    ("where", "words", "remedy"),
    [
        (
            "teacher",
            "the teacher's Q, K or V were not finite",
            "; otherwise check the weights of teacher.model",
        ),
        (
            "student",
            "the student's output was not finite",
            'or set train.precision to "bf16" or "fp32"',
        ),
        (
            "gradient",
            "a gradient, though not the loss, was not finite",
            "or lower train.max_grad_norm",
        ),
    ],
)
def test_a_skipped_step_names_what_was_not_finite(
    make_tree: Callable[..., dict[str, Any]], where: str, words: str, remedy: str
) -> None:
    tree = make_tree(train={**LONG, "max_skipped_steps": 1, "micro_batch_size": 2})
    [(kind, _, message), _] = run_ranks(distil_with_bad_values, 2, tree, where)
    assert kind == "DivergedError"
    assert f"where {words}; train.max_skipped_steps=1 allows no more" in message
    assert remedy in message
    assert message.endswith("; there is no checkpoint yet")


def distil_on_a_full_disk(tree: dict[str, Any], failing_saves: list[int]) -> tuple[str, int, str]:
    """Run on a disk that is full for the given saves, counted from 1."""
    from scaledistill.checkpoint import format as checkpoint
    from scaledistill.checkpoint.saver import Saver

    write_group, begin, saves = checkpoint.write_group, Saver.begin, 0

    def begin_and_wait(self: Saver, *arguments: Any) -> None:
        begin(self, *arguments)
        # So that the step at which it is known does not depend on the machine's load.
        assert self._ended.wait(20)

    def full(path: Path, tensors: Any) -> str:
        nonlocal saves
        if path.name == "l2.weights.safetensors":
            saves += 1
        if saves in failing_saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_group(path, tensors)

    checkpoint.write_group, Saver.begin = full, begin_and_wait  # type: ignore[method-assign]
    return distil(tree)


def test_a_full_disk_is_survived(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree(train={**LONG, "max_steps": 25}, checkpoint={"every_steps": 10, "keep": 5})
    assert run_ranks(distil_on_a_full_disk, 1, tree, [1, 2])[0][0] == "done"
    names = sorted(path.name for path in (Path(tree["run"]["folder"]) / "checkpoints").iterdir())
    assert names == ["step-000000012", "step-000000020", "step-000000025"]
    assert len(losses_of(tree)) == 25


def test_a_disk_that_stays_full_ends_the_run(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree(train=LONG, checkpoint={"every_steps": 10, "max_failed_saves": 1})
    kind, code, message = run_ranks(distil_on_a_full_disk, 1, tree, list(range(2, 99)))[0]
    assert (kind, code) == ("DataError", 3)
    assert message.startswith(
        "the checkpoint of step 21 could not be saved: No space left on device ("
    )
    assert (
        "checkpoint.max_failed_saves=1 allows no more. Free some space; rerun the same command to "
        "resume " in message
    )
    assert message.endswith("to resume from the checkpoint of step 10")
    root = Path(tree["run"]["folder"]) / "checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-000000010"]
    assert run_ranks(distil, 1, tree)[0][0] == "done"


def test_a_damaged_shard_ends_the_run(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(tiny_shards / "train", copy)
    flip_a_bit(copy / "shard-000001.tar")
    tree = make_tree(data={"train": str(copy)}, train={**LONG, "max_steps": 400})
    kind, code, message = run_ranks(distil, 1, tree)[0]
    assert (kind, code) == ("DataError", 3)
    assert "shard-000001.tar" in message
    assert "block 0" in message
    assert "crc32" in message
    assert status_of(tree)["state"] == "failed"


def distil_from(folders: list[str], tree: dict[str, Any]) -> tuple[str, int, str]:
    """Run with a working folder of each rank's own, as on nodes with disks of their own."""
    os.chdir(folders[int(os.environ["RANK"])])
    os.environ["LOCAL_RANK"] = "0"
    return distil(tree)


def test_a_shard_missing_on_one_rank(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path, tmp_path: Path
) -> None:
    nodes = disks_of_two_nodes(tiny_shards, "train", tmp_path)
    (nodes[1] / "train" / "shard-000001.tar").unlink()
    tree = make_tree(data={"train": "train"})
    ends = run_ranks(distil_from, 2, [str(node) for node in nodes], tree)
    assert [end[:2] for end in ends] == [("DataError", 3), ("PeerError", 3)]
    assert ends[0][2].startswith("rank 1 on ")
    assert "shard-000001.tar is missing" in ends[0][2]


def make_tree_with_student(make_tree: Callable[..., dict[str, Any]], name: str) -> dict[str, Any]:
    tree = make_tree()
    tree["students"] = {name: tree["students"]["l2"]}
    return tree


def test_a_damaged_validation_shard_is_told_by_the_rank_that_read_it(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path, tmp_path: Path
) -> None:
    nodes = disks_of_two_nodes(tiny_shards, "validation", tmp_path)
    flip_a_bit(nodes[1] / "validation" / "shard-000000.tar")
    tree = make_tree(data={"validation": "validation"}, train={**LONG, "validation_every_steps": 3})
    job = Job(distil_from, 2, [str(node) for node in nodes], tree)
    job.processes[1].join(60)
    job.kill()
    assert status_of(tree)["state"] == "failed"
    assert "shard-000000.tar" in status_of(tree)["message"]
    assert "block 0" in status_of(tree)["message"]


def test_another_run_is_not_continued(
    make_tree: Callable[..., dict[str, Any]], tiny_teacher: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    tree = make_tree(checkpoint={"every_steps": 3})
    run_ranks(distil, 1, tree)
    other_teacher = tmp_path / "other"
    shutil.copytree(tiny_teacher, other_teacher)
    model = AutoModel.from_pretrained(tiny_teacher)
    model.embeddings.word_embeddings.weight.data[7, 7] += 1
    model.save_pretrained(other_teacher)
    refused = {
        "train.learning_rate: 0.001 -> 0.002": make_tree(
            train={**tree["train"], "learning_rate": 2e-3}
        ),
        "students.l2.num_layers: 2 -> 3": make_tree(
            students={"l2": {**tree["students"]["l2"], "num_layers": 3}}
        ),
        "students.other.num_layers: null -> 2": make_tree_with_student(make_tree, "other"),
        "data.window_rows: 32 -> 16": make_tree(data={"window_rows": 16}),
        "data.train: data_sha256": make_tree(data={"train": str(tiny_shards / "validation")}),
        "teacher.model: the weights of": make_tree(teacher={"model": str(other_teacher)}),
    }
    ends = run_ranks(distil_all, 1, list(refused.values()))[0]
    for expected, (kind, code, message) in zip(refused, ends, strict=True):
        assert (kind, code) == ("ConfigError", 2)
        assert expected in message
        assert "use --fresh to start over" in message
    assert status_of(tree)["state"] == "done"
    free = make_tree(
        checkpoint={"every_steps": 2},
        logging={"every_steps": 3},
        train={**tree["train"], "micro_batch_size": 2},
    )
    assert run_ranks(distil, 1, free)[0][0] == "done"


def fresh(tree: dict[str, Any]) -> tuple[str, int, str]:
    return distil(tree, fresh=True)


def test_fresh_keeps_the_old_run(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree()
    run_ranks(distil, 1, tree)
    before = (Path(tree["run"]["folder"]) / "metrics.jsonl").read_text()
    other = make_tree(train={**tree["train"], "learning_rate": 5e-3})
    assert run_ranks(fresh, 1, other)[0][0] == "done"
    old = {**tree, "run": {**tree["run"], "folder": f"{tree['run']['folder']}.1"}}
    assert (Path(old["run"]["folder"]) / "metrics.jsonl").read_text() == before
    assert rows_of(other)[1]["lr"] == 5e-3
    assert losses_of(other)[0] == losses_of(old)[0], "the first step begins with the same weights"
    assert losses_of(other)[1:] != losses_of(old)[1:]


def dry_run(tree: dict[str, Any]) -> tuple[str, int, str]:
    return distil(tree, dry_run_steps=2)


def test_a_dry_run_writes_nothing(make_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    tree = make_tree()
    assert run_ranks(dry_run, 2, tree)[0] == ("dry run", 0, "2 steps run, nothing written")
    assert not Path(tree["run"]["folder"]).exists()
    [end] = run_ranks(
        dry_run, 1, make_tree(train={**tree["train"], "max_steps": 1, "warmup_steps": 1})
    )
    assert end == ("ConfigError", 2, "--dry-run 2 is more than train.max_steps=1; make fewer steps")


def test_a_standing_file_where_the_run_belongs(
    make_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tree = make_tree()
    holder = Job(hold_folder, 1, tree["run"]["folder"])
    while not (Path(tree["run"]["folder"]) / ".lock").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    kind, code, message = run_ranks(distil, 1, tree)[0]
    holder.kill()
    assert (kind, code) == ("SettingError", 2)
    assert "is in use by another process" in message


def hold_folder(folder: str) -> None:
    from scaledistill.distributed.ranks import process_group
    from scaledistill.run.folder import owned

    with process_group(60) as ranks, owned(Path(folder), 1, ranks, fresh=False):
        time.sleep(60)
