"""Draw a summary: a panel per column, a row per model, a horizontal line for the seeds' range.

Inputs: a `Summary`. Outputs: a PNG file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from scaledistill.glue.summary import MAJORITY, Summary, column_title

# Okabe and Ito's palette, which people with colour blindness can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PUBLISHED_COLOR = "#666666"
PANELS_PER_ROW = 4


def draw(summary: Summary, path: Path) -> None:
    """Draw the scores of all rows, with a dashed line at those of the first row.

    Without scores, remove the file if it exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [
        column for column in summary.columns if any(column in row.scores for row in summary.rows)
    ]
    if summary.averaged:
        columns.append("average")
    if not columns:
        path.unlink(missing_ok=True)
        return
    across = min(PANELS_PER_ROW, len(columns))
    down = math.ceil(len(columns) / across)
    names = [f"{row.name} (published)" if row.published else row.name for row in summary.rows]
    left = 0.085 * max(map(len, names))
    figure = Figure(
        figsize=(left + 2.6 * across, down * (0.75 + 0.34 * len(names)) + 0.5),
        dpi=130,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for panel, column in zip(panels, columns, strict=False):
        _panel(panel, summary, column)
        panel.set_title("average" if column == "average" else column_title(column), fontsize=10)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    text = (
        "dev score, %: median over the seeds, lines from the lowest to the highest; dashed: "
        f"{names[0]}"
    )
    if summary.majority:
        text += f"; dotted: {MAJORITY}"
    if any(choice.only_answers for choice in summary.choices):
        text += "; ×: one answer for every example"
    figure.supxlabel(text, fontsize=9)
    figure.savefig(path)


def _panel(panel: Any, summary: Summary, column: str) -> None:
    values = []
    for place, row in enumerate(summary.rows):
        score = row.scores.get(column)
        median = score.median if score else row.average if column == "average" else None
        if median is None:
            continue
        low, high = (score.low, score.high) if score else (median, median)
        color = PUBLISHED_COLOR if row.published else COLORS[place % len(COLORS)]
        panel.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        face = "white" if row.published else color
        marker = "X" if summary.only_answers(row, column) else "D" if row.published else "o"
        panel.plot([median], [place], marker=marker, color=color, markerfacecolor=face)
        panel.annotate(
            f"{median:.1f}",
            (median, place),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
        values += [low, high]
        if place == 0:
            panel.axvline(median, color=color, linewidth=1, linestyle="--", alpha=0.6, zorder=0)
    if values and column in summary.majority:
        panel.axvline(summary.majority[column], color="black", linewidth=1, linestyle=":", zorder=0)
        values.append(summary.majority[column])
    if values:
        margin = max(1.0, 0.15 * (max(values) - min(values)))
        panel.set_xlim(min(values) - margin, max(values) + margin)
    panel.grid(axis="y", alpha=0.3)
    panel.tick_params(axis="y", length=0)
