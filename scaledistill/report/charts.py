"""The charts of a report, as Vega-Lite specifications.

Inputs: `RunRecord`s. Outputs: `Chart`s, whose data are CSV. Not handled here: colours and fonts,
which follow the reader's theme (`page.js`); relation maps, which the page draws on demand.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaledistill.glue.summary import column_title
from scaledistill.glue.tasks import TASKS
from scaledistill.metrics.rows import student_value
from scaledistill.report.record import RunRecord

MOST_POINTS = 1000
"""Of a page's runs together in one chart: about one for each pixel of its width."""
LEAST_POINTS = 200
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""Names the language of a specification; nothing is loaded from there."""

Point = tuple[int, float | None]
MISSING = object()
"""Stands for a metric that a row does not have; None for one that was not finite."""


@dataclass(frozen=True)
class Chart:
    """A chart with its title and a caption that says how to read it."""

    title: str
    caption: str
    spec: Mapping[str, Any]
    wide: bool = False
    """Whether it takes the whole width of the page."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    kind: str = "training"
    """ "training" or "validation"."""


@dataclass(frozen=True)
class _Figures:
    """Builds the line charts of some runs."""

    runs: Sequence[RunRecord]
    charts: list[Chart] = field(default_factory=list)

    def curves(self, metric: str, kind: str = "training") -> list[Curve]:
        """Return a curve for each run and student that recorded a metric."""
        curves = []
        for run in self.runs:
            for student in run.students:
                # The number of students, and so the metric's name, may vary over a run.
                values = ((row["step"], _value(row, metric, student)) for row in run.rows)
                points = [(step, value) for step, value in values if value is not MISSING]
                while points and points[0][1] is None:  # before the student was added
                    points.pop(0)
                if points:
                    curves.append(Curve(self.label(run, student), points, kind))
        return curves

    def label(self, run: RunRecord, student: str) -> str:
        """Return the name of a curve: of the run, the student, or both, whatever distinguishes."""
        parts = [run.name] if len(self.runs) > 1 else []
        if len(run.students) > 1:
            parts.append(student)
        return " · ".join(parts) or student or run.name

    def of_runs(self, name: str, scale: float = 1.0) -> list[Curve]:
        """Return a curve for each run of a metric that students share, times `scale`."""
        curves = []
        for run in self.runs:
            points = [
                (row["step"], row[name] * scale) for row in run.rows if row.get(name) is not None
            ]
            if points:
                curves.append(Curve(run.name, points))
        return curves

    def add(self, title: str, caption: str, curves: list[Curve], y: str, **options: Any) -> None:
        """Add a chart, unless it has no curve."""
        if curves:
            wide = options.pop("wide", False)
            self.charts.append(Chart(title, caption, line_chart(curves, y, **options), wide))


def _value(row: Mapping[str, Any], metric: str, student: str) -> Any:
    """Return a student's metric: None if it was not finite, or the row does not have it at all."""
    section, _, name = metric.rpartition("/")
    own = f"{section}/{student}/{name}" if section else f"{metric}/{student}"
    if own in row:
        return row[own]
    return student_value(row, metric, student) if metric in row else MISSING


def line_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts over steps: losses, speed, memory, learning rate, gradient norm."""
    figures = _Figures(runs)
    losses = figures.curves("loss")
    validation = figures.curves("validation_loss", "validation")
    if len(losses) == 1:  # then only their kinds need names
        losses, validation = (
            [replace(curve, label=curve.kind) for curve in curves]
            for curves in (losses, validation)
        )
    figures.add(
        "Loss",
        "Relation loss per step (line) and on held-out rows (points). Vertical lines: resumes. "
        "Crosses at the bottom: steps that were skipped.",
        losses + validation,
        "relation loss",
        log=True,
        marks=[*_resumes(runs), *_skipped(runs)],
        wide=True,
    )
    _add_pairs(figures)
    probe = figures.curves("probe/stsb_spearman", "validation")
    figures.add(
        "STS-B probe", "Spearman correlation, without fine-tuning.", probe, "Spearman", form=".2f"
    )
    figures.add(
        "Throughput", "Tokens per second, all ranks together.",
        figures.of_runs("tokens_per_second"), "tokens/s", zero=True,
    )  # fmt: skip
    figures.add(
        "Model FLOPs utilisation", "Share of the devices' peak that the models use.",
        figures.of_runs("mfu"), "MFU", zero=True, form=".0%",
    )  # fmt: skip
    figures.add(
        "Data wait", "Share of the time in which a step waits for data; should be near 0.",
        figures.of_runs("data_wait_fraction"), "share of the time", zero=True, form="~%",
    )  # fmt: skip
    figures.add(
        "Memory", "Peak so far since the start or the last resume, of rank 0.",
        figures.of_runs("memory_peak_bytes", 1e-9), "GB", zero=True,
    )  # fmt: skip
    figures.add(
        "Learning rate", "Of each step.", figures.curves("lr"), "learning rate",
        form="~e",
    )  # fmt: skip
    figures.add(
        "Gradient norm", "Before clipping.", figures.curves("grad_norm"),
        "norm", log=True,
    )  # fmt: skip
    return figures.charts


def _add_pairs(figures: _Figures) -> None:
    """Add the loss by pair: one chart if there is one student in all, else one for each pair."""
    names = [(run, student) for run in figures.runs for student in run.students]
    pairs: dict[str, list[Curve]] = {}
    for run, student in names:
        prefix = f"loss/{student}/"
        found = dict.fromkeys(key for row in run.rows for key in row if key.startswith(prefix))
        for key in found:
            points = [(row["step"], row.get(key)) for row in run.rows]
            label = figures.label(run, student)
            pairs.setdefault(key.removeprefix(prefix), []).append(Curve(label, points))
    if len(names) == 1:
        curves = [Curve(pair, own[0].points) for pair, own in pairs.items()]
        text = "Loss of the relations among queries (qq), keys (kk), values (vv), …"
        figures.add("Loss by pair", text, curves, "loss of the pair", log=True)
        return
    for pair, curves in pairs.items():
        text = f"Loss of the {pair} relations, of each run and student."
        figures.add(f"Loss of {pair}", text, curves, f"loss of {pair}", log=True)


def line_chart(
    curves: Sequence[Curve],
    y: str,
    *,
    log: bool = False,
    zero: bool = False,
    form: str = "~s",
    marks: Sequence[tuple[str, int, str]] = (),
) -> dict[str, Any]:
    """Return the specification of curves over steps.

    Args:
        y: what they show.
        log: whether the axis is logarithmic.
        zero: whether it starts at 0.
        form: the d3 format of its numbers.
        marks: (kind, step, text) of what happened, "resume" or "skip".
    """
    most = max(LEAST_POINTS, MOST_POINTS // len(curves))
    table = _csv(
        ("step", "y", "label", "kind"),
        (
            (step, value if value is None else f"{value:.6g}", curve.label, curve.kind)
            for curve in curves
            for step, value in downsample(_drawable(curve.points, log), most)
        ),
    )
    legend = legend_of(curve.label for curve in curves)
    color = {
        "field": "label",
        "type": "nominal",
        "sort": None,
        "title": None,
        "legend": {**legend, "symbolType": "stroke"}
        if len({curve.label for curve in curves}) > 1
        else None,
    }
    # The validation losses of a short run lie in the range of the training losses.
    axis = {
        "field": "y",
        "type": "quantitative",
        "title": y,
        "scale": {"type": "log", "nice": False} if log else {"zero": zero},
        "axis": {"format": ".3~g" if log else form, "tickCount": 5},
    }
    tooltip = [
        {"field": "step", "type": "quantitative", "format": ",", "title": "step"},
        {"field": "y", "type": "quantitative", "format": ".4~g", "title": y},
        {"field": "label", "type": "nominal", "title": "of"},
        {"field": "kind", "type": "nominal", "title": "kind"},
    ]
    x = {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "axis": {"format": "~s", "tickCount": {"expr": "max(4, width / 80)"}},
        "scale": {"nice": False, "zero": False},
    }
    encoding = {"x": x, "y": axis, "color": color}
    kinds = {"training": {}, "validation": {"strokeDash": [4, 3], "point": True}}
    layers: list[dict[str, Any]] = [
        {
            "transform": [{"filter": f"datum.kind == '{kind}'"}],
            "mark": {"type": "line", "clip": True, **look},
            "encoding": encoding,
        }
        for kind, look in kinds.items()
        if any(curve.kind == kind for curve in curves)
    ]
    layers.append(
        {  # invisible: shows the nearest point's values under the pointer
            "params": [
                {
                    "name": "near",
                    "select": {
                        "type": "point",
                        "nearest": True,
                        "on": "pointerover",
                        "clear": "pointerout",
                    },
                }
            ],
            "mark": {"type": "point", "filled": True, "size": 60, "clip": True},
            "encoding": {
                **encoding,
                "tooltip": tooltip,
                "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
            },
        }
    )
    return {
        "$schema": SCHEMA,
        "width": "container",
        "height": 240,
        "data": {"values": table, "format": {"type": "csv", "parse": {"y": "number"}}},
        "layer": [*_mark_layers(marks), *layers],
    }


def legend_of(labels: Iterable[str]) -> dict[str, Any]:
    """Return a legend above a chart; long labels stand in two columns, or one on a phone."""
    columns = {"columns": 2} if max(map(len, labels)) > 12 else {}
    return {"orient": "top", "labelLimit": 300, **columns}


def _mark_layers(marks: Sequence[tuple[str, int, str]]) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = []
    shapes = {
        "resume": {"type": "rule", "strokeDash": [2, 3], "color": "#8a94a3"},
        "skip": {"type": "point", "shape": "cross", "size": 60, "angle": 45, "color": "#d1495b"},
    }
    for kind, shape in shapes.items():
        own = [(step, text) for found, step, text in marks if found == kind]
        if not own:
            continue
        encoding: dict[str, Any] = {
            "x": {"field": "step", "type": "quantitative"},
            "tooltip": {"field": "text", "type": "nominal"},
        }
        if kind == "skip":
            encoding["y"] = {"value": {"expr": "height - 6"}}
        data = {"values": _csv(("step", "text"), own), "format": {"type": "csv"}}
        layers.append({"data": data, "mark": shape, "encoding": encoding})
    return layers


def downsample(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most about `most` points that look the same: no spike and no gap is lost.

    The points are cut into stretches, of each of which the first, the lowest, the highest and a
    missing one are kept.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) * 3 / most)
    kept: set[int] = {len(points) - 1}
    for first in range(0, len(points), size):
        stretch = range(first, min(first + size, len(points)))
        kept.add(first)
        present = {place: y for place in stretch if (y := points[place][1]) is not None}
        if present:
            kept |= {min(present, key=present.__getitem__), max(present, key=present.__getitem__)}
        kept |= {place for place in stretch if place not in present and place - 1 in present}
    return [points[place] for place in sorted(kept)]


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    """Replace what has no place on a logarithmic axis."""
    return [(step, None if log and y is not None and y <= 0 else y) for step, y in points]


def _resumes(runs: Sequence[RunRecord]) -> list[tuple[str, int, str]]:
    return [
        ("resume", event.step, f"{run.name}: resumed at step {event.step:,}, {event.time[:16]}")
        for run in runs
        for event in run.events
        if event.kind == "resumed"
    ]


def _skipped(runs: Sequence[RunRecord]) -> list[tuple[str, int, str]]:
    return [
        ("skip", event.step, f"{run.name}: {event.message}")
        for run in runs
        for event in run.events
        if event.kind == "skipped"
    ]


def kl_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the KL per relation head of each student, sorted, a line for each pair."""
    charts = []
    label = _Figures(runs).label
    for run in runs:
        for student, measured in (run.maps.get("students") or {}).items():
            rows = [
                (place, f"{kl:.5g}", pair, head)
                for pair, heads in measured["kl"].items()
                for place, (kl, head) in enumerate(
                    sorted((kl, head) for head, kl in enumerate(heads))
                )
            ]
            title = "KL per relation head"
            if len(runs) > 1 or len(run.students) > 1:
                title += f": {label(run, student)}"
            caption = (
                f"The heads of each pair from the closest to the farthest, at step "
                f"{run.maps['step']:,}, on {measured['num_rows']} rows. An even curve means that "
                "all heads are learned alike."
            )
            charts.append(Chart(title, caption, _kl_spec(rows)))
    return charts


def _kl_spec(rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    return {
        "$schema": SCHEMA,
        "width": "container",
        "height": 240,
        "data": {
            "values": _csv(("place", "kl", "pair", "head"), rows),
            "format": {"type": "csv"},
        },
        "mark": {"type": "line", "point": {"size": 22}},
        "encoding": {
            "x": {
                "field": "place",
                "type": "quantitative",
                "title": "relation heads, sorted",
                "axis": {"tickMinStep": 1},
                "scale": {"nice": False},
            },
            "y": {"field": "kl", "type": "quantitative", "title": "KL, nats"},
            "color": {
                "field": "pair",
                "type": "nominal",
                "sort": None,
                "title": None,
                "legend": {"orient": "top"},
            },
            "tooltip": [
                {"field": "pair", "type": "nominal"},
                {"field": "head", "type": "nominal", "title": "relation head"},
                {"field": "kl", "type": "quantitative", "title": "KL, nats", "format": ".4~g"},
            ],
        },
    }


def glue_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Return the GLUE scores: a point for each model and column, a line for the seeds' range."""
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        for row in run.glue.get("rows", ()):
            for column, score in row["scores"].items():
                numbers = (score["median"], score["low"], score["high"])
                rows.append((glue_title(column), glue_name(runs, run, row), *numbers))
    if not rows:
        return None
    x = {
        "type": "quantitative",
        "title": "dev score, %",
        "scale": {"zero": False, "nice": True},
        "axis": {"tickCount": {"expr": "max(4, width / 80)"}},
    }
    shared = {
        "y": {
            "field": "task",
            "type": "nominal",
            "sort": None,
            "title": None,
            "axis": {"grid": True, "labelLimit": 150},
        },
        "yOffset": {"field": "model", "sort": None},
        "color": {
            "field": "model",
            "type": "nominal",
            "sort": None,
            "title": None,
            "legend": legend_of(row[1] for row in rows),
        },
    }
    tooltip = [
        {"field": "model", "type": "nominal"},
        {"field": "task", "type": "nominal"},
        *(
            {"field": name, "type": "quantitative", "format": ".1f"}
            for name in ("median", "low", "high")
        ),
    ]
    models = len({row[1] for row in rows})
    spec = {
        "$schema": SCHEMA,
        "width": "container",
        "height": max(24, 12 * models) * len({row[0] for row in rows}),
        "data": {
            "values": _csv(("task", "model", "median", "low", "high"), rows),
            "format": {"type": "csv"},
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {**shared, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {**shared, "x": {**x, "field": "median"}, "tooltip": tooltip},
            },
        ],
    }
    text = "Median over the seeds; lines from the lowest to the highest."
    return Chart("Dev scores", text, spec, wide=True)


def glue_title(column: str) -> str:
    """Return "CoLA matthews" for "cola/matthews"; another version may have had other tasks."""
    return column_title(column) if column.partition("/")[0] in TASKS else column


def glue_name(runs: Sequence[RunRecord], run: RunRecord, row: Mapping[str, Any]) -> str:
    """Return how a row of a run's GLUE table is called on a page of several runs."""
    name = f"{row['name']} (published)" if row.get("published") else str(row["name"])
    return f"{run.name} · {name}" if len(runs) > 1 else name


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(("" if value is None else value for value in row) for row in rows)
    return text.getvalue()
