"""Numbers and suggestions in messages; errors about a parameter, and its names."""

from __future__ import annotations

import os
import pickle
import signal

import pytest

from scaledistill.config.naming import student_names
from scaledistill.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    ConfigError,
    DataError,
    Field,
    Problems,
    SettingError,
    SourceError,
    carry_out,
    counted,
    did_you_mean,
    named,
    near_miss,
    near_misses,
)


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "rank", "0 ranks"),
        (1, "rank", "1 rank"),
        (1024, "rank", "1,024 ranks"),
        (2, "micro-batch", "2 micro-batches"),
    ],
)
def test_counted(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    ("found", "near", "end"),
    [
        ("trian", "train", "; did you mean train?"),
        ("train", "train", "; did you mean train?"),
        ("xyz", None, ""),
    ],
)
def test_near_miss(found: str, near: str | None, end: str) -> None:
    known = {"train": 1, "data": 2, "trains": 3}
    assert near_miss(found, known) == near
    assert did_you_mean(near_miss(found, known)) == end


def test_near_misses_are_sorted_by_likeness() -> None:
    known = ["gelu_new", "gelu", "silu", "tanh"]
    assert near_misses("gelu", known, at_most=2) == ["gelu", "gelu_new"]
    assert near_misses("gelu", known, at_most=3, cutoff=0.9) == ["gelu"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            SettingError("num_heads", 48, "does not divide 1024", "use 32 or 64"),
            "num_heads=48 does not divide 1024; use 32 or 64",
        ),
        (SettingError("pairs", expected="is empty"), "pairs is empty"),
        (SettingError("backend", "x", remedy="use auto"), "backend='x'; use auto"),
        (SettingError("workers", 9, ", expected 1 to 4"), "workers=9, expected 1 to 4"),
        (
            SourceError("model", "m", ": no such folder", "give one"),
            "model='m': no such folder; give one",
        ),
        (
            SettingError(
                "layers", 7, ("is more than ", Field("most", 5)), ("set ", Field("map"), " too")
            ),
            "layers=7 is more than most=5; set map too",
        ),
    ],
)
def test_a_message_by_itself(error: ConfigError | DataError, text: str) -> None:
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text


def test_exit_codes_and_types() -> None:
    wrong, missing = SettingError("a"), SourceError("b")
    assert (wrong.exit_code, missing.exit_code) == (EXIT_CONFIG, EXIT_ENVIRONMENT)
    assert isinstance(wrong, (ConfigError, ValueError))
    assert isinstance(wrong, ValueError)
    assert isinstance(missing, DataError)
    assert not isinstance(missing, ConfigError)


def load(folder: str) -> None:
    """Stand for a leaf."""
    raise SourceError(
        "folder", folder, "is empty", ("give another ", Field("folder"), " or ", Field("init", "x"))
    )


def open_model(model: str) -> None:
    """Stand for a function that passes its parameter on."""
    with named(folder="model"):
        load(f"cache/{model}")


def test_edges_rename_what_a_leaf_names() -> None:
    with pytest.raises(SourceError) as caught, named(model="teacher.model", init="students.s.init"):
        open_model("bert")
    error = caught.value
    assert str(error) == (
        "teacher.model='cache/bert' is empty; give another teacher.model or students.s.init='x'"
    )
    assert (error.field, error.found) == ("teacher.model", "cache/bert")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert caught.traceback[-1].name == "load"


def test_an_edge_may_replace_values_and_write_options() -> None:
    names = {"model": Field("--model", "bert"), "init": Field("use_teacher_weights", False)}
    with pytest.raises(SourceError) as caught, named(**names):
        open_model("bert")
    assert str(caught.value) == (
        "--model 'bert' is empty; give another --model or use_teacher_weights=False"
    )


def test_parts_of_a_field_follow_it() -> None:
    error = SettingError("pairs.qq", -1.0)
    error.rename({"pairs": "relations.pairs"})
    assert str(error) == "relations.pairs.qq=-1.0"
    error.rename({"pairs": "other"})
    assert str(error) == "relations.pairs.qq=-1.0"
    for names, text in (
        ({"config": "student"}, "student.width=8"),
        ({"config": "student", "config.width": "student_width"}, "student_width=8"),
        ({"config": "--config"}, "--config 8"),
    ):
        error = SettingError("config.width", 8)
        error.rename(names)
        assert str(error) == text


def test_other_errors_pass_an_edge_unchanged() -> None:
    with pytest.raises(ConfigError, match=r"^num_heads is mentioned$"), named(num_heads="x"):
        raise ConfigError("num_heads is mentioned")
    with pytest.raises(KeyError), named(num_heads="x"):
        raise KeyError("num_heads")


def test_problems_are_joined_and_renamed_together() -> None:
    problems = Problems()
    assert problems.attempt(load, "a") is None
    problems.attempt(load, "a")
    problems.found.append(SettingError("folder", 3, "is a number"))
    problems.found.append(ConfigError("no setting"))
    with pytest.raises(DataError) as caught, named(folder="--folder"):
        problems.raise_all()
    assert type(caught.value) is DataError
    assert str(caught.value).splitlines() == [
        "--folder 'a' is empty; give another --folder or init='x'",
        "--folder 3 is a number",
        "no setting",
    ]


def test_the_settings_of_a_student() -> None:
    error = SettingError(
        "config.hidden_size", 9, remedy=(Field("layer_map"), Field("init", "random"))
    )
    error.rename(student_names("s"))
    assert str(error) == "students.s.hidden_size=9; students.s.layer_mapstudents.s.init='random'"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_or_a_closed_terminal_stops_a_subcommand_like_ctrl_c(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        code = carry_out(
            lambda: signal.raise_signal(number), "make", interrupted="nothing was written"
        )
        assert code == EXIT_INTERRUPTED
        assert capsys.readouterr().err == "make: interrupted; nothing was written\n"
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_nohup_ignores_does_not_stop_a_subcommand() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert carry_out(lambda: os.kill(os.getpid(), signal.SIGHUP), "make") == EXIT_DONE
    finally:
        signal.signal(signal.SIGHUP, before)
