"""Checks of this machine and its Python environment, for `scaledistill doctor`.

Inputs: a `Machine`, through which every check looks at the machine, so that a test can replace any
part of it, and what the user `Wanted`. Outputs: `Finding`s, each with a remedy. Not handled here:
settings against models, data and memory (`preflight.checks`), the display (`cli.doctor`).

A missing or broken torch is a finding too: so this module imports nothing heavy, and what needs
torch runs in a process of its own (`preflight.probes`), whose crash is a finding as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from scaledistill.distributed.launcher import ISOLATED
from scaledistill.errors import ConfigError, DataError, counted

if TYPE_CHECKING:
    from scaledistill.config.schema import DistillConfig

PACKAGE = Path(__file__).parent.parent
WATCHED = ("torch", "transformers", "deepspeed", "accelerate", "triton")
"""Packages whose newer versions have broken things: a version beyond the tested one is reported."""
DEFAULT_PORT = 29500
"""Where `deepspeed` and `torchrun` let the ranks meet unless told otherwise."""
MIN_FREE_BYTES = 5_000_000_000
TEMPORARY_BYTES = 1_000_000_000
SHARED_BYTES = (128_000_000, 1_000_000_000)
"""Below the first, ranks on one machine fail; docker's default is 67 MB. Below the second, they may
if there are many."""
OPEN_FILES = (1024, 4096)
"""Below the first, a rank may run out of files; below the second, rank 0 of a large job may."""
MIN_CAPABILITY = (8, 0)
"""The oldest GPUs for which the kernels are tested (Ampere)."""
PROBE_SECONDS = 600.0
GRACE_SECONDS = 5.0
"""From the interrupt of a probe that takes too long to its kill."""
Level = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """The result of a check: a line of the report."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    """What to do; empty if nothing is wrong."""


@dataclass(frozen=True)
class Wanted:
    """What the machine is to be used for."""

    config: DistillConfig | None = None
    folder: Path = Path("runs")
    """The run folder."""
    min_free_bytes: int = MIN_FREE_BYTES
    """In the run folder."""
    num_gpus: int | None = None
    """GPUs that this machine must have."""
    shared_file: Path | None = None
    """A file that another machine made, which this one must see."""


class ProbeError(Exception):
    """A probe failed; the message says how."""


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    output: str
    errors: str


def _run(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> Ended:
    """Run a command.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it was killed after `seconds`.
    """
    with subprocess.Popen(
        command,
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException:
            _end(process)
            raise
    return Ended(process.returncode, output, errors)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process with all that it has started, such as compilers.

    An interrupt comes first: torch then removes the lock of the extension that it is building, for
    which later builds would wait without end.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)


def _driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the GPU driver supports; None without a driver."""
    try:
        driver, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if driver.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _ask_hub(name: str, revision: str | None) -> None:
    """Ask the hub for a model; raise whatever it raises."""
    from huggingface_hub import HfApi

    HfApi().model_info(name, revision=revision or "main", timeout=10)


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


@dataclass
class Machine:
    """What the checks look at; each field can be replaced."""

    root: Path = Path("/")
    """The folder with `sys` and `dev`."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    version: Callable[[str], str] = metadata.version
    """The version of an installed package; raises `PackageNotFoundError`."""
    disk_usage: Callable[[Path], Any] = shutil.disk_usage
    limits: Callable[[int], tuple[int, int]] = resource.getrlimit
    interfaces: Callable[[], list[tuple[int, str]]] = socket.if_nameindex
    driver_cuda: Callable[[], tuple[int, int] | None] = _driver_cuda
    run: Callable[[Sequence[str], Mapping[str, str], float], Ended] = _run
    ask_hub: Callable[[str, str | None], None] = _ask_hub
    is_cached: Callable[[str, str | None], bool] = _is_cached
    _facts: dict[str, dict[str, Any] | ProbeError] = field(default_factory=dict)

    def which(self, *names: str) -> str | None:
        """Return the first of the programs that is on PATH."""
        path = self.environ.get("PATH")
        return next((name for name in names if name and shutil.which(name, path=path)), None)

    def probe(self, name: str) -> dict[str, Any]:
        """Return the facts that a function of `preflight.probes` finds in a process of its own.

        It runs once; later calls return the same.

        Raises:
            ProbeError: it failed, crashed or took too long.
        """
        if name not in self._facts:
            try:
                self._facts[name] = self._probe(name)
            except ProbeError as error:
                self._facts[name] = error
        facts = self._facts[name]
        if isinstance(facts, ProbeError):
            raise facts
        return facts

    def _probe(self, name: str) -> dict[str, Any]:
        # A probe is a job of one rank, whatever launcher started this process.
        ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
        ours |= {"MASTER_PORT", "LOCAL_SIZE"}
        theirs = ("SLURM_", "OMPI_", "PMI_", "MV2_", "TORCHELASTIC_")
        environ = {
            key: value
            for key, value in self.environ.items()
            if key not in ours and not key.startswith(theirs)
        }
        paths = [str(PACKAGE.parent), environ.get("PYTHONPATH", "")]
        environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONWARNINGS": "ignore"}
        code = (
            f"{ISOLATED}from scaledistill.preflight.probes import main; sys.exit(main(sys.argv[1]))"
        )
        command = [sys.executable, "-c", code, name]
        try:
            ended = self.run(command, environ, PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            raise ProbeError(
                f"took more than {PROBE_SECONDS:.0f} s and was killed; is the machine busy?"
            ) from None
        except OSError as error:
            raise ProbeError(f"cannot be started: {error}") from error
        lines = [line for line in ended.errors.splitlines() if line.strip()]
        if ended.code:
            raise ProbeError(f"{_how_it_ended(ended.code)}: {lines[-1] if lines else 'no output'}")
        answers = [line for line in ended.output.splitlines() if line.startswith("{")]
        if not answers:
            raise ProbeError("gave no answer")
        return json.loads(answers[-1])


def _how_it_ended(code: int) -> str:
    if code > 0:
        return "failed"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


Check = Callable[[Machine, Wanted], Iterable[Finding]]


def check_versions(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Compare Python and every required package with the ranges in the package's metadata."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    python, lines = _requirements()
    here = ".".join(map(str, sys.version_info[:3]))
    if not SpecifierSet(python).contains(here):
        yield Finding(
            "versions", "problem", f"Python {here}, expected {python}", "make a new environment"
        )
    tested, newer, fine = _tested_versions(), [], []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, remedy = requirement.name, f"pip install '{line.partition(';')[0].strip()}'"
        try:
            found = machine.version(name)
        except metadata.PackageNotFoundError:
            expected = f", expected {requirement.specifier}" if requirement.specifier else ""
            yield Finding("versions", "problem", f"{name} is not installed{expected}", remedy)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            expected = str(requirement.specifier)
            yield Finding("versions", "problem", f"{name} {found}, expected {expected}", remedy)
            continue
        fine.append(name)
        if (
            name in WATCHED
            and name in tested
            and Version(found).release[:2] > Version(tested[name]).release[:2]
        ):
            newer.append(f"{name} {found} (tested: {tested[name]})")
    if newer:
        yield Finding(
            "versions",
            "warning",
            f"newer than tested: {', '.join(newer)}",
            "if something fails, install the tested versions",
        )
    shown = ", ".join(f"{name} {machine.version(name)}" for name in WATCHED if name in fine)
    if len(fine) > 0:
        yield Finding(
            "versions", "ok", f"Python {here}, {shown}; {counted(len(fine), 'package')} in range"
        )


def _requirements() -> tuple[str, list[str]]:
    """Return the range of Python versions and the requirement of each dependency.

    They are those of pyproject.toml: of a checkout, otherwise as installation has recorded them.
    """
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file() and sys.version_info >= (3, 11):
        import tomllib

        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == PACKAGE.name:
            return table["requires-python"], table["dependencies"]
    recorded = metadata.metadata(PACKAGE.name)
    return recorded["Requires-Python"], metadata.requires(PACKAGE.name) or []


def _tested_versions() -> dict[str, str]:
    """Return the versions of constraints.txt, by package; none if the file is not there."""
    from packaging.requirements import Requirement

    for folder in (PACKAGE / "templates", PACKAGE.parent):
        if (folder / "constraints.txt").is_file():
            text = (folder / "constraints.txt").read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if line and not line.startswith("#")]
            return {
                requirement.name: next(iter(requirement.specifier)).version
                for requirement in map(Requirement, lines)
            }
    return {}


def check_gpu(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Compare torch's build with the GPUs and their driver."""
    try:
        facts = machine.probe("torch")
    except ProbeError as error:
        yield Finding(
            "gpu",
            "problem",
            f"importing torch {error}",
            "reinstall it: pip install --force-reinstall torch",
        )
        return
    gpus, build, driver = facts["gpus"], facts["cuda"], machine.driver_cuda()
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if facts.get("hip"):
        yield Finding(
            "gpu",
            "warning",
            f"torch {facts['version']} is a ROCm build, which is not tested",
            "use NVIDIA GPUs with a CUDA build for what is tested",
        )
    elif driver and not build:
        yield Finding(
            "gpu",
            "problem",
            f"there is an NVIDIA driver, but torch {facts['version']} is a build for CPUs",
            "install a CUDA build of torch; its site lists the command for each CUDA version",
        )
    elif driver and build and not gpus:
        remedy = "check `nvidia-smi` and the kernel's log; install a newer driver"
        if visible is not None and visible.strip() in ("", "-1"):
            remedy = "unset CUDA_VISIBLE_DEVICES"
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        yield Finding(
            "gpu",
            "problem",
            f"there is an NVIDIA driver, but torch sees no GPU{hidden}: {facts['reason']}",
            remedy,
        )
    elif not gpus:
        yield Finding("gpu", "ok", f"no GPU; torch {facts['version']} runs on the CPU")
    else:
        yield from _gpu_findings(facts, driver)
    if wanted.num_gpus and len(gpus) < wanted.num_gpus:
        yield Finding(
            "gpu",
            "problem",
            f"{counted(len(gpus), 'GPU')} visible, expected {wanted.num_gpus}",
            "request them from the scheduler, or start fewer ranks",
        )


def _gpu_findings(facts: Mapping[str, Any], driver: tuple[int, int] | None) -> Iterator[Finding]:
    build = tuple(int(part) for part in facts["cuda"].split(".")[:2])
    names = ", ".join(
        f"{gpu['name']} ({gpu['memory_bytes'] / 1e9:.0f} GB)" for gpu in facts["gpus"]
    )
    if driver and driver[0] < build[0]:
        yield Finding(
            "gpu",
            "problem",
            f"torch is built for CUDA {facts['cuda']}, the driver supports {driver[0]}.{driver[1]}",
            f"update the driver, or install a torch build for CUDA {driver[0]}",
        )
    elif driver and driver < build:
        yield Finding(
            "gpu",
            "warning",
            f"torch is built for CUDA {facts['cuda']}, newer than the driver's "
            f"{driver[0]}.{driver[1]}",
            "update the driver if a kernel fails to load",
        )
    for gpu in facts["gpus"]:
        capability = tuple(gpu["capability"])
        if gpu["error"]:
            yield Finding(
                "gpu",
                "problem",
                f"{gpu['name']} cannot compute: {gpu['error']}",
                "install a torch build for this GPU, or choose others by CUDA_VISIBLE_DEVICES",
            )
        elif capability < MIN_CAPABILITY:
            yield Finding(
                "gpu",
                "warning",
                f"{gpu['name']} has compute capability {capability[0]}.{capability[1]}; the "
                f"kernels are tested from {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} on",
                "set relations.backend=reference if the check of the kernels fails",
            )
    if not any(gpu["error"] for gpu in facts["gpus"]):
        known = f", driver for {driver[0]}.{driver[1]}" if driver else ""
        yield Finding(
            "gpu",
            "ok",
            f"{counted(len(facts['gpus']), 'GPU')}: {names}; CUDA {facts['cuda']}{known}",
        )


def check_compiler(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Look for the compilers that Triton, torch.compile and DeepSpeed call."""
    environ = machine.environ
    c = machine.which(environ.get("CC", ""), "gcc", "clang", "cc")
    cxx = machine.which(environ.get("CXX", ""), "g++", "clang++", "c++")
    remedy = "install gcc and g++ (Debian: apt-get install build-essential), or set CC and CXX"
    if c and cxx:
        yield Finding("compiler", "ok", f"{c}, {cxx}")
    elif not c and _has_gpus(machine):
        text = "no C compiler: Triton's kernels and compiled blocks cannot be built"
        yield Finding("compiler", "problem", text, remedy)
    else:
        text = f"no {'C' if not c else 'C++'} compiler: train.compile on CPUs and DeepSpeed's "
        yield Finding("compiler", "warning", text + "operators cannot be built", remedy)


def _has_gpus(machine: Machine) -> bool:
    try:
        return bool(machine.probe("torch")["gpus"])
    except ProbeError:
        return machine.driver_cuda() is not None


def check_kernels(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Compare the Triton kernels with the reference backend on this machine's first GPU."""
    if not _has_gpus(machine):
        yield Finding("kernels", "ok", "no GPU: the kernels are not used")
        return
    if importlib.util.find_spec("triton") is None:
        text = "Triton is not installed: the relation loss would use the slow reference backend"
        yield Finding("kernels", "warning", text, "pip install triton")
        return
    remedy = "set relations.backend=reference; update torch with its Triton, and the driver"
    try:
        facts = machine.probe("kernels")
    except ProbeError as error:
        yield Finding("kernels", "problem", f"the Triton kernels: the check {error}", remedy)
        return
    shown = ", ".join(f"{dtype} {error:.1e}" for dtype, error in facts["errors"].items())
    wrong = {d for d, error in facts["errors"].items() if not error <= facts["tolerances"][d]}
    text = f"Triton against the reference on {facts['device']}, relative errors: {shown}"
    if wrong:
        limits = ", ".join(f"{dtype} {facts['tolerances'][dtype]:g}" for dtype in sorted(wrong))
        yield Finding("kernels", "problem", f"{text}; expected at most {limits}", remedy)
    else:
        yield Finding("kernels", "ok", text)


def check_deepspeed(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Make a step under DeepSpeed with offload, and load its CPU Adam."""
    uses = wanted.config is None or wanted.config.engine.name == "deepspeed"
    try:
        facts = machine.probe("deepspeed")
        yield Finding("deepspeed", "ok", f"a ZeRO-2 step with offload on {facts['device']}")
    except ProbeError as error:
        yield Finding(
            "deepspeed",
            "problem" if uses else "warning",
            f"a ZeRO-2 step with offload {error}",
            "pip install --force-reinstall deepspeed, or set engine.name=fsdp",
        )
    # `distill` does not need it: it takes PyTorch's AdamW with offload too.
    try:
        facts = machine.probe("cpu_adam")
        yield Finding("deepspeed", "ok", f"CPU Adam loads; {facts['error']:.0e} off PyTorch's")
    except ProbeError as error:
        yield Finding(
            "deepspeed",
            "warning",
            f"DeepSpeed's CPU Adam cannot be used, building or loading it {error}",
            "install g++ and ninja, and remove its folder of TORCH_EXTENSIONS_DIR (default: "
            "~/.cache/torch_extensions); only MiniLMTrainer with offload_optimizer needs it",
        )


def check_network(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Check NCCL, the network interfaces and the name of this machine."""
    try:
        facts = machine.probe("torch")
    except ProbeError:
        facts = {"gpus": [], "nccl": None}
    if facts["gpus"] and not facts["nccl"]:
        text = "this build of torch has no NCCL: several GPUs cannot be used together"
        yield Finding("network", "problem", text, "install torch's CUDA build for Linux")
    names = [name for _, name in machine.interfaces()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        stated = machine.environ.get(variable, "")
        if stated and not _any_interface(stated, names):
            yield Finding(
                "network",
                "problem",
                f"{variable}={stated}, but the interfaces are {', '.join(names)}",
                f"unset {variable}, or set it to one of them",
            )
    outside = [
        name
        for name in names
        if name != "lo" and _first_line(machine.root / "sys/class/net" / name / "operstate") == "up"
    ]
    if not outside:
        yield Finding(
            "network",
            "warning",
            "no network interface is up except the loopback: jobs on several machines cannot run",
            "for one machine nothing is needed; in a container, give it a network",
        )
    fabric = sorted(path.name for path in (machine.root / "sys/class/infiniband").glob("*"))
    if fabric and machine.limits(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        yield Finding(
            "network",
            "warning",
            f"{', '.join(fabric)}: the limit of locked memory is not 'unlimited', so that NCCL "
            "cannot use them",
            "ulimit -l unlimited; docker run --ulimit memlock=-1",
        )
    nccl = f"NCCL {'.'.join(map(str, facts['nccl']))}" if facts["nccl"] else "no NCCL (gloo)"
    up = ", ".join([*outside, *fabric]) or "loopback only"
    yield Finding("network", "ok", f"{nccl}; interfaces {up}")


def _any_interface(stated: str, names: Sequence[str]) -> bool:
    """Return whether NCCL would find an interface: prefixes, "=" for a whole name, "^" for not."""
    if stated.startswith("^"):
        return True
    exact = stated.startswith("=")
    wanted = [part for part in stated.lstrip("=").split(",") if part]
    return any(
        name == part if exact else name.startswith(part) for name in names for part in wanted
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def check_disk(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Check that the run folder, the temporary folder and the caches can be written and have room.

    What a run's checkpoints need is checked by `distill --validate`.
    """
    home, environ = Path(machine.environ.get("HOME", "/")), machine.environ
    cache = Path(environ.get("XDG_CACHE_HOME", home / ".cache"))
    remedy = "free some space, or set another {}"
    yield _folder(
        machine, "run folder", wanted.folder, wanted.min_free_bytes, remedy.format("run.folder")
    )
    temporary = Path(environ.get("TMPDIR", tempfile.gettempdir()))
    yield _folder(machine, "temporary folder", temporary, TEMPORARY_BYTES, remedy.format("TMPDIR"))
    caches = {
        "HF_HOME": (cache / "huggingface", MIN_FREE_BYTES),
        "TRITON_CACHE_DIR": (home / ".triton", TEMPORARY_BYTES),
        "TORCH_EXTENSIONS_DIR": (cache / "torch_extensions", TEMPORARY_BYTES),
    }
    for variable, (default, least) in caches.items():
        path = Path(environ.get(variable, default))
        found = _folder(machine, f"cache {variable}", path, least, remedy.format(variable))
        # Runs with local models and shards need none of them.
        yield found._replace(level="warning") if found.level == "problem" else found
    if wanted.shared_file and not wanted.shared_file.exists():
        yield Finding(
            "disk",
            "problem",
            f"{wanted.shared_file}, made by another machine, is not visible here",
            "put run.folder on storage that all machines share",
        )


def _folder(machine: Machine, what: str, path: Path, least: int, remedy: str) -> Finding:
    """Return whether a folder can be written and has at least `least` free bytes."""
    full = path.expanduser().absolute()
    existing = next(folder for folder in (full, *full.parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(b"x")
            file.flush()
        usage = machine.disk_usage(existing)
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding("disk", "problem", f"{what} {path}: cannot write: {reason}", remedy)
    text = f"{what} {path}: {usage.free / 1e9:.1f} GB free"
    if usage.free < least:
        return Finding("disk", "problem", f"{text}, expected at least {least / 1e9:g} GB", remedy)
    return Finding("disk", "ok", text)


def check_shared_memory(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Check /dev/shm, through which NCCL and gloo connect the ranks of a machine."""
    folder = machine.root / "dev/shm"
    remedy = "docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir of medium Memory"
    if not folder.is_dir():
        yield Finding("shm", "problem", f"{folder} does not exist", remedy)
        return
    usage = machine.disk_usage(folder)
    text = f"{folder}: {usage.free / 1e9:.2f} GB free of {usage.total / 1e9:.2f} GB"
    least, enough = SHARED_BYTES
    if usage.free < enough:
        level: Level = "problem" if usage.free < least else "warning"
        expected = f", expected {(least if level == 'problem' else enough) / 1e9:g} GB"
        yield Finding("shm", level, text + expected, remedy)
    else:
        yield Finding("shm", "ok", text)


def check_limits(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Check the limit of open files."""
    soft, hard = machine.limits(resource.RLIMIT_NOFILE)
    least, enough = OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= enough:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
        yield Finding("limits", "ok", f"open files (ulimit -n): {shown}")
        return
    higher = hard == resource.RLIM_INFINITY or hard > soft
    remedy = (
        "ulimit -n 65536" if hard == resource.RLIM_INFINITY else f"ulimit -n {min(hard, 65536)}"
    )
    if not higher:
        remedy = "raise the hard limit: /etc/security/limits.conf, docker run --ulimit nofile=65536"
    level: Level = "problem" if soft < least else "warning"
    expected = least if level == "problem" else enough
    why = "" if level == "problem" else " for jobs of many ranks"
    yield Finding(
        "limits",
        level,
        f"open files (ulimit -n): {soft:,}, expected at least {expected:,}{why}",
        remedy,
    )


def check_data(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Check that the manifest and every shard of the configuration's data are there."""
    if wanted.config is None:
        return
    from scaledistill.data.reader import ShardReader
    from scaledistill.storage.remote import ShardCache

    data = wanted.config.data
    locations = {setting: source.shards for setting, source in data.sources.items()}
    if data.validation is not None:
        locations["data.validation"] = data.validation
    for setting, location in locations.items():
        try:
            cache = ShardCache(
                Path(data.cache_folder) if data.cache_folder else None, limit_bytes=data.cache_bytes
            )
            manifest = ShardReader(location, cache=cache).manifest
        except (ConfigError, DataError) as error:
            # Most of their messages end with the remedy.
            text, _, remedy = str(error).rpartition("; ")
            if not text or remedy.startswith("expected"):
                text, remedy = str(error), f"correct {setting}, or make shards there"
            yield Finding("data", "problem", f"{setting}: {text}", remedy)
            continue
        found = f"{counted(manifest.rows, 'row')} in {counted(len(manifest.shards), 'shard')}"
        yield Finding("data", "ok", f"{setting}={location}: {found}")


def check_hub(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Ask the hub for each model that the configuration names and that is not a folder here."""
    if wanted.config is None:
        return
    from scaledistill.config.schema import INIT_WORDS
    from scaledistill.storage.files import is_path

    teacher = wanted.config.teacher
    models = {"teacher.model": (teacher.model, teacher.revision)}
    for name, student in wanted.config.students.items():
        if student.init not in INIT_WORDS:
            models[f"students.{name}.init"] = (student.init, None)
    for setting, (model, revision) in models.items():
        if Path(model).is_dir():
            yield Finding("hub", "ok", f"{setting}={model}: a local folder")
            continue
        if is_path(model):
            yield Finding(
                "hub", "problem", f"{setting}={model}: no such folder", f"correct {setting}"
            )
            continue
        offline = machine.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        if offline and machine.is_cached(model, revision):
            yield Finding("hub", "ok", f"{setting}={model}: in the cache (HF_HUB_OFFLINE)")
            continue
        try:
            machine.ask_hub(model, revision)
        except Exception as error:  # noqa: BLE001 - the client raises errors of many libraries
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            text = f"{setting}={model}: the hub gave no answer ({reason})"
            if machine.is_cached(model, revision):
                remedy = "set HF_HUB_OFFLINE=1, so that runs do not wait for it"
                yield Finding("hub", "warning", f"{text}; it is in the cache", remedy)
            else:
                remedy = "check the name, HF_ENDPOINT, HF_TOKEN and the proxy (HTTPS_PROXY); or "
                remedy += "download the model elsewhere and give its folder"
                yield Finding("hub", "problem", text, remedy)
        else:
            yield Finding("hub", "ok", f"{setting}={model}: on the hub")


def check_port(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Check that the port is free where the ranks meet, if that is on this machine."""
    stated = machine.environ.get("MASTER_PORT", "")
    remedy = "set another MASTER_PORT (--master_port of deepspeed, --master-port of torchrun); the "
    remedy += "scripts in launch/ find a free one"
    if stated and not (stated.isdecimal() and 1 <= int(stated) <= 65535):
        yield Finding(
            "port", "problem", f"MASTER_PORT={stated!r}, expected a number from 1 to 65535", remedy
        )
        return
    port = int(stated or DEFAULT_PORT)
    name = f"MASTER_PORT={port}" if stated else f"port {port}, the launchers' default,"
    with socket.socket() as probe:
        # As torch does: a port that was released just now counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            # `scaledistill distill` and the scripts in launch/ find a free port themselves.
            level: Level = "problem" if stated else "warning"
            yield Finding("port", level, f"{name} cannot be used: {error.strerror}", remedy)
        else:
            yield Finding("port", "ok", f"{name} is free")


CHECKS: dict[str, Check] = {
    "versions": check_versions,
    "gpu": check_gpu,
    "compiler": check_compiler,
    "kernels": check_kernels,
    "deepspeed": check_deepspeed,
    "network": check_network,
    "disk": check_disk,
    "shm": check_shared_memory,
    "limits": check_limits,
    "data": check_data,
    "hub": check_hub,
    "port": check_port,
}
"""The checks by the names that --only takes, in the order of the report."""


def examine(
    machine: Machine, wanted: Wanted, names: Iterable[str] = tuple(CHECKS)
) -> Iterator[Finding]:
    """Yield the findings of the named checks as they come; a check that fails is a problem."""
    for name in names:
        try:
            yield from CHECKS[name](machine, wanted)
        except ImportError as error:
            yield Finding(
                name,
                "problem",
                f"the check needs a package that cannot be imported: {error}",
                f"pip install --force-reinstall {error.name or PACKAGE.name}",
            )
        except Exception as error:  # noqa: BLE001 - one broken part must not hide the others
            yield Finding(
                name,
                "problem",
                f"the check itself failed: {type(error).__name__}: {error}",
                "report it with this line",
            )
