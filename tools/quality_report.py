"""Tables and plots of the experiments in tools/quality.py, from what is finished.

Enters: the folder of the runs. Leaves: the tables in docs/quality.md, between the marks that name them, plots and
figures beside it. A difference counts where all seeds of one side are above all of the other, or by Welch's test.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import ttest_ind

from scaledistill.benchmark import Table
from scaledistill.errors import DataError
from scaledistill.files import write_json
from scaledistill.glue.picture import draw
from scaledistill.glue.summary import Row, Summary, column_title, summary_of

COMPARED = (
    ("teacher-init", "teacher-init-undistilled"),
    ("random-init", "random-init-undistilled"),
    ("teacher-init", "random-init"),
    ("teacher-init", "bertdistiller"),
)
MINUS = str.maketrans("-", "\N{MINUS SIGN}")


def write_report(runs: Path, document: Path, variants: Sequence[str], heads: Sequence[int]) -> list[str]:
    """Write what can be written, and return the names of the tables.

    Args:
        runs: with `glue/`, `glue-tap/` and `yardsticks.json`, each where its step has been made.
        document: holds a pair of marks for each table.
        variants: of the ablations, in the table's order.
        heads: relation heads of the yardsticks.

    Raises:
        DataError: the document lacks the marks of a table.
    """
    pictures = document.with_suffix("")
    pictures.mkdir(exist_ok=True)
    tables: dict[str, str] = {}
    if (runs / "glue" / "grid.json").is_file():
        summary = summary_of(runs / "glue")
        tables["glue"] = summary.markdown()
        tables["compared"] = comparison(summary).markdown()
        draw(summary, pictures / "glue.png")
        write_json(pictures / "glue.json", {"figures": summary.figures()})
    if (runs / "glue-tap" / "grid.json").is_file():
        tables["tap"] = tap_table(summary_of(runs / "glue-tap")).markdown()
    if (runs / "yardsticks.json").is_file():
        found = json.loads((runs / "yardsticks.json").read_text())
        write_json(pictures / "yardsticks.json", found)
        if short := by_variant(found, variants):
            tables["ablations"] = ablation_table(short, heads).markdown()
            draw_ablations(short, heads, pictures / "ablations.png")
    text = document.read_text()
    for name, table in tables.items():
        parts = re.split(f"(<!-- (?:end )?{name} -->)", text)
        if len(parts) != 5:
            raise DataError(f"{document} has {len(parts) // 2} marks for the table {name!r}; expected a pair")
        parts[2] = f"\n\n{table.strip()}\n\n"
        text = "".join(parts)
    document.write_text(text)
    return list(tables)


def comparison(summary: Summary) -> Table:
    """Return the differences between pairs of models, and each one's share of the teacher's average."""
    rows = {row.name: row for row in summary.rows}
    table = Table(
        "Differences of the medians; bold where every seed of one is above every seed of the other",
        ["", *map(column_title, summary.averaged), "average", "share of the teacher's"],
    )
    for ours, theirs in COMPARED:
        if ours in rows and theirs in rows:
            cells = [difference(rows[ours], rows[theirs], column) for column in summary.averaged]
            table.rows.append([f"{ours} against {theirs}", *cells, _gap(rows[ours], rows[theirs]), ""])
    teacher = rows.get("teacher")
    for row in summary.rows:
        if teacher and teacher.average and row.average is not None:
            share = f"{row.average / teacher.average:.1%}"
            table.rows.append([row.name, *[""] * len(summary.averaged), f"{row.average:.1f}", share])
    return table


def difference(ours: Row, theirs: Row, column: str) -> str:
    """Return the difference of two medians, bold where the ranges are apart."""
    one, other = ours.scores[column], theirs.scores[column]
    text = f"{one.median - other.median:+.1f}".translate(MINUS)
    return f"**{text}**" if one.low > other.high or one.high < other.low else text


def _gap(ours: Row, theirs: Row) -> str:
    if ours.average is None or theirs.average is None:
        return ""
    return f"{ours.average - theirs.average:+.1f}".translate(MINUS)


def tap_table(summary: Summary) -> Table:
    """Return median (lowest to highest) of each variant over its distillation seeds; models are named VARIANT-seedN."""
    groups: dict[str, list[Row]] = {}
    for row in summary.rows:
        groups.setdefault(row.name.rpartition("-seed")[0], []).append(row)
    table = Table(
        "Dev scores, %: median over distillation seeds (lowest to highest)",
        ["variant", "n", *map(column_title, summary.averaged), *(["average"] if summary.averaged else [])],
    )
    for variant, rows in groups.items():
        columns = [[row.scores[column].median for row in rows] for column in summary.averaged]
        averages = [row.average for row in rows if row.average is not None]
        cells = [
            f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
            for values in [*columns, averages]
            if values
        ]
        table.rows.append([variant, str(len(rows)), *cells])
    return table


def by_variant(
    found: Mapping[str, Mapping[str, float]], variants: Sequence[str]
) -> dict[str, list[Mapping[str, float]]]:
    """Return the yardsticks of the short runs by variant, in the order of `variants`."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for variant in variants:
        for name, losses in sorted(found.items()):
            kind, _, run = name.partition("/")
            if kind == "short" and run.rpartition("-seed")[0] == variant:
                groups.setdefault(variant, []).append(losses)
    return groups


def ablation_table(groups: Mapping[str, Sequence[Mapping[str, float]]], heads: Sequence[int]) -> Table:
    """Return median (lowest to highest) by yardstick, and Welch's test against the first variant."""
    base, top = next(iter(groups)), str(max(heads))
    table = Table(
        "Held-out relation loss",
        ["variant", "n", *(f"R = {count}" for count in heads), f"against {base} at R = {top}"],
    )
    for variant, runs in groups.items():
        cells = []
        for count in heads:
            losses = [run[str(count)] for run in runs]
            cells.append(f"{statistics.median(losses):.4f} ({min(losses):.4f}–{max(losses):.4f})")
        ours, others = ([run[top] for run in groups[name]] for name in (variant, base))
        verdict = "–"
        if variant != base and min(len(ours), len(others)) > 1:
            ratio = statistics.mean(ours) / statistics.mean(others) - 1
            chance = ttest_ind(ours, others, equal_var=False).pvalue
            verdict = f"{ratio:+.1%}, p = {chance:.2g}".translate(MINUS) + (
                "" if chance < 0.05 else " (not significant)"
            )
        table.rows.append([variant, str(len(runs)), *cells, verdict])
    return table


def draw_ablations(groups: Mapping[str, Sequence[Mapping[str, float]]], heads: Sequence[int], path: Path) -> None:
    """Draw every run's held-out loss, a panel for each yardstick."""
    names = list(groups)[::-1]
    figure = Figure(figsize=(10, 1 + 0.4 * len(groups)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(heads), sharey=True)
    for count, axes in zip(heads, panels, strict=True):
        for number, variant in enumerate(names):
            losses = [run[str(count)] for run in groups[variant]]
            axes.plot(losses, [number] * len(losses), "o", color="#0072b2", alpha=0.6)
            axes.plot([statistics.median(losses)], [number], "|", color="black", markersize=16)
        axes.set(xlabel="held-out relation loss", title=f"{count} relation heads")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    figure.savefig(path)
