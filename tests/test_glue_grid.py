"""The GLUE grid: cells that run, fail, are interrupted, damaged or finished already."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import glue_stub
import pytest
from conftest import WORDS
from ranks import Job
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from scaledistill.config.schema import EvaluationSettings
from scaledistill.errors import ConfigError, DataError
from scaledistill.glue import grid as grid_module
from scaledistill.glue import worker as worker_module
from scaledistill.glue.cell import Cell, read_record
from scaledistill.glue.features import subset
from scaledistill.glue.grid import GridResult, Update, run_grid, worker_count
from scaledistill.glue.plan import make_plan
from scaledistill.glue.worker import Share
from scaledistill.storage.files import locked

PAIR = "index\t1\t2\t3\t4\t5\t6\tsentence1\tsentence2\t{label}\n"
SMALL: dict[str, Any] = {
    "tasks": ["cola", "stsb", "mnli", "squad2"],
    "learning_rates": [1e-3],
    "epochs": [2],
    "seeds": [1, 2],
    "batch_size": 8,
    "max_length": 24,
    "group_by_length": True,
}


def write_glue(folder: Path, rows: int = 24) -> Path:
    """Write a CoLA, an STS-B, an MNLI and a SQuAD 2.0 that a tiny model can read."""
    generator = random.Random(5)

    def text(words: int = 5) -> str:
        return " ".join(generator.choices(WORDS, k=words))

    def write(task: str, split: str, head: str, lines: list[str]) -> None:
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / f"{split}.tsv").write_text(head + "".join(line + "\n" for line in lines))

    for split, count in (("train", rows), ("dev", rows // 2)):
        write("CoLA", split, "", [f"src\t{row % 2}\t\t{text()}" for row in range(count)])
        pairs = [
            f"{row}\t1\t2\t3\t4\t5\t6\t{text()}\t{text()}\t{row % 11 / 2}" for row in range(count)
        ]
        write("STS-B", split, PAIR.format(label="score"), pairs)
        questions = []
        for row in range(count):
            answer = {"text": (context := text(20))[:9], "answer_start": 0}
            asked = {
                "id": f"q{row}",
                "question": text(3),
                "answers": [answer],
                "is_impossible": row % 2 == 1,
            }
            questions.append({"context": context, "qas": [asked]})
        (folder / f"{split}-v2.0.json").write_text(
            json.dumps({"data": [{"paragraphs": questions}]})
        )
    for split in ("train", "dev_matched", "dev_mismatched"):
        labels = ("entailment", "neutral", "contradiction")
        pairs = [
            f"{row}\t1\t2\t3\t4\t5\t6\t{text()}\t{text()}\t{labels[row % 3]}" for row in range(rows)
        ]
        write("MNLI", split, PAIR.format(label="gold_label"), pairs)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """The tiny teacher with a tokenizer that knows pairs."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_teacher, folder, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A model that lacks a weight, which nobody sees before it is loaded."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.2.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings(data: Path, **changes: Any) -> EvaluationSettings:
    return EvaluationSettings(**{**SMALL, "data_folder": str(data), **changes})


@pytest.fixture(scope="module")
def result(
    tmp_path_factory: pytest.TempPathFactory, model: Path, broken: Path, data: Path
) -> GridResult:
    """A real grid with a model that fails, in one worker of one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_module, "_share", lambda *_: Share(None, 1))
        models = {"broken": str(broken), "tiny": str(model)}
        return run_grid(models, settings(data), tmp_path_factory.mktemp("grid"))


def test_a_grid_gives_the_table(result: GridResult) -> None:
    assert len(result.finished) == 8
    assert {cell.model for cell in result.finished} == {"tiny"}
    text = (result.output / "summary.md").read_text()
    assert "| tiny | 0.0 M |" in text
    assert "| CoLA matthews | STS-B pearson |" in text
    assert (result.output / "summary.png").stat().st_size > 5000
    names = [
        "cola/matthews",
        "stsb/pearson",
        "stsb/spearman",
        "mnli/accuracy_m",
        "mnli/accuracy_mm",
    ]
    names += ["squad2/f1", "squad2/exact"]
    figures = [
        figure["name"] for figure in result.summary.figures() if "one answer" not in figure["name"]
    ]
    assert figures == [
        *(f"tiny/{name}" for name in names),
        *(f"majority class/{name}" for name in names),
    ]
    assert result.summary.majority["cola/matthews"] == 0
    assert result.summary.majority["mnli/accuracy_m"] == pytest.approx(100 / 3)
    assert "| majority class |" in text


def test_a_failed_cell_is_shown_and_stops_no_other(result: GridResult) -> None:
    assert len(result.failures) == 8
    cell, error = next(iter(result.failures.items()))
    assert "model broken lacks weights that are needed: " in error
    assert "encoder.layer.2.output.dense.weight" in error
    assert (
        "Traceback"
        in json.loads(cell.path(result.output).with_suffix(".error").read_text())["details"]
    )
    text = (result.output / "summary.md").read_text()
    assert "**Not finished: 8 cells**" in text
    assert "- broken cola 0.001 × 2 seed 1: model broken lacks weights" in text
    assert "| broken | 0.0 M | none finished |" in text


def test_a_record_says_everything(result: GridResult) -> None:
    cell = next(cell for cell in result.finished if cell.task == "cola")
    record = read_record(cell, result.output)
    assert record is not None
    assert record["cell"]["conditions"]["batch_size"] == 8
    assert record["train_rows"] == record["all_train_rows"] == 24
    assert record["dev_rows"] == {"dev": 12}
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2]
    assert record["epochs"][-1]["scores"] == record["scores"]
    assert record["majority_scores"] == {"matthews": 0.0}
    classes = {row["prediction"] for row in predictions(cell, result.output)}
    assert (record["only_answer"] is not None) == (len(classes) == 1)
    assert record["new_weights"] == ["classifier.bias", "classifier.weight"]
    assert record["device"] == "cpu"
    assert record["threads"] == 1
    assert record["seconds"] > record["train_seconds"] > 0
    assert {"torch", "transformers", "scaledistill", "python"} < set(record["versions"])


def predictions(cell: Cell, output: Path) -> list[dict[str, Any]]:
    with gzip.open(cell.path(output).with_suffix(".jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


def test_predictions_stand_beside_the_record(result: GridResult) -> None:
    by_task = {cell.task: predictions(cell, result.output) for cell in result.finished}
    assert [row["id"] for row in by_task["cola"]] == [str(row) for row in range(12)]
    assert by_task["cola"][3]["prediction"] == max(
        range(2), key=by_task["cola"][3]["logits"].__getitem__
    )
    assert isinstance(by_task["stsb"][0]["prediction"], float)
    assert [row["split"] for row in by_task["mnli"]] == ["dev_matched"] * 24 + [
        "dev_mismatched"
    ] * 24
    assert by_task["squad2"][1] | {"prediction": ""} == {
        "split": "dev",
        "id": "q1",
        "answers": [],
        "prediction": "",
    }


def test_the_same_cell_gives_the_same_scores_and_divergence_fails(
    result: GridResult, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "_share", lambda *_: Share(None, 1))
    changed = settings(
        data, learning_rates=[1e30, 1e-3], seeds=[2], tasks=["cola"], scores_each_epoch=True
    )
    again = run_grid({"tiny": str(model)}, changed, tmp_path)
    [cell] = again.finished
    assert cell in result.finished
    mine, other = read_record(cell, tmp_path), read_record(cell, result.output)
    assert mine is not None
    assert other is not None
    assert "scores" not in other["epochs"][0]
    assert mine["epochs"][0].pop("scores").keys() == {"matthews"}
    assert mine["epochs"] == other["epochs"], "scoring in between changes nothing"
    assert mine["predictions_sha256"] == other["predictions_sha256"]
    [error] = again.failures.values()
    assert "epoch 1" in error
    assert "not finite; try a lower learning rate than 1e+30" in error


def contents(output: Path) -> dict[Path, tuple[int, bytes]]:
    files = [
        path
        for path in (output / "cells").rglob("*")
        if path.is_file() and not path.name.startswith(".")
    ]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def no_worker(*_: object) -> None:
    raise AssertionError("a worker was started")


def test_what_is_finished_is_not_run_again(
    result: GridResult, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "Worker", no_worker)
    before = contents(result.output)
    again = run_grid({"tiny": str(model)}, settings(data), result.output)
    assert contents(result.output) == before
    assert again.summary.figures() == result.summary.figures()
    assert not again.failures
    assert len(again.summary.failures) == 8, "those of the grid before still stand in the table"


@pytest.mark.parametrize("damage", ["record", "digit", "predictions", "gone"])
def test_what_is_damaged_counts_as_unfinished(
    result: GridResult, tmp_path: Path, damage: str
) -> None:
    cell = result.finished[0]
    record = cell.path(tmp_path)
    shutil.copytree(cell.path(result.output).parent, record.parent)
    assert read_record(cell, tmp_path) is not None
    beside = record.with_suffix(".jsonl.gz")
    if damage == "record":
        record.write_bytes(record.read_bytes()[:-20])
    elif damage == "digit":
        record.write_text(record.read_text().replace('"train_rows": 24', '"train_rows": 25'))
    elif damage == "predictions":
        beside.write_bytes(beside.read_bytes()[:-5])
    else:
        beside.unlink()
    assert read_record(cell, tmp_path) is None


def test_cells_of_other_conditions_leave_the_table(
    result: GridResult, model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(result.output, tmp_path, dirs_exist_ok=True)
    plan = make_plan({"tiny": str(model)}, settings(data, max_train_rows=16))
    grid_module.write_grid(plan, tmp_path, quick=False)
    assert "16 cells of earlier grids left out of the summary" in caplog.text
    assert grid_module.summary_of(tmp_path).choices == []
    assert not {cell.path(tmp_path) for cell in plan.cells} & set(contents(tmp_path))


def test_a_model_that_changes_during_the_grid_is_not_scored(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on replaces its best export."""
    from scaledistill.glue.finetune import fine_tune

    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda *_, **__: None)
    changing = Path(shutil.copytree(model, tmp_path / "model"))
    [cell, *_] = make_plan({"tiny": str(changing)}, settings(data)).cells
    (changing / "config.json").write_text((changing / "config.json").read_text() + "\n")
    with pytest.raises(DataError, match=r"the model tiny in .* has changed since the grid was"):
        fine_tune(cell, changing, data, lambda fraction: None)


def test_models_of_one_name_from_several_working_folders(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    for name in "ab":
        folder = Path(shutil.copytree(model, tmp_path / name / "export"))
        (folder / "config.json").write_text((model / "config.json").read_text() + "\n" * ord(name))
        monkeypatch.chdir(tmp_path / name)
        plans.append(make_plan({"tiny": "export"}, settings(data)))
        if name == "a":
            grid_module.write_grid(plans[0], tmp_path, quick=False)
    with pytest.raises(ConfigError, match=rf"of another model tiny, {tmp_path}/a/export; give"):
        grid_module.write_grid(plans[1], tmp_path, quick=False)
    grid_module.write_grid(plans[1], tmp_path, quick=False, own_output=True)


def test_workers_import_nothing_from_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise ImportError('not the standard library')")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(
        worker_module.COMMAND,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_subset_is_always_the_same() -> None:
    assert subset(10, None) == subset(10, 10) == list(range(10))
    rows = subset(1000, 100)
    assert rows == sorted(set(rows)) == subset(1000, 100)
    assert len(rows) == 100


def test_more_workers_than_there_is_room_for() -> None:
    with pytest.raises(
        ConfigError, match=r"workers=1000, expected 1 to \d+: the machine has \d+ (cores|GPUs)"
    ):
        worker_count(1000)


STUB = {"tasks": ["cola", "stsb"], "learning_rates": [1e-3, 2e-3], "seeds": [1, 2]}


def test_a_killed_worker_is_a_failed_cell(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the grid goes on with another worker."""
    workers: list[Any] = []

    class Watched(grid_module.Worker):
        def __init__(self) -> None:
            super().__init__()
            workers.append(self)

    def on_update(update: Update) -> None:
        if update.state == "finished" and len(workers) == 1:
            os.kill(workers[0]._process.pid, signal.SIGKILL)

    monkeypatch.setattr(worker_module, "COMMAND", glue_stub.COMMAND)
    monkeypatch.setattr(grid_module, "Worker", Watched)
    changed = settings(data, tasks=["cola"], seeds=[1, 2, 3])
    outcome = run_grid({"tiny": str(model)}, changed, tmp_path, on_update=on_update)
    [(cell, error)] = outcome.failures.items()
    assert cell.seed == 2
    assert error == "the worker process ended: SIGKILL, often because memory ran out"
    assert [cell.seed for cell in outcome.finished] == [1, 3]
    assert "(2 of 3)" in (tmp_path / "summary.md").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(worker_module, "COMMAND", glue_stub.COMMAND)
    again = run_grid({"tiny": str(model)}, changed, tmp_path)
    assert len(again.finished) == 3, "what failed is tried again"
    assert not list(tmp_path.rglob("*.error"))


def test_a_worker_that_cannot_start_ends_the_grid(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "COMMAND", ("sh", "-c", "echo no such thing >&2; exit 1"))
    with pytest.raises(
        DataError, match="a worker process ended before it was ready, exit status 1:\nno such thing"
    ):
        run_grid({"tiny": str(model)}, settings(data), tmp_path)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def glue_in_folder(arguments: list[str], folder: Path) -> None:
    """Run the command line in this process, with workers that take half a second for each cell, its
    words in `folder`.
    """
    from scaledistill.glue.command import main

    for name in [name for name in os.environ if name.startswith(worker_module.LAUNCHERS)]:
        del os.environ[name]  # users start it without a launcher
    os.environ["GLUE_STUB_SECONDS"] = "0.5"
    worker_module.COMMAND = glue_stub.COMMAND
    for number, name in ((1, "output"), (2, "words")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os._exit(main(arguments))


def test_interrupted_twice_it_ends_with_the_same_numbers(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C and by SIGKILL; nothing that was finished is run again, and no process is left
    behind.
    """
    monkeypatch.setattr(worker_module, "COMMAND", glue_stub.COMMAND)
    whole = run_grid({"tiny": str(model)}, settings(data, **STUB), tmp_path / "whole")
    output = tmp_path / "out"
    options = {
        "model": f"tiny={model}",
        "data-dir": data,
        "tasks": "cola,stsb",
        "learning-rates": "1e-3,2e-3",
    }
    options |= {"epochs": 2, "seeds": "1,2", "batch-size": 8, "max-length": 24, "output": output}
    arguments = ["--group-by-length", *(f"--{name}={value}" for name, value in options.items())]
    generator = random.Random(5)
    kept: dict[Path, tuple[int, bytes]] = {}
    for kill in (signal.SIGINT, signal.SIGKILL):
        job = Job(glue_in_folder, 1, arguments, tmp_path)
        [process] = job.processes
        try:
            while len(list(output.glob("cells/*/*/*.json"))) <= len(kept) / 2 and (
                process.is_alive()
            ):
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.3))
            words = (tmp_path / "words").read_text()
            assert process.is_alive(), words
            workers = children(process.pid)
            os.kill(process.pid, kill)
            process.join(20)
        finally:
            job.kill()
        words = (tmp_path / "words").read_text()
        assert len(workers) == 1, words
        if kill == signal.SIGINT:
            assert process.exitcode == 130, words
            assert (
                f"glue: interrupted; finished cells are kept in {output}; rerun the same command "
                "to resume" in words
            )
            assert not is_running(workers[0])
        deadline = time.monotonic() + 10
        while is_running(workers[0]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_running(workers[0])
        now = contents(output)
        assert all(now[path] == content for path, content in kept.items())
        records = {str(path).removesuffix(".json") for path in now if path.suffix == ".json"}
        kept = {
            path: content
            for path, content in now.items()
            if str(path).partition(".json")[0] in records
        }
        assert len(kept) < 16, "interrupted too late"
    workers_at_a_time = min(2, len(os.sched_getaffinity(0)))
    last = run_grid({"tiny": str(model)}, settings(data, **STUB), output, workers=workers_at_a_time)
    after = contents(output)
    assert all(after[path] == content for path, content in kept.items())
    assert len(after) == 16
    assert last.summary.figures() == whole.summary.figures()
    assert [path.name for path in output.rglob(".*")] == [".lock"]
    with (
        locked(output),
        pytest.raises(ConfigError, match=r"in use by another process; .* another output"),
    ):
        run_grid({"tiny": str(model)}, settings(data, **STUB), output)
