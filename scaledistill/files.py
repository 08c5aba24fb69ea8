"""Durable files: atomic replacement, fsync, hashes; and folders that one process at a time may hold."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from scaledistill.errors import ConfigError

log = logging.getLogger(__name__)

LOCK_HELD_ELSEWHERE = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # EACCES: NFS, as fcntl(2) allows
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

_warned: set[str] = set()
"""What this process has warned of: each ability that is missing is worth one line, not one a checkpoint."""


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


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> Literal["locked", "in use", "no locks"]:
    """Lock an open file until it is closed; "in use" is never returned when this waits.

    Raises:
        OSError: the disk failed; not where it has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in LOCK_HELD_ELSEWHERE and not wait:
            return "in use"
        if error.errno in NO_LOCKS:
            _warn_once("this file system has no file locks", error, "start nothing else that writes to the same folder")
            return "no locks"
        raise
    return "locked"


def _warn_once(missing: str, error: OSError, consequence: str) -> None:
    if missing not in _warned:
        _warned.add(missing)
        log.warning("%s (%s): going on without; %s", missing, error.strerror, consequence)


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
