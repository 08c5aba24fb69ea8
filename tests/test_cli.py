from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scaledistill.cli import distill as cli
from scaledistill.cli.distill import main
from scaledistill.config.load import load_config
from scaledistill.errors import DivergedError, PeerError
from scaledistill.preflight import checks
from scaledistill.storage.files import locked
from scaledistill.training import exports
from scaledistill.training import loop as train
from scaledistill.training.loop import RunResult

ROOT = Path(__file__).parent.parent
MakeFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what `main` sets up for a whole process: handlers, warning filters and variables."""
    monkeypatch.setattr(
        os,
        "environ",
        {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES},
    )
    monkeypatch.setattr(cli, "REPORT_SECONDS", 0.0)
    package = logging.getLogger("scaledistill")
    before = package.handlers[:], package.propagate, package.level
    with warnings.catch_warnings():
        yield
    package.handlers[:], package.propagate = before[:2]
    package.setLevel(before[2])


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def distill(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "distill.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def seconds_of_children() -> float:
    """Return the processor seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_says_what_counts() -> None:
    before = seconds_of_children()
    ended = distill("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert seconds_of_children() - before < 0.3
    text = " ".join(ended.stdout.split())
    for part in (
        "--config FILE",
        "--set KEY=VALUE",
        "--print-config",
        "--validate",
        "--world-size N",
        "--dry-run N",
    ):
        assert part in text, part
    assert (
        "exit codes: 0 done, 1 an unexpected error, 2 configuration, 3 environment or data, "
        "4 diverged, 75 stopped on request" in text
    )
    assert "local_rank" not in text


def test_the_package_runs_as_a_module(config_file: MakeFile) -> None:
    command = [
        sys.executable,
        "-m",
        "scaledistill",
        "distill",
        "--config",
        str(config_file()),
        "--set",
        "train.max_steps=4321",
    ]
    shown = subprocess.run(
        [*command, "--print-config"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(shown.stdout)["train"]["max_steps"] == 4321
    wrong = subprocess.run(
        [*command, "--frsh"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert wrong.returncode == 2
    assert "unknown option --frsh; did you mean --fresh?" in wrong.stderr
    assert "RuntimeWarning" not in wrong.stderr


HEAVY = """
import sys
from scaledistill.cli.command import main
assert main(sys.argv[1:]) == 0
heavy = {
    "torch", "transformers", "deepspeed", "numpy", "datasets", "rich", "accelerate", "matplotlib",
    "pyarrow",
}
sys.stderr.write(" ".join(sorted(heavy & set(sys.modules))))
"""


def test_printing_a_configuration_imports_nothing_heavy() -> None:
    config = str(ROOT / "configs" / "large_to_l6.json")
    ended = subprocess.run(
        [sys.executable, "-c", HEAVY, "distill", "--config", config, "--print-config"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert ended.stderr == ""
    assert ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "x.json", "--frsh"], "unknown option --frsh; did you mean --fresh?"),
        # No abbreviations.
        (["--config", "x.json", "--valid"], "unknown option --valid; did you mean --validate?"),
        ([], "--config FILE is missing"),
        (["--confg", "x.json"], "unknown option --confg; did you mean --config?"),
        (
            ["--config", "x.json", "--dry-run", "0"],
            "--dry-run: found '0', expected a whole number from 1 up",
        ),
        (["--config", "x.json", "--validate", "--world-size", "-2"], "argument --world-size: "),
        (
            ["--config", "x.json", "--dry-run", "ten"],
            "argument --dry-run: found 'ten', expected a whole number",
        ),
        (
            ["--config", "x.json", "--world-size", "7"],
            "--world-size is read only with --validate; the launcher sets",
        ),
        (
            ["--config", "x.json", "--tokens-per-second", "7"],
            "--tokens-per-second is read only with --validate",
        ),
        (
            ["--config", "x.json", "--resume"],
            "unknown option --resume; rerun the same command: it resumes",
        ),
        (["x.json"], "unexpected argument 'x.json'; type --config x.json"),
        (
            ["--config", "x.json", "--validate", "--dry-run", "3"],
            "--validate and --dry-run do different things; give one",
        ),
        (
            ["--config", "x.json", "--profile", "2", "--dry-run", "3"],
            "--dry-run and --profile do different things",
        ),
        (
            ["--config", "x.json", "--print-config", "--validate"],
            "--print-config and --validate do different things",
        ),
        (
            ["--config", "x.json", "--print-config", "toml"],
            "argument --print-config: invalid choice: 'toml' (choose from",
        ),
        (
            ["--explain", "train", "--validate"],
            "--explain and --validate do different things; give one of them",
        ),
        (
            ["--config", "x.json", "--export", "0", "--validate"],
            "--validate and --export do different things",
        ),
        (
            ["--config", "x.json", "--export", "3", "--fresh"],
            "--fresh starts a run over, --export starts none",
        ),
        (
            ["--config", "x.json", "--print-config", "--fresh"],
            "--fresh starts a run over, --print-config starts none",
        ),
        (
            ["--config", "x.json", "--export", "best"],
            "is exported while a run lasts: see <run.folder>/export/<student>-best",
        ),
        (
            ["--config", "x.json", "--export", "x"],
            "found 'x', expected a step that has a checkpoint, or 'newest'",
        ),
        (
            ["--config", "x.json", "--validate", "--device-memory-gb", "nan"],
            "found 'nan', expected a number above 0",
        ),
    ],
)
def test_misspelt_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_threads_spin_briefly_unless_the_user_decides() -> None:
    del os.environ["OMP_WAIT_POLICY"]  # of the tests
    main(["--config", "nowhere.json"])
    assert os.environ.pop("GOMP_SPINCOUNT") == "2000"
    os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
    main(["--config", "nowhere.json"])
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("name", ["quickstart", "large_to_l6"])
def test_print_config_round_trips(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [
        "--config",
        str(ROOT / "configs" / f"{name}.json"),
        "--set",
        "train.max_steps=4321",
        "--print-config",
    ]
    assert main(first) == 0
    printed = capsys.readouterr().out
    (tmp_path / "resolved.json").write_text(printed)
    assert json.loads(printed)["train"]["max_steps"] == 4321
    assert main(["--config", str(tmp_path / "resolved.json"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_print_config_as_yaml_round_trips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "configs" / "family_from_large.json")
    assert main(["--config", config, "--print-config", "yaml"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "resolved.yaml") == load_config(config)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", "students.NAME.num_layers"]) == 0
    assert "Number of blocks.\n\n  values   a whole number above 0\n" in capsys.readouterr().out
    assert main(["--explain"]) == 0
    assert "\n  train       Batch sizes, optimizer" in capsys.readouterr().out
    assert main(["--explain", "trian"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err[9:]) == (
        "",
        "ERROR unknown setting trian; did you mean 'train'?\n",
    )


def test_only_rank_0_prints(config_file: MakeFile, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["RANK"] = "1"
    assert main(["--config", str(config_file()), "--print-config"]) == 0
    assert main(["--config", str(config_file()), "--validate"]) == 0
    assert main(["--config", str(config_file()), "--set", "x=1", "--validate"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"\S+ \[rank 1\] ERROR x: unknown key; .*\n", captured.err)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.max_steps"],
            "--set train.max_steps: expected KEY=VALUE, such as --set train.max_steps=100",
        ),
        (["train.max_stepz=3"], "train.max_stepz: unknown key; did you mean 'max_steps'?"),
        (
            ["train.max_steps=many"],
            'train.max_steps: found "many" (str); expected a whole number above 0',
        ),
        (
            ["train.learning_rate=Infinity"],
            "train.learning_rate: found Infinity (float); expected a finite number above 0",
        ),
        (["train.max_steps.x=1"], "--set train.max_steps.x=1: 'max_steps' is a value, not a block"),
        (["run.folder="], 'run.folder: found "" (str); expected non-empty text in double quotes'),
    ],
)
def test_bad_overrides(
    overrides: list[str], message: str, config_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file()), *(f"--set={each}" for each in overrides)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_missing_file_is_a_configuration_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / "configs" / "quikstart.json")]) == 2
    assert re.search(
        r"quikstart\.json: no such file; did you mean \S+quickstart\.json\?",
        capsys.readouterr().err,
    )


def test_validate_prints_the_plan(
    config_file: MakeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file()), "--validate"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"DeepSpeed ZeRO-2, 1 rank +\n", captured.out)
    assert captured.out.endswith("all checks passed (weights not loaded)\n")
    assert captured.err == ""
    assert not (tmp_path / "run").exists()


def test_validate_plans_for_other_numbers_of_ranks(
    config_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config_file()), "--validate", "--world-size"]
    assert main([*arguments, "7"]) == 2
    assert (
        "train.global_batch_size=8 is not divisible by 7 ranks; use 7 or 14, or 4 or 8 ranks"
        in capsys.readouterr().err
    )
    assert main([*arguments, "4"]) == 0
    assert "DeepSpeed ZeRO-2, 4 ranks" in capsys.readouterr().out
    os.environ["WORLD_SIZE"] = "2"  # under a launcher
    assert main(arguments[:-1]) == 0
    assert "DeepSpeed ZeRO-2, 2 ranks" in capsys.readouterr().out


def test_validate_says_that_the_folder_is_in_use(
    config_file: MakeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        (folder / "status.json").write_text(
            '{"state": "running", "step": 3, "max_steps": 6, "pid": 17, "host": "node1"}'
        )
        assert main(["--config", str(config_file()), "--validate"]) == 2
        captured = capsys.readouterr()
        assert "DeepSpeed ZeRO-2, 1 rank" in captured.out
        assert (
            "in use by a running process (pid 17 on node1, running, step 3 of 6); wait "
            "until it has ended" in captured.err
        )
    assert main(["--config", str(config_file()), "--validate"]) == 0


def test_a_micro_batch_above_the_share_is_said(
    config_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config_file(train={"micro_batch_size": 8})), "--validate"]
    assert main(arguments) == 0
    assert "train.micro_batch_size" not in capsys.readouterr().out
    assert main([*arguments, "--world-size", "4"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert (
        "train.micro_batch_size=8 is more than a rank's share of train.global_batch_size=8 on 4 "
        "ranks: 2 is used; set "
        'it to 2 or "auto"' in words
    )


@pytest.mark.parametrize("option", [["--validate"], []])
def test_data_that_is_not_there(
    option: list[str], config_file: MakeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file(data={"train": "./no/shards"})), *option]) == 3
    captured = capsys.readouterr()
    assert "ERROR data.train: no such folder: no/shards; expected" in captured.err
    assert captured.out == ""
    status = tmp_path / "run" / "status.json"
    assert not status.exists() if option else json.loads(status.read_text())["exit_code"] == 3


def test_debug_shows_where(config_file: MakeFile) -> None:
    with pytest.raises(checks.ConfigError, match="num_heads=5"):
        main(
            [
                "--config",
                str(config_file()),
                "--set",
                "relations.num_heads=5",
                "--validate",
                "--debug",
            ]
        )


@pytest.mark.parametrize(
    ("end", "exit_code", "text"),
    [
        (RunResult("done", 0, 6, "6 steps done"), 0, "INFO 6 steps done"),
        (RunResult("stopped", 75, 3, "stopped after step 3"), 75, "INFO stopped after step 3"),
        (DivergedError("11 steps in a row"), 4, "ERROR 11 steps in a row"),
        (PeerError("said by rank 0", 3), 3, ""),
    ],
    ids=["done", "stopped", "diverged", "peer"],
)
def test_how_a_run_ended(
    end: Any,
    exit_code: int,
    text: str,
    config_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {}

    def run(config: Any, **options: Any) -> RunResult:
        asked.update(options, config=config)
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(train, "distill", run)
    path = config_file()
    assert main(["--config", str(path), "--fresh", "--dry-run", "2", "--local_rank=0"]) == exit_code
    assert asked == {
        "config": load_config(path),
        "fresh": True,
        "dry_run_steps": 2,
        "profile_steps": None,
    }
    captured = capsys.readouterr()
    assert text in captured.err if text else captured.err == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_export_is_rank_0s(
    rank: str,
    config_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def export(config: Any, wanted: Any) -> list[Path]:
        asked.append(wanted)
        if wanted == 7:
            raise checks.ConfigError("no checkpoint of step 7")
        return [Path("export/l2-step-8")]

    monkeypatch.setattr(exports, "export_checkpoint", export)
    os.environ["RANK"] = rank
    command = ["--config", str(config_file()), "--export"]
    codes = [main([*command, step]) for step in ("step-8", "latest", "7")]
    captured = capsys.readouterr()
    if rank == "0":
        assert (codes, asked) == ([0, 0, 2], [8, "newest", 7])
        assert "the student is in export/l2-step-8" in captured.err
        assert "ERROR no checkpoint of step 7" in captured.err
    else:
        assert (codes, asked, captured.err) == ([0, 0, 0], [], "")


@pytest.mark.parametrize(
    ("ranks", "fault", "waits"),
    [
        (("1", "1"), PeerError("said by rank 0", 3), [30]),
        (("9", "1"), PeerError("said by rank 0", 3), [5]),  # another machine
        (("0", "0"), DivergedError("said here"), []),
        (("1", "1"), "--set=x=1", [30]),
        (("8", "0"), "--set=x=1", []),  # the first of its machine, which reads a file of its own
        (("1", "1"), "--frsh", [30]),
        (("0", "0"), "--frsh", []),
    ],
)
def test_who_does_not_report_leaves_last(
    ranks: tuple[str, str],
    fault: Any,
    waits: list[int],
    config_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise fault

    pauses: list[float] = []
    monkeypatch.setattr(train, "distill", run)
    monkeypatch.setattr(cli, "REPORT_SECONDS", 30)
    monkeypatch.setattr("scaledistill.cli.distill.time.sleep", pauses.append)
    os.environ["RANK"], os.environ["LOCAL_RANK"] = ranks
    options = ["--config", str(config_file()), *([fault] if isinstance(fault, str) else [])]
    if fault == "--frsh":
        with pytest.raises(SystemExit, match="2"):
            main(options)
    else:
        assert main(options) in (2, 3, 4)
    assert pauses == waits


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_variables_of_a_launcher_that_are_no_numbers(
    name: str, config_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ[name] = "x"
    for options in (["--validate"], []):
        assert main(["--config", str(config_file()), *options]) == 2
        assert (
            f"ERROR the environment sets {name}='x', expected a whole number"
            in capsys.readouterr().err
        )


def test_an_interrupt_says_what_there_is(
    config_file: MakeFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "distill", interrupted)
    command = ["--config", str(config_file())]
    for expected, options in (
        (
            "interrupted; no checkpoint was saved yet: rerun the same command to start from the "
            "beginning",
            [],
        ),
        ("interrupted; rerun the same command to resume from the checkpoint of step 12", []),
        ("interrupted", ["--dry-run", "2"]),
    ):
        assert main([*command, *options]) == 130
        assert capsys.readouterr().err.endswith(f"ERROR {expected}\n")
        (tmp_path / "run" / "checkpoints" / "step-000000012").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "checkpoints" / "step-000000012" / "manifest.json").touch()


def test_parser_takes_what_launchers_add() -> None:
    assert cli.parser().parse_args(["--config", "x", "--local-rank", "3"]).local_rank == 3


@pytest.mark.parametrize("option", ["--export=newest", "--validate"])
def test_sigterm_cleans_up_like_ctrl_c(
    option: str,
    config_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = []

    def work(*arguments: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            left.append(True)
        return 0

    for name in ("_export", "_validate"):
        monkeypatch.setattr(cli, name, work)
    assert main(["--config", str(config_file()), option]) == 130
    assert left
    assert capsys.readouterr().err.endswith("interrupted\n")
