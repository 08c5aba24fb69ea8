"""What the wheel and the source archive hold, and that the wheel works without the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from scaledistill.config.load import load_config

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
from setuptools.build_meta import build_sdist, build_wheel
output = sys.argv[1]  # setuptools puts its own arguments there
build_sdist(output)
build_wheel(output)
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("output")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(ROOT / "constraints.txt", tree)
    for name in ("scaledistill", "tests", "configs", "launch", "tools"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    subprocess.run([sys.executable, "-c", BUILD, output], cwd=tree, check=True, capture_output=True)
    return output


def test_wheel_and_source_archive(output: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "scaledistill").rglob("*.py")}

    [wheel] = output.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    # Types of ours are for type checkers of others too.
    data = {"scaledistill/py.typed", "scaledistill/glue/published.json"}
    data |= {"scaledistill/report/page.css", "scaledistill/report/page.js"}
    files = {
        str(path.relative_to(ROOT))
        for folder in ("configs", "launch")
        for path in (ROOT / folder).iterdir()
        if path.is_file()
    } | {"constraints.txt"}
    assert names == modules | data | {f"scaledistill/templates/{name}" for name in files}

    [archive] = output.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert inside >= modules | data | files
    assert inside >= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt"}
    # They need files that are not packaged.
    assert not [name for name in inside if name.startswith("tests")]


def test_the_wheel_works_alone(output: Path, tmp_path: Path) -> None:
    """Unpacked, as pip installs it, and called from an empty folder."""
    installed, here = tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    [wheel] = output.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    [entry] = installed.glob("*.dist-info/entry_points.txt")
    assert "scaledistill = scaledistill.cli.command:main" in entry.read_text()

    def run(*arguments: str, code: int = 0) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "scaledistill", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(installed)},
        )
        assert (ended.returncode, bool(ended.stderr)) == (code, code != 0)
        assert "Traceback" not in ended.stderr
        return ended.stdout + ended.stderr

    listed = [line.split()[0] for line in run("init", "--list").splitlines()]
    assert listed == sorted(path.stem for path in (ROOT / "configs").glob("*.json"))
    assert "$defs" in json.loads(run("schema"))
    assert "written: my.yaml\n" in run(
        "init", "--preset", "large_to_l6", "my.yaml", "--with-launchers"
    )
    assert load_config(here / "my.yaml") == load_config(ROOT / "configs" / "large_to_l6.json")
    for path in (ROOT / "launch").iterdir():
        if path.is_file():
            written = here / "launch" / path.name
            assert written.read_bytes() == path.read_bytes()
            assert os.access(written, os.X_OK) == path.read_bytes().startswith(b"#!")
            for preset in re.findall(r"configs/\w+\.json", path.read_text()):
                assert (here / preset).is_file(), f"{path.name} starts it"
    node = subprocess.run(["launch/node.sh", "--help"], cwd=here, capture_output=True, text=True)
    assert "NUM_PROCESSES" in node.stdout
    # Nothing of the user's is lost.
    (here / "launch" / "node.sh").write_text("mine")
    assert "launch/node.sh exists; name another file, or replace with --force" in run(
        "init", "--with-launchers", code=2
    )
    run("init", "--with-launchers", "--force")
    assert "no such file" in run("distill", "--config", "quickstart.json", code=2)
