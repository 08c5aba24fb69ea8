from __future__ import annotations

import json
import logging
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import largest_file

from scaledistill.config.naming import own_metric
from scaledistill.metrics import recorder as metrics
from scaledistill.metrics.recorder import (
    Pace,
    Recorder,
    draw_losses,
    line,
    read_rows,
    summary,
)
from scaledistill.metrics.rows import by_student, student_value, student_values


def recorder(
    folder: Path, *, resumed_at: int = 0, trackers: tuple[str, ...] = (), **names: str
) -> Recorder:
    return Recorder(
        folder,
        max_steps=10,
        resumed_at=resumed_at,
        trackers=trackers,
        config={"run": {"seed": 1}, "data": "https://me:pw@host/shards"},
        **names,
    )


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 8.0 / step, **more}


def write_rows(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_rows_are_on_the_disk_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with recorder(tmp_path) as record:
        for step in (1, 2):
            record.record(row(step, grad_norm=1 / 3))
            assert read_rows(tmp_path / "metrics.jsonl")[-1] == row(step, grad_norm=1 / 3)
    assert [entry.getMessage() for entry in caplog.records] == [
        "step 1/10  loss 8.0000",
        "step 2/10  loss 4.0000",
    ]
    assert (tmp_path / "loss.png").is_file()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    values = {
        "loss": float("nan"),
        "grad_norm": float("inf"),
        "lr": -float("inf"),
        "skipped_steps": 1,
    }
    with recorder(tmp_path) as record:
        record.record({"step": 1, **values})
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "loss": null, "grad_norm": null, "lr": null, "skipped_steps": 1}'


def test_a_resume_makes_later_rows_again(tmp_path: Path) -> None:
    write_rows(tmp_path, *(row(step) for step in range(1, 8)))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:5]
    with recorder(tmp_path, resumed_at=5) as record:
        record.record(row(6, again=True))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [*kept, json.dumps(row(6, again=True))]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["events.jsonl", "loss.png", "metrics.jsonl"]


def test_a_new_run_starts_an_empty_record(tmp_path: Path) -> None:
    write_rows(tmp_path, row(1))
    with recorder(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    "end",
    ['{"step": 3, "lo', '{"step": 3', "\0" * 30, "\n"],
    ids=["value", "brace", "zeros", "empty line"],
)
def test_a_last_line_that_was_cut(end: str, tmp_path: Path) -> None:
    write_rows(tmp_path, row(1), row(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + end)
    assert read_rows(path) == [row(1), row(2)]
    with recorder(tmp_path, resumed_at=2) as record:
        record.record(row(3))
    assert read_rows(path) == [row(1), row(2), row(3)]


def test_a_folder_s_name_is_no_formula(tmp_path: Path) -> None:
    """Variables that nobody expanded; an error of the picture would fail the finished run."""
    folder = tmp_path / "$MODEL_$LR"
    folder.mkdir()
    with recorder(folder) as record:
        record.record(row(1))
    assert (folder / "loss.png").is_file()


def test_a_picture_that_cannot_be_drawn_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(folder: Path) -> None:
        raise ValueError("a font is missing")

    monkeypatch.setattr("scaledistill.metrics.recorder.draw_losses", draw)
    with recorder(tmp_path) as record:
        record.record(row(1))
    assert f"{tmp_path}: no loss.png: a font is missing" in caplog.text


def test_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []
    draw_losses(tmp_path)
    write_rows(tmp_path, {"step": 1, "loss": None})
    draw_losses(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    row_of_two = {"loss": 3.0, "loss/a": 1.0, "loss/b": 2.0, "validation_loss/a": 1.0}
    write_rows(tmp_path, {"step": 1, **row_of_two}, {"step": 2, "loss": 1.0, "loss/a": 1.0})
    draw_losses(tmp_path)
    assert (tmp_path / "loss.png").exists()


def test_the_values_of_many_students() -> None:
    names = [f"student-{number}" for number in range(12)]
    all_of_them = {f"{metric}/{name}": 1.0 for name in names for metric in ("loss", "lr")}
    assert student_values({**all_of_them, "loss": 12.0}, "loss", names) == dict.fromkeys(names, 1.0)
    # Before others were added, a run had one, which a row does not name.
    earlier = {"loss": 2.0, "loss/student-3/qq": 2.0}
    assert student_values(earlier, "loss", names) == {"student-3": 2.0}
    start = time.process_time()
    for _ in range(1000):
        student_values(all_of_them, "loss", names)
    assert time.process_time() - start < 0.5  # it was 3 s: a regular expression for each key


def test_a_full_disk_delays_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write(record: Recorder, step: int) -> None:
        record.record(row(step))
        record._disk.submit(lambda: None).result(60)  # a loaded machine may need long

    with recorder(tmp_path) as record:
        write(record, 1)
        with largest_file(40):
            write(record, 2)
            write(record, 3)
        write(record, 4)
    assert read_rows(tmp_path / "metrics.jsonl") == [row(step) for step in (1, 2, 3, 4)]
    assert caplog.text.count("metrics.jsonl: File too large; training continues") == 2


def test_a_full_disk_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with largest_file(40), recorder(tmp_path) as record:
        record.record(row(1))
        record.record(row(2))
    assert read_rows(tmp_path / "metrics.jsonl") == [row(1)]
    assert f"{tmp_path}: the record is not complete: File too large" in caplog.text


class Hanging:
    """A file on a disk that does not answer until `answers` is set."""

    def __init__(self, file: Any) -> None:
        self._file, self.answers = file, threading.Event()

    def write(self, text: str) -> None:
        self.answers.wait(60)
        self._file.write(text)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_disk_that_hangs_does_not_hold_up_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "WORD_SECONDS", 0.3)
    warning = (
        "metrics.jsonl: the disk has not answered for 0 s; training continues, and the rows are "
        "written when it does"
    )
    with recorder(tmp_path) as record:
        for first in (2, 102):
            record.record(row(first - 1))
            record._file = file = Hanging(getattr(record._file, "_file", record._file))  # type: ignore[assignment]
            start = time.monotonic()
            for step in range(first, first + 98):
                record.record(row(step))
            assert time.monotonic() - start < 5, "10 s if each row were waited for"
            assert read_rows(tmp_path / "metrics.jsonl")[-1]["step"] == first - 1
            time.sleep(0.3)
            record.record(row(first + 98))
            file.answers.set()
            record._waiting[-1][1].result(60)
    assert read_rows(tmp_path / "metrics.jsonl") == [row(step) for step in range(1, 201)]
    assert [warning in message for message in warnings(caplog)] == [True, True], "once each time"
    assert (tmp_path / "loss.png").is_file()


def test_a_disk_that_hangs_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.1)
    with recorder(tmp_path) as record:
        record.record(row(1))
        record._file = file = Hanging(record._file)  # type: ignore[assignment]
        record.record(row(2))
    assert warnings(caplog) == [
        f"{tmp_path}: the record is not complete: the disk has not answered for 0 s"
    ]
    file.answers.set()
    record._waiting[-1][1].result(60)
    assert read_rows(tmp_path / "metrics.jsonl") == [row(1), row(2)]


def test_trackers_see_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    with recorder(tmp_path) as record:
        monkeypatch.setattr(record._trackers, "log", lambda values, step: seen.append(step))
        record._file = file = Hanging(record._file)  # type: ignore[assignment]
        for step in range(1, 6):
            record.record(row(step))
        assert seen == [1, 2, 3, 4, 5]
        file.answers.set()


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({"loss": 1.23456}, "loss 1.2346"),
        ({"loss": None, "mfu": None}, "loss not finite"),
        (
            {
                "loss": 2.0,
                "validation_loss": 1.5,
                "tokens_per_second": 12_345.6,
                "mfu": 0.417,
                "data_wait_fraction": 0.0123,
                "memory_peak_bytes": 45_600_000_000,
                "lr": 1e-3,
            },
            "loss 2.0000  validation 1.5000  12.3k tokens/s  MFU 42%  data wait 1.2%  memory 45.6 "
            "GB",
        ),
        (
            {
                "loss": None,
                "loss/a": 2.0,
                "loss/a/qq": 1.0,
                "loss/b": None,
                "validation_loss": 3.5,
                "validation_loss/a": 1.5,
                "validation_loss/b": 2.0,
                "probe/a/stsb_spearman": 0.5,
                "probe/a/stsb_spearman_below": 0.6,
                "probe/b/stsb_spearman": 0.25,
            },
            "loss not finite  (a 2.0000, b not finite)  validation 3.5000  (a 1.5000, b 2.0000)  "
            "STS-B probe  (a 0.500, b 0.250)",
        ),
        ({"loss": 1.0, "validation_loss": None}, "loss 1.0000  validation not finite"),
        ({"loss": 1.0, "tokens_per_second": 999.4}, "loss 1.0000  999 tokens/s"),
        ({"loss": 1.0, "tokens_per_second": 2.5e6}, "loss 1.0000  2.5M tokens/s"),
        ({"loss": 1.0, "tokens_per_second": 3e9}, "loss 1.0000  3.0G tokens/s"),
    ],
)
def test_summary(figures: dict[str, Any], text: str) -> None:
    assert summary({"step": 3, **figures}) == text


def test_a_line_of_the_log() -> None:
    figures = {"step": 3, "loss": 2.0, "lr": 6e-4, "tokens_per_second": 1500.0}
    assert line(figures) == "loss 2.0000  1.5k tokens/s  lr 6.00e-04"
    assert line(figures, 7384.6) == "loss 2.0000  1.5k tokens/s  lr 6.00e-04  2:03:05 left"
    assert line({"step": 3, "loss": 2.0}, 90_000) == "loss 2.0000  1 day, 1:00:00 left"
    several = {"step": 3, "loss": 2.0, "lr/a": 6e-4, "lr/b": 1e-3}
    assert line(several) == "loss 2.0000  lr  (a 6.00e-04, b 1.00e-03)"


def test_a_student_of_a_run_whose_students_change() -> None:
    alone = {"step": 1, "loss": 1.0, "loss/a/qq": 0.5, "validation_loss": 0.7}
    several = {"step": 2, "loss": 5.0, "loss/a": 2.0, "loss/b": 3.0, "loss/a/qq": 1.0}
    assert by_student(alone, "loss") == {}
    assert by_student(several, "loss") == {"a": 2.0, "b": 3.0}
    assert [student_value(each, "loss", "a") for each in (alone, several)] == [1.0, 2.0]
    assert [student_value(each, "loss", "b") for each in (alone, several)] == [None, 3.0]
    assert student_value(alone, "validation_loss", "a") == 0.7
    assert own_metric("lr", "a", ["a"]) == "lr"
    assert own_metric("lr", "a", ["a", "b"]) == "lr/a"


def test_how_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 106.0, 118.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    pace = Pace(20)
    assert [pace.seconds_left(step) for step in (5, 8, 14, 20)] == [None, 24.0, 12.0, None]


def test_the_log_says_how_long_it_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with recorder(tmp_path) as record:
        record.record(row(4, lr=1e-3), 60.2)
    assert caplog.messages == ["step 4/10  loss 2.0000  lr 1.00e-03  0:01:00 left"]


def test_loss_png(tmp_path: Path) -> None:
    folder = tmp_path / "a_run"
    folder.mkdir()
    rows = [
        row(step, validation_loss=9.0 / step if step % 10 == 0 else None) for step in range(1, 41)
    ]
    rows[4]["loss"] = None  # a skipped step
    write_rows(folder, *rows)
    draw_losses(folder)
    content = (folder / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (960, 540)
    from matplotlib.image import imread

    pixels = imread(folder / "loss.png")[..., :3]
    for red, green, blue in ((31, 119, 180), (214, 39, 40)):  # the two curves
        colour = torch.tensor([red, green, blue]) / 255
        assert int((torch.from_numpy(pixels) - colour).abs().amax(-1).lt(0.02).sum()) > 100
