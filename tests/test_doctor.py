"""`doctor`: a healthy machine, and each part of one broken on purpose."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, use_hub

from scaledistill.cli import doctor as command
from scaledistill.config.schema import DistillConfig
from scaledistill.preflight import doctor
from scaledistill.preflight.doctor import CHECKS, Ended, Finding, Machine, Wanted, examine
from scaledistill.preflight.probes import multiplies

GPU = {"name": "A100", "capability": [8, 0], "memory_bytes": 80 * 10**9, "error": ""}
ON_GPU = {
    "torch": {
        "version": "2.13.0+cu128",
        "cuda": "12.8",
        "hip": None,
        "nccl": [2, 29, 3],
        "reason": "",
        "gpus": [GPU, GPU],
    },
    "kernels": {
        "device": "A100",
        "errors": {"float32": 2e-6, "bfloat16": 3e-3},
        "tolerances": {"float32": 1e-4, "bfloat16": 2e-2},
    },
    "deepspeed": {"device": "cuda"},
    "cpu_adam": {"error": 1e-9},
}
ON_CPU: dict[str, Any] = {
    **ON_GPU,
    "torch": {**ON_GPU["torch"], "version": "2.13.0+cpu", "cuda": None, "nccl": None, "gpus": []},
}


def answering(answers: Mapping[str, Any]) -> Callable[..., Ended]:
    """Return a stand-in for `Machine.run`; an `Ended` or an exception is a failure."""

    def run(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> Ended:
        assert not {"RANK", "MASTER_PORT", "SLURM_NTASKS"} & set(environ)
        answer = answers[command[-1]]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Ended) else Ended(0, f"noise\n{json.dumps(answer)}", "")

    return run


@pytest.fixture
def make_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Return a function that makes a healthy machine; keyword arguments replace parts of it."""
    root = tmp_path / "root"
    (root / "dev/shm").mkdir(parents=True)
    (root / "sys/class/net/eth0").mkdir(parents=True)
    (root / "sys/class/net/eth0/operstate").write_text("up\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gcc", "g++"):
        (programs / name).write_text("")
        (programs / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]

    def make(**parts: Any) -> Machine:
        environ = {
            "PATH": str(programs),
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "MASTER_PORT": str(port),
            "SLURM_NTASKS": "4",
        } | parts.pop("environ", {})
        usual = {
            "root": root,
            "environ": environ,
            "disk_usage": lambda path: SimpleNamespace(total=10**12, free=10**11),
            "limits": lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
            "interfaces": lambda: [(1, "lo"), (2, "eth0")],
            "driver_cuda": lambda: None,
            "run": answering(ON_CPU),
        }
        return Machine(**(usual | parts))

    return make


MakeMachine = Callable[..., Machine]


def found(machine: Machine, *names: str, **wanted: Any) -> list[Finding]:
    """Return the findings that are not ok."""
    wanted.setdefault("folder", Path(machine.environ["HOME"]) / "run")
    return [
        finding
        for finding in examine(machine, Wanted(**wanted), names or CHECKS)
        if finding.level != "ok"
    ]


@pytest.mark.parametrize("with_gpus", [False, True])
def test_a_healthy_machine(
    with_gpus: bool, make_machine: MakeMachine, tiny_config: Callable[..., DistillConfig]
) -> None:
    machine = make_machine()
    if with_gpus:
        machine = make_machine(run=answering(ON_GPU), driver_cuda=lambda: (13, 0))
    findings = list(examine(machine, Wanted(tiny_config(), Path(machine.environ["HOME"]))))
    assert [finding for finding in findings if finding.level != "ok"] == []
    assert {finding.check for finding in findings} == set(CHECKS)
    assert ("2 GPUs: A100 (80 GB), A100 (80 GB); CUDA 12.8, driver for 13.0" in {
        finding.text for finding in findings
    }) == with_gpus  # fmt: skip


def full(path: Path) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def of_size(num_bytes: int) -> Callable[[Path], Any]:
    return lambda path: SimpleNamespace(total=num_bytes, free=num_bytes)


def versions(**changed: str) -> Callable[[str], str]:
    return lambda name: changed.get(name) or metadata.version(name)


def missing(name: str) -> str:
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return metadata.version(name)


def gpu(**changed: Any) -> dict[str, Any]:
    return {**ON_GPU, "torch": {**ON_GPU["torch"], **changed}}


def limit(soft: int, hard: int) -> Callable[[int], tuple[int, int]]:
    return lambda which: (soft, hard)


GONE = Ended(-signal.SIGSEGV, "", "")
BROKEN: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    # the check, what is broken, the level, words of the finding, words of the remedy
    "a version out of range": (
        "versions", {"version": versions(torch="2.9.1")}, "problem",
        "torch 2.9.1, expected >=2.11", "pip install 'torch>=2.11'",
    ),
    "a package that is missing": (
        "versions", {"version": missing}, "problem",
        "torch is not installed, expected >=2.11", "pip install 'torch>=2.11'",
    ),
    "a version that is newer than tested": (
        "versions", {"version": versions(torch="2.99.0")}, "warning",
        "newer than tested: torch 2.99.0 (tested: 2.13.0)", "install the tested versions",
    ),
    "torch that crashes": (
        "gpu", {"run": answering({"torch": GONE})}, "problem",
        "importing torch was killed by SIGSEGV: no output", "--force-reinstall torch",
    ),
    "torch that cannot be imported": (
        "gpu", {"run": answering({"torch": Ended(1, "", "ImportError: libcudnn.so.9")})}, "problem",
        "importing torch failed: ImportError: libcudnn", "--force-reinstall torch",
    ),
    "a build of torch for CPUs beside a GPU": (
        "gpu", {"driver_cuda": lambda: (12, 8)}, "problem",
        "but torch 2.13.0+cpu is a build for CPUs", "install a CUDA build of torch",
    ),
    "hidden GPUs": (
        "gpu",
        {
            "driver_cuda": lambda: (12, 8), "run": answering(gpu(gpus=[], reason="no device")),
            "environ": {"CUDA_VISIBLE_DEVICES": ""},
        },
        "problem", "torch sees no GPU (CUDA_VISIBLE_DEVICES='')", "unset CUDA_VISIBLE_DEVICES",
    ),
    "an old driver": (
        "gpu", {"driver_cuda": lambda: (11, 8), "run": answering(ON_GPU)}, "problem",
        "torch is built for CUDA 12.8, the driver supports 11.8", "a torch build for CUDA 11",
    ),
    "a driver that is a little older": (
        "gpu", {"driver_cuda": lambda: (12, 4), "run": answering(ON_GPU)}, "warning",
        "newer than the driver's 12.4", "update the driver",
    ),
    "a GPU that this torch has no code for": (
        "gpu", {"run": answering(gpu(gpus=[{**GPU, "error": "no kernel image is available"}]))},
        "problem", "A100 cannot compute: no kernel image", "a torch build for this GPU",
    ),
    "an old GPU": (
        "gpu", {"run": answering(gpu(gpus=[{**GPU, "capability": [7, 0]}]))}, "warning",
        "compute capability 7.0", "relations.backend=reference",
    ),
    "no compiler for a GPU": (
        "compiler", {"run": answering(ON_GPU), "environ": {"PATH": ""}}, "problem",
        "no C compiler: Triton's kernels", "build-essential",
    ),
    "no compiler": (
        "compiler", {"environ": {"PATH": ""}}, "warning", "DeepSpeed's operators", "install gcc",
    ),
    "wrong kernels": (
        "kernels",
        {"run": answering(
            {"torch": ON_GPU["torch"], "kernels": {
                **ON_GPU["kernels"], "errors": {"float32": 0.3, "bfloat16": 1e-3},
            }}
        )},
        "problem", "float32 3.0e-01, bfloat16 1.0e-03; expected at most float32 0.0001",
        "relations.backend=reference",
    ),
    "kernels that are not a number": (
        "kernels",
        {"run": answering(
            {**ON_GPU, "kernels": {**ON_GPU["kernels"], "errors": {"float32": float("nan")}}}
        )},
        "problem", "float32 nan; expected at most", "relations.backend=reference",
    ),
    "DeepSpeed that hangs": (
        "deepspeed",
        {"run": answering({**ON_CPU, "deepspeed": subprocess.TimeoutExpired("x", 1)})}, "problem",
        "a ZeRO-2 step with offload took more than 600 s", "set engine.name=fsdp",
    ),
    "a DeepSpeed operator that cannot be built": (
        "deepspeed",
        {"run": answering(
            {**ON_CPU, "cpu_adam": Ended(1, "", "log\nFileNotFoundError: no such file: 'c++'\n")}
        )},
        "warning", "CPU Adam cannot be used, building or loading it failed: FileNotFoundError",
        "install g++ and ninja",
    ),
    "an interface that does not exist": (
        "network", {"environ": {"NCCL_SOCKET_IFNAME": "ib0"}}, "problem",
        "NCCL_SOCKET_IFNAME=ib0, but the interfaces are lo, eth0", "unset NCCL_SOCKET_IFNAME",
    ),
    "no network": (
        "network", {"interfaces": lambda: [(1, "lo")]}, "warning",
        "no network interface is up except the loopback", "give it a network",
    ),
    "no NCCL": (
        "network", {"run": answering(gpu(nccl=None))}, "problem", "torch has no NCCL", "CUDA build",
    ),
    "a full disk": (
        "disk", {"disk_usage": full}, "problem",
        "cannot write: No space left on device", "free some space, or set another run.folder",
    ),
    "little disk": (
        "disk", {"disk_usage": of_size(2 * 10**9)}, "problem",
        "2.0 GB free, expected at least 5 GB", "free some space, or set another run.folder",
    ),
    "small shared memory": (
        "shm", {"disk_usage": of_size(67_108_864)}, "problem",
        "0.07 GB free of 0.07 GB, expected 0.128 GB", "docker run --shm-size=8g",
    ),
    "few open files": (
        "limits", {"limits": limit(256, 524288)}, "problem",
        "open files (ulimit -n): 256, expected at least 1,024", "ulimit -n 65536",
    ),
    "few open files for many ranks": (
        "limits", {"limits": limit(1024, 1024)}, "warning",
        "expected at least 4,096 for jobs of many ranks", "raise the hard limit",
    ),
    "a port that is no number": (
        "port", {"environ": {"MASTER_PORT": "x"}}, "problem",
        "MASTER_PORT='x', expected a number from 1 to 65535", "set another MASTER_PORT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named_with_its_remedy(what: str, make_machine: MakeMachine) -> None:
    check, parts, level, words, remedy = BROKEN[what]
    [first, *_] = found(make_machine(**parts), check)
    assert (first.check, first.level) == (check, level), first
    assert words in first.text
    assert remedy in first.remedy


def test_a_port_in_use(make_machine: MakeMachine) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        [finding] = found(make_machine(environ={"MASTER_PORT": port}), "port")
    assert finding.text == f"MASTER_PORT={port} cannot be used: Address already in use"
    assert "the scripts in launch/ find a free one" in finding.remedy


def test_locked_memory_for_infiniband(make_machine: MakeMachine) -> None:
    machine = make_machine(limits=limit(65536, 65536))
    (machine.root / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    [finding] = found(machine, "network")
    assert (finding.level, finding.remedy.partition(";")[0]) == ("warning", "ulimit -l unlimited")


def test_missing_and_damaged_shards(
    make_machine: MakeMachine, tiny_config: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    gone = tiny_config(data={"train": str(tmp_path / "gone")})
    [finding] = found(make_machine(), "data", config=gone)
    assert finding.level == "problem"
    assert finding.text.startswith(f"data.train: no such folder: {tmp_path / 'gone'}")
    assert finding.remedy == "correct data.train, or make shards there"
    whole = tiny_config()
    copy = shutil.copytree(whole.data.train, tmp_path / "copy")
    next(copy.glob("*.tar")).unlink()
    [finding] = found(make_machine(), "data", config=tiny_config(data={"train": str(copy)}))
    assert ".tar is missing" in finding.text
    assert "copy it again" in finding.remedy


@pytest.mark.parametrize(("cached", "level"), [(False, "problem"), (True, "warning")])
def test_a_hub_that_cannot_be_reached(
    cached: bool,
    level: str,
    make_machine: MakeMachine,
    tiny_config: Callable[..., DistillConfig],
) -> None:
    def refuse(name: str, revision: str | None) -> None:
        raise ConnectionError("connection refused")

    config = tiny_config(teacher={"model": "somebody/encoder"})
    machine = make_machine(ask_hub=refuse, is_cached=lambda name, revision: cached)
    [finding] = found(machine, "hub", config=config)
    assert finding.level == level
    assert "teacher.model=somebody/encoder: the hub gave no answer (connection refused)" in (
        finding.text
    )
    assert ("HF_HUB_OFFLINE=1" if cached else "HTTPS_PROXY") in finding.remedy


def test_a_hub_that_answers(
    make_machine: MakeMachine,
    tiny_config: Callable[..., DistillConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with FakeHub("somebody/encoder", folder) as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        assert (
            found(make_machine(), "hub", config=tiny_config(teacher={"model": "somebody/encoder"}))
            == []
        )
        other = tiny_config(teacher={"model": "somebody/else"})
        [finding] = found(make_machine(), "hub", config=other)
    assert "check the name" in finding.remedy
    assert "GET /api/models/somebody/encoder/revision/main" in hub.asked


def test_gpus_and_files_that_are_wanted(make_machine: MakeMachine, tmp_path: Path) -> None:
    machine = make_machine(run=answering(ON_GPU))
    [finding] = found(machine, "gpu", num_gpus=8)
    assert finding.text == "2 GPUs visible, expected 8"
    [finding] = found(machine, "disk", shared_file=tmp_path / "gone")
    assert "made by another machine, is not visible here" in finding.text


def test_a_check_that_fails_is_a_finding(
    make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(machine: Machine, wanted: Wanted) -> list[Finding]:
        raise KeyError("x")

    def lack(machine: Machine, wanted: Wanted) -> list[Finding]:
        raise ModuleNotFoundError("No module named 'packaging'", name="packaging")

    monkeypatch.setitem(CHECKS, "gpu", fail)
    monkeypatch.setitem(CHECKS, "versions", lack)
    without, other = found(make_machine(), "versions", "gpu")
    assert without.remedy == "pip install --force-reinstall packaging"
    assert other.text == "the check itself failed: KeyError: 'x'"


def test_a_probe_that_hangs_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "GRACE_SECONDS", 0.5)
    pid = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {pid}; wait"
    with pytest.raises(subprocess.TimeoutExpired):
        doctor._run(["bash", "-c", script], {"PATH": "/usr/bin:/bin"}, 1.0)
    stat, deadline = Path(f"/proc/{pid.read_text().strip()}/stat"), time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.05)


def test_a_probe_imports_nothing_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise ImportError('not the random of Python')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(doctor.ProbeError, match="KeyError: 'no such probe'"):
        Machine().probe("no such probe")


def test_a_probe_that_hangs_is_interrupted_first(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "lock = pathlib.Path('lock')\n"
        "lock.touch()\n"
        "try: time.sleep(60)\n"
        "finally: lock.rename('released')\n"
    )
    script = f'cd {tmp_path} && exec {sys.executable} -c "{code}"'
    for seconds in (1.0, 10.0):  # on a busy machine, the first may end before Python has started
        with pytest.raises(subprocess.TimeoutExpired):
            doctor._run(["bash", "-c", script], {"PATH": "/usr/bin:/bin"}, seconds)
        if (tmp_path / "released").exists():
            break
    assert (tmp_path / "released").exists()


def test_the_command_line(
    make_machine: MakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    machine = make_machine(limits=limit(100, 100), run=answering({**ON_CPU, "cpu_adam": GONE}))
    monkeypatch.setattr(command, "Machine", lambda: machine)
    written = tmp_path / "doctor.json"
    config = config_file(data={"train": "gone"})
    code = command.main(["--config", str(config), "--json", str(written), "--min-free-gb", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert lines[-1] == "2 problems, 1 warning"
    assert "problem  limits    open files (ulimit -n): 100, expected at least 1,024" in lines
    assert f"{' ' * 19}remedy: raise the hard limit" in "\n".join(lines)
    rows = json.loads(written.read_text())
    assert [row["check"] for row in rows if row["level"] == "problem"] == ["limits", "data"]
    assert all(row["remedy"] for row in rows if row["level"] != "ok")
    assert command.main(["--only", "port,compiler"]) == 0
    assert command.main(["--config", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "gpus"], "there is no check 'gpus'; expected some of"),
        (["--set", "run.seed=2"], "--set is read only with --config"),
        (["--json", "no/folder/x.json"], "no/folder is not a folder"),
        (["--min-free-gb", "nan"], "found 'nan', expected a number from 0 up"),
        (["--num-gpus", "0"], "found '0', expected a whole number from 1 up"),
        (["--only", "port", "--num-gpus", "1"], "--num-gpus is read only by the check gpu"),
        (["--quick", "--only", "kernels"], "--quick leaves out kernels; drop one of the options"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_it_starts_without_torch() -> None:
    """With torch, transformers and rich that cannot be imported, it reports them."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'rich', 'deepspeed'): sys.modules[name] = None\n"
        "from scaledistill.cli.doctor import main\n"
        "sys.exit(main(['--only', 'versions,limits,shm,port']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100
    )
    assert "versions" in ended.stdout, ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_facts_of_this_torch() -> None:
    facts = Machine().probe("torch")
    assert facts["version"] == metadata.version("torch")
    assert multiplies(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["kernels", "deepspeed"])
def test_probes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    facts = Machine().probe(name)
    if name == "kernels":
        assert facts["errors"]["float32"] < 1e-5
    else:
        assert facts["device"] in ("cpu", "cuda")
