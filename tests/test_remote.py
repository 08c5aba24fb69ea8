from __future__ import annotations

import errno
import fcntl
import http.server
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest

from scaledistill.data.reader import ShardReader
from scaledistill.data.shards import Manifest, ShardWriter
from scaledistill.data.stream import ShardStream, iter_validation
from scaledistill.errors import ConfigError, DataError
from scaledistill.preflight.checks import _order
from scaledistill.storage import remote
from scaledistill.storage.remote import ShardCache

T = 8
ROWS = 500
IDS_NT = np.arange(ROWS * T).reshape(ROWS, T)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    tokenizer = {"name": "test", "sha256": "0" * 64}
    sizes = {"sequence_length": T, "vocab_size": 5000, "rows_per_block": 10, "rows_per_shard": 80}
    with ShardWriter(folder, tokenizer=tokenizer, pad_token_id=0, **sizes) as writer:
        writer.write(IDS_NT, np.array([(row, 0, T) for row in range(ROWS)]))
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.0)


def read_all(shards: ShardReader) -> np.ndarray:
    """Read block by block, so that every shard is opened often."""
    blocks = [
        (shard, block)
        for shard, entry in enumerate(shards.manifest.shards)
        for block in range(len(entry.block_rows))
    ]
    return np.concatenate(
        [shards.read(shard, range(block, block + 1))[0][1] for shard, block in blocks]
    )


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat x",
        "file:///shards",
        "ftp://host/x",
        "s3://a::memory://b",
        "simplecache::s3://a",
        "s3:a",
        "S3://a",
    ],
)
def test_refused_urls(url: str) -> None:
    with pytest.raises(
        ConfigError,
        match="not an allowed URL; expected a folder or one of s3://, gs://, hf://, https://",
    ):
        ShardReader(url)


def test_paths_are_not_urls(folder: Path) -> None:
    assert not remote.is_url(str(folder))
    assert not remote.is_url("./a:b")


@pytest.fixture
def memory_url(folder: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/bucket/shards", recursive=True)
    yield "memory://bucket/shards"
    files.rm("/bucket", recursive=True)


def test_memory_url_reads_the_same(folder: Path, memory_url: str, tmp_path: Path) -> None:
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    assert shards.manifest.sha256 == Manifest.load(folder).sha256
    np.testing.assert_array_equal(read_all(shards), IDS_NT)
    assert sorted(path.stem for path in tmp_path.glob("*.tar")) == sorted(
        shard.sha256 for shard in shards.manifest.shards
    )
    assert not list(tmp_path.glob("*.partial"))


def test_remote_shards_are_checked_at_open(memory_url: str, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/shards/shard-000001.tar", b"short")
    with pytest.raises(DataError, match=r"shard-000001.tar has 5 bytes"):
        ShardReader(memory_url, cache=ShardCache(tmp_path))
    files.rm("/bucket/shards/shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001.tar is missing"):
        ShardReader(memory_url, cache=ShardCache(tmp_path))
    files.rm("/bucket/shards/shards.manifest")
    with pytest.raises(DataError, match=r"shards.manifest: FileNotFoundError; check the URL"):
        ShardReader(memory_url, cache=ShardCache(tmp_path))


# S3's where listing is not allowed.
@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_sets_of_earlier_versions_are_read(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    files = fsspec.filesystem("memory")
    files.mv("/bucket/shards/shards.manifest", "/bucket/shards/manifest.json")
    cat_file, asked = type(files).cat_file, []

    def cat(self: Any, path: str, **options: Any) -> bytes:
        asked.append(path.rpartition("/")[2])
        if not self.exists(path):
            raise error(path)
        return cat_file(self, path, **options)

    monkeypatch.setattr(type(files), "cat_file", cat)
    np.testing.assert_array_equal(
        read_all(ShardReader(memory_url, cache=ShardCache(tmp_path))), IDS_NT
    )
    assert asked == ["shards.manifest", "manifest.json"], "one request more"


def test_damaged_downloads_are_never_used(memory_url: str, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    path = "/bucket/shards/shard-000003.tar"
    files.pipe(path, files.cat(path)[:-1] + b"x")
    with pytest.raises(DataError, match=r"shard-000003.tar: failed 4 times.*the manifest says"):
        read_all(shards)
    assert not list(tmp_path.glob("*.partial"))
    assert shards.manifest.shards[3].sha256 not in {entry.stem for entry in tmp_path.glob("*.tar")}


def test_a_damaged_cached_copy_is_named(memory_url: str, tmp_path: Path) -> None:
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    read_all(shards)
    damaged = tmp_path / f"{shards.manifest.shards[0].sha256}.tar"
    data = bytearray(damaged.read_bytes())
    data[shards.manifest.shards[0].ids_offset[0]] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(
        DataError, match=rf"shard-000000.tar, block 0: .*cached copy {damaged}: delete it"
    ):
        read_all(shards)


def test_cache_stays_within_its_bound_and_drops_the_least_recently_used(
    memory_url: str, tmp_path: Path
) -> None:
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path)).manifest.shards
    cache = ShardCache(tmp_path, limit_bytes=3 * shards[0].bytes)

    def use(number: int) -> None:
        entry = shards[number]
        os.close(
            cache.open(f"{memory_url}/{entry.file}", num_bytes=entry.bytes, sha256=entry.sha256)
        )
        time.sleep(0.01)  # modification times must differ
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache.limit_bytes

    for number in (0, 1, 2, 0, 3, 0, 4):
        use(number)
    assert {path.stem for path in tmp_path.glob("*.tar")} == {
        shards[number].sha256 for number in (0, 3, 4)
    }


def test_cache_too_small(memory_url: str, tmp_path: Path) -> None:
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path, limit_bytes=100))
    with pytest.raises(ConfigError, match=r"^limit_bytes=100 is less than .* num_lanes=6"):
        ShardStream(
            shards, shards.order(seed=0, num_lanes=6), global_batch_size=8, micro_batch_size=8
        )
    sources = {"data.train": SimpleNamespace(name="train", weight=1.0)}
    data = SimpleNamespace(num_lanes=6, window_rows=64, sources=sources)
    settings: Any = SimpleNamespace(data=data, run=SimpleNamespace(seed=0))
    with pytest.raises(
        ConfigError, match=r"^data.cache_bytes=100 is less than .* data.num_lanes=6"
    ):
        _order(settings, [shards])
    with pytest.raises(ConfigError, match=r"data.cache_bytes=100 is too small for one shard"):
        shards.read(0, range(1))


def test_what_a_killed_download_leaves_is_cleared(memory_url: str, tmp_path: Path) -> None:
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path, limit_bytes=50_000))
    other = tmp_path / f"{'0' * 64}.lock"
    other.touch()
    os.truncate(other, 49_999)  # a reservation without a process
    other.with_suffix(".partial").write_bytes(b"x" * 100)
    own = tmp_path / f"{shards.manifest.shards[0].sha256}.partial"
    own.write_bytes(b"half")
    assert len(shards.read(0, range(8))) == 8
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tar"] == ["cache.lock"]


def test_files_of_others_in_the_cache_s_folder_stay(memory_url: str, tmp_path: Path) -> None:
    others = {tmp_path / name for name in ("imagenet.tar", "uv.lock", "x.lock", "uvx.partial")}
    for path in others:
        path.touch()
        if path.name != "x.lock":
            os.truncate(path, 60_000)
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path, limit_bytes=50_000))
    assert len(shards.read(0, range(8))) == 8
    assert others <= set(tmp_path.iterdir())


def test_what_a_power_cut_left_is_downloaded_again(memory_url: str, tmp_path: Path) -> None:
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    read_all(shards)
    os.truncate(tmp_path / f"{shards.manifest.shards[1].sha256}.tar", 100)
    np.testing.assert_array_equal(
        read_all(ShardReader(memory_url, cache=ShardCache(tmp_path))), IDS_NT
    )


def test_lock_files_are_removed(memory_url: str, tmp_path: Path) -> None:
    for number in range(20):  # as earlier versions left them
        (tmp_path / f"{number:064}.lock").touch()
    read_all(ShardReader(memory_url, cache=ShardCache(tmp_path)))
    assert [path.name for path in tmp_path.glob("*.lock")] == ["cache.lock"]


def test_a_lock_file_that_is_removed_never_lets_two_in(tmp_path: Path) -> None:
    inside, most, rounds = 0, 0, 200

    def work() -> None:
        nonlocal inside, most
        for _ in range(rounds):
            with remote._locked(tmp_path / "x.lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, list(tmp_path.iterdir())) == (1, [])


class Slow:
    """Downloads of the memory file system that take their time; what was fetched, by which
    thread.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.fetched: list[tuple[str, str]] = []
        self.busy = self.most = 0
        cls = type(fsspec.filesystem("memory"))
        get_file = cls.get_file

        def slow(files: Any, remote_path: str, local_path: str, **options: Any) -> None:
            self.fetched.append((remote_path.rpartition("/")[2], threading.current_thread().name))
            self.busy += 1
            self.most = max(self.most, self.busy)
            time.sleep(seconds)
            self.busy -= 1
            get_file(files, remote_path, local_path, **options)

        monkeypatch.setattr(cls, "get_file", slow)


def test_shards_are_fetched_before_they_are_due(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, 0.2)
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    order = shards.order(seed=0, num_lanes=2, window_rows=40)
    start = time.perf_counter()
    with ShardStream(
        shards, order, global_batch_size=10, micro_batch_size=10, prefetch_batches=1
    ) as stream:
        rows = [next(stream).input_ids_BT]
        assert time.perf_counter() - start < 0.39, "the first shards of both lanes at once"
        waits = []
        for _ in range(40):
            time.sleep(0.04)  # a shard of 80 rows lasts 16 steps
            start = time.perf_counter()
            rows.append(next(stream).input_ids_BT)
            waits.append(time.perf_counter() - start)
    assert max(waits) < 0.1
    assert slow.most >= 2
    shard_N, row_N = order.locate(np.arange(410))
    np.testing.assert_array_equal(np.concatenate(rows), IDS_NT[shard_N * 80 + row_N])


def test_what_is_fetched_ahead_stays_within_the_cache_and_evicts_nothing_in_use(
    memory_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Slow(monkeypatch, 0.0)
    entries = ShardReader(memory_url, cache=ShardCache(tmp_path / "other")).manifest.shards
    largest = max(entry.bytes for entry in entries)
    for limit, warnings in ((3, 1), (5, 0)):
        slow.fetched.clear()
        caplog.clear()
        cache = ShardCache(tmp_path / str(limit), limit_bytes=limit * largest)
        shards = ShardReader(memory_url, cache=cache)
        order = shards.order(seed=0, num_lanes=2, window_rows=40)
        with ShardStream(
            shards, order, global_batch_size=10, micro_batch_size=10, prefetch_batches=1
        ) as stream:
            for _ in range(order.rows_per_epoch // 10):
                next(stream)
                time.sleep(0.002)
                sizes = remote.sizes(f"file://{cache.folder}") or {}
                assert (
                    sum(size for name, size in sizes.items() if name.endswith(".tar"))
                    <= cache.limit_bytes
                )
        assert caplog.text.count("data.cache_bytes=") == warnings
    assert f"set it to {4 * largest} or more" not in caplog.text
    names = [name for name, _ in slow.fetched]
    assert len(names) <= len(entries) + 3, (
        "a shard that two lanes share, and the first ones of the next epoch"
    )


def test_an_error_of_fetching_ahead_comes_where_the_shard_is_read(
    memory_url: str, tmp_path: Path
) -> None:
    files = fsspec.filesystem("memory")
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    order = shards.order(seed=0, num_lanes=1, window_rows=40)
    shard_N, _ = order.locate(np.arange(500))
    bad = shards.manifest.shards[int(shard_N[200])].file
    path = f"/bucket/shards/{bad}"
    files.pipe(path, files.cat(path)[:-1] + b"x")
    first = int(np.flatnonzero(shard_N == shard_N[200])[0])
    message = rf"{bad}: failed 4 times.*the manifest says"
    with ShardStream(shards, order, global_batch_size=10, micro_batch_size=10) as stream:
        for _ in range(first // 10):
            next(stream)
        with pytest.raises(DataError, match=message):
            next(stream)


def test_a_download_that_hangs_keeps_nobody_from_leaving(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch, 3.0)
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    order = shards.order(seed=0, num_lanes=2)
    start = time.perf_counter()
    ShardStream(shards, order, global_batch_size=8, micro_batch_size=8).close()
    assert time.perf_counter() - start < 2.5


def test_validation_fetches_the_next_shard_too(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, 0.05)
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    before = threading.active_count()
    for batch in iter_validation(shards, rows=160, micro_batch_size=10):
        assert batch.weight == 10
        time.sleep(0.02)
    assert threading.active_count() == before
    assert sorted(slow.fetched) == [
        (f"shard-00000{number}.tar", "fetch-ahead") for number in (0, 1)
    ]


@pytest.mark.parametrize("held", [True, False])
def test_locks_of_another_user(
    held: bool, memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared cache they may be read, but not written."""
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path, limit_bytes=50_000))
    own = tmp_path / f"{shards.manifest.shards[0].sha256}.lock"
    theirs = [tmp_path / "cache.lock", tmp_path / f"{'0' * 64}.lock", *([] if held else [own])]
    for path in theirs:
        path.touch(mode=0o644)
    os.truncate(theirs[1], 10_000 if held else 49_999)
    plain_open, refused = os.open, []

    def open_file(path: Any, flags: int, *mode: int, **more: Any) -> int:
        if Path(path) in theirs and flags & os.O_RDWR and Path(path).exists():
            refused.append(path)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain_open(path, flags, *mode, **more)

    with theirs[1].open() as download:
        if held:
            fcntl.flock(download, fcntl.LOCK_EX)
        monkeypatch.setattr(os, "open", open_file)
        assert len(shards.read(0, range(8))) == 8
    assert refused
    assert theirs[1].exists() is held


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_cache_without_locks(
    number: int,
    memory_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr("scaledistill.storage.files._warned", set())
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path, limit_bytes=50_000))
    reserved = tmp_path / f"{'0' * 64}.lock"
    reserved.touch()
    os.truncate(reserved, 49_999)  # whose process may be gone, and must not hold this one up
    reserved.with_suffix(".elsewhere-1.partial").write_bytes(b"it may be there")
    assert len(shards.read(0, range(8))) == 8
    assert [path.name for path in tmp_path.glob("*.partial")] == [
        f"{reserved.stem}.elsewhere-1.partial"
    ]
    assert sum("this file system has no file locks" in message for message in caplog.messages) == 1


def test_local_shards_need_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    cache = ShardCache()
    with pytest.raises(
        ConfigError,
        match=r"^data\.cache_folder=/proc/nowhere/\S+ can't be made: .*; name a folder that",
    ):
        cache.path("0")

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(
        ConfigError,
        match=r"^data\.cache_folder=~/\.cache/scaledistill can't be made: Could not determine",
    ):
        ShardCache().path("0")


def test_missing_file_system_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match="needs a package that is not installed"):
        ShardReader("s3://bucket/shards", cache=ShardCache(tmp_path))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; counts what was sent whole and breaks some answers on request."""

    sent: Counter[str]
    broken: list[str]
    delay_seconds: float

    def do_GET(self) -> None:
        time.sleep(self.delay_seconds)
        name = self.path.rsplit("/", 1)[-1]
        fault = self.broken.pop(0) if name.endswith(".tar") and self.broken else ""
        if fault.isdecimal():
            self.send_error(int(fault))
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            self.close_connection = True
        else:
            self.sent[name] += 1
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    Handler.sent, Handler.broken, Handler.delay_seconds = Counter(), [], 0.0
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(folder))
    ) as running:
        threading.Thread(
            target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        yield running
        running.shutdown()


def test_http_with_faults(
    folder: Path, server: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    Handler.broken = ["503", "cut", "", "cut"]
    shards = ShardReader(f"http://127.0.0.1:{server.server_port}/", cache=ShardCache(tmp_path))
    np.testing.assert_array_equal(read_all(shards), IDS_NT)
    assert {name: count for name, count in Handler.sent.items() if name.endswith(".tar")} == {
        shard.file: 1 for shard in shards.manifest.shards
    }
    with pytest.raises(DataError, match=r"other/shards.manifest: FileNotFoundError"):
        ShardReader(f"{shards.location}/other", cache=ShardCache(tmp_path))


def test_an_outage_is_waited_for(
    server: http.server.ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards = ShardReader(f"http://127.0.0.1:{server.server_port}/", cache=ShardCache(tmp_path))
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 60.0)
    Handler.broken = ["503"] * 12
    assert len(shards.read(0, range(8))) == 8
    assert [text for text in caplog.messages if "attempt" in text] == [
        text for text in caplog.messages if ": attempt " in text and "failed: " in text
    ]
    assert sum(": attempt " in text for text in caplog.messages) == 4, "not a line each time"
    Handler.broken = ["403"] * 12
    with pytest.raises(DataError, match=r"shard-000001.tar: failed 4 times, .*403"):
        shards.read(1, range(8))
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.0)
    Handler.broken = ["503"] * 12
    with pytest.raises(DataError, match=r"shard-000001.tar: failed 4 times, .*503"):
        shards.read(1, range(8))


def test_no_limit_to_a_download_that_proceeds(
    server: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = remote._file_system(f"http://127.0.0.1:{server.server_port}/")
    timeout = files.client_kwargs["timeout"]
    assert (timeout.total, timeout.sock_connect, timeout.sock_read) == (None, 30, 60)
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"trust_env": True}})
    files, _ = remote._file_system(f"http://127.0.0.1:{server.server_port}/")
    assert files.client_kwargs["trust_env"] is True, "as the user has configured"


def test_a_disk_smaller_than_the_cache_s_bound(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    size = max(shard.bytes for shard in shards.manifest.shards)
    disk_bytes = 3 * size

    def usage(folder: Path) -> SimpleNamespace:
        stored = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
        return SimpleNamespace(free=disk_bytes - stored)

    monkeypatch.setattr(remote.shutil, "disk_usage", usage)
    np.testing.assert_array_equal(read_all(shards), IDS_NT)
    assert len(list(tmp_path.glob("*.tar"))) == 3, "older ones made room"
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    own_lock = tmp_path / f"{shards.manifest.shards[0].sha256}.lock"
    own_lock.touch()
    os.truncate(own_lock, size)  # a killed process of the same shard reserved it
    # It was another user's, whose file this process may not change.
    monkeypatch.setattr(remote, "_set_reservation", lambda lock, num_bytes: None)
    disk_bytes = size // 2
    with pytest.raises(
        DataError,
        match=rf"^data.cache_folder=.* no room for a shard .*: {disk_bytes} bytes are",
    ):
        shards.read(0, range(8))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_fault_of_the_network(
    number: int, memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, attempts = ShardReader(memory_url, cache=ShardCache(tmp_path)), []

    def get_file(*arguments: object) -> None:
        attempts.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", get_file)
    with pytest.raises(
        DataError,
        match=rf"^data.cache_folder={tmp_path}: {os.strerror(number)}, a shard of .*; set",
    ):
        shards.read(0, range(8))
    assert len(attempts) == 1


def test_files_of_another_user_count_but_cannot_be_evicted(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder like /tmp, where only its owner may remove a file."""
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path))
    size = max(shard.bytes for shard in shards.manifest.shards)
    shards = ShardReader(memory_url, cache=ShardCache(tmp_path, limit_bytes=3 * size))
    theirs = [tmp_path / f"{number:064x}.tar" for number in range(2)]
    lock = tmp_path / f"{2:064x}.lock"  # which a killed process of theirs left
    for path in (*theirs, lock):
        path.write_bytes(b"x" * size)
    unlink = Path.unlink

    def protected(path: Path, missing_ok: bool = False) -> None:
        if path in (*theirs, lock):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", protected)
    np.testing.assert_array_equal(read_all(shards), IDS_NT)
    # Fetching ahead evicts nothing in use, though what else there is cannot be removed.
    cache, entries = shards._cache, shards.manifest.shards
    assert cache
    [kept] = [entry for entry in entries if cache.path(entry.sha256).exists()]
    cache.keep_for(0, [kept.sha256])
    for entry in entries[:2]:
        options = {"num_bytes": entry.bytes, "sha256": entry.sha256}
        assert not cache.fetch(f"{memory_url}/{entry.file}", **options)
    assert cache.path(kept.sha256).exists()
    theirs.append(tmp_path / f"{3:064x}.tar")
    theirs[-1].write_bytes(b"x" * size)
    with pytest.raises(
        DataError, match=rf"no room for a shard .* other users .*: data.cache_bytes={3 * size}; rai"
    ):
        read_all(shards)


READ_ALL = """
import sys
from pathlib import Path
from scaledistill.data.reader import ShardReader
from scaledistill.storage.remote import ShardCache
shards = ShardReader(sys.argv[1], cache=ShardCache(Path(sys.argv[2])))
for number, shard in enumerate(shards.manifest.shards):
    assert len(shards.read(number, range(len(shard.block_rows)))) == len(shard.block_rows)
"""


def test_processes_share_a_cache(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    Handler.delay_seconds = 0.1  # so that the processes meet
    url = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", READ_ALL, url, str(tmp_path)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    downloads = {name: count for name, count in Handler.sent.items() if name.endswith(".tar")}
    assert downloads == {
        shard.file: 1 for shard in ShardReader(url, cache=ShardCache(tmp_path)).manifest.shards
    }


def test_credentials_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"http://\*\*\*@127\.0\.0\.1:1/a/shards.manifest") as error:
        ShardReader("http://me:pw@127.0.0.1:1/a", cache=ShardCache(tmp_path))
    assert "attempt 1 failed" in caplog.text
    assert "me:pw" not in caplog.text + str(error.value)
    text = '{"train": "https://me:pw@host/a", "validation": "s3://bucket/b@2"}'
    assert remote.without_credentials(text) == text.replace("me:pw", "***")


@pytest.mark.parametrize(
    ("facts", "is_temporary"),
    [
        ({"status": 404}, False),
        ({"code": 401}, False),
        ({"code": "403"}, False),
        ({"response": SimpleNamespace(status_code=416)}, False),
        ({"status": 429}, True),
        ({"response": SimpleNamespace(status_code=503)}, True),
        ({"response": {"Error": {"Code": "SlowDown"}}}, True),
        ({}, True),
    ],
)
def test_refused_requests_are_not_repeated_for_minutes(
    facts: dict[str, Any], is_temporary: bool
) -> None:
    """aiohttp, gcsfs, huggingface_hub and botocore state the answer in fields of their own."""
    error = OSError("failed")
    error.__dict__.update(facts)
    assert remote._may_be_temporary(error) is is_temporary
