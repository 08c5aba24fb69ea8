from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_metrics import recorder, row

from scaledistill.errors import ConfigError
from scaledistill.metrics.recorder import read_rows
from scaledistill.metrics.trackers import check_trackers
from scaledistill.storage.files import read_json


def test_unknown_tracker() -> None:
    check_trackers([])
    with pytest.raises(
        ConfigError, match=r"^trackers: unknown tracker 'tensorbord'; known: aim, .*wandb$"
    ):
        check_trackers(["tensorbord"])


def test_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(
        ConfigError,
        match=r"^trackers: 'wandb' is not installed; pip install it or remove it$",
    ):
        recorder(tmp_path, trackers=("wandb",))


def test_a_tracker_gets_the_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import tracking

    calls: list[tuple[str, Any]] = []

    class Fake(tracking.GeneralTracker):
        name = "wandb"
        requires_logging_directory = False

        def __init__(self, run_name: str) -> None:
            calls.append(("name", run_name))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(("config", values))

        def log(self, values: dict[str, Any], step: int | None) -> None:
            calls.append(("log", (step, values)))

        def finish(self) -> None:
            calls.append(("finish", None))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    with recorder(tmp_path, trackers=("wandb",)) as record:
        record.record(row(2, lr=float("nan"), grad_norm=0.5))
    assert calls == [
        ("name", tmp_path.name),
        ("config", {"config": '{"run": {"seed": 1}, "data": "https://***@host/shards"}'}),
        ("log", (2, {"loss": 4.0, "grad_norm": 0.5})),
        ("finish", None),
    ]


@pytest.mark.parametrize("in_use", [False, True])
def test_accelerate_s_runtime_is_left_as_it_was(
    in_use: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run of several ranks neither hands its processes to accelerate nor takes its runtime."""
    pytest.importorskip("tensorboard", reason="the extra 'tracking' is not installed")
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    if in_use:
        PartialState(cpu=True)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    before = dict(PartialState._shared_state)
    with recorder(tmp_path, trackers=("tensorboard",)) as record:
        record.record(row(1))
        assert PartialState().num_processes == 1
        assert os.environ == environment
    assert PartialState._shared_state == before


def test_tensorboard_is_equal_to_the_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read back after a resume, to the 32 bits of its format, and without what is not finite."""
    pytest.importorskip("tensorboard", reason="the extra 'tracking' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures = {"lr": 1 / 3, "loss/small": 1e-9, "tokens": 2**40, "memory_gb": 47.9}
    for first, steps in ((1, (1, 2, 3)), (3, (3, 4))):  # the third step was not saved
        with recorder(
            tmp_path, resumed_at=first - 1, trackers=("tensorboard",), run_name="mine"
        ) as record:
            for step in steps:
                norm = math.nan if step == 2 else (step + first) / 7
                record.record(row(step, **figures, grad_norm=norm))
    events = EventAccumulator(str(tmp_path / "mine"))
    events.Reload()
    read = {
        (event.step, name, event.value)
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [found["step"] for found in rows] == [1, 2, 3, 4]
    assert read == {
        (found["step"], name, float(np.float32(value)))
        for found in rows
        for name, value in found.items()
        if name != "step" and value is not None
    }
    # The reader says that it leaves the repeated step out.
    warned = [found.name for found in caplog.records if found.levelno >= logging.WARNING]
    assert warned == ["tensorboard"]


class Calls(list[Any]):
    """What a fake tracker was asked to do."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Return a function that registers a tracker under a name, as accelerate's are, failing in some
    of its methods.
    """
    from accelerate import tracking

    def register(name: str, *failing: str, error: BaseException | None = None) -> Calls:
        calls = Calls()

        def note(what: str, *values: Any) -> None:
            calls.append((what, *values))
            if what in failing:
                raise error or ConnectionError("no route to host")

        class Fake(tracking.GeneralTracker):
            requires_logging_directory = False

            def __init__(self, project: str, **options: Any) -> None:
                note("new", project, options)
                self.run = SimpleNamespace(name=f"{options.get('name')} (2)")
                self.active_run = SimpleNamespace(info=SimpleNamespace(run_id="mlflow-17"))

            def start(self) -> None:
                note("start")

            def store_init_configuration(self, values: dict[str, Any]) -> None:
                note("config")

            def log(self, values: dict[str, Any], step: int | None) -> None:
                note("log", step)

            def finish(self) -> None:
                note("finish")

        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Fake)
        return calls

    return register


@pytest.mark.parametrize("error", [None, SystemExit(1)], ids=["error", "exit"])
@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ("new", ["new"]),
        ("start", ["new", "start"]),
        ("config", ["new", "start", "config", "finish"]),
        ("log", ["new", "start", "config", "log", "finish"]),
        ("finish", ["new", "start", "config", "log", "log", "log", "finish"]),
    ],
)
def test_a_tracker_that_fails_ends_no_run(
    failing: str,
    expected: list[str],
    error: BaseException | None,
    fake: Callable[..., Calls],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, sound = fake("broken", failing, error=error), fake("sound")
    with recorder(tmp_path, trackers=("broken", "sound")) as record:
        for step in (1, 2, 3):
            record.record(row(step))
    assert [call[0] for call in broken] == expected
    assert [call[0] for call in sound] == ["new", "start", "config", "log", "log", "log", "finish"]
    [warning] = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert warning.startswith("logging.trackers: broken could not ")
    assert warning.endswith("; the run continues without it, metrics.jsonl has every figure")
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    assert (tmp_path / "loss.png").is_file()


def test_the_record_is_closed_before_a_tracker_that_takes_its_time(
    fake: Callable[..., Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake("slow", "finish", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), recorder(tmp_path, trackers=("slow",)) as record:
        record.record(row(1))
    assert calls[-1] == ("finish",)
    assert record._file.closed
    assert (tmp_path / "loss.png").is_file()


def test_wandb_goes_on_in_the_same_run(fake: Callable[..., Calls], tmp_path: Path) -> None:
    calls = fake("wandb")
    for resumed_at in (0, 4):
        with recorder(
            tmp_path,
            resumed_at=resumed_at,
            trackers=("wandb",),
            project="students",
            run_name="first",
        ):
            pass
    (_, project, options), (_, again, later) = (call for call in calls if call[0] == "new")
    assert (project, again) == ("students", "students")
    assert options["id"] == later["id"] == read_json(tmp_path / "trackers.json")["wandb"]  # type: ignore[index]
    assert options == {"id": options["id"], "resume": "allow", "name": "first"} == later
    assert [call[0] for call in calls].count("config") == 1
    other = tmp_path / "other"
    other.mkdir()
    with recorder(other, trackers=("wandb",)):
        pass
    assert calls[-4][2]["id"] != options["id"]
    assert calls[-4][1] == calls[-4][2]["name"] == "other"


def test_names_that_the_environment_gives(
    fake: Callable[..., Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake("wandb")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.setenv("WANDB_NAME", "theirs")
    for names in ({}, {"run_name": "ours"}):
        with recorder(tmp_path, trackers=("wandb",), **names):
            pass
    found = [call[2] for call in calls if call[0] == "new"]
    assert [(each["id"], each["name"]) for each in found] == [("abc", "theirs"), ("abc", "ours")]


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("mlflow", {"run_name": "mine"}, {"run_id": "mlflow-17"}),
        ("trackio", {"name": "mine", "resume": "never"}, {"name": "mine (2)", "resume": "allow"}),
        ("another", {}, {}),
    ],
)
def test_others_go_on_in_the_same_run(
    name: str,
    first: dict[str, str],
    then: dict[str, str],
    fake: Callable[..., Calls],
    tmp_path: Path,
) -> None:
    calls = fake(name)
    for resumed_at in (0, 4):
        with recorder(tmp_path, resumed_at=resumed_at, trackers=(name,), run_name="mine"):
            pass
    assert [call[2] for call in calls if call[0] == "new"] == [first, then]


def test_tensorboard_without_a_folder_to_write_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tracking' is not installed")
    (tmp_path / tmp_path.name).write_text("a file where its folder should be")
    with recorder(tmp_path, trackers=("tensorboard",)) as record:
        record.record(row(1))
    assert caplog.text.count("logging.trackers: tensorboard could not start (FileExistsError") == 1
    assert read_rows(tmp_path / "metrics.jsonl") == [row(1)]


@pytest.fixture
def bare_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with W&B installed, on which nobody has logged in."""
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wandb_without_a_key(bare_home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'wandb' has no API key; run `wandb login`, set WANDB_API_KEY, or set "
    ):
        check_trackers(["wandb"])
    (bare_home / ".netrc").write_text("machine example.org login user password key\n")
    (bare_home / ".netrc").chmod(0o600)
    with pytest.raises(ConfigError, match="no API key"):
        check_trackers(["wandb"])
    os.environ["WANDB_BASE_URL"] = "https://example.org"
    check_trackers(["wandb"])


@pytest.mark.parametrize(
    "variables",
    [{"WANDB_API_KEY": "k"}, {"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}],
    ids=str,
)
def test_wandb_with_a_key_or_without_need_of_one(
    bare_home: Path, variables: dict[str, str]
) -> None:
    os.environ.update(variables)
    check_trackers(["wandb"])


def test_wandb_that_is_offline_by_its_own_settings(bare_home: Path) -> None:
    (bare_home / "wandb").mkdir()
    (bare_home / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    check_trackers(["wandb"])
