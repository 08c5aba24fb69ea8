"""Adds configs/, launch/ and constraints.txt to the package; the rest: pyproject.toml.

In the repository they are at the top, for those who work in a clone of it.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "launch")
CONSTRAINTS = Path("constraints.txt")


class BuildWithTemplates(build_py):
    """Builds the package and copies the folders into it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads the folders themselves
            for source, target in self._templates().items():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, self._templates().values())]

    def _templates(self) -> dict[Path, Path]:
        """Return where each file goes, by its path."""
        target = Path(self.build_lib) / "scaledistill" / "templates"
        files = (path for folder in FOLDERS for path in sorted(Path(folder).iterdir()))
        return {path: target / path for path in (*files, CONSTRAINTS) if path.is_file()}


setup(cmdclass={"build_py": BuildWithTemplates})
