"""Checkpoints: folders of safetensors and one JSON, committed atomically and verified on load.

Inputs: named groups of tensors and a JSON-serialisable state. Outputs: the same, bit for bit, from
the newest good checkpoint. Not handled here: what tensors and state mean, the thread that writes
them (`checkpoint.saver`), copies elsewhere (`checkpoint.mirror`).

The stages of a save, in this order: `write_group` for each group, `write_state`, `read_back`,
`write_manifest`, `commit`, `prune`. Earlier checkpoints are not touched until `commit`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scaledistill.checkpoint import mirror
from scaledistill.checkpoint.names import MANIFEST, STATE, committed, folder_name
from scaledistill.distributed.ranks import Ranks, broadcast_object, failing_together
from scaledistill.errors import DataError
from scaledistill.storage.files import disk_remedy, read_json, sha256_of, sync, write_json

log = logging.getLogger(__name__)

FORMAT = {"format": "scaledistill-checkpoint", "version": 1}
CHUNK_BYTES = 1 << 22
FALLING_BACK, NONE_LEFT = (
    "falling back to the one before",
    "there is none before it: the run starts from the beginning",
)
# In the order of safetensors, which writes tensors of the last dtype first.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Return a group of tensors, on the CPU.

        Raises:
            DataError: the file cannot be read as safetensors.
        """
        path = self.folder / f"{group}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:  # the hash matches, but we did not write it
            raise DataError(
                f"{path} cannot be used ({error}); remove {self.folder} to resume from the "
                "checkpoint before it"
            ) from None


def write_checkpoint(
    root: Path, step: int, groups: dict[str, dict[str, Tensor]], state: str, *, keep: int
) -> Path:
    """Commit a checkpoint, prune to the `keep` newest up to this step, and return its folder.

    Args:
        groups: tensors on the CPU; emptied on the way, so that each is freed as soon as it is
            written.
        state: JSON.

    Raises:
        OSError: it cannot be written, or reads back differently; no partial folder is left behind.
    """
    root.mkdir(parents=True, exist_ok=True)
    partial, folder = root / f".partial-{folder_name(step)}", root / folder_name(step)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        digests = {}
        for group in list(groups):
            name = f"{group}.safetensors"
            digests[name] = write_group(partial / name, groups.pop(group))
        digests[STATE] = write_state(partial / STATE, state)
        read_back(partial, digests)
        write_manifest(partial, digests)
        commit(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        error.filename = error.filename or str(partial)
        raise
    prune(folder, keep)
    return folder


def write_group(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors like safetensors' `save_file`, without copying them all; return the sha256.

    `tensors` is emptied on the way, so that each is freed as soon as it is written.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header, offset = {}, 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        _append(file, memoryview(len(text).to_bytes(8, "little") + text), digest)
        for name in names:
            data: Any = tensors.pop(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            _append(file, memoryview(data), digest)
    return digest.hexdigest()


def _append(file: io.FileIO, data: memoryview, digest: Any) -> None:
    while data:  # an unbuffered write may be partial
        written = file.write(data[:CHUNK_BYTES])
        digest.update(data[:written])
        data = data[written:]


def write_state(path: Path, state: str) -> str:
    """Write a checkpoint's JSON; return its sha256."""
    path.write_text(state)
    return hashlib.sha256(state.encode()).hexdigest()


def read_back(partial: Path, digests: Mapping[str, str]) -> None:
    """Flush the files to the disk and compare their contents with what was written.

    Raises:
        OSError: they cannot be flushed or read, or differ.
    """
    for name, digest in digests.items():
        path = partial / name
        sync(path)
        # Drop the page cache if possible, so that the data is read from the disk.
        with path.open("rb") as file, suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if sha256_of(path) != digest:
            raise OSError(errno.EIO, "the data read back differs from what was written", str(path))


def write_manifest(partial: Path, digests: Mapping[str, str]) -> None:
    """Write the sizes and hashes of the files, which completes a checkpoint."""
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": digests[name]}
        for name in sorted(digests)
    }
    write_json(partial / MANIFEST, {**FORMAT, "files": files})


def commit(partial: Path, folder: Path) -> None:
    """Move a complete folder to its final name."""
    aside = folder.with_name(f".partial-old-{folder.name}")
    if folder.exists():  # the same step, saved again after a resume from an earlier one
        folder.rename(aside)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints up to this one."""
    # A later checkpoint is damaged, or the run would have resumed from it: it must not count.
    for old in [path for path in committed(folder.parent) if path.name <= folder.name][keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest_checkpoint(root: Path, ranks: Ranks, remote: str | None = None) -> Checkpoint | None:
    """Return the newest good checkpoint, or None. Collective.

    It is good if all sizes and hashes match; a warning names each damaged one. If `remote` has a
    newer good one, that is downloaded first.

    Raises:
        DataError: a rank cannot read the checkpoint that rank 0 reads, or `remote` cannot be read.
        PeerError: the same, on the other ranks.
    """
    name = None
    with failing_together():
        if ranks.is_main:
            name = _newest_good(root, remote)
    name = broadcast_object(name)
    if name is None:
        return None
    folder, state = root / name, {}
    with failing_together():
        try:
            state = json.loads((folder / STATE).read_text())
        except OSError as error:
            raise DataError(
                f"checkpoint {folder}: rank 0 reads it, rank {ranks.rank} does not "
                f"({error.strerror}); run.folder must be on a file system that all ranks share"
            ) from None
        except (ValueError, RecursionError) as error:  # the hash matches, but we did not write it
            raise DataError(
                f"{folder / STATE} cannot be used ({error}); remove {folder} to resume from the "
                "checkpoint before it"
            ) from None
    return Checkpoint(folder, state)


def _newest_good(root: Path, remote: str | None) -> str | None:
    """Return the name of the newest good checkpoint in `root`, downloading it if need be."""
    for leftover in root.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    name = None
    for folder in committed(root):
        if (damage := verify(folder)) is None:
            name = folder.name
            break
        log.warning(
            "checkpoint %s is damaged (%s); %s",
            folder,
            damage,
            _fallback(root, folder.name, remote),
        )
    copies = mirror.checkpoints(remote) if remote else []
    for number, newer in enumerate(copies, start=1):
        if name is not None and newer <= name:
            break
        partial = root / f".partial-{newer}"
        if (damage := _fetch(f"{remote}/{newer}", partial)) is None:
            commit(partial, root / newer)
            log.info("resuming from %s/%s, which is newer than all in %s", remote, newer, root)
            return newer
        then = FALLING_BACK if name or number < len(copies) else NONE_LEFT
        log.warning("checkpoint %s/%s is damaged (%s); %s", remote, newer, damage, then)
        shutil.rmtree(partial, ignore_errors=True)
    return name


def _fallback(root: Path, damaged: str, remote: str | None) -> str:
    if any(path.name < damaged for path in committed(root)):
        return FALLING_BACK
    if remote:
        return f"there is none before it here; looking in {remote}"
    return NONE_LEFT


def _fetch(url: str, partial: Path) -> str | None:
    """Download a checkpoint; return what is wrong with it, if anything."""
    try:
        partial.mkdir(parents=True)
        mirror.download(url, partial)
    except OSError as error:
        raise DataError(
            f"{url} cannot be fetched to {partial}: {error}; {disk_remedy(error)}"
        ) from None
    return verify(partial)


def newest_state(root: Path, remote: str | None = None) -> dict[str, Any] | None:
    """Return the newest checkpoint's JSON, unverified; None if there is no readable one.

    `remote` is read as well, if it can be.
    """
    states = ((folder.name, read_json(folder / STATE)) for folder in committed(root))
    name, state = next(((name, state) for name, state in states if state), ("", None))
    return (mirror.newest_state(remote, name) if remote else None) or state


def verify(folder: Path) -> str | None:
    """Return what is wrong with a committed checkpoint; None if all sizes and hashes match."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if {key: manifest[key] for key in FORMAT} != FORMAT:
            return (
                f"{MANIFEST}: written by another version: {manifest['format']} "
                f"{manifest['version']}"
            )
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}"
            if sha256_of(path) != facts["sha256"]:
                return f"the sha256 of {name} differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is unreadable: {error!r}"
    return None if STATE in files else f"{MANIFEST} does not name {STATE}"
