"""Write files durably, lock them and hold folders for one process at a time.

Inputs: paths and contents. Outputs: files replaced atomically and flushed, hashes, locks. Not
handled here: remote files (`storage.remote`).

File systems differ in their abilities (Lustre mounted without flock, NFS without its lock service,
CIFS, FUSE). A missing ability is not a failure: the run goes on without it, after one warning. A
real disk error stays an `OSError`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from scaledistill.errors import Field, SettingError, near_miss

log = logging.getLogger(__name__)

# NFS may return EACCES, as fcntl(2) allows.
LOCK_HELD_ELSEWHERE = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
NO_FOLDER_SYNC = NO_SYNC | {errno.EBADF, errno.EACCES, errno.EISDIR, errno.EPERM}

_warned: set[str] = set()
"""The abilities this process has warned about: one line each, not one per checkpoint."""


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
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None if the file has no readable one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def is_path(name: str | Path) -> bool:
    """Return whether a model's name can only mean a local folder, not a name on the hub.

    A name of two parts may be either, even if there is a folder named like the organisation.
    """
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1


def near_folder(name: str | Path) -> Path | None:
    """Return a folder of nearly that path, any part of which may be misspelt; None if none."""
    path = Path(name).expanduser()
    found = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        if part != ".." and not (found / part).is_dir():
            try:
                folders = [each.name for each in found.iterdir() if each.is_dir()]
            except OSError:
                return None
            near = near_miss(part, folders)
            if near is None:
                return None
            part = near
        found = found / part
    return found


def no_such_folder(name: str | Path, remedy: str) -> str:
    """Return a message that there is no such folder.

    It suggests a folder of nearly that name, or else `remedy`, and says where it looked.
    """
    near = near_folder(name)
    looked = (
        ""
        if Path(name).expanduser().is_absolute()
        else f" (looked for in the working folder {Path.cwd()})"
    )
    return f"no such folder; {f'did you mean {near}?' if near else remedy}{looked}"


def set_default_mode(path: Path) -> None:
    """Give a file the mode that the umask gives new files in its folder.

    safetensors' own writer makes files that only their owner may read.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    probe.touch()
    try:
        if probe.stat().st_mode != path.stat().st_mode:
            shutil.copymode(probe, path)
    finally:
        probe.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk, as far as its file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        # A folder may be writable but not readable.
        if error.errno in NO_FOLDER_SYNC and path.is_dir():
            return
        raise
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """Flush an open file or folder to the disk, as far as its file system can.

    If a folder cannot be flushed, its renames are done all the same; only a power cut may undo
    them.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            if error.errno not in NO_FOLDER_SYNC:
                raise
        elif error.errno not in NO_SYNC:
            raise
        else:
            _warn_once(
                "this file system cannot flush files to the disk",
                error,
                "a power cut may damage the newest",
            )


def lock(
    descriptor: int, *, wait: bool = False, shared: bool = False
) -> Literal["locked", "in use", "no locks"]:
    """Lock an open file until it is closed; with `wait`, never return "in use".

    A `shared` lock, which only an exclusive one refuses, also locks a file opened for reading.

    Raises:
        OSError: the disk failed. A file system without locks is not an error.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in LOCK_HELD_ELSEWHERE and not wait:
            return "in use"
        if error.errno in NO_LOCKS:
            _warn_once(
                "this file system has no file locks",
                error,
                "start nothing else that writes to the same folder",
            )
            return "no locks"
        raise
    return "locked"


def disk_remedy(error: Exception) -> str:
    """Return the remedy for a file that could not be written.

    `error` is an `OSError`, or one that a Rust library passes on in its text.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number == errno.EDQUOT:
        return "free some space, or have the quota raised"
    if number == errno.ENOSPC:
        return "free some space"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check who may write there, or name another folder"
    return "check the disk, or name another folder"


def _warn_once(missing: str, error: OSError, consequence: str) -> None:
    """Warn once per process about a missing ability."""
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
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder and refuse it to other processes; without file locks, none is refused.

    Raises:
        SettingError: another process holds it.
        OSError: its lock file cannot be created.
    """
    with (folder / ".lock").open("w") as file:
        if lock(file.fileno()) == "in use":
            raise SettingError(
                "folder",
                str(folder),
                "is in use by another process",
                ("wait for it, or set another ", Field("folder")),
            )
        yield


def in_use(folder: Path) -> bool:
    """Return whether a process holds a folder by `locked`; nothing is written."""
    try:
        file = (folder / ".lock").open()
    except OSError:
        return False
    with file:
        try:
            return lock(file.fileno(), shared=True) == "in use"
        except OSError:  # the run itself will report a failing disk
            return False
