"""Read files at fsspec URLs, directly or through a bounded, verified cache of whole files.

Inputs: URLs. Outputs: bytes, local paths, and changes to remote files. Only allowed kinds of URL
are accepted. Not handled here: what a shard is (`data.manifest`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from scaledistill.errors import ConfigError, DataError
from scaledistill.storage.files import flush
from scaledistill.storage.files import lock as lock_file

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "hf", "https", "http", "memory")
WRITABLE = ("s3", "gs", "memory")
ATTEMPTS = 4
BACKOFF_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 10.0
BUSY = (408, 425, 429)
"""The HTTP errors of the client's kind after which to try again."""
PATIENCE_SECONDS = 300.0
"""How long a running job tries to download a shard: servers restart, and networks fail, for
minutes."""
MOST_REMOVED = 1000
DEFAULT_FOLDER = Path("~/.cache/scaledistill")
DEFAULT_BYTES = 100_000_000_000

Result = TypeVar("Result")


def without_credentials(text: str) -> str:
    """Return a text with the user and password of every URL in it replaced by ***."""
    return re.sub(r"(?<=://)[^/@\s\"]+@", "***@", text)


def is_url(location: str) -> bool:
    """Return whether a location is a URL rather than a path.

    Raises: ConfigError for URLs that are not allowed: other schemes (`pipe:` runs a shell) and
    those chained by `::`.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", location)
    if scheme is None and "::" not in location:
        return False
    if (
        scheme is None
        or "::" in location
        or scheme[1] not in SCHEMES
        or not location.startswith(f"{scheme[1]}://")
    ):
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(
            f"data location {without_credentials(location)!r}: not an allowed URL; expected a "
            f"folder or one of {allowed}"
        )
    return True


def read_bytes(url: str) -> bytes:
    """Read a small file.

    Raises: DataError if it can't be read after some attempts.
    """
    return _retry(url, lambda files, path: files.cat_file(path))


def read_first(urls: Sequence[str]) -> tuple[str, bytes]:
    """Read the first of some small files that exists; return its URL too.

    Raises: DataError if none can be read, with the problem of the first.
    """
    failure: DataError | None = None
    for url in urls:
        try:
            return url, read_bytes(url)
        except DataError as error:
            failure = failure or error
            # Without permission to list, object stores answer "forbidden" for a missing file.
            if not isinstance(error.__cause__, FileNotFoundError | PermissionError):
                break
    raise failure or DataError("no files to read")


def sizes(folder_url: str) -> dict[str, int] | None:
    """List a folder's files with their sizes in bytes; None over HTTP, which has no listings."""
    if folder_url.startswith("http"):
        return None
    listing = _retry(folder_url, lambda files, path: files.ls(path, detail=True))
    return {
        entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"]
        for entry in listing
        if entry["type"] == "file"
    }


def change(url: str, action: Callable[[Any, str], Result]) -> Result:
    """Return `action(filesystem, path)`, retried; repeating it must do no harm.

    Raises: DataError if it fails.
    """

    def fresh(files: Any, path: str) -> Result:
        files.invalidate_cache()  # cached listings are stale: this and other processes change files
        return action(files, path)

    return _retry(url, fresh)


class _FullDiskError(DataError):
    """The disk of the cache is full."""


def _retry(url: str, action: Callable[[Any, str], Result], seconds: float = 0.0) -> Result:
    """Call `action(filesystem, path)` until it succeeds, at most ATTEMPTS times.

    The wait doubles after each attempt. After ATTEMPTS, it goes on until `seconds` have passed if
    the error may be temporary.

    Raises: DataError if every attempt failed, or at once if the file is missing or forbidden.
    """
    shown = without_credentials(url)
    start = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return action(*_file_system(url))
        except _FullDiskError:
            raise
        except ImportError as error:
            raise DataError(
                f"{shown}: its file system needs a package that is not installed: {error}"
            ) from error
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(
                f"{shown}: {type(error).__name__}; check the URL, the access rights, and that the "
                "program that wrote it finished"
            ) from error
        except Exception as error:  # file systems differ in errors
            reason = without_credentials(str(error)) or "no answer in time"
            problem = f"{type(error).__name__}: {reason}"
            if attempt >= ATTEMPTS and (
                time.monotonic() - start >= seconds or not _may_be_temporary(error)
            ):
                raise DataError(
                    f"{shown}: failed {attempt} times, the last time with {problem}"
                ) from error
            if attempt <= ATTEMPTS:
                more = f"; trying for {seconds:.0f} s" if attempt == ATTEMPTS else ""
                logger.warning("%s: attempt %d failed: %s%s", shown, attempt, problem, more)
        time.sleep(min(BACKOFF_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS))
    raise AssertionError("unreachable")


def _may_be_temporary(error: Exception) -> bool:
    """Return whether waiting may help: not if the content is wrong or the request was refused."""
    status = _http_status(error)
    refused = status is not None and 400 <= status < 500 and status not in BUSY
    return not (refused or isinstance(error, DataError | TypeError | ValueError))


def _http_status(error: Exception) -> int | None:
    """Return the status of HTTP in an error of aiohttp, gcsfs, Azure, requests or httpx."""
    holders, names = (error, getattr(error, "response", None)), ("status", "code", "status_code")
    found = (str(getattr(holder, name, None)) for holder in holders for name in names)
    return next((int(text) for text in found if text.isdecimal()), None)


def _file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
    options: dict[str, Any] = {}
    if url.startswith("http"):
        import aiohttp

        # Its default ends a download after five minutes, even one that proceeds.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        # Given options replace the configured ones of the same name.
        configured = fsspec.config.conf.get(url.partition(":")[0], {}).get("client_kwargs", {})
        options["client_kwargs"] = {"timeout": timeout, **configured}
    return fsspec.core.url_to_fs(url, **options)


class ShardCache:
    """Whole remote files, named by their sha256, in one folder of at most `limit_bytes`.

    The least recently used files are evicted; files with other names are left alone. Several
    processes of a host, also of several users, share the folder. A file is downloaded under a lock
    of its own, checked, then renamed. The (sparse) size of the lock file reserves room for the
    running download, so that the bound holds for all processes together. The holder removes its
    lock file at the end; one that a killed process left is removed by the next process that meets
    it. A file that is evicted while it is read stays readable, because it is open.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = DEFAULT_BYTES) -> None:
        self._folder = folder
        self.limit_bytes = limit_bytes
        self._kept: dict[int, frozenset[str]] = {}

    def keep_for(self, reader: int, sha256s: Iterable[str]) -> None:
        """Evict files last that a reader, by its id, uses or fetches ahead; it replaces its own."""
        self._kept[reader] = frozenset(sha256s)

    @property
    def keep(self) -> frozenset[str]:
        """The sha256 of the files that are evicted last."""
        return frozenset().union(*list(self._kept.values()))

    @cached_property
    def folder(self) -> Path:
        """The folder, created on first use: a run on local shards needs neither it nor a home.

        Raises: ConfigError if it can't be created or written.
        """
        folder = self._folder or DEFAULT_FOLDER
        try:
            folder = folder.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home in HOME or the passwd file
            raise ConfigError(
                f"data.cache_folder={folder} can't be made: {error}; name a folder that this user "
                "may write"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"data.cache_folder={folder} can't be written; name a folder that this user may "
                "write"
            )
        return folder

    def path(self, sha256: str) -> Path:
        """Return the path of a file's local copy, whether it exists or not."""
        return self.folder / f"{sha256}.tar"

    def open(self, url: str, *, num_bytes: int, sha256: str) -> int:
        """Return a file descriptor of the local copy, downloaded first if needed.

        The caller closes it.

        Raises: ConfigError if the file is larger than the cache; DataError if it can't be
        downloaded, differs from the manifest, or does not fit on the disk.
        """
        if num_bytes > self.limit_bytes:
            raise ConfigError(
                f"data.cache_bytes={self.limit_bytes} is too small for one shard of {num_bytes} "
                "bytes; raise it"
            )
        descriptor = self._open(url, num_bytes, sha256, evict_kept=True)
        if descriptor is None:
            raise AssertionError(
                "unreachable: there is always room once everything else is evicted"
            )
        return descriptor

    def fetch(self, url: str, *, num_bytes: int, sha256: str) -> bool:
        """Download a file ahead of its use; return whether it is there.

        It is not downloaded if files in `keep` would have to be evicted for it.

        Raises: DataError if it can't be downloaded or differs from the manifest.
        """
        # Other processes do not know `keep` and evict by last use, so refresh it.
        for name in self.keep:
            with contextlib.suppress(OSError):
                os.utime(self.path(name))
        descriptor = self._open(url, num_bytes, sha256, evict_kept=False)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def _open(self, url: str, num_bytes: int, sha256: str, *, evict_kept: bool) -> int | None:
        path = self.path(sha256)
        if (descriptor := _open_used(path, num_bytes)) is not None:
            return descriptor
        with _locked(path.with_suffix(".lock")) as lock:
            if (descriptor := _open_used(path, num_bytes)) is not None:
                return descriptor  # another process was faster
            if lock_file(lock) == "locked":  # what a killed process left
                _remove_partials(path)
                _set_reservation(lock, 0)
            if not self._reserve(lock, num_bytes, evict_kept=evict_kept):
                return None
            try:
                # Who fetches ahead need not wait for a server: the reader will ask again.
                patience = PATIENCE_SECONDS if evict_kept else 0.0
                return _download(url, path, num_bytes, sha256, patience)
            finally:
                _set_reservation(lock, 0)

    def _own(self, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the cache's files of a kind; the folder may hold files of others."""
        for path in self.folder.glob(f"*.{suffix}"):
            if re.fullmatch(r"[0-9a-f]{64}", path.stem):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()

    def _reserve(self, lock: int, num_bytes: int, *, evict_kept: bool = True) -> bool:
        """Make room and reserve it; return False if files in `keep` would have to be evicted.

        The room is that of the disk, if that has less than `limit_bytes`.

        Raises: DataError if there is none and nothing is left to evict.
        """
        while True:
            with _locked(self.folder / "cache.lock", remove=False):
                locks = [(path, found.st_size) for path, found in self._own("lock")]
                keep = self.keep
                reserved = sum(
                    _reserved_bytes(path)
                    for path, size in locks
                    # The size of another user's lock file cannot be changed by its new holder.
                    if size and not _is_at(lock, path)
                )
                files = sorted(
                    (path.stem in keep, found.st_mtime_ns, found.st_size, path)
                    for path, found in self._own("tar")
                )
                stored = sum(size for _, _, size, _ in files)
                free = shutil.disk_usage(self.folder).free
                limit = min(self.limit_bytes, stored + free)
                kept = reserved + sum(size for is_kept, _, size, _ in files if is_kept)
                if not evict_kept and kept + num_bytes > limit:
                    return False
                used = reserved + stored
                while files and used + num_bytes > limit:
                    is_kept, _, size, oldest = files.pop(0)
                    if is_kept and not evict_kept:  # others' files cannot be removed instead
                        return False
                    if _removed(oldest):
                        used -= size
                if fits := used + num_bytes <= limit:
                    _set_reservation(lock, num_bytes)
                elif not reserved:
                    is_bound = limit == self.limit_bytes
                    raise _FullDiskError(
                        f"data.cache_folder={self.folder} has no room for a shard of {num_bytes} "
                        "bytes beside files of other users or programs: "
                        + (
                            f"data.cache_bytes={limit}; raise it"
                            if is_bound
                            else f"{free} bytes are free on its disk; free some space"
                        )
                        + ", or name another folder"
                    )
            # Earlier versions left one lock file per shard.
            for path, size in itertools.islice(locks, MOST_REMOVED):
                if not size:
                    _reserved_bytes(path)
            if fits:
                return True
            # Running downloads fill the cache; once they end, their files can be evicted.
            time.sleep(0.05)


def _open_used(path: Path, num_bytes: int) -> int | None:
    """Open a local copy; return None if there is none, or only what a power cut left of it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != num_bytes:
        os.close(descriptor)
        return None
    with contextlib.suppress(OSError):  # another user's file in a shared cache
        os.utime(descriptor)  # the last use, by which files are evicted
    return descriptor


@contextlib.contextmanager
def _locked(path: Path, *, remove: bool = True) -> Iterator[int]:
    """Hold a lock file, created if needed; remove it at the end unless `remove` is off."""
    while True:
        lock = _open_lock(path, os.O_CREAT)
        try:
            found = lock_file(lock, wait=True)
            if found == "no locks" or _is_at(lock, path):
                break
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its former holder removed it: try again with the path's current file
    try:
        yield lock
    finally:
        if remove:
            _removed(path)
        os.close(lock)  # this unlocks it


def _open_lock(path: Path, create: int = 0) -> int:
    """Open a lock file; another user's in a shared cache for reading, if it cannot be written."""
    # In a folder like /tmp, O_CREAT may not open another user's file.
    for flags in (os.O_RDWR | create, os.O_RDWR):
        with contextlib.suppress(PermissionError):
            return os.open(path, flags, 0o666)
    return os.open(path, os.O_RDONLY)


def _set_reservation(lock: int, num_bytes: int) -> None:
    with contextlib.suppress(OSError):  # another user's lock file, left by a killed process
        os.truncate(lock, num_bytes)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _reserved_bytes(path: Path) -> int:
    """Return the reservation of a lock file.

    If its process is gone, remove the lock file and the process's partial download.
    """
    try:
        lock = _open_lock(path)
    except FileNotFoundError:
        return 0
    try:
        found = lock_file(lock)
        size = os.fstat(lock).st_size
        if found == "locked" and _is_at(lock, path):
            if size:
                _remove_partials(path)
            _removed(path)
        # Without locks it is unknown whether its process is alive.
        return size if found == "in use" else 0
    finally:
        os.close(lock)


def _remove_partials(path: Path) -> None:
    """Remove a file's partial downloads by killed processes; the caller holds its lock."""
    for partial in path.parent.glob(f"{path.stem}*.partial"):
        _removed(partial)


def _removed(path: Path) -> bool:
    """Remove a file; return False if it is another user's, which a folder like /tmp protects."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def _download(url: str, path: Path, num_bytes: int, sha256: str, patience: float) -> int:
    # A name per process, because without file locks two processes may download the file.
    partial = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.partial")

    def get(files: Any, remote_path: str) -> int:
        try:
            files.get_file(remote_path, str(partial))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _FullDiskError(
                    f"data.cache_folder={path.parent}: {error.strerror}, a shard of {num_bytes} "
                    "bytes does not fit; set data.cache_bytes to less than this user may store "
                    "there, or name another folder"
                ) from error
            raise
        descriptor = os.open(partial, os.O_RDONLY)
        found, digest = os.fstat(descriptor).st_size, _sha256(descriptor)
        if (found, digest) == (num_bytes, sha256):
            return descriptor
        os.close(descriptor)
        raise DataError(
            f"found {found} bytes with sha256 {digest}, the manifest says {num_bytes} and {sha256}"
        )

    try:
        descriptor = _retry(url, get, patience)
        flush(descriptor)
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
