"""What the wheel and the source archive hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
from setuptools.build_meta import build_sdist, build_wheel
output = sys.argv[1]  # setuptools puts its own arguments there
build_sdist(output)
build_wheel(output)
"""


def test_wheel_and_source_archive(tmp_path: Path) -> None:
    tree, output = tmp_path / "tree", tmp_path / "output"
    tree.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("scaledistill", "tests"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    subprocess.run([sys.executable, "-c", BUILD, output], cwd=tree, check=True, capture_output=True)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "scaledistill").rglob("*.py")}

    [wheel] = output.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    # Types of ours are for type checkers of others too.
    data = {"scaledistill/py.typed", "scaledistill/glue/published.json"}
    data |= {"scaledistill/report/page.css", "scaledistill/report/page.js"}
    assert names == modules | data

    [archive] = output.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert inside >= modules | data | {"pyproject.toml", "README.md", "LICENSE"}
    # They need files that are not packaged.
    assert not [name for name in inside if name.startswith("tests")]
