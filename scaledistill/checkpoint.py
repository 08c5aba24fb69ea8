"""Checkpoints: folders of safetensors and one JSON, committed atomically, verified on load, the newest good one wins.

Enters: named groups of tensors and a JSON-able state. Leaves: the same, bit for bit. What they mean is left to others.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaledistill.distributed import Ranks, broadcast_object, failing_together
from scaledistill.errors import DataError
from scaledistill.files import read_json, sha256_of, sync, write_json

log = logging.getLogger(__name__)

FORMAT = {"format": "scaledistill-checkpoint", "version": 1}
MANIFEST, STATE = "manifest.json", "state.json"
FOLDER = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Return a group of tensors, on the CPU."""
        return load_file(self.folder / f"{group}.safetensors")


def save_checkpoint(
    root: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    ranks: Ranks,
) -> str | None:
    """Commit a checkpoint, then drop all but the `keep` newest up to this step. Collective; rank 0 writes.

    Files go to a temporary folder, the manifest with sizes and hashes last; the rename is the commit. Nothing that was
    committed before is touched until then.

    Returns:
        None, or what went wrong where the disk did not take it; nothing is left behind then.
    """
    error = None
    if ranks.is_main:
        partial = root / f".partial-step-{step:09d}"
        try:
            _write(partial, groups, state)
            folder = root / f"step-{step:09d}"
            _replace(partial, folder)
            # A later one is damaged, or this step would not have been made again: it must not push this one out.
            for old in [path for path in _committed(root) if path.name <= folder.name][keep:]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as failure:
            error = f"{failure.strerror or failure} ({failure.filename or partial})"
            shutil.rmtree(partial, ignore_errors=True)
    return broadcast_object(error)


def newest_checkpoint(root: Path, ranks: Ranks) -> Checkpoint | None:
    """Return the newest checkpoint whose sizes and hashes hold; each damaged one is named in a warning. Collective.

    Raises:
        DataError: rank 0 found one that another rank does not see.
        PeerError: the same, on the other ranks.
    """
    name = None
    if ranks.is_main:
        for leftover in root.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in _committed(root):
            if (damage := verify(folder)) is None:
                name = folder.name
                break
            log.warning("checkpoint %s is damaged (%s); falling back to the one before", folder, damage)
    name = broadcast_object(name)
    if name is None:
        return None
    folder, state = root / name, {}
    with failing_together():
        try:
            state = json.loads((folder / STATE).read_text())
        except OSError as error:
            raise DataError(
                f"checkpoint {folder}: rank 0 reads it, rank {ranks.rank} does not ({error.strerror}); run.folder must "
                "be on a file system that all ranks share"
            ) from None
    return Checkpoint(folder, state)


def newest_state(root: Path) -> dict[str, Any] | None:
    """Return the JSON of the newest checkpoint, unverified; None where there is none that can be read."""
    return next(filter(None, (read_json(folder / STATE) for folder in _committed(root))), None)


def verify(folder: Path) -> str | None:
    """Return what is wrong with a committed checkpoint; None where every size and hash holds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if {key: manifest[key] for key in FORMAT} != FORMAT:
            return f"{MANIFEST}: written by another version: {manifest['format']} {manifest['version']}"
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}"
            if sha256_of(path) != facts["sha256"]:
                return f"the sha256 of {name} differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable: {error!r}"
    return None if STATE in files else f"{MANIFEST} does not name {STATE}"


def _committed(root: Path) -> list[Path]:
    """Return the committed checkpoints, newest first."""
    return sorted((path for path in root.glob("step-*") if FOLDER.fullmatch(path.name)), reverse=True)


def _write(partial: Path, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for group, tensors in groups.items():
        path = partial / f"{group}.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except SafetensorError as error:  # how safetensors reports what the disk did not take
            raise OSError(None, str(error), str(path)) from None
    (partial / STATE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(partial.iterdir())}
    for name in files:
        sync(partial / name)
    write_json(partial / MANIFEST, {**FORMAT, "files": files})


def _replace(partial: Path, folder: Path) -> None:
    aside = folder.with_name(f".partial-old-{folder.name}")
    if folder.exists():  # the same step, saved again after a resume from an earlier one
        folder.rename(aside)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
