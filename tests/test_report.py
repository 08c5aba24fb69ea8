from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from scaledistill.cli.report import main
from scaledistill.errors import SourceError
from scaledistill.metrics.events import Event
from scaledistill.report import library, page
from scaledistill.report.charts import downsample, line_charts
from scaledistill.report.page import report_at_end, write_report
from scaledistill.report.record import read_run

HOSTILE = '</script><script>alert(1)</script><img src="http://example.org/x.png">&amp;'
RESUMES = (1210, 2400, 2950)


def write_long_run(folder: Path, num_rows: int = 4000, students: int = 1) -> Path:
    """Write what a run of many rows leaves that was resumed three times and skipped two steps."""
    generator = random.Random(7)
    names = [f"l{6 - number}-h384" for number in range(students)]
    rows: list[dict[str, Any]] = []
    events = [Event("started", 0, "at step 0", time_of(0), FACTS)]
    for number in range(1, num_rows + 1):
        step, noise = number * 10, generator.gauss(1, 0.03)
        by_pair = {"qq": 1.1, "kk": 1.6, "vv": 0.6}
        base = (0.11 + 1.9 * math.exp(-number / 300)) * noise
        row: dict[str, Any] = {"step": step, "loss": base * 3.3 * students}
        for name in names:
            if students > 1:
                row[f"loss/{name}"] = base * 3.3
            row |= {f"loss/{name}/{pair}": base * weight for pair, weight in by_pair.items()}
            end = f"/{name}" if students > 1 else ""
            row[f"lr{end}"] = 6e-4 * min(number / 100, (num_rows - number) / num_rows)
            row[f"grad_norm{end}"] = abs(generator.gauss(0.4, 0.1))
        speed = 1.2e6 * generator.gauss(1, 0.02)
        row |= {
            "tokens_per_second": speed,
            "mfu": speed / 2.8e6,
            "data_wait_fraction": 0.3 if number == 1500 else abs(generator.gauss(0, 0.004)),
            "memory_peak_bytes": 45_600_000_000,
            "skipped_steps": (number >= 700) + (number >= 3100),
        }
        if number in (700, 3100):
            row["loss"] = None
            text = f"step {step} skipped: the student's output was not finite"
            events.append(Event("skipped", step, text, time_of(number)))
        if number % 200 == 0:
            row["validation_loss"] = base * 3.5 * students
            if students > 1:
                row |= {f"validation_loss/{name}": base * 3.5 for name in names}
            row["probe/stsb_spearman" if students == 1 else f"probe/{names[0]}/stsb_spearman"] = (
                0.8 - 0.5 * math.exp(-number / 900)
            )
            text = f"checkpoint of step {step}"
            events.append(Event("saved", step, text, time_of(number)))
        if number in RESUMES:
            text = f"from step {step}"
            events.append(Event("resumed", step, text, time_of(number), FACTS))
        rows.append(row)
    events.append(Event("done", step, f"{step} steps done", time_of(num_rows)))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "events.jsonl").write_text("".join(event.line() for event in events))
    config = {
        "run": {"folder": HOSTILE, "seed": 1},
        "students": {name: {"num_layers": 6} for name in names},
        "train": {"max_steps": step, "learning_rate": 6e-4},
    }
    (folder / "config.json").write_text(json.dumps(config))
    status = {"state": "done", "step": step, "max_steps": step, "message": f"{step} steps done"}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "maps.json").write_text(json.dumps(maps_of(names, step)))
    return folder


FACTS = {
    "environment": {"device": "NVIDIA H100", "ranks": 8, "torch": "2.13.0"},
    "teacher": {"model": HOSTILE, "layer": 18},
    "data": {"training": {"rows": 101_763, "source": {"files": ["a.txt", HOSTILE]}}},
}


def time_of(number: int) -> str:
    """Return when a row was written: one every 20 seconds."""
    start = datetime(2026, 1, 1, 10, tzinfo=timezone.utc)
    return (start + timedelta(seconds=20 * number)).isoformat(timespec="seconds")


def maps_of(names: list[str], step: int) -> dict[str, Any]:
    tokens = ["[CLS]", "the", HOSTILE, "cat", "sat", "[SEP]"]
    uniform = [1000 // len(tokens)] * len(tokens) ** 2
    head = {"head": 3, "kl": 0.02, "place": "the closest", "teacher": [uniform] * 2}
    student = {
        "num_rows": 16,
        "kl": {pair: [0.01 * number for number in range(1, 13)] for pair in ("qq", "vv")},
        "maps": {pair: [{**head, "student": [uniform] * 2}] for pair in ("qq", "vv")},
    }
    return {
        "step": step,
        "source": "the first rows of held-out",
        "sentences": [tokens, tokens],
        "students": dict.fromkeys(names, student),
    }


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_run(tmp_path_factory.mktemp("runs") / "run-a")


@pytest.fixture(scope="module")
def report(long_run: Path) -> Path:
    return write_report([long_run], long_run / "report.html")


class Page(HTMLParser):
    """The elements of a page, its text, and the content of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.texts[tag] = self.texts.get(tag, "") + data + "\n"
        if tag == "script":
            self.scripts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def test_a_page_parses_and_loads_nothing(report: Path) -> None:
    text = report.read_text()
    assert len(text.encode()) < 3_000_000
    parsed = Page(text)
    names = [name for name, _ in parsed.elements]
    assert names.count("script") == 3
    assert "img" not in names, "settings are escaped"
    links = {value for _, found in parsed.elements for key, value in found.items()
             if key in ("src", "href")}  # fmt: skip
    assert links == {"data:,"}
    [policy] = [found["content"] for _, found in parsed.elements
                if found.get("http-equiv") == "Content-Security-Policy"]  # fmt: skip
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not re.search(r"\bhttps?:", policy)
    for title in ("Training", "What the student learns", "Events", "Data and teacher"):
        assert title in parsed.texts["h2"]
    for title in ("Loss", "Loss by pair", "Throughput", "Model FLOPs utilisation", "Data wait",
                  "Memory", "Learning rate", "KL per relation head", "Relation maps"):  # fmt: skip
        assert title in parsed.texts["h3"].split("\n")
    assert HOSTILE in parsed.texts["td"], "the text is shown as it is"
    assert "step 7000 skipped: the student's output was not finite" in parsed.texts["td"]
    assert parsed.texts["td"].count("resumed") == 2 * 3, "with and without saves"
    assert HOSTILE in parsed.data["maps"][0]["sentences"][0]


def test_key_figures(report: Path) -> None:
    figures = Page(report.read_text()).texts
    values = dict(zip(figures["dt"].split("\n"), figures["dd"].split("\n"), strict=True))
    assert values["step"] == "40,000 of 40,000"
    assert values["skipped steps"] == "2"
    assert values["resumes"] == "3"
    # 20 s a row, from the start to the end, without the pauses before the resumes.
    assert values["time"] == page.clock(20 * (1200 + 1190 + 400 + 1050))


def test_spikes_survive(long_run: Path) -> None:
    [loss, *_] = [chart for chart in line_charts([read_run(long_run)]) if chart.title == "Loss"]
    lines = loss.spec["data"]["values"].splitlines()
    assert 500 < len(lines) < 1200
    assert any(line.startswith("7000,,") for line in lines), "a skipped step is a gap"
    charts = {chart.title: chart for chart in line_charts([read_run(long_run)])}
    assert "\n15000,0.3," in charts["Data wait"].spec["data"]["values"]


@pytest.mark.parametrize("most", [40, 100])
def test_downsample(most: int) -> None:
    points = [(x, math.sin(x / 50)) for x in range(1000)]
    points[333] = (333, 50.0)
    points[700] = (700, -50.0)
    some: list[tuple[int, float | None]] = [*points]
    some[500] = (500, None)
    kept = downsample(some, most)
    assert len(kept) <= most + 2
    assert {(0, 0.0), (333, 50.0), (700, -50.0), (500, None), some[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert downsample(some, 1000) == some
    assert downsample([], most) == []


def test_several_runs_and_students(tmp_path: Path, long_run: Path) -> None:
    family = write_long_run(tmp_path / "family", 300, students=2)
    text = write_report([long_run, family], tmp_path / "out" / "page.html").read_text()
    assert len(text) < 3_000_000
    parsed = Page(text)
    [loss] = [
        spec for spec in parsed.data["charts"]
        if "layer" in spec and spec["layer"][-1]["encoding"]["y"]["title"] == "relation loss"
    ]  # fmt: skip
    labels = {line.split(",")[2] for line in loss["data"]["values"].splitlines()[1:]}
    assert labels == {"run-a", "family · l6-h384", "family · l5-h384"}
    assert [each["label"] for each in parsed.data["maps"]] == [
        "run-a",
        "family · l6-h384",
        "family · l5-h384",
    ]
    assert "Settings that differ" in parsed.texts["h3"]
    assert "train.max_steps" in parsed.texts["th"]
    assert "Loss of vv" in parsed.texts["h3"]


def test_a_validation_that_was_not_finite(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 20)
    losses = (1.5, None)
    rows = [{"step": step, "loss": 1.0, "validation_loss": x} for step, x in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    figures = Page(write_report([folder], tmp_path / "page.html").read_text()).texts
    values = dict(zip(figures["dt"].split("\n"), figures["dd"].split("\n"), strict=True))
    assert values["validation loss"] == "not finite"
    assert values["best validation"] == "1.5000 at step 1"


def test_runs_of_equal_names(tmp_path: Path) -> None:
    folders = [write_long_run(tmp_path / parent / "run", 30) for parent in ("a", "b")]
    text = write_report(folders, tmp_path / "page.html").read_text()
    assert f"{folders[0]} vs. {folders[1]}" in Page(text).texts["h1"]


def test_a_run_is_shown_once(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 30)
    text = write_report([folder, tmp_path / "." / "run"], tmp_path / "page.html").read_text()
    assert Page(text).texts["h1"] == "run\n"


def test_what_happened_amid_many_saves_is_shown(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 30)
    events = [
        Event("saved", step, f"checkpoint of step {step}", time_of(step)) for step in range(900)
    ]
    events.insert(450, Event("dropped", 450, "student b is dropped", time_of(450)))
    (folder / "events.jsonl").write_text("".join(event.line() for event in events))
    text = Page(write_report([folder], tmp_path / "page.html").read_text()).texts
    assert "student b is dropped" in text["td"]
    assert "All events, with 900 saves" in text["summary"]
    assert "501 events in between are left out." in text["p"]
    assert "time (UTC)" in text["th"]


def test_the_time_of_a_run_under_way(tmp_path: Path) -> None:
    """Its last event may be a save of hours ago."""
    folder = write_long_run(tmp_path / "run", 30)
    status = {"state": "running", "updated": "2026-01-02T20:00:00+00:00"}
    (folder / "status.json").write_text(json.dumps(status))
    text = write_report([folder], tmp_path / "page.html").read_text()
    assert "<dt>time</dt><dd>1 day, 10:00:00</dd>" in text


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 30)
    (folder / "status.json").write_text('{"state": "failed", "message": "caf\\udce9.txt"}')
    assert "caf?.txt" in write_report([folder], tmp_path / "page.html").read_text()


def test_students_without_a_configuration(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 30, students=2)
    (folder / "config.json").unlink()
    assert Page(write_report([folder], tmp_path / "page.html").read_text()).data["charts"]


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 30)
    for name in ("events.jsonl", "maps.json", "config.json", "status.json"):
        (folder / name).unlink()
    parsed = Page(write_report([folder], tmp_path / "page.html").read_text())
    assert "has no relation maps yet" in parsed.texts["p"]
    assert "No events.jsonl in this folder." in parsed.texts["p"]
    assert parsed.data["maps"] == []


def test_glue_scores(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run", 30)
    score = {"median": 77.52, "low": 77.0, "high": 78.0, "n": 3}
    row = {"name": "l6", "scores": {"sst2/accuracy": score}, "average": 77.52, "published": None}
    (folder / "evaluation").mkdir()
    summary = {"columns": ["sst2/accuracy", "later/score"], "rows": [row]}
    (folder / "evaluation" / "summary.json").write_text(json.dumps(summary))
    parsed = Page(write_report([folder], tmp_path / "page.html").read_text())
    assert "77.5 ± 0.5" in parsed.texts["td"]
    assert "SST-2 accuracy" in parsed.texts["th"]
    assert "SST-2 accuracy,l6,77.52,77.0,78.0" in parsed.data["charts"][-1]["data"]["values"]


def test_what_is_not_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SourceError, match="is not a folder; give a run's folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(SourceError, match=r"has no metrics\.jsonl with rows; give a run's folder"):
        read_run(tmp_path)
    assert main([str(tmp_path / "missing")]) == 3
    assert f"RUN='{tmp_path}/missing' is not a folder" in capsys.readouterr().err
    assert main([str(tmp_path / "missing"), "--maps"]) == 3
    assert f"RUN='{tmp_path}/missing' is not a folder" in capsys.readouterr().err
    report_at_end(tmp_path)
    assert "no report.html: " in caplog.text


def test_the_command(long_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(long_run), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n"
    assert (tmp_path / "page.html").stat().st_size > 500_000
    assert main([str(long_run), "--output", str(tmp_path)]) == 2
    assert "found a folder, expected a file; add report.html" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.count("  scaledistill report runs/") == 2


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    expected = library.vega_script()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert library.vega_script() == expected


def test_without_the_library(
    long_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(library, "PACKAGE", "no-such-package")
    assert main([str(long_run)]) == 3
    missing = "needs no-such-package, which is not installed: pip install 'scaledistill[report]'"
    assert capsys.readouterr().err == f"scaledistill report: the report {missing}\n"
    report_at_end(long_run)
    assert caplog.messages == [f"no report.html: the report {missing}"]
    assert caplog.records[-1].levelname == "INFO"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("columns", [1280, pytest.param(500, marks=pytest.mark.full)])
def test_a_browser_draws_it(report: Path, tmp_path: Path, columns: int) -> None:
    """No error in the console, no request, all charts and maps drawn."""
    log = tmp_path / "net.json"
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        *("--enable-logging=stderr", "--virtual-time-budget=3000", "--timeout=60000"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}"),
        *(f"--window-size={columns},2000", f"--log-net-log={log}", report.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    charts = len(Page(report.read_text()).data["charts"])
    assert done.stdout.count('class="marks"') == charts + 2, "two maps of one head"
    # Headless Chromium itself asks its maker for this and that; the page must ask for nothing.
    hosts = set(re.findall(r'"url":"https?://([^/":]+)', log.read_text()))
    own = (".google.com", ".googleapis.com", ".gvt1.com")
    assert {host for host in hosts if not host.endswith(own)} == set()
