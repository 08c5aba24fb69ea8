"""tools/glue.py: options, what is wrong with models and data said before anything runs, --list,
--json, exit codes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import glue_stub
import pytest
from safetensors.torch import load_file
from test_glue_grid import data, model, no_worker  # noqa: F401 - fixtures

from scaledistill.errors import ConfigError
from scaledistill.glue import grid as grid_module
from scaledistill.glue import speed as speed_module
from scaledistill.glue import worker as worker_module
from scaledistill.glue.command import main, named_models

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> Run:
    """Run the tool with a stub of fine-tuning; keywords add or, with None, remove options."""
    monkeypatch.setattr(worker_module, "COMMAND", glue_stub.COMMAND)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(*flags: str, **changes: Any) -> tuple[int, str, str]:
        options: dict[str, Any] = {
            "model": f"tiny={model}",
            "tasks": "cola,stsb",
            "data_dir": data,
            "epochs": 1,
        }
        options |= {
            "learning_rates": "1e-3",
            "seeds": "1,2",
            "max_length": 24,
            "output": tmp_path / "out",
        } | changes
        given = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in options.items()
            if value is not None
        ]
        try:
            code = main([*given, *flags])
        except SystemExit as left:
            code = int(str(left.code))
        return code, *capsys.readouterr()

    return call


def copy(folder: Path, target: Path, *without: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*without))
    return target


def test_a_grid_with_a_failing_cell(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Cells go on after one that fails in a way that nobody thought of; --json is the same from run
    to run.
    """
    code, out, err = run("--published", seeds="13,1,2", json=tmp_path / "a.json")
    assert code == 3
    assert "tiny cola 0.001 × 1 seed 13  failed: ValueError: unlucky" in err
    assert "6/6  tiny stsb" in err
    assert "Traceback" not in err
    assert "not finished: tiny cola 0.001 × 1 seed 13: ValueError: unlucky" in out
    assert "(2 of 3)" in out
    assert "BERT-base → 6×768" in out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert [figure["name"] for figure in figures] == [
        *("tiny/cola/matthews", "tiny/stsb/pearson", "tiny/stsb/spearman", "tiny/average"),
    ]
    assert all(figure.keys() == {"name", "value", "unit", "n"} for figure in figures)
    monkeypatch.setattr(grid_module, "Worker", no_worker)
    code, *_ = run(seeds="1,2", json=tmp_path / "b.json")
    assert code == 0
    assert "4 of 4 cells are finished already" in caplog.text
    assert json.loads((tmp_path / "b.json").read_text()) == figures


def test_list_runs_nothing(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--list")
    assert code == 0
    assert "4 fine-tunings (1 model × 2 tasks × 1 learning rate × 1 epoch count × 2 seeds)" in out
    assert re.search(
        r"4 of 4 cells to run, one at a time: about \d+ s \(estimated: FLOPs at half of the matrix",
        out,
    )
    assert not (tmp_path / "out").exists()
    assert run(seeds="1")[0] == 0
    code, out, _ = run("--list")
    assert "2 of 4 cells to run, one at a time: about 0 s (from the 2 finished cells)" in out
    assert re.search(r"tiny\s*│ CoLA\s*│ 2\s*│ 1\s*│ 0\s*│ 24\s*│ 0 s", out)


def test_quick_settings_give_way_to_what_is_said(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--quick", learning_rates=None, seeds=None, epochs=3)
    assert code == 0
    assert "A quick look" in out
    assert (
        "Learning rates 0.0001; epochs 3; seeds 1; batch size 32, rows of similar length together."
        in out
    )


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (
            {},
            ["--learning-rate=1e-3"],
            "glue: unknown option --learning-rate=1e-3; did you mean --learning-rates?",
        ),
        ({}, ["cola"], "glue: unknown argument cola"),
        ({"model": None}, [], "glue: --model is missing"),
        ({"tasks": None}, [], "glue: --tasks is missing"),
        ({"tasks": "cola,SST-2"}, [], "unknown task 'SST-2', expected some of cola, "),
        ({"tasks": "cola,SST-2"}, [], "did you mean sst2?"),
        ({"tasks": ","}, [], "--tasks: found []"),
        (
            {"epochs": "3,five"},
            [],
            "argument --epochs: found '3,five', expected whole numbers, separated by commas",
        ),
        ({"epochs": "3,0"}, [], "--epochs: found 0 (int); expected a whole number above 0"),
        (
            {"learning_rates": "1e-3,0.001"},
            [],
            "--learning-rates has 0.001 more than once; name it once",
        ),
        (
            {"max_length": "65"},
            [],
            "--max-length 65 (CoLA) is more than the 64 positions of model tiny",
        ),
        ({"workers": "1000"}, [], "--workers 1000, expected 1 to "),
        ({"json": "nowhere/x.json"}, [], "--json nowhere/x.json: no folder nowhere; make it first"),
        (
            {"max_length": 2},
            [],
            "--max-length 2 (CoLA) leaves no room for text: the tokenizer of model tiny adds 2 "
            "tokens",
        ),
        (
            {"max_length": 4},
            [],
            "--max-length 4 (STS-B) leaves no room for text: the tokenizer of model tiny adds 3 ",
        ),
        ({"max_length": 4}, [], "tokens to a pair; set --max-length to 5 or more (128 is usual)"),
        (
            {"tasks": "cola stsb"},
            [],
            "tasks: 'cola stsb' is not a task; write cola,stsb on the command line",
        ),
        (
            {"tasks": "all"},
            [],
            "tasks: 'all' is not a task; name them all: cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte",
        ),
        (
            {},
            ["--tasks", "rte"],
            "--tasks is given twice; give all values at once, separated by commas",
        ),
        (
            {"tasks": None},
            ["--tasks", "rte", "mrpc"],
            "unknown argument mrpc; separate values by commas: --tasks rte,mrpc",
        ),
        (
            {"seeds": None},
            ["--seeds=1", "2", "3"],
            "unknown argument 2; separate values by commas: --seeds 1,2,3",
        ),
        (
            {"seeds": "1 2"},
            [],
            "argument --seeds: found '1 2', expected 1,2: whole numbers, separated by commas",
        ),
        ({}, ["--model", "a", "b"], "unknown argument b; repeat the option: --model a --model b"),
        ({}, ["--task_name", "rte"], "unknown option --task_name; did you mean --tasks?"),
        (
            {},
            ["--num_train_epochs=3"],
            "unknown option --num_train_epochs=3; did you mean --epochs?",
        ),
        ({}, ["--output_dir=x"], "unknown option --output_dir=x; did you mean --output?"),
        ({"model": "x="}, [], "--model 'x=': expected a folder or hub name after '='"),
        (
            {},
            ["--speed"],
            "the speed is measured on 128 tokens, more than the 64 positions of model tiny",
        ),
    ],
)
def test_wrong_options(run: Run, changes: dict[str, Any], flags: list[str], message: str) -> None:
    code, out, err = run(*flags, **changes)
    assert message in err
    assert code == 2
    assert not out


def test_questions_are_measured_before_anything_runs(run: Run) -> None:
    code, out, err = run("--list", tasks="squad2", max_length=8)
    assert (code, out) == (3, "")
    assert (
        "glue: --max-length 8 leaves too little room beside the longest question of SQuAD 2.0; set "
        "--max-length" in err
    )


def test_names_of_models() -> None:
    arguments = ["x=runs/lr=1e-4/export", "runs/lr=1e-4/l6", "hub/name"]
    assert named_models(arguments) == {
        "x": "runs/lr=1e-4/export",
        "l6": "runs/lr=1e-4/l6",
        "name": "hub/name",
    }
    with pytest.raises(ConfigError, match="expected a folder or hub name after '='"):
        named_models(["x="])


def test_json_must_be_a_file(run: Run, tmp_path: Path) -> None:
    code, out, err = run(json=tmp_path)
    assert (code, out) == (2, "")
    assert f"glue: --json {tmp_path} is a folder; name a file in it" in err


def test_two_models_of_one_name(run: Run, model: Path) -> None:  # noqa: F811
    code, _, err = run(f"--model={model}/../{model.name}/", model=model)
    assert code == 2
    assert f"glue: two models are called '{model.name}': {model} and " in err
    assert "give one as --model NAME=" in err


def test_every_wrong_model_and_task_is_named_at_once(
    run: Run,
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    untokenized = copy(model, tmp_path / "untokenized", "tokenizer*", "special*")
    bare = copy(model, tmp_path / "bare", "config.json")
    pickled = copy(model, tmp_path / "pickled", "model.safetensors")
    (pickled / "pytorch_model.bin").touch()
    cut = copy(model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    larger = copy(model, tmp_path / "larger")
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(config | {"vocab_size": 150}))
    models = [
        untokenized,
        bare,
        pickled,
        cut,
        larger,
        tmp_path / "untokenised",
        tmp_path / "w rong",
    ]
    code, out, err = run(
        *(f"--model={folder}" for folder in models), tasks="cola,rte", output=tmp_path / "out"
    )
    assert code in (2, 3)
    assert not out
    for expected in (
        "model untokenized=.* has no tokenizer; copy tokenizer.json and tokenizer_config.json "
        "there from the original model",
        "model bare=.* has no config.json; give the folder that save_pretrained wrote",
        r"model pickled=.* has pickled weights only \(pytorch_model.bin\)",
        r"model cut=.*: model.safetensors cannot be read \(.*\); fetch the model again",
        "model larger=.*: its tokenizer has 200 tokens, the model 150; they do not match",
        "model untokenised=.*: no such folder; did you mean .*/untokenized?",
        "model name 'w rong': expected letters, digits",
        r"has no folder for RTE \(found: CoLA, MNLI, STS-B\)",
    ):
        assert re.search(
            "^glue: " + expected if "model" in expected else expected, err, re.MULTILINE
        ), (expected, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dev.tsv", "", "dev.tsv has no examples; fetch CoLA again"),
        ("train.tsv", "src\t1\tsentence\n", r"train.tsv:1: found 3 columns, expected 4"),
        ("dev.tsv", "src\t1\t\ta b\nsrc\t2\t\tb\n", r"dev.tsv:2: label '2', expected 0 or 1"),
        (
            "dev.tsv",
            None,
            "has neither dev.tsv nor dev.tsv.gz; fetch CoLA again, or leave the task out",
        ),
    ],
)
def test_wrong_data(
    run: Run,
    data: Path,  # noqa: F811
    tmp_path: Path,
    file: str,
    content: str | None,
    message: str,
) -> None:
    folder = copy(data, tmp_path / "glue")
    (folder / "CoLA" / file).unlink()
    if content is not None:
        (folder / "CoLA" / file).write_text(content)
    code, _, err = run(data_dir=folder)
    assert code == 3
    assert re.search(message, err)


def test_the_speed_of_models(
    run: Run,
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed_module, "TOKENS", 16)
    monkeypatch.setattr(speed_module, "ROUND_SECONDS", 0.0)
    code, out, _ = run("--speed", f"--model=other={model}", seeds="1")
    assert code == 0
    assert "Speed of the encoders, 16 tokens, float32, CPU, " in out
    figures = {
        figure["name"]: figure for figure in json.loads((tmp_path / "out/speed.json").read_text())
    }
    assert figures["tiny/speedup/batch-1"]["value"] == 1
    assert figures["other/parameters"]["value"] == sum(
        weight.numel() for weight in load_file(model / "model.safetensors").values()
    )
    assert {figure["n"] for name, figure in figures.items() if "batch" in name} == {
        speed_module.ROUNDS
    }
    assert "| other |" in (tmp_path / "out/speed.md").read_text()


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "scaledistill.glue.command", "--bogus"]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("scaledistill glue: unknown option --bogus")


def test_folders_near_a_model_name_it(run: Run, model: Path, tmp_path: Path) -> None:  # noqa: F811
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints" / "step-3").mkdir(parents=True)
    (run_folder / "metrics.jsonl").touch()
    (run_folder / "config.json").write_text('{"teacher": {}}')
    _, _, err = run(model=run_folder)
    assert (
        "is the folder of a run that has exported no model yet; finish it, then give its "
        "export/<student>" in err
    )
    exported = copy(model, run_folder / "export" / "l2")
    for given, what in (
        (run_folder, f"is a run's folder, not a model's folder; give {exported}\n"),
        (run_folder / "export", f"holds models, not a model's folder; give {exported}\n"),
        (
            run_folder / "checkpoints" / "step-3",
            f"is in a run, not a model's folder; give {exported}\n",
        ),
        (exported / "model.safetensors", f"is a file; give its folder, {exported}\n"),
    ):
        code, _, err = run(model=given)
        assert code == 3
        assert f"glue: model {given.name}='{given}' {what}" in err


def test_folders_near_the_data_name_it(
    run: Run,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "outer").mkdir()
    inner = copy(data, tmp_path / "outer" / "glue_data")
    (tmp_path / "outer" / "a-of-others").mkdir()
    iterdir = Path.iterdir

    def refused(folder: Path) -> Iterator[Path]:
        if folder.name == "a-of-others":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    for given, what in (
        (data / "CoLA", f"is the folder of one task; give the folder that it is in, {data}\n"),
        (
            data / "CoLA" / "train.tsv",
            f"give the one that has a folder for each task; for CoLA that is {data}\n",
        ),
        (tmp_path / "outer", f"has the tasks one level deeper; give {inner}\n"),
        (
            tmp_path / "outter",
            "is not a folder; give the one that has a folder for each task; did you mean "
            f"{tmp_path}",
        ),
    ):
        code, _, err = run(tasks="cola", data_dir=given)
        assert code == 3
        assert f"glue: --data-dir '{given}' " in err
        assert what in err
