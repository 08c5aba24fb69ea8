from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_tree
from ranks import Job

from scaledistill.config.schema import RunSettings
from scaledistill.distributed import peers as module
from scaledistill.distributed.peers import PeerMonitor
from scaledistill.distributed.ranks import Ranks
from scaledistill.distributed.stall import Beat, Unchanged
from scaledistill.distributed.watchdog import Watchdog
from scaledistill.errors import DataError, PeerError
from scaledistill.run.resume_hint import resume_hint

LOST_PEER = RuntimeError(
    "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Ranked(Watchdog):
    """A rank's watchdog without its threads: `go_round` calls `peers.round`. While one waits, the
    living ones beat.
    """

    living: list[Ranked]
    peers: PeerMonitor

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        folder: Path,
        clock: Clock,
        **limits: int,
    ) -> None:
        self.ended: list[int] = []
        self.lines: list[str] = []
        ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
        limits = {"lost_rank_seconds": 10, "timeout_seconds": 60} | limits
        settings = RunSettings(folder=str(folder), **limits)
        hint = partial(resume_hint, folder)
        super().__init__(
            ranks, settings, store=store, clock=clock, leave=self.ended.append, resume_hint=hint
        )
        assert self._peers
        self.record_failure, self.peers, self._clock = self.lines.append, self._peers, clock
        self._over.wait = self._wait  # type: ignore[method-assign,assignment]

    def _wait(self, seconds: float) -> bool:
        self._clock.now += seconds
        for dog in self.living:
            dog.peers._publish()
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return clock


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., list[Ranked]]:
    store = dist.HashStore()
    return lambda number, **limits: [
        Ranked(rank, number, store, tmp_path, clock, **limits) for rank in range(number)
    ]


def go_round(dogs: list[Ranked], clock: Clock, seconds: float, moving: bool = True) -> None:
    """Let the living watchdogs look around for so many seconds, unless one ends its rank."""
    for dog in dogs:
        dog.living = dogs
    for _ in range(int(seconds)):
        clock.now += 1
        for dog in dogs:
            if moving:
                dog.at("teacher", 7)
            dog.peers.round()
            if dog.ended:
                return


def test_unchanged(clock: Clock) -> None:
    value = Unchanged(4, clock)
    assert value.seconds("a") == 0
    clock.now = 3
    assert value.seconds("a") == 3
    clock.now = 1000  # we were suspended ourselves
    assert value.seconds("a") == 7
    assert value.seconds("b") == 0


def test_a_silent_rank_is_named_by_its_neighbour(
    make: Callable[..., list[Ranked]],
    clock: Clock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dogs = make(3)
    (tmp_path / "checkpoints" / "step-000000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000000005" / "manifest.json").touch()
    go_round(dogs, clock, 20)
    assert not any(dog.ended for dog in dogs)
    others = [dogs[0], dogs[1]]
    go_round(others, clock, 9)
    assert not any(dog.ended for dog in dogs)
    started = clock.now
    go_round(others, clock, 5)
    assert dogs[1].ended == [3]
    assert clock.now - started < 10, "one second to the limit, six for a second look"
    dogs[0].peers.round()
    assert dogs[0].ended == [3]
    host = os.uname().nodename
    message = (
        f"rank 2 on {host} is lost: no heartbeat for 10 s (run.lost_rank_seconds=10): killed, "
        "stopped, or the machine or its network is down; last seen at step 7, 'teacher'; rerun the "
        "same command to resume from the checkpoint of step 5"
    )
    assert (dogs[0].lines, dogs[1].lines) == ([message], []), "the lowest rank left reports"
    assert [record.message for record in caplog.records] == [message]
    stacks = (tmp_path / "stacks" / "rank-1.txt").read_text()
    assert stacks.startswith(message)
    assert "test_a_silent_rank_is_named_by_its_neighbour" in stacks


def test_a_lost_machine_is_named_whole(make: Callable[..., list[Ranked]], clock: Clock) -> None:
    dogs = make(16)
    go_round(dogs, clock, 3)
    go_round(dogs[:4], clock, 12)
    ended = next(dog for dog in dogs if dog.ended)
    assert ended is dogs[3]
    assert ended.peers.verdict is not None
    assert ended.peers.verdict.lost == list(range(4, 16))
    assert ended.peers.verdict.message.startswith("ranks 4, 5, 6, 7, 8, 9, 10, 11 and 4 more on ")


def test_a_rank_that_never_comes(make: Callable[..., list[Ranked]], clock: Clock) -> None:
    dogs = make(2)
    go_round(dogs[:1], clock, 11)
    assert "rank 1 on a host that is not known is lost: no heartbeat for 10 s" in dogs[0].lines[0]
    assert "never seen" in dogs[0].lines[0]


def test_a_rank_that_is_done_is_not_lost(make: Callable[..., list[Ranked]], clock: Clock) -> None:
    dogs = make(2)
    go_round(dogs, clock, 2)
    dogs[1].peers.left = "done"
    dogs[1].peers._publish()
    go_round(dogs[:1], clock, 50)
    assert not dogs[0].ended


def test_a_stall_names_who_is_behind(
    make: Callable[..., list[Ranked]], clock: Clock, tmp_path: Path
) -> None:
    dogs = make(3, timeout_seconds=30)
    go_round(dogs, clock, 2)
    for dog in (dogs[0], dogs[2]):
        dog.at("optimizer")  # and waits there for rank 1
    go_round(dogs, clock, 29, moving=False)
    assert not any(dog.ended for dog in dogs)
    go_round(dogs, clock, 4, moving=False)
    assert dogs[0].lines == [
        f"no progress for 30 s (run.timeout_seconds=30): rank 1 on {os.uname().nodename} is at "
        f"step 7, 'teacher'; the stacks of the ranks are in {tmp_path / 'stacks'}; no checkpoint "
        "was saved yet: rerun the same command to start from the beginning"
    ]
    for dog in dogs[1:]:
        dog.peers.round()
        assert dog.ended == [3]
    assert {path.name for path in (tmp_path / "stacks").iterdir()} == {
        "rank-0.txt",
        "rank-1.txt",
        "rank-2.txt",
    }


def test_a_rank_that_works_while_others_wait_is_no_stall(
    make: Callable[..., list[Ranked]], clock: Clock
) -> None:
    dogs = make(2, timeout_seconds=30)
    for _ in range(100):
        dogs[1].at("student")
        go_round(dogs, clock, 1, moving=False)
    assert not any(dog.ended for dog in dogs)
    go_round(dogs, clock, 32, moving=False)
    assert "rank 0 on " in dogs[0].lines[0]


def test_all_stand_at_one_place(make: Callable[..., list[Ranked]], clock: Clock) -> None:
    dogs = make(2, timeout_seconds=30)
    go_round(dogs, clock, 33, moving=False)
    assert "each rank is at step 0, 'starting'" in dogs[0].lines[0]


@pytest.mark.parametrize("left", ["failed", ""])
def test_a_collective_that_lost_a_peer(
    left: str, make: Callable[..., list[Ranked]], clock: Clock
) -> None:
    dogs = make(3)
    go_round(dogs, clock, 2)
    dogs[0].peers.left = left
    if left:
        dogs[0].peers._publish()
    for dog in dogs[1:]:
        dog.living = dogs[1:]
        dog.peers._asked.set()
        dog.peers.round()
        assert not dog.ended, "its main thread ends it"
    message = (
        f"rank 0 on {os.uname().nodename} is lost: it ended or was killed; last seen at step 7, "
        "'teacher'; no checkpoint was saved yet: rerun the same command to start from the beginning"
    )
    with pytest.raises(DataError, match=message), dogs[1].naming_lost_ranks():
        raise LOST_PEER
    with pytest.raises(PeerError), dogs[2].naming_lost_ranks():
        raise LOST_PEER


def test_an_error_of_a_collective_with_all_ranks_there(
    make: Callable[..., list[Ranked]], clock: Clock
) -> None:
    dogs = make(2)
    go_round(dogs, clock, 2)
    dogs[0].peers._asked.set()
    dogs[0].peers.round()
    with pytest.raises(RuntimeError, match="Connection closed"), dogs[0].naming_lost_ranks():
        raise LOST_PEER
    with pytest.raises(ZeroDivisionError), dogs[0].naming_lost_ranks():
        raise ZeroDivisionError


class Broken(dist.HashStore):
    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Broken pipe")


def test_a_store_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()
    settings = RunSettings(folder=str(tmp_path), lost_rank_seconds=1)
    ranks = Ranks(1, 2, 1, torch.device("cpu"))
    watchdog = Watchdog(
        ranks,
        settings,
        store=Broken(),
        leave=lambda code: ended.set(),
        resume_hint=partial(resume_hint, tmp_path),
    )
    assert watchdog._peers
    watchdog._peers._known[0] = Beat(1, os.uname().nodename, 3, "teacher", 4, 0.0)
    started = time.monotonic()
    with watchdog:
        watchdog.at("backward", 5)
        assert ended.wait(10)
    assert time.monotonic() - started < 4
    assert caplog.messages == [
        f"rank 0 on {os.uname().nodename}, which holds the job's store, no longer answers "
        "(run.lost_rank_seconds=1): killed, stopped, or the machine or its network is down; this "
        "rank was at step 5, 'backward'; no checkpoint was saved yet: rerun the same command to "
        "start from the beginning"
    ]


def test_a_rank_that_is_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()
    settings = RunSettings(folder=str(tmp_path), lost_rank_seconds=1, timeout_seconds=1)
    watchdog = Watchdog(
        Ranks(0, 1, 0, torch.device("cpu")),
        settings,
        leave=lambda code: ended.set(),
        resume_hint=partial(resume_hint, tmp_path),
    )
    with watchdog:
        for _ in range(8):
            watchdog.at("teacher", 2)
            assert not ended.wait(0.2)
        assert ended.wait(10)
    assert "no progress for 1 s (run.timeout_seconds=1): rank 0 on " in caplog.text
    assert "test_a_rank_that_is_alone" in (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]


def distil_in_folder(tree: dict[str, Any], folder: Path) -> None:
    """Run the command line in this rank, its words and its pid in `folder`."""
    from scaledistill.cli.distill import main

    rank = os.environ["RANK"]
    words = os.open(folder / f"words-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(words, 2)
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    os._exit(main(["--config", str(folder / "config.json")]))


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGSTOP, 0),
        (signal.SIGKILL, 1),
        # A case of the fault suite's short form too.
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.full),
    ],
)
def test_a_rank_is_hit(
    number: signal.Signals, rank: int, tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    train = {"max_steps": 100_000, "global_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2}
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, train=train, run={"lost_rank_seconds": 3})
    folder = Path(tree["run"]["folder"])
    job = Job(distil_in_folder, 2, tree, tmp_path)
    hit, other = job.processes[rank], job.processes[1 - rank]
    try:
        deadline = time.monotonic() + 60
        while (
            not (folder / "metrics.jsonl").exists()
            or len((folder / "metrics.jsonl").read_text().splitlines()) < 3
        ):
            assert time.monotonic() < deadline, (tmp_path / "words-0").read_text()
            time.sleep(0.05)
        os.kill(int((tmp_path / f"pid-{rank}").read_text()), number)
        started = time.monotonic()
        other.join(30)
        took = time.monotonic() - started
        assert other.exitcode == 3
    finally:
        job.kill()
    assert took < (12 if number == signal.SIGSTOP else 8)
    assert hit.exitcode == -signal.SIGKILL
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["message"].startswith(f"rank {rank} on {os.uname().nodename}")
    words = (tmp_path / f"words-{1 - rank}").read_text()
    assert words.count(status["message"]) == 1
    if number == signal.SIGSTOP:
        assert "train_step" in (folder / "stacks" / f"rank-{1 - rank}.txt").read_text()
