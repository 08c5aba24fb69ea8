"""The benchmarks: each tool end to end on tiny sizes, and what they share."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from scaledistill.metrics import benchmark
from scaledistill.metrics.benchmark import Report, Worker, WorkerError, add_options, in_turn, ratios

TOOLS = Path(__file__).parent.parent / "tools" / "bench"
TINY = (
    "teacher.layer=2",
    "relations.num_heads=4",
    *(
        f"students.l6-h384.{size}"
        for size in ("num_layers=2", "hidden_size=16", "num_attention_heads=2")
    ),
)

Figures = dict[str, dict[str, Any]]


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, Figures]]:
    """Return a function that runs a tool of ours in this process and returns its exit code and
    figures by name.
    """

    def run(name: str, *arguments: str) -> tuple[int, Figures]:
        file = tmp_path / "figures.json"
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        for variable, value in (("DS_ACCELERATOR", "cpu"), ("KINETO_LOG_LEVEL", "99")):
            monkeypatch.setenv(variable, value)  # which the tools set themselves, for good
        monkeypatch.syspath_prepend(str(TOOLS))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--json", str(file)])
        code = importlib.import_module(name).main()
        figures = json.loads(file.read_text())
        assert all(set(figure) == {"name", "value", "unit", "n"} for figure in figures)
        by_name = {figure["name"]: figure for figure in figures}
        assert len(by_name) == len(figures)
        return code, by_name

    return run


def peer_environment(folder: Path, versions: str, worker: str = "") -> Path:
    """Make a folder that looks like bertdistiller's environment: its `python` prints `versions` and
    runs `worker`.
    """
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    (folder / "worker.py").write_text(worker)
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo {versions}; else exec {sys.executable} '
        f'{folder}/worker.py "$@"; fi\n'
    )
    python.chmod(0o755)
    return folder


PEER_WORKER = """
import json, sys
import numpy
from scaledistill.metrics.benchmark import Turns
turns = Turns()
settings = json.load(open(sys.argv[-1]))
if settings["arguments"]["bf16"]:
    sys.exit("no bf16 today")
assert settings["relations"] == [[1, 1, 1.0], [2, 2, 1.0], [3, 3, 1.0]]
assert settings["arguments"]["per_device_train_batch_size"] == 2
assert settings["arguments"]["gradient_accumulation_steps"] == 2
assert numpy.load(settings["tokens"]).shape == (64, 16)
print("noise")
while True:
    turns.wait()
    turns.answer(seconds=1.0, loss=0.5, peak_memory_bytes=1000)
"""


@pytest.mark.parametrize(
    "fast_bf16",
    [pytest.param(False, marks=pytest.mark.full), True],
    ids=["slow-bf16", "fast-bf16"],
    indirect=True,
)
def test_step_beside_a_peer(
    run_tool: Callable[..., tuple[int, Figures]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    fast_bf16: bool,
) -> None:
    environment = peer_environment(
        tmp_path / "venv", f"0.1.1 {version('torch')} 4.57.6", PEER_WORKER
    )
    markdown = tmp_path / "tables.md"
    sizes = ["--shape", "4x16", "--teacher", "3x32", "--rounds", "2"]
    sizes += [f"--set={override}" for override in TINY]
    peer = ["--peer-venv", str(environment), "--peer-micro-batch", "2"]
    code, figures = run_tool("step", *sizes, *peer, "--markdown", str(markdown))
    assert code == 3, "one of the two peers failed"
    assert "4x16 bertdistiller_bf16 ended with status 1:\nno bf16 today" in capfd.readouterr().err
    assert "step/4x16/speedup_vs_bertdistiller_bf16" not in figures

    def value(name: str) -> float:
        return figures[f"step/4x16/{name}"]["value"]

    assert figures["step/4x16/bertdistiller_tokens_per_second"] == {
        "name": "step/4x16/bertdistiller_tokens_per_second",
        "value": 64.0,
        "unit": "tokens/s",
        "n": 2,
    }
    assert value("bertdistiller_peak_memory_bytes") == 1000
    assert value("peak_memory_bytes") > 1e8
    assert value("speedup_vs_bertdistiller") == pytest.approx(
        value("tokens_per_second") / 64, rel=0.5
    )
    # Per token: a whole layer has 24 D² + 4 T D, Q/K/V alone 6 D²; the student's count three times.
    needed = (30 * 32**2 + 4 * 16 * 32) + 3 * (30 * 16**2 + 4 * 16 * 16)
    dtype = "bf16" if fast_bf16 else "fp32"  # the teacher's
    rate = figures[f"machine/matrix_rate_{dtype}"]["value"]
    assert (
        value("mfu")
        == value(f"mfu_{dtype}")
        == pytest.approx(needed * value("tokens_per_second") / rate)
    )
    shares = [
        value(f"{phase}_fraction")
        for phase in ("teacher", "student", "loss", "backward", "optimizer")
    ]
    assert min(shares) > 0
    assert sum(shares) + value("data_wait_fraction") < 1
    assert "| 4x16 | bertdistiller | 64 |" in markdown.read_text()
    assert f"| 4x16 | {dtype}, fp32 |" in markdown.read_text()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        (
            "0.1.0 2.0 4.57.6",
            "has bertdistiller, torch, transformers ['0.1.0', '2.0', '4.57.6']; expected 0.1.1",
        ),
        (None, "set its folder with --peer-venv, or measure without bertdistiller: --no-peer"),
    ],
)
def test_no_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: str | None, message: str
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    peer = importlib.import_module("peer")
    folder = tmp_path / "venv"
    if versions:
        peer_environment(folder, versions)
    else:
        folder.write_text("a file where the environment should be made")
    with pytest.raises(peer.PeerError) as error:
        peer.ready_python(folder)
    assert message in str(error.value)


@pytest.mark.full
def test_students_together_and_alone(
    run_tool: Callable[..., tuple[int, Figures]], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shape", "4x16", "--teacher", "2x32", "--warmup", "1", "--rounds", "2"]
    settings = [part for size in TINY for part in ("--set", size)]
    code, figures = run_tool("step", *sizes, *settings, "--students", "2x16,1x16,1x32")
    assert code == 0
    assert figures["step/students/count"]["value"] == 3
    for prefix in ("step/students", "step/students/first_two"):
        ratio, joint, separate = (
            figures[f"{prefix}/{name}"]
            for name in ("joint_over_separate", "joint_seconds", "separate_seconds")
        )
        assert (ratio["unit"], ratio["n"]) == ("fraction", 2)
        assert 0 < joint["value"] < 2 * separate["value"]
    output = capsys.readouterr().out
    assert "l2-h16, l1-h16, l1-h32" in output
    for wrong in ("2x16", "2x16,2x16", "2x16,x"):
        with pytest.raises(SystemExit):
            run_tool("step", "--students", wrong)


def test_relations(
    run_tool: Callable[..., tuple[int, Figures]], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--lengths", "8", "32", "--heads", "12", "64", "--tokens", "32"]
    code, figures = run_tool("relations", *sizes, "--rounds", "2", "--max-map-bytes", "1e6")
    assert code == 0
    for backend in ("reference", "sdpa"):
        assert figures[f"relations/{backend}/4x8/64/milliseconds"]["n"] == 2
        assert figures[f"relations/{backend}/4x8/12/error"]["value"] < 1e-5
    assert figures["relations/sdpa/4x8/speedup_vs_reference"]["unit"] == "x"
    # The reference's maps are 4 x 12 x 8 x 8 floats; it holds some of them, and two gradients of
    # the student at least.
    held = figures["relations/reference/4x8/12/peak_memory_bytes"]["value"]
    gradient = 4 * 32 * 3 * 384
    assert gradient < held < 12 * (4 * 4 * 12 * 8 * 8 + gradient)
    assert "relations/reference/1x32/64/milliseconds" not in figures
    assert "relations/sdpa/1x32/64/milliseconds" in figures
    assert "maps too large" in capsys.readouterr().out


def test_data(run_tool: Callable[..., tuple[int, Figures]]) -> None:
    code, figures = run_tool("data", "--tokens", "1000", "--repeats", "1")
    assert code == 0
    assert [*figures] == ["data/128/tokens_per_second", "data/512/tokens_per_second"]


def test_runs_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    runs = {"slow": lambda: run("slow", 3.0), "fast": lambda: run("fast", 1.0)}
    seconds = in_turn(runs, rounds=3, max_seconds=5, title="case")
    assert order == ["slow", "fast", "slow", "fast", "fast"], (
        "the slow one sits out the third round"
    )
    assert seconds == {"slow": [3.0, 3.0], "fast": [1.0, 1.0, 1.0]}
    assert ratios(seconds["slow"], seconds["fast"]) == [3.0, 3.0]
    assert "case, round 1 of 3: slow 3,000.0 ms, fast 1,000.0 ms" in capsys.readouterr().err


def test_a_report_keeps_medians() -> None:
    report = Report()
    assert report.add("a", [5.0, 1.0, 2.0], "s") == 2.0
    report.add("b", 4, "bytes")
    assert report.figures == [
        {"name": "a", "value": 2.0, "unit": "s", "n": 3},
        {"name": "b", "value": 4, "unit": "bytes", "n": 1},
    ]
    table = report.table("title", ("x", "y"))
    table.rows.append(("1", "2"))
    assert table.markdown() == "**title**\n\n| x | y |\n| --- | --- |\n| 1 | 2 |"


def test_figures_that_are_not_finite_are_null() -> None:
    report = Report()
    report.add("a", math.nan, "s")
    assert json.loads(report.json()) == [{"name": "a", "value": None, "unit": "s", "n": 1}]


def test_a_commit_is_that_of_our_own_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        settings = ("-c", "user.name=x", "-c", "user.email=x@x.org")
        subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True, capture_output=True)

    folder = tmp_path / "venv" / "scaledistill"
    folder.mkdir(parents=True)
    (folder / "x.py").touch()
    git("init")
    git("commit", "--allow-empty", "--message", "theirs")
    assert benchmark._commit(folder) == "not a git checkout"
    git("add", ".")
    git("commit", "--message", "ours")
    assert re.fullmatch("[0-9a-f]{7,}", benchmark._commit(folder))


def test_a_folder_for_the_figures_is_missed_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", str(tmp_path / "none" / "figures.json")])
    assert "none is not a folder; make it first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", str(tmp_path)])
    assert f"{tmp_path} is a folder; name a file in it" in capsys.readouterr().err


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    program = "import sys; print('why', file=sys.stderr); sys.exit(7)"
    with (
        Worker(
            "one", [sys.executable, "-c", program], log=tmp_path / "log", environment={}
        ) as worker,
        pytest.raises(WorkerError, match=r"one ended with status 7:\nwhy"),
    ):
        worker.turn()
