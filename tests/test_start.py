"""Ranks that the command starts itself: signals, exit codes, a run stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaledistill.cli.distill import _ranks_to_start, main
from scaledistill.distributed.start import ranks_to_start, start_ranks
from scaledistill.errors import ConfigError, SettingError

ROOT = Path(__file__).parent.parent
MakeFile = Callable[..., Path]
# A rank that saves something on SIGINT, which takes a while, as a run does.
SAVES = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "saved-" + os.environ["RANK"]).touch()
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1], "ready-" + os.environ["RANK"]).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import os; os.environ['WORLD_SIZE'] == '2' or sys.exit(9)", 0),
        ("import os, sys, time; os.environ['RANK'] == '1' and sys.exit(4); time.sleep(60)", 4),
        ("import os; os.kill(os.getpid(), 9)", 3),
    ],
)
def test_exit_codes(code: str, exit_code: int, caplog: pytest.LogCaptureFixture) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert start_ranks(["-c", code], 2) == exit_code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert ("was killed by SIGKILL, often because memory ran out" in caplog.text) == (
        exit_code == 3
    )


def test_a_signal_reaches_all_ranks_and_they_end_in_peace(tmp_path: Path) -> None:
    def interrupt() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert start_ranks(["-c", SAVES, str(tmp_path)], 2) == 0
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_how_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (ranks_to_start(None), ranks_to_start(3)) == (1, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (ranks_to_start(None), ranks_to_start(2)) == (4, 2)
    with pytest.raises(
        SettingError, match=r"num_ranks=5 is more than the 4 GPUs that this process"
    ):
        ranks_to_start(5)


def test_what_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (_ranks_to_start(None), _ranks_to_start(1)) == (4, 0)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert _ranks_to_start(None) == 0
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ConfigError, match="this is one of 2 tasks of `srun`"):
        _ranks_to_start(None)


def test_a_launcher_with_another_number_of_ranks(
    config_file: MakeFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("scaledistill.cli.distill._set_up_messages", lambda *_: None)
    assert main(["--config", str(config_file()), "--num-ranks", "2"]) == 2
    assert "--num-ranks 2: a launcher has started 1; leave the option out" in caplog.text


@pytest.mark.full
def test_a_run_on_two_ranks_is_stopped_and_resumed(config_file: MakeFile, tmp_path: Path) -> None:
    """Ctrl-C on a terminal, which signals the whole group, saves a checkpoint and exits with 75."""
    folder = tmp_path / "run"
    file = config_file(
        run={"folder": str(folder), "seed": 1},
        engine={"name": "fsdp"},
        checkpoint={"every_steps": 1000, "keep": 1},
        train={"max_steps": 400, "schedule": "warmup_stable_decay"},
    )
    (tmp_path / "datasets.py").write_text("raise ImportError('of the working folder')")
    program = Path(sys.executable).parent / "scaledistill"
    command = [program, "distill", "--config", file, "--num-ranks", 2]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")
    } | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*settings: str) -> subprocess.Popen[str]:
        options = [part for setting in settings for part in ("--set", setting)]
        return subprocess.Popen(
            [*map(str, command), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )

    process = start()
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    status = json.loads((folder / "status.json").read_text())
    assert (process.returncode, status["state"]) == (75, "stopped"), said
    assert "Traceback" not in said
    assert "elastic" not in said
    assert said.count("got SIGINT: ") == 1
    step = status["step"]
    process = start(f"train.max_steps={step + 2}", "train.decay_steps=1")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"step {step}" in said
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", step + 2)
