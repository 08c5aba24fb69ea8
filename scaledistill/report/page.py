"""Write the report of one run, or of several side by side, as one self-contained HTML page.

Inputs: run folders. Outputs: an HTML file that loads nothing: charts, their data and the charting
library are in it, and its content security policy forbids requests. Not handled here: what the
charts show (`report.charts`), measuring relation maps (`training.maps`).
"""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from scaledistill.errors import DataError, counted
from scaledistill.metrics.display import clock, loss_text, short
from scaledistill.metrics.events import Event
from scaledistill.metrics.rows import by_student
from scaledistill.report.charts import (
    Chart,
    glue_chart,
    glue_name,
    glue_title,
    kl_charts,
    line_charts,
)
from scaledistill.report.library import MissingLibraryError, vega_script
from scaledistill.report.names import REPORT_FILE
from scaledistill.report.record import RunRecord, read_run
from scaledistill.storage.files import write_bytes
from scaledistill.storage.remote import without_credentials

log = logging.getLogger(__name__)

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data:"
)
"""Vega compiles expressions, hence 'unsafe-eval'; nothing can be loaded or sent."""
MOST_EVENTS = 400
"""Of a run; of a longer list the first and the last are shown."""
MOST_FILES = 20
"""Of a data set's source."""

Cell = str | tuple[str, str]
"""The text of a table's cell, or (text, class)."""


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write the report of runs to a file and return its path.

    Raises:
        SourceError: a folder is not that of a run.
        MissingLibraryError: the charting library is not installed.
        OSError: the file cannot be written.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs = _with_unique_names([read_run(folder) for folder in folders], folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A folder's name or a message may have bytes that are no UTF-8.
    write_bytes(output, page(runs, vega_script()).encode(errors="replace"))
    return output


def report_at_end(folder: Path) -> None:
    """Write `report.html` into a run's folder; if it cannot be written, log why in one line."""
    try:
        log.info("the report is in %s", write_report([folder], folder / REPORT_FILE))
    except MissingLibraryError as error:
        log.info("no report.html: %s", error)
    except DataError as error:
        log.warning("no report.html: %s", error)
    except Exception as error:  # noqa: BLE001 - the run is done; a page must not fail it
        log.warning("no report.html: %s: %s", type(error).__name__, error)


def page(runs: Sequence[RunRecord], script: str) -> str:
    """Return the HTML of a page that shows runs side by side; `script` is the charting library."""
    charts: list[Chart] = []
    name = " / ".join(run.name for run in runs)
    body = [
        f"<header><h1>{_text(' vs. '.join(run.name for run in runs))}</h1>{_state(runs)}</header>",
        _overview(runs),
        _section("Training", _charts(line_charts(runs), charts)),
        _section("What the student learns", _relations(runs, charts)),
        _section("GLUE", _glue(runs, charts)),
        _section("Events", _events(runs)),
        _section("Configuration", _configuration(runs)),
        _section("Environment", _facts(runs, "environment")),
        _section("Data and teacher", _provenance(runs)),
        "<footer>Made by scaledistill. This page loads nothing from a network.</footer>",
    ]
    data = {"charts": [chart.spec for chart in charts], "maps": _maps_data(runs)}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(name)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
{"".join(body)}
<script type="application/json" id="data">{_json(data)}</script>
<script>{_inline(script)}</script>
<script>{_inline(_asset("page.js"))}</script>
</body>
</html>
"""


def _with_unique_names(runs: list[RunRecord], folders: Sequence[Path]) -> list[RunRecord]:
    """Name runs by their paths if their folders have the same name."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(folder))
        for run, folder in zip(runs, folders, strict=True)
    ]


def _state(runs: Sequence[RunRecord]) -> str:
    lines = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        text = run.status.get("message") or "no status.json"
        lines.append(f'<p class="soft">{_text(prefix + str(text))}</p>')
    return "".join(lines)


def _overview(runs: Sequence[RunRecord]) -> str:
    """Return the key figures: tiles for one run, a table for several."""
    figures = [_key_figures(run) for run in runs]
    if len(runs) == 1:
        tiles = (
            f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"
            for label, value in figures[0].items()
        )
        return f'<dl class="tiles">{"".join(tiles)}</dl>'
    labels = dict.fromkeys(label for own in figures for label in own)
    rows: list[list[Cell]] = [
        [label, *((own.get(label, ""), "number") for own in figures)] for label in labels
    ]
    header: list[Cell] = ["", *((run.name, "number") for run in runs)]
    return _section("Overview", _card(_table(header, rows)))


def _key_figures(run: RunRecord) -> dict[str, str]:
    last, figures = run.rows[-1], {}
    figures["state"] = str(run.status.get("state", "not known"))
    steps = run.status.get("max_steps") or (run.config.get("train") or {}).get("max_steps")
    figures["step"] = f"{last['step']:,}" + (f" of {steps:,}" if steps else "")
    figures["loss"] = loss_text(last.get("loss"))
    measured = [row["validation_loss"] for row in run.rows if "validation_loss" in row]
    if measured:
        figures["validation loss"] = loss_text(measured[-1])
    validated = [row for row in run.rows if row.get("validation_loss") is not None]
    if validated:
        # The loss is a sum over students; only sums over the same ones can be compared.
        trained = by_student(validated[-1], "validation_loss").keys()
        validated = [
            row for row in validated if by_student(row, "validation_loss").keys() == trained
        ]
        best = min(validated, key=lambda row: row["validation_loss"])
        figures["best validation"] = (
            f"{loss_text(best['validation_loss'])} at step {best['step']:,}"
        )
    speeds = sorted(row["tokens_per_second"] for row in run.rows if row.get("tokens_per_second"))
    if speeds:
        figures["median tokens/s"] = short(speeds[len(speeds) // 2])
    shares = sorted(row["mfu"] for row in run.rows if row.get("mfu") is not None)
    if shares:
        figures["median MFU"] = f"{shares[len(shares) // 2]:.0%}"
    if memory := [row["memory_peak_bytes"] for row in run.rows if row.get("memory_peak_bytes")]:
        figures["peak memory"] = f"{max(memory) / 1e9:.1f} GB"
    if last.get("skipped_steps") is not None:
        figures["skipped steps"] = f"{last['skipped_steps']:,}"
    if run.events:
        figures["resumes"] = str(sum(event.kind == "resumed" for event in run.events))
        if seconds := _training_seconds(run):
            figures["time"] = clock(seconds)
    return figures


def _training_seconds(run: RunRecord) -> float:
    """Return how long the run was under way, without the breaks before its resumes."""
    seconds, begin, last = 0.0, None, None
    for event in run.events:
        try:
            now = datetime.fromisoformat(event.time)
            if event.kind in ("started", "resumed"):
                if begin and last:
                    seconds += (last - begin).total_seconds()
                begin = now
        except (ValueError, TypeError):
            continue
        last = now
    if begin and last and run.status.get("state") in ("running", "evaluating"):
        with suppress(ValueError, TypeError):  # no event since may be as late
            last = max(last, datetime.fromisoformat(str(run.status.get("updated"))))
    return seconds + ((last - begin).total_seconds() if begin and last else 0.0)


def _charts(own: Iterable[Chart], charts: list[Chart]) -> str:
    """Return the cards of charts, and append the charts to those of the page."""
    own, cards = list(own), []
    # Two stand beside each other; the last one fills the row if it would stand alone.
    is_odd = sum(not chart.wide for chart in own) % 2 == 1
    for number, chart in enumerate(own):
        wide = chart.wide or (is_odd and number == len(own) - 1)
        place = len(charts)
        charts.append(chart)
        cards.append(
            f'<div class="card{" wide" if wide else ""}"><h3>{_text(chart.title)}</h3>'
            f'<p class="soft">{_text(chart.caption)}</p>'
            f'<div class="chart" id="chart-{place}"></div></div>'
        )
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _relations(runs: Sequence[RunRecord], charts: list[Chart]) -> str:
    missing = [run for run in runs if not run.maps]
    parts = [_charts(kl_charts(runs), charts)]
    if len(missing) < len(runs):
        choices = "".join(
            f'<label>{name} <select id="choose-{name}"></select></label>'
            for name in ("student", "pair", "sentence")
        )
        parts.append(
            '<div class="card" style="margin-top:16px"><h3>Relation maps</h3><p class="soft">What '
            "the student learns to imitate. Each row of a map belongs to a token and shows how "
            "its relation is spread over all tokens of the sentence; a row adds up to 1, and "
            "darker means more (in the dark theme: lighter). A student has learned a head if both "
            "maps look the same.</p>"
            f'<div class="choices">{choices}</div><div class="heads" id="heads"></div></div>'
        )
    for run in missing:
        parts.append(
            f'<p class="soft">{_text(run.name)} has no relation maps yet. They are measured when '
            "a run ends; to measure those of its newest checkpoint, run "
            "<code>scaledistill report --maps</code> where its teacher and data are.</p>"
        )
    return "".join(parts)


def _maps_data(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the relation maps as `page.js` takes them."""
    data = []
    for run in runs:
        for student, measured in (run.maps.get("students") or {}).items():
            parts = [run.name] if len(runs) > 1 else []
            if len(run.students) > 1 or not parts:
                parts.append(student)
            data.append(
                {
                    "label": " · ".join(parts),
                    "sentences": run.maps["sentences"],
                    "pairs": list(measured["maps"]),
                    "maps": measured["maps"],
                }
            )
    return data


def _glue(runs: Sequence[RunRecord], charts: list[Chart]) -> str:
    chart = glue_chart(runs)
    if chart is None:
        return ""
    columns = list(dict.fromkeys(c for run in runs for c in run.glue.get("columns", ())))
    header: list[Cell] = ["model", *((glue_title(c), "number") for c in columns)]
    header.append(("average", "number"))
    rows: list[list[Cell]] = []
    for run in runs:
        for row in run.glue.get("rows", ()):
            scores = (row["scores"].get(column) for column in columns)
            cells: list[Cell] = [(_score(score), "number") for score in scores]
            average = row.get("average")
            cells.append(("" if average is None else f"{average:.1f}", "number"))
            rows.append([glue_name(runs, run, row), *cells])
    table = f'<div style="margin-top:16px">{_card(_table(header, rows))}</div>'
    return _charts([chart], charts) + table


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    half = (score["high"] - score["low"]) / 2
    return f"{score['median']:.1f}" + (f" ± {half:.1f}" if score["n"] > 1 else "")


def _events(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        title = f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""
        if not run.events:
            parts.append(_card(f'{title}<p class="soft">No events.jsonl in this folder.</p>'))
            continue
        # Saves are many and alike: only the others are open to view.
        notable = [event for event in run.events if event.kind != "saved"]
        body = title + _event_table(notable)
        if saved := len(run.events) - len(notable):
            body += (
                f"<details><summary>All events, with {saved:,} saves</summary>"
                f"{_event_table(run.events)}</details>"
            )
        parts.append(_card(body))
    return _stacked(parts)


def _event_table(events: Sequence[Event]) -> str:
    """Return a table of the first and the last events, if they are many."""
    if (left := len(events) - MOST_EVENTS) <= 0:
        return _table(_EVENT_HEADER, map(_event_row, events), "events")
    shown = [*events[: MOST_EVENTS // 2], *events[-MOST_EVENTS // 2 :]]
    text = f'<p class="soft">{counted(left, "event")} in between are left out.</p>'
    return _table(_EVENT_HEADER, map(_event_row, shown), "events") + text


_EVENT_HEADER: Sequence[Cell] = ("time (UTC)", ("step", "number"), "event", "")


def _event_row(event: Event) -> list[Cell]:
    when = event.time[:16].replace("T", " ")
    return [when, (f"{event.step:,}", "number"), (event.kind, event.kind), event.message]


def _configuration(runs: Sequence[RunRecord]) -> str:
    flat = [
        {key: without_credentials(value) for key, value in _flat(run.config).items()}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for own in flat for key in own))
    if not keys:
        return _card('<p class="soft">No config.json in this folder.</p>')
    header = ["setting", *(run.name for run in runs)] if len(runs) > 1 else ["setting", "value"]
    rows = {key: [key, *(own.get(key, "") for own in flat)] for key in keys}
    different = [row for row in rows.values() if len(set(row[1:])) > 1]
    parts = []
    if different:
        parts.append(f"<h3>Settings that differ</h3>{_table(header, different, 'facts')}")
    table = _table(header, rows.values(), "facts", [row in different for row in rows.values()])
    parts.append(f"<details><summary>All {len(keys)} settings</summary>{table}</details>")
    return _card("".join(parts))


def _facts(runs: Sequence[RunRecord], block: str) -> str:
    """Return a table of one block of the runs' facts."""
    flat = [_flat(run.facts.get(block, {})) for run in runs]
    keys = list(dict.fromkeys(key for own in flat for key in own))
    if not keys:
        return _card('<p class="soft">Not recorded: an older version made this run.</p>')
    header = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    rows = [[key, *(own.get(key, "") for own in flat)] for key in keys]
    return _card(_table(header, rows, "facts"))


def _provenance(runs: Sequence[RunRecord]) -> str:
    if not any(run.facts.get("data") for run in runs):
        return _facts(runs, "data")
    parts = [f"<h3>Teacher</h3>{_facts(runs, 'teacher')}"]
    for name in dict.fromkeys(name for run in runs for name in run.facts.get("data", {})):
        own = [{"data": run.facts.get("data", {}).get(name, {})} for run in runs]
        flat = [_flat(each["data"]) for each in own]
        keys = dict.fromkeys(key for each in flat for key in each)
        header = ["", *(run.name for run in runs)] if len(runs) > 1 else []
        rows = [[key, *(each.get(key, "") for each in flat)] for key in keys]
        title = f"{name[:1].upper()}{name[1:]} data"
        parts.append(f"<h3>{_text(title)}</h3>{_card(_table(header, rows, 'facts'))}")
    return _stacked(parts)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested settings as text, by dotted key."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and len(value) > MOST_FILES:
            first = ", ".join(map(str, value[:MOST_FILES]))
            leaves[prefix + key] = f"{first} and {len(value) - MOST_FILES} more"
        elif isinstance(value, list):
            leaves[prefix + key] = ", ".join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            leaves[prefix + key] = f"{value:,}"
        else:
            leaves[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return leaves


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _card(content: str) -> str:
    return f'<div class="card"><div class="scroll">{content}</div></div>'


def _stacked(parts: Iterable[str]) -> str:
    return f'<div class="stack">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _table(
    header: Sequence[Cell],
    rows: Iterable[Sequence[Cell]],
    kind: str = "",
    differs: Sequence[bool] = (),
) -> str:
    """Return a table; in one of facts the first cell of a row is its heading."""
    head = f"<thead><tr>{''.join(_cell(cell, 'th') for cell in header)}</tr></thead>"
    body = []
    for number, row in enumerate(rows):
        first, *others = row
        cells = _cell(first, "th" if kind == "facts" else "td") + "".join(map(_cell, others))
        marked = ' class="differs"' if number < len(differs) and differs[number] else ""
        body.append(f"<tr{marked}>{cells}</tr>")
    return f'<table class="{kind}">{head if header else ""}<tbody>{"".join(body)}</tbody></table>'


def _cell(cell: Cell, tag: str = "td") -> str:
    text, kind = cell if isinstance(cell, tuple) else (cell, "")
    attribute = f' class="{_text(kind)}"' if kind else ""
    return f"<{tag}{attribute}>{_text(text)}</{tag}>"


def _text(text: str) -> str:
    return html.escape(str(text))


def _json(content: Any) -> str:
    """Return JSON that cannot end the script element that it is in."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    for character, code in {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}.items():
        text = text.replace(character, code)
    return text


def _inline(script: str) -> str:
    """Return a script that cannot end its element: "<\\/" is "</" in a JavaScript string."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return resources.files("scaledistill.report").joinpath(name).read_text("utf-8")
