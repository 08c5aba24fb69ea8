from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import context, run_ranks
from test_checkpoint import largest_file, names

from scaledistill.distributed.ranks import Ranks
from scaledistill.errors import ConfigError, DataError, DivergedError, PeerError
from scaledistill.run import folder as runfolder
from scaledistill.run.folder import STOP_SIGNALS, Status, StopRequest, owned, set_aside
from scaledistill.storage import files
from scaledistill.storage.files import read_json, write_json


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


def status_of(folder: Path) -> dict[str, Any]:
    status = read_json(folder / "status.json")
    assert status is not None
    return status


def test_status_says_everything(tmp_path: Path) -> None:
    status = Status(tmp_path, max_steps=10)
    status.step = 4
    status.write("stopped", "because", 75)
    found = status_of(tmp_path)
    assert found.pop("updated").endswith("+00:00")
    assert found == {
        "state": "stopped",
        "step": 4,
        "max_steps": 10,
        "exit_code": 75,
        "message": "because",
        "host": os.uname().nodename,
        "pid": os.getpid(),
    }
    assert names(tmp_path) == ["status.json"]


def test_status_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = Status(tmp_path, max_steps=10)
    status.write("running", "first")
    seen = []
    monkeypatch.setattr(
        files, "sync", lambda path: seen.append((path.name, status_of(tmp_path)["message"]))
    )
    status.write("running", "second")
    # On the disk before and after it is put in place.
    assert [message for _, message in seen] == ["first", "second"]
    with largest_file(20), pytest.raises(OSError, match="File too large"):
        status.write("running", "third")
    assert status_of(tmp_path)["message"] == "second"
    assert names(tmp_path) == ["status.json"]


ERRORS = [
    (ConfigError("a setting"), "failed", 2, "a setting"),
    (DataError("a shard"), "failed", 3, "a shard"),
    (DivergedError("a loss"), "diverged", 4, "a loss"),
    (ZeroDivisionError("a defect"), "failed", 1, "ZeroDivisionError: a defect"),
    (KeyboardInterrupt(), "failed", 130, "KeyboardInterrupt: "),
]


@pytest.mark.parametrize(
    ("error", "state", "exit_code", "message"), ERRORS, ids=lambda value: type(value).__name__
)
def test_an_error_is_written_down(
    error: BaseException, state: str, exit_code: int, message: str, tmp_path: Path, ranks: Ranks
) -> None:
    def run() -> None:
        with owned(tmp_path / "run", 10, ranks, fresh=False) as status:
            status.step = 3
            raise error

    with pytest.raises(type(error)):
        run()
    found = status_of(tmp_path / "run")
    assert [found[key] for key in ("state", "exit_code", "message", "step")] == [
        state,
        exit_code,
        message,
        3,
    ]


def test_a_full_disk_does_not_hide_the_error(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(DataError, match="no space for checkpoints"),
        largest_file(20),
        owned(tmp_path, 10, ranks, fresh=False),
    ):
        raise DataError("no space for checkpoints")
    assert f"{tmp_path / 'status.json'} could not be written: File too large" in caplog.text


class HangingDisk:
    """Holds the writes of `status.json`, and counts them, until it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers, self.states = threading.Event(), []

        def held(path: Path, content: dict[str, Any]) -> None:
            self.states.append(content["state"])
            assert self.answers.wait(60)
            write_json(path, content)

        monkeypatch.setattr(runfolder, "write_json", held)


def test_a_state_that_is_written_often_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, status = HangingDisk(monkeypatch), Status(tmp_path, max_steps=1000)
    status.write_soon("running", "training")
    wait_until(lambda: disk.states == ["running"])
    start = time.monotonic()
    for status.step in range(1, 1001):
        status.write_soon("running", "training")
    assert time.monotonic() - start < 5
    end = threading.Thread(target=status.write, args=("done", "1000 steps done", 0))
    end.start()
    assert not (tmp_path / "status.json").exists()
    disk.answers.set()
    end.join(60)
    assert disk.states == ["running", "running", "done"], "the first, the newest, and the end"
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["step"]) == ("done", 1000)
    assert names(tmp_path) == ["status.json"]


@pytest.mark.parametrize("how", ["done", "stopped", "failed"])
def test_the_end_stands_last_though_the_disk_hangs(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runfolder, "WRITE_SECONDS", 0.1)
    disk, status = HangingDisk(monkeypatch), Status(tmp_path, max_steps=10)
    status.write_soon("running", "training")
    wait_until(lambda: disk.states)
    status.write_soon("running", "training")
    if how == "failed":
        status.write_failure(how, "no space", 3)
    else:
        status.write_if_possible(how, "the end", 0)
    with pytest.raises(OSError, match="the disk has not answered for 0 s"):
        Status(tmp_path, max_steps=10).write("evaluating", "another's")
    path = tmp_path / "status.json"
    assert caplog.messages == [f"{path} could not be written: the disk has not answered for 0 s"]
    assert not path.exists()
    disk.answers.set()
    wait_until(lambda: path.exists() and status_of(tmp_path)["state"] == "evaluating")
    assert disk.states == ["running", "running", how, "evaluating"]


def test_a_full_disk_is_reported_though_nobody_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    status = Status(tmp_path, max_steps=10)
    with largest_file(20):
        status.write_soon("running", "training")
        wait_until(lambda: caplog.messages)
    assert caplog.messages == [f"{tmp_path / 'status.json'} could not be written: File too large"]
    status.write_soon("running", "training")
    wait_until((tmp_path / "status.json").exists)


def test_a_refused_resume_leaves_the_status_alone(tmp_path: Path, ranks: Ranks) -> None:
    with owned(tmp_path, 10, ranks, fresh=False) as status:
        status.write("done", "the run before", 0)
    for error in (ConfigError("other settings"), PeerError("other settings", 2)):
        with pytest.raises(type(error)), owned(tmp_path, 10, ranks, fresh=False):
            raise error
    assert status_of(tmp_path)["message"] == "the run before"
    with pytest.raises(DataError), owned(tmp_path, 10, ranks, fresh=False):
        raise DataError("no shards")
    assert status_of(tmp_path)["message"] == "no shards"


def test_the_first_cause_stays(tmp_path: Path, ranks: Ranks) -> None:
    def run() -> None:
        with owned(tmp_path, 10, ranks, fresh=False) as status:
            status.started = True
            status.write("failed", "another rank's cause", 3)
            raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError):
        run()
    assert status_of(tmp_path)["message"] == "another rank's cause"


def hold(folder: Path, held: Any, let_go: Any) -> None:
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held.set()
        let_go.wait(60)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_has_one_owner(fresh: bool, tmp_path: Path, ranks: Ranks) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(folder, held, let_go))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(ConfigError) as caught, owned(folder, 10, ranks, fresh=fresh):
            pytest.fail("the folder was held")
        assert str(caught.value) == (
            f"run.folder='{folder}' is in use by another process; wait for it, or set another "
            "run.folder"
        )
        assert names(tmp_path) == ["run"]
        assert names(folder) == [".lock"]
    finally:
        let_go.set()
        other.join(10)
    with owned(folder, 10, ranks, fresh=fresh) as status:
        status.write("running", "now it is ours")


def test_fresh_keeps_what_was_there(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    for number in range(3):
        with owned(folder, 10, ranks, fresh=True) as status:
            assert names(folder) == [".lock"]
            status.write("done", f"run {number}", 0)
    messages = {name: status_of(tmp_path / name)["message"] for name in names(tmp_path)}
    assert messages == {"run.1": "run 0", "run.2": "run 1", "run": "run 2"}
    assert f"--fresh: the old run is kept as {tmp_path / 'run.2'}" in caplog.text
    with owned(folder, 10, ranks, fresh=False):
        assert status_of(folder)["message"] == "run 2"


def test_set_aside_takes_the_first_free_number(tmp_path: Path) -> None:
    for name in ("run", "run.1", "run.3"):
        (tmp_path / name).mkdir()
    assert set_aside(tmp_path / "run") == tmp_path / "run.2"
    assert names(tmp_path) == ["run.1", "run.2", "run.3"]


def test_a_linked_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "old").touch()
    (tmp_path / "run").symlink_to(tmp_path / "large")
    assert set_aside(tmp_path / "run") == tmp_path / "large.1"
    assert (tmp_path / "large.1" / "old").exists()
    assert (tmp_path / "run").is_symlink()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("folder", [".", "run"])
def test_the_working_folder_is_not_set_aside(
    folder: str, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "run" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    place = Path(".") if folder == "." else inner.parent
    with (
        pytest.raises(ConfigError, match="holds the working folder, which --fresh cannot rename"),
        owned(place, 10, ranks, fresh=True),
    ):
        pytest.fail("it was renamed")
    assert names(tmp_path) == ["run"]


@pytest.fixture
def hang_up() -> Iterator[None]:
    """The usual handling of SIGHUP, which nohup changes for the tests too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_nohup_is_heeded(tmp_path: Path, hang_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(tmp_path, watch_file=False)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.reason() is None


def test_a_signal_counts_though_nobody_reads_stderr(tmp_path: Path) -> None:
    """Ctrl-C has ended `tee`, or the terminal was closed."""
    reading, writing = os.pipe()
    os.close(reading)
    stop, stderr = StopRequest(tmp_path, watch_file=False, logs=True), os.dup(2)
    os.dup2(writing, 2)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.reason() == "got SIGINT"
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writing)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_a_request(number: signal.Signals, tmp_path: Path, hang_up: None) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    stop = StopRequest(tmp_path, watch_file=True)
    with stop.listening():
        assert stop.reason() is None
        os.kill(os.getpid(), number)
        assert stop.reason() == f"got {number.name}"
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, following: nothing new
        assert stop.acknowledge() == f"got {number.name}"
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_second_interrupt_counts_only_later(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, watch_file=False)
    with stop.listening():
        for _ in range(3):  # a launcher passes on what the terminal sent already
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.05)
        os.kill(os.getpid(), signal.SIGTERM)  # never more than a request
        assert stop.reason() == "got SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_listens_to_no_signals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As under Ray, Airflow or a notebook's server."""
    caplog.set_level("INFO")
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    stop = StopRequest(tmp_path, watch_file=True, logs=True)
    seen: list[Any] = []

    def run() -> None:
        with stop.listening():
            seen.extend(signal.getsignal(each) for each in STOP_SIGNALS)
            (tmp_path / "STOP").touch()
            seen.append(stop.reason())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert seen == [*before, f"found {tmp_path / 'STOP'}"]
    assert caplog.messages == [
        f"not in the main thread: signals do not stop this run, use {tmp_path / 'STOP'} or "
        "run.max_hours"
    ]


def test_what_a_signal_is_answered_by(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, again in (
        (signal.SIGUSR1, ""),
        (signal.SIGINT, "; press Ctrl-C again to quit at once"),
    ):
        stop = StopRequest(tmp_path, watch_file=False, logs=True)
        with stop.listening():
            stop.answer = "saving"
            os.kill(os.getpid(), number)
        assert capfd.readouterr().err == f"\ngot {number.name}: saving{again}\n"


LOOP = """
import sys, time
from pathlib import Path
from scaledistill.run.folder import StopRequest
stop = StopRequest(Path(sys.argv[1]), watch_file=True)
with stop.listening():
    print("ready", flush=True)
    while not stop.reason():
        time.sleep(0.01)
sys.stdout.write(stop.acknowledge())
"""


def test_a_signal_from_another_process(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGUSR1)
    assert child.communicate(timeout=60) == ("got SIGUSR1", None)
    assert child.returncode == 0


def test_the_stop_file(tmp_path: Path) -> None:
    stop, elsewhere = (
        StopRequest(tmp_path, watch_file=True),
        StopRequest(tmp_path, watch_file=False),
    )
    assert stop.reason() is None
    (tmp_path / "STOP").touch()
    assert stop.reason() == f"found {tmp_path / 'STOP'}"
    assert elsewhere.reason() is None
    assert elsewhere.acknowledge() is None
    assert stop.acknowledge() == f"found {tmp_path / 'STOP'}"
    assert names(tmp_path) == []  # so that the same command goes on
    assert stop.reason() is None


class HangingFolder:
    """Paths named `name` below `folder` do not answer while it is up; each call to `action` is
    counted.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, action: str, name: str) -> None:
        real = getattr(Path, action)
        self.answers, self.calls = threading.Event(), 0

        def slow(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == name:
                self.calls += 1
                self.answers.wait(60)
            return real(path, *arguments, **options)

        monkeypatch.setattr(Path, action, slow)


def seconds_of(call: Any) -> tuple[float, Any]:
    start = time.monotonic()
    result = call()
    return time.monotonic() - start, result


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_that_hangs_does_not_hold_up_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = HangingFolder(monkeypatch, "exists", "STOP")
    (tmp_path / "STOP").touch()
    stop = StopRequest(tmp_path, watch_file=True)
    with stop.listening():
        first, found = seconds_of(stop.reason)
        assert found is None
        assert first < 5
        later, found = seconds_of(lambda: [stop.reason() for _ in range(1000)])
        assert set(found) == {None}
        assert later < 2, "nothing is waited for twice"
        assert folder.calls == 1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.reason() == "got SIGUSR1"
    stop = StopRequest(tmp_path, watch_file=True)
    assert stop.reason() is None
    folder.answers.set()
    wait_until(stop.reason)
    assert stop.acknowledge() == f"found {tmp_path / 'STOP'}"
    wait_until(lambda: stop.reason() is None)
    assert names(tmp_path) == []


def test_a_slow_folder_is_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: time.sleep(0.1) or real(path))
    stop = StopRequest(tmp_path, watch_file=True)
    assert stop.reason() is None
    took, _ = seconds_of(lambda: [stop.reason() for _ in range(100)])
    assert took < 1, "10 s if every step waited"
    (tmp_path / "STOP").touch()
    wait_until(stop.reason)
    monkeypatch.undo()
    (tmp_path / "STOP").unlink()
    wait_until(lambda: stop.reason() is None)


def test_a_folder_that_cannot_be_read_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    stop = StopRequest(tmp_path, watch_file=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", stale)
        assert stop.reason() is None
    (tmp_path / "STOP").touch()
    wait_until(stop.reason)


def test_a_stop_file_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "STOP").touch()
    stop = StopRequest(tmp_path, watch_file=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        assert stop.acknowledge() == f"found {tmp_path / 'STOP'}"
    assert caplog.messages == [
        f"{tmp_path / 'STOP'} cannot be removed: Read-only file system; remove it before you rerun "
        "the command"
    ]


def owned_by_two(folder: Path, which: int) -> tuple[str, str]:
    from scaledistill.distributed.ranks import failing_together, process_group

    with process_group(60) as ranks:
        try:
            with owned(folder, 10, ranks, fresh=True) as status, failing_together():
                status.started = True
                if ranks.rank == which:
                    raise DataError("no such shard")
        except (DataError, PeerError) as error:
            return type(error).__name__, str(error)
        return "nothing", ""


def test_one_of_two_ranks_fails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"state": "failed", "message": "old"}))
    first, second = run_ranks(owned_by_two, 2, folder, 1)
    assert (first[0], second[0]) == ("DataError", "PeerError")
    assert status_of(folder)["message"] == first[1]
    assert first[1].startswith("rank 1 on ")
    assert status_of(tmp_path / "run.1")["message"] == "old"
