"""How to resume a run that ended, which depends on whether there is a checkpoint.

Inputs: a run's folder. Outputs: text. Imports nothing heavy, so that it can be used if a run is
interrupted during its imports. Not handled here: whether the checkpoint is good, which
`checkpoint.format` verifies when the run resumes.
"""

from __future__ import annotations

import threading
from pathlib import Path

from scaledistill.checkpoint.names import MANIFEST, committed, step_of

DISK_SECONDS = 2.0
"""How long to wait for the disk, which may be the reason that the run ended."""


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint in a run's folder, unverified; None without one."""
    folders = committed(folder / "checkpoints")
    return next((step_of(path) for path in folders if (path / MANIFEST).exists()), None)


def resume_hint(folder: str | Path) -> str:
    """Return how to resume the run in a folder, whether or not it has a checkpoint."""
    found: list[int | None] = []

    def look() -> None:
        """Append the newest step; append nothing if the folder cannot be read."""
        try:
            found.append(newest_step(Path(folder)))
        except OSError:  # the same as for a disk that does not answer
            return

    thread = threading.Thread(target=look, name="resume hint", daemon=True)
    thread.start()
    thread.join(DISK_SECONDS)
    if not found:
        return "rerun the same command"
    if found[0] is None:
        return "no checkpoint was saved yet: rerun the same command to start from the beginning"
    return f"rerun the same command to resume from the checkpoint of step {found[0]}"
