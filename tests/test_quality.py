"""The experiments of docs/quality.md: cells and their files, the order of work, the report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scaledistill.cli import shards_make
from scaledistill.data.shards import ShardWriter
from scaledistill.errors import DataError
from scaledistill.glue import command as glue_command
from scaledistill.glue.summary import Row, Score, Summary
from scaledistill.glue.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "quality"))

import command
import report
from cells import ABLATIONS, CONFIG, MODELS, SMALL, Cell, Job, Lab, rows_identity
from results import Results

ROOT = Path(__file__).parent.parent
COLUMN = "rte/accuracy"


def test_a_result_comes_back_for_its_settings_alone(tmp_path: Path) -> None:
    results = Results(tmp_path)
    path = results.put("glue/a/rte-seed1", {"epochs": 3, "layers": (1, 2)}, {"score": 61.4}, 12.34)
    for found in (results, Results(tmp_path)):
        assert found.get("glue/a/rte-seed1", {"epochs": 3, "layers": [1, 2]}) == {"score": 61.4}
        assert found.get("glue/a/rte-seed1", {"epochs": 4, "layers": [1, 2]}) is None
        assert found.get("glue/a/rte-seed2", {"epochs": 3, "layers": [1, 2]}) is None
    record = json.loads(path.read_text())
    assert record["seconds"] == 12.3
    assert {"commit", "hardware", "versions", "command", "date"} <= set(record)


def test_a_cell_with_other_settings_replaces_the_old_one(tmp_path: Path) -> None:
    results = Results(tmp_path)
    old = results.put("models/a", {"tokens": 1}, {"loss": 1.0}, 1)
    new = results.put("models/a", {"tokens": 2}, {"loss": 0.5}, 1)
    assert not old.exists()
    assert list(tmp_path.rglob("*.json")) == [new]


def test_a_result_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    path = Results(tmp_path).put("models/a", {"tokens": 1}, {"loss": 1.25}, 1)
    path.write_text(path.read_text().replace("1.25", "1.15"))
    with pytest.raises(DataError, match="was changed after the measurement: its content has"):
        Results(tmp_path)


def test_two_files_of_one_cell_are_refused(tmp_path: Path) -> None:
    first = Results(tmp_path).put("models/a", {"tokens": 1}, {"loss": 1.0}, 1)
    kept = first.read_text()
    Results(tmp_path).put("models/a", {"tokens": 2}, {"loss": 0.5}, 1)
    first.write_text(kept)
    with pytest.raises(DataError, match="are results of the same cell"):
        Results(tmp_path)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab whose data are not read."""
    monkeypatch.setattr(Lab, "_inputs", {"teacher": "t", "train": "d", "validation": "v"})
    monkeypatch.setattr(
        Lab, "_glue_conditions", {task: {"data_sha256": task} for task in SMALL.glue.tasks}
    )
    lab = Lab.__new__(Lab)
    lab.folder, lab.results, lab.tier = tmp_path / "runs", Results(tmp_path / "results"), SMALL
    lab.config, lab._text = json.loads(CONFIG.read_text()), []
    lab._glue_data, lab._teacher = tmp_path, tmp_path
    return lab


def test_one_seed_of_every_model_comes_first(lab: Lab) -> None:
    names = [cell.name for job in lab.jobs() for cell in job.cells]
    assert sorted(names) == sorted(report.expected_cells())
    first_table = len(MODELS) * (1 + len(SMALL.glue.tasks))
    assert {name.partition("/")[0] for name in names[:first_table]} == {"models", "glue"}
    assert not any(name.endswith(("seed2", "seed3")) for name in names[:first_table])
    for name in MODELS:  # a model is there before it is fine-tuned
        assert names.index(f"models/{name}") < names.index(f"glue/{name}/rte-seed1")


def test_settings_decide_the_folder_of_a_cell(lab: Lab) -> None:
    cells = [cell for job in lab.jobs() for cell in job.cells]
    assert len({lab._folder_of(cell) for cell in cells}) == len(cells)
    before = lab._folder_of(lab._model_cell("teacher-init"))
    lab.config["relations"]["num_heads"] = 24
    assert lab._folder_of(lab._model_cell("teacher-init")) != before


def test_the_data_s_identity_is_of_its_rows_not_of_its_paths(tmp_path: Path) -> None:
    def write(name: str, token: int) -> str:
        with ShardWriter(
            tmp_path / name,
            sequence_length=4,
            vocab_size=9,
            tokenizer={"name": f"at/{name}", "sha256": "0" * 64},
            pad_token_id=0,
            source={"files": [f"{name}.txt"]},
        ) as writer:
            writer.write(np.full((2, 4), token, np.uint16), np.array([[0, 0, 4], [1, 0, 4]]))
        return str(tmp_path / name)

    one = rows_identity(write("one", 5))
    assert rows_identity(write("elsewhere", 5)) == one
    assert rows_identity(write("other", 6)) != one


def make_jobs(results: Results, done: list[str], interrupted: list[str]) -> list[Job]:
    """Return three jobs of two cells; each name in `interrupted` is taken off it by Ctrl-C after
    its first cell.
    """

    def make(number: int) -> Job:
        cells = tuple(Cell(f"models/{number}{letter}", {"number": number}, 60.0) for letter in "ab")

        def run(waiting: list[Cell]) -> None:
            for cell in waiting:
                if cell.name in interrupted:
                    interrupted.remove(cell.name)
                    raise KeyboardInterrupt
                done.append(cell.name)
                results.put(cell.name, cell.settings, {"loss": float(number)}, 1.0)

        return Job(cells, run)

    return [make(number) for number in range(3)]


def prepare_run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, jobs: Callable[[Results], list[Job]]
) -> None:
    """Make `command.main` run these jobs, with the results in `folder`."""
    monkeypatch.setattr(command, "make_shards", lambda options: None)
    monkeypatch.setattr(command, "at_idle_priority", lambda: None)

    def lab(_: Path, results: Results, *rest: Any) -> SimpleNamespace:
        return SimpleNamespace(jobs=lambda: jobs(results))

    monkeypatch.setattr(command, "Lab", lab)
    words = [
        "tools/quality",
        "run",
        "--tier",
        "small",
        "--text",
        "t",
        "--held-out",
        "h",
        "--data-dir",
        "d",
        "--results",
    ]
    monkeypatch.setattr(sys, "argv", [*words, str(folder)])


def test_an_interrupted_run_resumes_and_redoes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    interrupted = ["models/0b", "models/2a"]
    prepare_run(monkeypatch, tmp_path, lambda results: make_jobs(results, done, interrupted))
    assert command.main() == 130
    assert "rerun the same command to resume" in capsys.readouterr().err
    assert command.main() == 130
    first = capsys.readouterr().out
    assert "1 of 6 cells finished; 5 cells left, about 5 min" in first
    assert command.main() == 0
    assert "all cells are finished" in capsys.readouterr().out
    assert done == [f"models/{number}{letter}" for number in range(3) for letter in "ab"]
    assert [record.name.partition(".")[0] for record in sorted(tmp_path.rglob("*.json"))] == [
        "0a",
        "0b",
        "1a",
        "1b",
        "2a",
        "2b",
    ]


def test_a_job_that_measures_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job((Cell("models/a", {}, 1.0),), lambda waiting: None)
    prepare_run(monkeypatch, tmp_path, lambda results: [job])
    assert command.main() == 3
    assert "models/a was not measured" in capsys.readouterr().err


def test_the_full_tier_prints_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/quality", "run", "--tier", "full"])
    assert command.main() == 0
    text = capsys.readouterr().out
    config = json.loads((ROOT / "configs" / "large_to_l6.json").read_text())
    [student] = config["students"]
    assert f"{config['run']['folder']}/export/{student}" in text
    assert (
        f"--tokenizer {config['teacher']['model']} --sequence-length "
        f"{config['data']['sequence_length']}" in " ".join(text.replace("\\\n", "").split())
    )


def test_the_full_tier_s_commands_are_right() -> None:
    lines = [
        shlex.split(line) for line in command.FULL.replace("\\\n", "").splitlines() if "  " in line
    ]
    [shards, distil, *glue] = [line for line in lines if line[:1] in (["python"], ["deepspeed"])]
    options = shards_make.parse(shards[2:])
    config = json.loads((ROOT / distil[-1]).read_text())
    assert f"{options.output}/train" == config["data"]["train"]
    assert options.sequence_length == config["data"]["sequence_length"]
    assert len([glue_command.parse(line[2:]) for line in glue]) == 2


def test_shards_of_other_text_are_refused(tmp_path: Path) -> None:
    """bertdistiller would read the named text, our students the shards."""
    with ShardWriter(
        tmp_path,
        sequence_length=4,
        vocab_size=9,
        tokenizer={"name": "x", "sha256": "0" * 64},
        pad_token_id=0,
        source={"files": ["elsewhere/wiki.txt"]},
    ) as writer:
        writer.write(np.full((2, 4), 5, np.uint16), np.array([[0, 0, 4], [1, 0, 4]]))
    command._check_inputs(tmp_path, [Path("corpus/wiki.txt")])
    with pytest.raises(
        DataError, match=r"was made from wiki\.txt, found other\.txt on the command"
    ):
        command._check_inputs(tmp_path, [Path("other.txt")])


def row(name: str, values: list[float]) -> Row:
    score = Score.of(values)
    return Row(name, None, {COLUMN: score}, average=score.median)


def test_a_difference_is_bold_if_the_seeds_do_not_overlap() -> None:
    theirs = row("theirs", [50.0, 52.0, 51.0])
    assert report.difference(row("ours", [53.0, 52.5, 60.0]), theirs, COLUMN) == "**+2.0**"
    assert report.difference(row("ours", [53.0, 52.0, 60.0]), theirs, COLUMN) == "+2.0"
    assert report.difference(row("ours", [40.0, 49.9, 41.0]), theirs, COLUMN) == "**−10.0**"
    assert report.difference(row("ours", [60.0]), theirs, COLUMN) == "+9.0"
    assert report.difference(Row("ours", None, {}, None), theirs, COLUMN) == "missing"


def test_shares_of_the_teacher() -> None:
    values = {"teacher": 80.0, "teacher-init": 72.0, "teacher-init-undistilled": 60.0}
    rows = [
        row(name, [values[name]]) if name in values else Row(name, None, {}, None)
        for name in MODELS
    ]
    table = report.comparison(Summary([COLUMN], [COLUMN], rows, [], [], []))
    assert table.rows[0] == ["teacher-init vs. teacher-init-undistilled", "+12.0", "+12.0", ""]
    shares = {line[0]: line[-1] for line in table.rows[-len(MODELS) :]}
    assert (shares["teacher"], shares["teacher-init"], shares["bertdistiller"]) == (
        "100.0%",
        "90.0%",
        "missing",
    )


@pytest.mark.parametrize(
    ("losses", "probes", "conclusion"),
    [
        ([0.150, 0.151, 0.149], [0.60, 0.61, 0.60], "worse, the default stays"),
        ([0.080, 0.081, 0.079], [0.75, 0.76, 0.75], "better, the default should change"),
        ([0.150, 0.151, 0.149], [0.75, 0.76, 0.75], "the measures disagree, the default stays"),
        ([0.100, 0.110, 0.095], [0.69, 0.71, 0.70], "not significant, the default stays"),
        ([0.150, 0.151], [0.75, 0.76], "missing"),
    ],
)
def test_conclusion_of_an_ablation(
    losses: list[float], probes: list[float], conclusion: str
) -> None:
    def runs(losses: list[float], probes: list[float]) -> list[dict[str, float]]:
        pairs = zip(losses, probes, strict=True)
        return [
            {"R48": loss, "stsb_spearman": 0.1, "stsb_spearman_below": probe}
            for loss, probe in pairs
        ]

    base = runs([0.100, 0.101, 0.099], [0.70, 0.71, 0.69])
    assert report.conclude("random", runs(losses, probes), base).endswith(conclusion)


def test_a_loss_says_nothing_about_other_relation_heads() -> None:
    """It favours the students that were trained with as many."""

    def runs(loss: float) -> list[dict[str, float]]:
        return [
            {"R48": loss + probe, "stsb_spearman": probe, "stsb_spearman_below": 0.1}
            for probe in (0.70, 0.71, 0.69)
        ]

    text = report.conclude("heads-12", runs(0.5), runs(0.1))
    assert text == (
        "12 relation heads instead of 48: probe +0.0000 (p = 1); not significant, the default stays"
    )


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "quality.md"
    names = ("state", "glue", "compared", "probe", "ablations")
    path.write_text(
        "before\n"
        + "".join(f"<!-- {name} -->\nstale\n<!-- end {name} -->\n" for name in names)
        + "after\n"
    )
    return path


def put_glue(
    results: Results, name: str, task: str, seed: int, score: float, **settings: Any
) -> None:
    metrics = dict.fromkeys(TASKS[task].metrics, score)
    result = {
        "scores": metrics,
        "majority_scores": dict.fromkeys(metrics, 50.0),
        "only_answer": None,
    }
    kept = {
        "model": "m",
        "task": task,
        "seed": seed,
        "learning_rate": 1e-4,
        "epochs": 3,
        **settings,
    }
    results.put(f"glue/{name}/{task}-seed{seed}", kept, result, 3600.0)


def test_the_report_comes_from_the_results(tmp_path: Path, document: Path) -> None:
    results = Results(tmp_path / "results")
    assert report.write_report(results, document) == [
        "state",
        "glue",
        "compared",
        "probe",
        "ablations",
    ]
    assert f"all {len(report.expected_cells())} cells are missing" in document.read_text()
    assert ".png" not in document.read_text()
    for task in SMALL.glue.tasks:
        for seed, score in enumerate((70.0, 71.0, 72.0), 1):
            put_glue(results, "teacher-init", task, seed, score)
        put_glue(results, "bertdistiller", task, 1, 60.0)
    scores = {"stsb_spearman": 0.671, "stsb_spearman_below": 0.702}
    for number, name in enumerate(ABLATIONS):
        for seed in SMALL.seeds:
            losses = {"12": 0.2, "48": 0.1 + 0.01 * number + 0.001 * seed}
            results.put(
                f"ablations/{name}-seed{seed}", {}, {"probe": scores, "held_out_loss": losses}, 60
            )
    point = {
        "tokens": 100,
        "validation_loss": 0.5,
        "probe/stsb_spearman": 0.6,
        "probe/stsb_spearman_below": 0.6,
    }
    results.put(
        "models/teacher-init", {}, {"probe": scores, "held_out_loss": losses, "curve": [point]}, 60
    )
    report.write_report(Results(tmp_path / "results"), document)
    text = document.read_text()
    assert text.startswith("before\n<!-- state -->\n\n")
    assert text.endswith("<!-- end ablations -->\nafter\n")
    assert "stale" not in text
    found = 5 * 4 + len(ABLATIONS) * 3 + 1
    assert f"{found} of {len(report.expected_cells())} cells are finished" in text
    assert "Missing: models/teacher, " in text
    assert "71.0 ±1.0" in text
    assert "60.0 (1 of 3)" in text
    assert "| teacher-init | 0.671 | 0.702 | 0.2000 |" in text
    assert "| teacher | missing | missing | missing | missing |" in text
    [base] = [line for line in text.splitlines() if line.startswith("| base |")]
    losses = "0.2000 (0.2000–0.2000) | 0.1020 (0.1010–0.1030)"
    assert (
        base
        == f"| base | 3 | {losses} | 0.671 (0.671–0.671) | 0.702 (0.702–0.702) | the defaults |"
    )
    for name in ("glue", "curves", "ablations"):
        assert (tmp_path / "quality" / f"{name}.png").stat().st_size > 5000
        assert f"](quality/{name}.png)" in text
    document.write_text("no marks")
    with pytest.raises(DataError, match="has 0 marks for the table 'state'"):
        report.write_report(results, document)


def test_results_under_different_settings_are_refused(tmp_path: Path, document: Path) -> None:
    results = Results(tmp_path / "results")
    put_glue(results, "teacher", "rte", 1, 60.0)
    put_glue(results, "teacher-init", "rte", 1, 60.0, epochs=4)
    with pytest.raises(DataError, match="results of RTE were measured under 2 different settings"):
        report.write_report(results, document)
