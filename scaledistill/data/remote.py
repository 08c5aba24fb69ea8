"""Files behind fsspec URLs: which URLs are allowed, small reads, changes, and a bounded, verified cache of whole files.

Enters: URLs. Leaves: bytes and local paths. What a shard is, `data.manifest` knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from scaledistill.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "hf", "https", "http", "memory")
WRITABLE = ("s3", "gs", "memory")
ATTEMPTS = 4
BACKOFF_SECONDS = 0.5
DEFAULT_FOLDER = Path("~/.cache/scaledistill")
DEFAULT_BYTES = 100_000_000_000

Result = TypeVar("Result")


def is_url(location: str) -> bool:
    """Tell URLs from paths.

    Raises: ConfigError for URLs that are not allowed: other schemes (`pipe:` runs a shell) and those chained by `::`.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", location)
    if scheme is None and "::" not in location:
        return False
    if scheme is None or "::" in location or scheme[1] not in SCHEMES or not location.startswith(f"{scheme[1]}://"):
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(f"data location {location!r}: not an allowed URL; expected a folder or one of {allowed}")
    return True


def read_bytes(url: str) -> bytes:
    """Read a small file. Raises: DataError if it can't be read after some attempts."""
    return _retry(url, lambda files, path: files.cat_file(path))


def read_first(urls: Sequence[str]) -> tuple[str, bytes]:
    """Read the first of some small files that exists; return its URL too.

    Raises: DataError if none can be read, with what was wrong with the first.
    """
    failure: DataError | None = None
    for url in urls:
        try:
            return url, read_bytes(url)
        except DataError as error:
            failure = failure or error
            # Object stores answer "forbidden" for a file that is not there where listing is not allowed.
            if not isinstance(error.__cause__, FileNotFoundError | PermissionError):
                break
    raise failure or DataError("no files to read")


def sizes(folder_url: str) -> dict[str, int] | None:
    """List the files of a folder with their sizes in bytes; None over HTTP, which has no listings."""
    if folder_url.startswith("http"):
        return None
    listing = _retry(folder_url, lambda files, path: files.ls(path, detail=True))
    return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] for entry in listing if entry["type"] == "file"}


def change(url: str, action: Callable[[Any, str], Result]) -> Result:
    """Return `action(filesystem, path)`, retried; it must do no harm when it is done again.

    Raises: DataError if it fails.
    """

    def fresh(files: Any, path: str) -> Result:
        files.invalidate_cache()  # listings, which others and we ourselves change
        return action(files, path)

    return _retry(url, fresh)


def _retry(url: str, action: Callable[[Any, str], Result]) -> Result:
    """Call `action(filesystem, path)` until it succeeds, at most ATTEMPTS times, waiting twice as long each time."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        try:
            files, path = fsspec.core.url_to_fs(url)
            return action(files, path)
        except ImportError as error:
            raise DataError(f"{url}: its file system needs a package that is not installed: {error}") from error
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(
                f"{url}: {type(error).__name__}; check the URL, the access rights and that what wrote it finished"
            ) from error
        except Exception as error:  # noqa: BLE001 - every file system has its own errors; the last one is raised below
            failure = error
            logger.warning(
                "%s: attempt %d of %d failed: %s: %s", url, attempt + 1, ATTEMPTS, type(error).__name__, error
            )
    raise DataError(
        f"{url}: failed {ATTEMPTS} times, the last time with {type(failure).__name__}: {failure}"
    ) from failure


class ShardCache:
    """Whole files of URLs, named by their sha256, in one folder of at most `limit_bytes`; the least recently used go.

    Several processes of a host share the folder. A file is downloaded under a lock of its own, checked, then renamed.
    The lock file's (sparse) size is the reservation of a download under way, so that the bound holds for all processes
    together; a lock file with a size and no holder is what a killed process leaves. A file that is evicted while it is
    read stays readable, because it is open.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = DEFAULT_BYTES) -> None:
        self.folder = (folder or DEFAULT_FOLDER).expanduser()
        self.limit_bytes = limit_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache_folder={self.folder} can't be made: {error}; name a writable folder"
            ) from error

    def path(self, sha256: str) -> Path:
        """Tell where a file's local copy is, or would be."""
        return self.folder / f"{sha256}.tar"

    def open(self, url: str, *, num_bytes: int, sha256: str) -> int:
        """Return a file descriptor of the local copy, downloading it first if need be. The caller closes it.

        Raises: ConfigError if it is larger than the cache; DataError if it can't be had or isn't as the manifest says.
        """
        if num_bytes > self.limit_bytes:
            raise ConfigError(
                f"data.cache_bytes={self.limit_bytes} is too small for one shard of {num_bytes} bytes; raise it"
            )
        path = self.path(sha256)
        with contextlib.suppress(FileNotFoundError):
            return _open_used(path)
        with _locked(path.with_suffix(".lock")) as lock:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                return _open_used(path)
            self._reserve(lock, num_bytes)
            try:
                return _download(url, path, num_bytes, sha256)
            finally:
                os.truncate(lock, 0)

    def _reserve(self, lock: int, num_bytes: int) -> None:
        while True:
            with _locked(self.folder / "cache.lock"):
                reserved = sum(_reserved_bytes(other) for other in self.folder.glob("*.lock"))
                files = sorted(
                    (entry.stat().st_mtime_ns, entry.stat().st_size, entry) for entry in self.folder.glob("*.tar")
                )
                used = reserved + sum(size for _, size, _ in files)
                while files and used + num_bytes > self.limit_bytes:
                    _, size, oldest = files.pop(0)
                    oldest.unlink()
                    used -= size
                if used + num_bytes <= self.limit_bytes:
                    os.truncate(lock, num_bytes)
                    return
            time.sleep(0.05)  # downloads under way fill the cache; they end, and then their files can be evicted


def _open_used(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    os.utime(descriptor)  # the use that "least recently used" goes by
    return descriptor


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)  # which unlocks it


def _reserved_bytes(path: Path) -> int:
    """Read the reservation of a lock file; clear it where its process is gone."""
    lock = os.open(path, os.O_RDWR)
    try:
        if size := os.fstat(lock).st_size:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_suffix(".partial").unlink(missing_ok=True)
                os.truncate(lock, 0)
                return 0
        return size
    finally:
        os.close(lock)


def _download(url: str, path: Path, num_bytes: int, sha256: str) -> int:
    partial = path.with_suffix(".partial")

    def get(files: Any, remote_path: str) -> int:
        files.get_file(remote_path, str(partial))
        descriptor = os.open(partial, os.O_RDONLY)
        found, digest = os.fstat(descriptor).st_size, _sha256(descriptor)
        if (found, digest) == (num_bytes, sha256):
            return descriptor
        os.close(descriptor)
        raise DataError(f"found {found} bytes with sha256 {digest}, the manifest says {num_bytes} and {sha256}")

    try:
        descriptor = _retry(url, get)
        partial.rename(path)
        return descriptor
    finally:
        partial.unlink(missing_ok=True)


def _sha256(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, 1 << 22, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
