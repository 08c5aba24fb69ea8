"""Copies of checkpoints in `checkpoint.remote`: a bucket, or a folder on another disk.

Inputs: committed folders and where to copy them. Outputs: the same folders there. A copy counts
once its manifest is there, which is written last and removed first. Not handled here: verifying the
files (`checkpoint.format`).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from scaledistill.checkpoint.names import FOLDER, MANIFEST, STATE
from scaledistill.errors import ConfigError, DataError
from scaledistill.storage.remote import WRITABLE, change, is_url

FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check(remote: str, own: Path) -> None:
    """Check that copies can be written, by writing an empty file and removing it.

    Args:
        own: where the run keeps its checkpoints.

    Raises:
        ConfigError: `remote` is of a kind that cannot be written to, or the same folder as `own`.
        DataError: it cannot be reached, or denies access.
    """
    _check_scheme(remote)
    probe = f".probe-{socket.gethostname()}-{os.getpid()}"

    def write_and_remove(files: Any, path: str) -> bool:
        """Write the empty file and remove it; return whether it was in the run's own folder."""
        files.makedirs(path, exist_ok=True)
        files.pipe_file(f"{path}/{probe}", b"")
        same = (own / probe).exists()
        files.rm_file(f"{path}/{probe}")
        return same

    if _named(remote, write_and_remove):
        raise ConfigError(
            f"checkpoint.remote={remote!r} is where the run keeps its own checkpoints ({own}); "
            "name another place"
        )


def _check_scheme(remote: str) -> None:
    try:
        scheme = remote.partition("://")[0] if is_url(remote) else None
    except ConfigError:
        scheme = remote
    if scheme and scheme not in WRITABLE:
        allowed = ", ".join(f"{name}://" for name in WRITABLE)
        raise ConfigError(
            f"checkpoint.remote={remote!r} cannot hold checkpoints; use one of {allowed} or a "
            "folder"
        )


def checkpoints(remote: str) -> list[str]:
    """Return the names of the checkpoints whose manifest is there, newest first."""

    def find(files: Any, path: str) -> list[str]:
        """Return the folders that have a manifest."""
        return list(_whole(files, path))

    return _named(remote, find)


def newest_state(remote: str, after: str = "") -> dict[str, Any] | None:
    """Return the JSON of the newest checkpoint, unverified, if its name is above `after`.

    Returns None if there is none, or `remote` cannot be read.
    """

    def read(files: Any, path: str) -> dict[str, Any] | None:
        """Return the newest copy's JSON."""
        for name in itertools.takewhile(lambda name: name > after, _whole(files, path)):
            with suppress(FileNotFoundError, ValueError, RecursionError):
                return json.loads(files.cat_file(f"{path}/{name}/{STATE}"))
        return None

    try:
        _check_scheme(remote)
        return _named(remote, read)
    except (ConfigError, DataError):
        return None


def upload(folder: Path, remote: str, keep: int) -> None:
    """Copy a checkpoint, then remove all but the `keep` newest up to it.

    Raises:
        DataError: `remote` cannot be reached, or denies access.
    """

    def forget(files: Any, path: str) -> None:
        """Make the folder, and remove its manifest if it has one."""
        files.makedirs(path, exist_ok=True)
        # An earlier copy of this step must not count while it is overwritten.
        if files.exists(f"{path}/{MANIFEST}"):
            files.rm_file(f"{path}/{MANIFEST}")

    url = f"{remote}/{folder.name}"
    _named(url, forget)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        _named(
            url, lambda files, target, path=path: files.put_file(str(path), f"{target}/{path.name}")
        )
    _named(remote, lambda files, path: _prune(files, path, folder.name, keep))


def download(url: str, folder: Path) -> None:
    """Copy the files of a checkpoint into a folder.

    Raises:
        DataError: `url` cannot be reached, or denies access.
        OSError: the files cannot be written.
    """

    def get(files: Any, path: str) -> None:
        """Download every file with a plain name."""
        for entry in files.ls(path, detail=True):
            name = _name(entry)
            if entry["type"] == "file" and FILE.fullmatch(name):
                files.get_file(entry["name"], str(folder / name))

    _named(url, get)


def set_aside(remote: str) -> str | None:
    """Move the checkpoints to the first free `<remote>.1`, `<remote>.2`, …, and return it.

    Returns None if there are no checkpoints.

    Raises:
        ConfigError, DataError: see `check`.
    """
    _check_scheme(remote)

    def move(files: Any, path: str) -> str | None:
        """Move the folders and return where to."""
        names = list(_folders(files, path))
        if not names:
            return None
        number = 1
        while files.exists(f"{path}.{number}"):
            number += 1
        files.makedirs(f"{path}.{number}", exist_ok=True)
        for name in names:
            files.mv(f"{path}/{name}", f"{path}.{number}/{name}", recursive=True)
        return f"{remote.rstrip('/')}.{number}"

    return _named(remote, move)


def _prune(files: Any, path: str, newest: str, keep: int) -> None:
    older = [name for name in _folders(files, path) if name < newest]
    good = [name for name in older if files.exists(f"{path}/{name}/{MANIFEST}")]
    for name in set(older) - set(good[: keep - 1]):
        if name in good:
            files.rm_file(f"{path}/{name}/{MANIFEST}")
        files.rm(f"{path}/{name}", recursive=True)


def _folders(files: Any, path: str) -> Iterator[str]:
    """Yield the folders with names of checkpoints, newest first."""
    entries = files.ls(path, detail=True) if files.exists(path) else []
    names = {_name(entry) for entry in entries if entry["type"] == "directory"}
    yield from sorted(filter(FOLDER.fullmatch, names), reverse=True)


def _whole(files: Any, path: str) -> Iterator[str]:
    """Yield those of the folders that have a manifest."""
    return (name for name in _folders(files, path) if files.exists(f"{path}/{name}/{MANIFEST}"))


def _name(entry: dict[str, Any]) -> str:
    return entry["name"].rstrip("/").rpartition("/")[2]


def _named(url: str, action: Any) -> Any:
    """Apply an action to a location; its errors name the setting."""
    try:
        return change(url, lambda files, path: action(files, path.rstrip("/")))
    except DataError as error:
        raise DataError(f"checkpoint.remote: {error}") from error
