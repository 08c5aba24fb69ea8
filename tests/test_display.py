from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console
from rich.logging import RichHandler

from scaledistill.metrics.display import ago, sparkline
from scaledistill.metrics.events import read_events
from scaledistill.metrics.recorder import Recorder

SKIPPED = "step 290000 skipped: the student's output was not finite on samples 74239744 to 74239999"


class Screen(io.StringIO):
    """A terminal: what was written is drawn by pyte."""

    def __init__(self, columns: int, lines: int) -> None:
        super().__init__()
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.Stream(self._screen)
        self.raw = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.raw += text
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display if line.strip()]


@pytest.fixture
def package_log() -> Iterator[logging.Logger]:
    log = logging.getLogger("scaledistill")
    before = log.handlers[:], log.propagate, log.level
    yield log
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


def draw(
    folder: Path,
    log: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    lines: int,
    students: tuple[str, ...] = ("l12-h384", "l6-h384"),
) -> Screen:
    """Show a run with all figures, warnings and messages; return the screen at its end."""
    folder.mkdir()
    screen = Screen(columns, lines)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    monkeypatch.setattr(sys, "stderr", screen)
    log.handlers[:] = [RichHandler(console=Console(stderr=True), show_path=False)]
    log.setLevel(logging.INFO)
    with Recorder(folder, max_steps=400_000, resumed_at=100_000, trackers=(), config={}) as record:
        for number in range(1, 31):
            step = 100_000 + number * 10_000
            row: dict[str, Any] = {"step": step, "loss": 2 / number}
            if len(students) > 1:
                row |= {f"loss/{name}": 1 / number for name in students}
            row |= {
                "tokens_per_second": 123_456.0,
                "mfu": 0.41,
                "data_wait_fraction": 0.001,
                "memory_peak_bytes": 40e9,
                **{f"lr/{name}": 6e-4 for name in students},
            }
            if number == 15:
                row |= {"validation_loss": 1.3456, "probe/stsb_spearman": 0.612}
                row |= {f"validation_loss/{name}": 0.6728 for name in students}
                record.event("saved", "checkpoint of step 240000", 240_000)
            if number == 19:
                log.warning(SKIPPED, extra={"event": "skipped"})
            if number == 20:
                log.info("a message")
            record.advance(step)
            record.record(row, 200_000 - number)
            assert record._display
            if number in (1, 16, 30):  # besides, it is drawn four times a second
                record._display._live.refresh()
        record.show_notices(lambda: "got SIGINT: saving a checkpoint and stopping")
    return screen


@pytest.mark.parametrize(
    ("columns", "lines", "colour"), [(80, 24, True), (80, 24, False), (200, 50, True)]
)
def test_the_display(
    tmp_path: Path,
    package_log: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    lines: int,
    colour: bool,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = draw(tmp_path / "my_run", package_log, monkeypatch, columns, lines)
    shown = screen.lines
    words = " ".join(" ".join(shown).split())
    assert "…" not in words
    for figures in (
        "step 400,000/400,000 100.0%",
        "2 days, 7:32:50 left",
        "loss 0.0667 █",
        "l12-h384 0.0333 █",
        "l6-h384 0.0333 █",
        "validation 1.3456 (l12-h384 0.6728, l6-h384 0.6728) STS-B probe 0.612 at step 250,000",
        "speed 123.5k tokens/s MFU 41% data wait 0.1% memory 40.0 GB",
        "learning rate 6.00e-04",
        "checkpoint step 240,000, ",
        f"warning {SKIPPED}",
        "stopping got SIGINT: saving a checkpoint and stopping",
    ):
        assert figures in words, figures
    # Redrawn in place: each part is there once, with the messages above.
    starts = [line.split("  ")[0] for line in shown]
    for label in ("my_run", "loss", "validation", "speed", "checkpoint", "warning", "stopping"):
        assert starts.count(label) == 1, label
    assert words.count("step 290000 skipped") == 2, "logged above, and in the display"
    assert words.index("a message") < words.index("my_run")
    assert bool(re.search(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;)", screen.raw)) == colour


def test_many_students_fit(
    tmp_path: Path, package_log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(f"student-{number}" for number in range(40))
    shown = draw(tmp_path / "my_run", package_log, monkeypatch, 200, 60, names).lines
    assert sum(line.startswith("  student-") for line in shown) == 40
    assert shown[-1].startswith("stopping")
    few = draw(tmp_path / "other_run", package_log, monkeypatch, 200, 30, names).lines
    assert sum(line.startswith("  student-") for line in few) == 18
    assert any("and 22 more students" in line for line in few)


def test_a_terminal_that_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package_log: logging.Logger
) -> None:
    """The run ends as it would have: it has to save first."""
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen(80, 24)
    monkeypatch.setattr(sys, "stderr", screen)
    with Recorder(tmp_path, max_steps=10, resumed_at=0, trackers=(), config={}) as record:
        assert record._display

        def write(text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(screen, "write", write)
        record.record({"step": 4, "loss": 2.0, "lr": 1e-3})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 4


def test_plain_lines_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a terminal, and on one that cannot move the cursor."""
    caplog.set_level("INFO")
    dumb = Screen(80, 24)
    for name, stderr in (("dumb", dumb), ("file", io.StringIO())):
        monkeypatch.setenv("TERM", name)
        monkeypatch.setattr(sys, "stderr", stderr)
        with Recorder(tmp_path, max_steps=10, resumed_at=0, trackers=(), config={}) as record:
            assert not record.show_notices(str)
            record.record({"step": 4, "loss": 2.0, "lr": 1e-3}, 60.2)
        assert stderr.getvalue() == ""
    text = "step 4/10  loss 2.0000  lr 1.00e-03  0:01:00 left"
    assert caplog.messages == [text, text]
    assert dumb.raw == ""


def test_events(tmp_path: Path) -> None:
    log = logging.getLogger("scaledistill.training.skips")
    for resumed_at in (0, 5):
        facts = {"environment": {"ranks": 2}}
        with (
            pytest.raises(KeyError) if resumed_at else pytest.MonkeyPatch.context(),
            Recorder(
                tmp_path,
                max_steps=9,
                resumed_at=resumed_at,
                trackers=(),
                config={},
                facts=facts,
            ) as record,
        ):
            record.advance(resumed_at + 3)
            log.warning("step %d skipped", 3, extra={"event": "skipped"})
            log.warning("a slow disk")
            record.event("saved", "checkpoint of step 2", 2)
            if resumed_at:
                raise KeyError("l6")
            record.event("stopped", "stopped after step 3")
    log.warning("not of the run")
    path = tmp_path / "events.jsonl"
    path.write_text(path.read_text() + '{"kind": "saved", "st')
    events = read_events(path)
    assert [(event.kind, event.step, event.message) for event in events] == [
        ("started", 0, "at step 0"),
        ("skipped", 3, "step 3 skipped"),
        ("warning", 3, "a slow disk"),
        ("saved", 2, "checkpoint of step 2"),
        ("stopped", 3, "stopped after step 3"),
        ("resumed", 5, "from step 5"),
        ("skipped", 8, "step 3 skipped"),
        ("warning", 8, "a slow disk"),
        ("saved", 2, "checkpoint of step 2"),
        ("failed", 8, "KeyError: 'l6'"),
    ]
    assert events[0].details == events[5].details == facts


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([None, 0.0], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([8.0, 4.0, None, 2.0, 1.0], "█▆▃▁"),
        ([1.0] * 4 + [3.0] * 4, "▁▁██"),
    ],
)
def test_sparkline(values: list[float | None], text: str) -> None:
    assert sparkline(values, 4) == text


def test_how_long_ago() -> None:
    assert [ago(x) for x in (0.2, 59, 200, 7200)] == [
        "0 s ago",
        "59 s ago",
        "3 min ago",
        "2.0 h ago",
    ]
