"""Scores from Python, and at the end of a run."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glue_stub
import pytest
import torch
from conftest import tiny_tree
from huggingface_hub import ModelCard
from ranks import run_ranks
from rich.console import Console
from test_train import distil, status_of
from transformers import BertConfig

from scaledistill.config.load import parse_config
from scaledistill.errors import ConfigError, DataError
from scaledistill.glue import worker
from scaledistill.glue.api import create_summary_table, evaluate, evaluate_run, plan_evaluation
from scaledistill.preflight.checks import plan_run
from scaledistill.preflight.report import plan_table
from scaledistill.training import loop as train

ROWS = [(f"w{i % 190:03} w{i % 7:03}", f"w{(i + i % 2) % 190:03}", i % 2) for i in range(48)]


@pytest.fixture(scope="module")
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE and CoLA with 48 and 24 rows of the tiny vocabulary's words."""
    folder = tmp_path_factory.mktemp("glue")
    for split, rows in (("train", ROWS), ("dev", ROWS[:24])):
        for task in ("RTE", "CoLA"):
            (folder / task).mkdir(exist_ok=True)
        names = ("entailment", "not_entailment")
        lines = [
            f"{i}\t{one}\t{other}\t{names[label]}" for i, (one, other, label) in enumerate(rows)
        ]
        (folder / "RTE" / f"{split}.tsv").write_text(
            "\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n"
        )
        lines = [f"s\t{label}\t\t{one}" for one, _, label in rows]
        (folder / "CoLA" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_tree(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path, glue_folder: Path
) -> Callable[..., dict[str, Any]]:
    """Return a function that makes the configuration of a run with an evaluation."""

    def make(**changes: Any) -> dict[str, Any]:
        tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards)
        evaluation = {
            "tasks": ["rte"],
            "data_folder": str(glue_folder),
            "learning_rates": [1e-3],
            "epochs": [1],
        }
        tree["evaluation"] = {**evaluation, "seeds": [1], "max_length": 16, **changes}
        return tree

    return make


def test_a_run_ends_with_its_scores(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree(include_teacher=True)
    tree["students"]["l1"] = {**tree["students"]["l2"], "num_layers": 1}
    folder = Path(tree["run"]["folder"])
    state, code, message = run_ranks(distil, 1, tree)[0]
    assert (state, code) == ("done", 0), message
    assert message.endswith("evaluation/summary.md")
    scores = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert [row["name"] for row in scores["rows"]] == ["l2", "l1", "teacher"]
    scored = {row["name"]: row["scores"]["rte/accuracy"]["median"] for row in scores["rows"]}
    for name in ("l2", "l1"):
        card = (folder / "export" / name / "README.md").read_text()
        assert card.count("## Evaluation") == 1
        places = [
            card.index(f"## {title}") for title in ("Untrained parts", "Evaluation", "Licence")
        ]
        assert places == sorted(places)
        assert f"| {name} |" in card
        assert f"**Dev scores of {name} by seed, %**" in card
        data = ModelCard(card).data
        [result] = data.eval_results
        assert (result.dataset_config, result.metric_type) == ("rte", "accuracy")
        assert result.metric_value == pytest.approx(scored[name], abs=0.01)
    cells = {path: path.stat().st_mtime_ns for path in folder.glob("evaluation/cells/*/*/*.json")}
    assert len(cells) == 3
    # Exports again; the same weights have their scores.
    assert run_ranks(distil, 1, tree)[0][0] == "done"
    assert {
        path: path.stat().st_mtime_ns for path in folder.glob("evaluation/cells/*/*/*.json")
    } == cells
    assert (folder / "export" / "l2" / "README.md").read_text().count("## Evaluation") == 1


def test_an_evaluation_that_cannot_be_is_told_before_the_run(
    make_tree: Callable[..., dict[str, Any]],
) -> None:
    for changes, message in (
        ({"tasks": ["rtee"]}, "unknown task 'rtee', expected some of .* did you mean rte"),
        ({"tasks": ["mrpc"]}, "has no folder for MRPC"),
        (
            {
                "seeds": [1, 2, 1],
                "max_length": 600,
                "include_teacher": True,
                "students": {"teacher": {}},
            },
            r"evaluation\.seeds has 1 more than once; name it once\n"
            r"evaluation\.include_teacher needs the name 'teacher' in the tables; give the student "
            "another name\n"
            r"evaluation\.max_length=600 \(RTE\) is more than the \d+ positions of the student "
            r"teacher; set evaluation\.max_length to",
        ),
    ):
        students = changes.pop("students", {})
        tree = make_tree(**changes)
        tree["students"] = dict.fromkeys(students, tree["students"]["l2"]) or tree["students"]
        state, code, text = run_ranks(distil, 1, tree)[0]
        assert state in ("ConfigError", "DataError")
        assert code in (2, 3)
        assert re.search(message, text)
        assert not (Path(tree["run"]["folder"]) / "metrics.jsonl").exists()
    with pytest.raises(
        ConfigError,
        match=r"evaluation\.max_length=1 \(RTE\) leaves no room for text: .* the student l2",
    ):
        plan_evaluation(parse_config(make_tree(max_length=1)), {})
    shorter = {"l2": BertConfig(max_position_embeddings=20)}
    with pytest.raises(
        ConfigError, match=r"max_length=24 \(RTE\) is more than the 20 positions of"
    ):
        plan_evaluation(parse_config(make_tree(max_length=24)), shorter)
    with pytest.raises(ConfigError, match=r"evaluation\.task\b.*tasks"):
        parse_config({**make_tree(), "evaluation": {"task": ["rte"]}})


def test_an_evaluation_stops_and_goes_on(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree()
    folder = Path(tree["run"]["folder"])
    stopped, went_on, broken = run_ranks(stop_and_go_on, 1, tree)[0]
    words = f"; the evaluation was stopped (found {folder}/STOP); rerun the same command to resume"
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 75)
    assert stopped["message"].endswith(words)
    assert (went_on["state"], went_on["exit_code"]) == ("done", 0)
    assert words not in went_on["message"]
    assert (broken["state"], broken["exit_code"]) == ("failed", 3)
    assert "l2" in broken["message"]


def stop_and_go_on(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `status.json` after an evaluation that is stopped, one that goes on, and one that
    cannot be; its fine-tuning takes no time.
    """
    worker.COMMAND = glue_stub.COMMAND
    config, folder = parse_config(tree), Path(tree["run"]["folder"])
    result = train.distill(parse_config({**tree, "evaluation": None}))
    (folder / "STOP").touch()
    evaluate_run(config, result.message)
    found = [status_of(tree)]
    assert not (folder / "STOP").exists()
    train.distill(config)
    found.append(status_of(tree))
    (folder / "export" / "l2" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer"):
        evaluate_run(config, result.message)
    return [*found, status_of(tree)]


def test_evaluate_and_its_table(
    tmp_path: Path, tiny_teacher: Path, glue_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "COMMAND", glue_stub.COMMAND)
    given: dict[str, Any] = {
        "data_dir": glue_folder,
        "output_dir": tmp_path / "out",
        "max_seq_length": 16,
    }
    result = evaluate(str(tiny_teacher), ["rte", "cola"], 1e-3, 1, seed=[1, 2], **given)
    assert (len(result.finished), result.failures) == (4, {})
    table = create_summary_table(tmp_path / "out")
    assert list(table.columns) == ["CoLA matthews", "RTE accuracy", "Average"]
    [row] = table.index
    assert row == tiny_teacher.name
    assert table.loc[row, "Average"] == pytest.approx(
        (table.loc[row].iloc[0] + table.loc[row].iloc[1]) / 2, abs=0.01
    )
    assert (
        (tmp_path / "out" / "summary_table.csv")
        .read_text()
        .startswith(",CoLA matthews,RTE accuracy,Average\n")
    )
    assert (
        list(create_summary_table(tmp_path / "out", save=False, include_average=False).columns)[-1]
        == "RTE accuracy"
    )
    with pytest.raises(ConfigError, match=r"epochs.*found 0"):
        evaluate(str(tiny_teacher), "rte", epochs=0, **given)
    other = shutil.copytree(tiny_teacher, tmp_path / "other" / tiny_teacher.name)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(
        ConfigError,
        match=r"has scores of another model .*; give .* a name of its own, or set another",
    ):
        evaluate(str(other), "rte", 1e-3, 1, seed=[1], **given)
    evaluate(str(other), "rte", 1e-3, 1, seed=[1, 2], model_name="other", **given)
    assert list(create_summary_table(tmp_path / "out").index) == [tiny_teacher.name, "other"]
    with pytest.raises(DataError, match=r"has no grid\.json"):
        create_summary_table(tmp_path)


def test_the_plan_says_how_many_fine_tunings(make_tree: Callable[..., dict[str, Any]]) -> None:
    tree = make_tree(
        include_teacher=True, tasks=["rte", "cola"], learning_rates=[1e-3, 2e-3], seeds=[1, 2, 3]
    )
    size = "24 fine-tunings (2 models × 2 tasks × 2 learning rates × 1 epoch count × 3 seeds)"
    planned = plan_evaluation(parse_config(tree), {})
    assert planned.size == size
    assert planned.flops(1000) > planned.flops(0) > 0
    alone = plan_evaluation(parse_config(make_tree()), {})
    assert (
        alone.size == "1 fine-tuning (1 model × 1 task × 1 learning rate × 1 epoch count × 1 seed)"
    )
    assert alone.flops(0) == 0
    twice = plan_evaluation(parse_config(make_tree(seeds=[1, 2])), {})
    assert twice.flops_per_parameter == 2 * alone.flops_per_parameter
    plan = plan_run(parse_config(tree), 1, torch.device("cpu"))
    assert plan.evaluation == size
    console = Console(width=200, file=io.StringIO())
    console.print(plan_table(plan))
    text = console.file.getvalue()
    assert re.search(
        r"evaluation +24 fine-tunings \(.*\), about \d+ s on this machine \(estimated from the "
        r"FLOPs\)",
        text,
    )
