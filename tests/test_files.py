"""Locks and flushes on file systems that lack them, and what is said where a disk refuses."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from scaledistill.errors import ConfigError, DataError
from scaledistill.storage import files


def failing(
    number: int, only: Callable[[int], bool] = lambda descriptor: True
) -> Callable[..., None]:
    """Return a system call on a descriptor that fails with an errno; on others it does nothing."""

    def call(descriptor: int, *rest: int) -> None:
        if only(descriptor):
            raise OSError(number, os.strerror(number))

    return call


def is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_dir()


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_warned", set())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        with files.locked(tmp_path):
            pass
    with (tmp_path / "file").open("w") as file:
        assert files.lock(file.fileno(), wait=True) == "no locks"
    [message] = caplog.messages
    assert message == (
        f"this file system has no file locks ({os.strerror(number)}): going on without; start "
        "nothing else that writes to the same folder"
    )


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_process_holds(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with (
        pytest.raises(ConfigError, match=r"^folder=.* is in use by another process; wait"),
        files.locked(tmp_path),
    ):
        pytest.fail("it was held")


def test_a_disk_that_fails_is_no_held_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), files.locked(tmp_path):
        pytest.fail("it was locked")


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A lock file that is left behind, as by `kill -9`, holds nobody up."""
    (tmp_path / ".lock").write_text("left behind")
    with files.locked(tmp_path), (tmp_path / ".lock").open("w") as other:
        assert files.lock(other.fileno()) == "in use"
    with files.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES]
)
def test_a_folder_that_cannot_be_flushed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number, is_folder))
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert files.read_json(tmp_path / "x.json") == {"a": 1}
    assert caplog.messages == []


def test_a_file_system_that_cannot_flush_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    for number in range(2):
        files.write_json(tmp_path / "x.json", {"a": number})
    [message] = caplog.messages
    assert message.startswith(
        "this file system cannot flush files to the disk (Invalid argument): going on without;"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    "only", [is_folder, lambda descriptor: not is_folder(descriptor)], ids=["folder", "file"]
)
def test_what_a_disk_refuses_stays_an_error(
    number: int, only: Callable[[int], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number, only))
    with pytest.raises(OSError, match=os.strerror(number)):
        files.write_json(tmp_path / "x.json", {"a": 1})


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "x"), "free some space"),
        (OSError(errno.EDQUOT, "x"), "free some space, or have the quota raised"),
        (OSError(errno.EROFS, "x"), "check who may write there, or name another folder"),
        (OSError(errno.EIO, "x"), "check the disk, or name another folder"),
        # As safetensors says it.
        (DataError("I/O error: No space left on device (os error 28)"), "free some space"),
    ],
)
def test_space_is_the_remedy_for_full_disks_alone(error: Exception, remedy: str) -> None:
    assert files.disk_remedy(error) == remedy
