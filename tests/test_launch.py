"""The run under each launcher, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import free_port

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "{port}"],
    "accelerate": [
        "accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
    ],
    "python": ["python"],
}


def start(launcher: str, *arguments: object) -> subprocess.Popen[str]:
    words = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [
        str(BIN / words[0]),
        *words[1:],
        str(ROOT / "launch" / "distill.py"),
        *map(str, arguments),
    ]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "launcher",
    [
        name if name == "deepspeed" else pytest.param(name, marks=pytest.mark.full)
        for name in LAUNCHERS
    ],
)
def test_a_run_under(launcher: str, config_file: Callable[..., Path], tmp_path: Path) -> None:
    process = start(launcher, "--config", config_file(), "--set", "train.max_steps=4")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 4)
    assert (tmp_path / "run" / "export" / "l2" / "model.safetensors").exists()
    lines = [line for line in (output + errors).splitlines() if "step 4/4" in line]
    assert len(lines) == 1, "only rank 0 logs"
    if launcher == "accelerate":
        assert "accelerate launch was asked for several" not in output + errors
    # Accelerate starts CPU ranks by MPI only.
    ranks = 2 if launcher in ("deepspeed", "torchrun") else 1
    state = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-000000004" / "state.json").read_text()
    )
    assert state["world_size"] == ranks


def test_a_mistake_is_reported_once_under_deepspeed(config_file: Callable[..., Path]) -> None:
    process = start("deepspeed", "--config", config_file(), "--set", "train.max_stepz=4")
    output, errors = process.communicate(timeout=60)
    lines = [
        line for line in (output + errors).splitlines() if "train.max_stepz: unknown key" in line
    ]
    assert len(lines) == 1
    assert process.returncode == 2


@pytest.mark.full
@pytest.mark.parametrize("fault", ["data.train=./nowhere", "train.max_stepz=4"])
def test_a_failure_is_reported_once_under_torchrun(
    fault: str, config_file: Callable[..., Path]
) -> None:
    """The rank that does not report must not make torchrun end the one that does."""
    process = start("torchrun", "--config", config_file(), "--set", fault)
    output, errors = process.communicate(timeout=120)
    lines = [
        line
        for line in (output + errors).splitlines()
        if re.search("no such folder: nowhere|unknown key", line)
    ]
    assert len(lines) == 1
    assert process.returncode == 1


@pytest.mark.full
def test_a_port_in_use_is_one_line_under_deepspeed(config_file: Callable[..., Path]) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        LAUNCHERS["deepspeed-busy"] = [
            "deepspeed",
            "--num_accelerators",
            "2",
            "--master_port",
            str(port),
        ]
        process = start("deepspeed-busy", "--config", config_file())
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 3
    assert (output + errors).count(f"ERROR port {port} on ") == 1
    assert "Traceback" not in output + errors


@pytest.mark.full
def test_torchrun_does_not_restart_a_stopped_run(
    config_file: Callable[..., Path], tmp_path: Path
) -> None:
    LAUNCHERS["torchrun-restarts"] = [*LAUNCHERS["torchrun"], "--max-restarts", "2"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    process = start("torchrun-restarts", "--config", config_file())
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("stopped", 0, 75)


@pytest.mark.full
def test_ctrl_c_under_deepspeed_saves(config_file: Callable[..., Path], tmp_path: Path) -> None:
    process = start("deepspeed", "--config", config_file(), "--set", "train.max_steps=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    status = tmp_path / "run" / "status.json"
    while json.loads(status.read_text())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ended = json.loads(status.read_text())
    assert ended["state"] == "stopped"
    assert (
        tmp_path / "run" / "checkpoints" / f"step-{ended['step']:09d}" / "manifest.json"
    ).exists()
