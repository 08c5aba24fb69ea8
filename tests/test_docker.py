"""The Dockerfile: linted, every file and extra that it names exists, and its install steps work.

An image cannot be built here. The steps that install run with pip's --dry-run on a copy of what the
builder would get, against the packages that are installed.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PIP = """#!/usr/bin/env bash
echo "$@" >>"$LOG"
exec "$PYTHON" -m pip "$@" --dry-run --no-index --quiet
"""


class Instruction(NamedTuple):
    """An instruction of the Dockerfile, with its lines joined."""

    name: str
    text: str


def instructions() -> Iterator[Instruction]:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield Instruction(name, " ".join(rest.split()))


def named(name: str) -> list[str]:
    return [instruction.text for instruction in instructions() if instruction.name == name]


def ignored(path: Path) -> bool:
    """Return whether .dockerignore keeps a file from the builder; the last match decides."""
    is_ignored = False
    parts = path.relative_to(ROOT).parts
    parents = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        names = [*parents, *parts] if "**/" in line else parents
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            is_ignored = not line.startswith("!")
    return is_ignored


def copied() -> list[Path]:
    """Return the files and folders that COPY names."""
    return [ROOT / source for text in named("COPY") for source in text.split()[:-1]]


def test_what_it_copies_exists_and_reaches_the_builder() -> None:
    assert copied()
    for source in copied():
        assert source.exists(), source
        assert not ignored(source), source
    assert ignored(ROOT / "tests")
    assert ignored(ROOT / "scaledistill/errors.pyc")
    assert ignored(ROOT / "scaledistill/cli/__pycache__")
    assert not ignored(ROOT / "scaledistill/cli/doctor.py")


def test_it_runs_as_a_user_and_starts_the_command() -> None:
    scripts = re.search(r"\[project\.scripts\]\n(\w+) =", (ROOT / "pyproject.toml").read_text())
    assert scripts
    assert named("ENTRYPOINT") == [f'["{scripts[1]}"]']
    [user] = named("USER")
    [made] = [text for text in named("RUN") if "useradd" in text]
    assert user != "0"
    assert f"--uid {user} " in made
    [base] = [text for text in named("ARG") if text.startswith("BASE=")]
    assert re.search(r"nvidia/cuda:\d+\.\d+\.\d+-devel", base)


@pytest.mark.parametrize("index", ["", "https://wheels.example/cu128"])
def test_its_install_steps(index: str, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    context, programs, log = tmp_path / "context", tmp_path / "bin", tmp_path / "log"
    context.mkdir()
    programs.mkdir()
    for source in copied():
        if source.is_dir():
            pattern = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, context / source.name, ignore=pattern)
        else:
            shutil.copy(source, context)
    (programs / "pip").write_text(PIP)
    (programs / "pip").chmod(0o755)
    values = dict(text.split("=", 1) for text in named("ARG"))
    environ = {
        **os.environ,
        **{name: value.strip('"') for name, value in values.items()},
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "LOG": str(log),
        "TORCH_INDEX": index,
    }
    steps = [text for text in named("RUN") if text.startswith("pip ")]
    for step in steps:
        assert set(re.findall(r"(?:^|&& )(\S+)", step)) == {"pip"}, "run nothing else here"
        ended = subprocess.run(
            ["bash", "-euc", step],
            cwd=context, env=environ, capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        # pip warns about an extra that the package does not have.
        assert (ended.returncode, ended.stderr) == (0, ""), step
    setup, torch, project = log.read_text().splitlines()
    assert setup.endswith("setuptools wheel")
    assert torch.endswith(f"--index-url {index} torch" if index else "constraints.txt torch")
    assert project.endswith("--no-build-isolation .[eval,tracking]")


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("needs hadolint")
    ended = subprocess.run(
        [hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert ended.stdout == ""
