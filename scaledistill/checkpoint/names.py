"""Names of checkpoints and of the files in them: `step-000000040/manifest.json`.

Inputs: steps and folders. Outputs: names and paths; no file is opened. Imports nothing heavy.
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST, STATE = "manifest.json", "state.json"
FOLDER = re.compile(r"step-(\d{9})")


def folder_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:09d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder.

    Raises:
        ValueError: the folder is not named like a checkpoint.
    """
    found = FOLDER.fullmatch(folder.name)
    if found is None:
        raise ValueError(f"{folder} is not named like a checkpoint, such as {folder_name(40)}")
    return int(found[1])


def committed(root: Path) -> list[Path]:
    """Return the committed checkpoints in a folder, newest first."""
    return sorted(
        (path for path in root.glob("step-*") if FOLDER.fullmatch(path.name)), reverse=True
    )
