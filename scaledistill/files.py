"""Durable files: atomic replacement, fsync, hashes; and folders that one process at a time may hold."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scaledistill.errors import ConfigError


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically and durably."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where there is no readable one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def is_path(name: str | Path) -> bool:
    """Return whether a model's name can only be meant as a local folder, not as a name on the hub.

    Two parts may be either, also where a folder has the name of the hub's organisation.
    """
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1


def near_folder(name: str | Path) -> Path | None:
    """Return the folder of nearly that path, each part of which may be misspelt; None if there is none."""
    path = Path(name).expanduser()
    found = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        if part != ".." and not (found / part).is_dir():
            try:
                folders = [each.name for each in found.iterdir() if each.is_dir()]
            except OSError:
                return None
            near = difflib.get_close_matches(part, folders, n=1)
            if not near:
                return None
            part = near[0]
        found = found / part
    return found


def no_such_folder(name: str | Path, remedy: str) -> str:
    """Return that there is no such folder, with one of nearly that name, or else `remedy`, and where it was sought."""
    near = near_folder(name)
    looked = "" if Path(name).expanduser().is_absolute() else f" (looked for in the working folder {Path.cwd()})"
    return f"no such folder; {f'did you mean {near}?' if near else remedy}{looked}"


def set_default_mode(path: Path) -> None:
    """Give a file the mode of a new one in its folder, by the umask; safetensors' own writer makes private files."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    probe.touch()
    try:
        if probe.stat().st_mode != path.stat().st_mode:
            shutil.copymode(probe, path)
    finally:
        probe.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Hold a folder while others that would hold it are refused.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{setting}={str(folder)!r} is in use by another process; wait for it, or set another {setting}"
            ) from None
        yield


def in_use(folder: Path) -> bool:
    """Return whether a process holds a folder by `locked`; nothing is written."""
    try:
        file = (folder / ".lock").open()
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False
