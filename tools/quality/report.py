"""Write the tables and pictures of docs/quality.md from the results of tools/quality alone.

Inputs: result files. Outputs: the tables in the document, between the marks that name them, and
pictures in the folder next to it. A difference counts as real if all seeds of one side are above
all seeds of the other, or by Welch's test.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import ABLATIONS, HELD_OUT_HEADS, MODELS, SMALL, STUDENTS, TEACHER
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import Results
from scipy.stats import ttest_ind

from scaledistill.errors import DataError, counted
from scaledistill.glue.picture import COLORS, draw
from scaledistill.glue.summary import Choice, Row, Score, Summary, column_title
from scaledistill.glue.tasks import TASKS
from scaledistill.metrics.benchmark import Table

COMPARED = (
    ("teacher-init", "teacher-init-undistilled"),
    ("random-init", "random-init-undistilled"),
    ("teacher-init", "random-init"),
    ("tap-extra", "teacher-init"),
    ("teacher-init", "bertdistiller"),
)
DEFAULTS = {
    "random": 'init "random" instead of "teacher"',
    "heads-12": "12 relation heads instead of 48",
    "map-last": "the last layers instead of evenly spaced ones",
    "tap-extra": 'tap "extra" instead of "last"',
    "dropout-0.1": "dropout 0.1 instead of 0",
}
"""What each ablation changes."""
OTHER_LOSS = ("heads-12",)
"""Those that were trained with another loss than base."""
MISSING = "missing"
MINUS = str.maketrans("-", "\N{MINUS SIGN}")
LAST, BELOW = "stsb_spearman", "stsb_spearman_below"
SIGNIFICANT = 0.05


def write_report(results: Results, document: Path) -> list[str]:
    """Write every table and picture, and return the names of the tables.

    Raises:
        DataError: the document lacks the marks of a table, or the results of one table were
            measured under different conditions.
    """
    pictures = document.with_suffix("")
    pictures.mkdir(exist_ok=True)
    summary = summary_from(results)
    runs = ablations_from(results)
    tables = {
        "state": state(results),
        "glue": summary.markdown() if summary.columns else "No cell is finished.",
        "compared": comparison(summary).markdown(),
        "probe": probe_table(results).markdown(),
        "ablations": ablation_table(runs).markdown(),
    }
    # A picture follows its table once there is data to show.
    if summary.columns:
        draw(summary, pictures / "glue.png")
        tables["glue"] += f"\n![Scores by task]({pictures.name}/glue.png)"
    if any(results.record(f"models/{name}") for name in STUDENTS):
        draw_curves(results, pictures / "curves.png")
        title = "Held-out loss and probe while the students were distilled"
        tables["probe"] += f"\n\n![{title}]({pictures.name}/curves.png)"
    if any(runs.values()):
        draw_ablations(runs, pictures / "ablations.png")
        title = "Held-out loss and probe of every short run"
        tables["ablations"] += f"\n\n![{title}]({pictures.name}/ablations.png)"
    text = document.read_text()
    for name, table in tables.items():
        parts = re.split(f"(<!-- (?:end )?{name} -->)", text)
        if len(parts) != 5:
            raise DataError(
                f"{document} has {len(parts) // 2} marks for the table {name!r}; expected a pair"
            )
        parts[2] = f"\n\n{table.strip()}\n\n"
        text = "".join(parts)
    document.write_text(text)
    return list(tables)


def expected_cells() -> list[str]:
    """Return the names of all cells of the tier, in the order of the tables."""
    glue = [
        f"glue/{name}/{task}-seed{seed}"
        for name in MODELS
        for task in SMALL.glue.tasks
        for seed in SMALL.seeds
    ]
    ablations = [f"ablations/{name}-seed{seed}" for name in ABLATIONS for seed in SMALL.seeds]
    return [*(f"models/{name}" for name in MODELS), *glue, *ablations]


def state(results: Results) -> str:
    """Return a text: how much is finished, how long that took and where, and what is missing."""
    names = expected_cells()
    finished = [record for name in names if (record := results.record(name))]
    if not finished:
        return f"No result yet: all {len(names)} cells are {MISSING}."
    hours = sum(record["seconds"] for record in finished) / 3600
    # Earlier versions wrote "1 cores".
    where = sorted({re.sub(r"\b1 cores", "1 core", record["hardware"]) for record in finished})
    commits = sorted({record["commit"] for record in finished})
    lines = [
        f"{len(finished)} of {counted(len(names), 'cell')} are finished. They took {hours:.1f} "
        "hours in total at idle priority, including time in which other work ran, on "
        f"{'; '.join(where)}, with {counted(len(commits), 'version')} of the code "
        f"({', '.join(commits)})."
    ]
    if absent := [name for name in names if not results.record(name)]:
        lines += ["", f"Missing: {', '.join(absent)}."]
    return "\n".join(lines)


def summary_from(results: Results) -> Summary:
    """Return the scores of all models after fine-tuning, in the GLUE runner's form."""
    columns = [f"{task}/{metric}" for task in SMALL.glue.tasks for metric in TASKS[task].metrics]
    rows: list[Row] = []
    choices: list[Choice] = []
    majority: dict[str, float] = {}
    for name in MODELS:
        scores: dict[str, Score] = {}
        for task in SMALL.glue.tasks:
            records = _of_task(results, name, task)
            if not records:
                continue
            outcomes = [record["result"] for record in records]
            by_metric = {
                metric: Score.of([one["scores"][metric] for one in outcomes])
                for metric in TASKS[task].metrics
            }
            scores |= {f"{task}/{metric}": score for metric, score in by_metric.items()}
            only = tuple(one["only_answer"] for one in outcomes if one["only_answer"] is not None)
            settings = records[0]["settings"]
            choices.append(
                Choice(
                    name, task, settings["learning_rate"], settings["epochs"], by_metric,
                    n=len(outcomes), planned=len(SMALL.seeds), tried=1, only_answers=only,
                )
            )  # fmt: skip
            majority |= {
                f"{task}/{metric}": value
                for metric, value in outcomes[0]["majority_scores"].items()
            }
        rows.append(Row(name, None, scores, average=None))
    present = [column for column in columns if any(column in row.scores for row in rows)]
    firsts = [f"{task}/{TASKS[task].metrics[0]}" for task in SMALL.glue.tasks]
    averaged = [column for column in firsts if column in present]
    rows = [
        Row(
            row.name,
            None,
            row.scores,
            statistics.fmean(row.scores[column].median for column in averaged),
        )
        if averaged and all(column in row.scores for column in averaged)
        else row
        for row in rows
    ]
    glue = SMALL.glue
    rate, epochs = glue.learning_rates[0], glue.epochs[0]
    conditions = [
        f"Learning rate {rate:g}, {epochs} epochs, batch {glue.batch_size}, the same "
        f"{glue.max_train_rows:,} training rows per task for all models, batches of rows with "
        "similar length, fp32."
    ]
    return Summary(present, averaged, rows, choices, [], conditions, majority)


def _of_task(results: Results, name: str, task: str) -> list[dict[str, Any]]:
    """Return the records of a model's seeds on a task.

    Raises:
        DataError: the models were not all fine-tuned under the same conditions.
    """
    cells = [f"glue/{name}/{task}-seed{seed}" for seed in SMALL.seeds]
    records = [record for cell in cells if (record := results.record(cell))]
    every = [
        results.record(f"glue/{other}/{task}-seed{seed}")
        for other in MODELS
        for seed in SMALL.seeds
    ]
    kinds = {str({**record["settings"], "model": None, "seed": None}) for record in every if record}
    if len(kinds) > 1:
        raise DataError(
            f"the results of {TASKS[task].title} were measured under {len(kinds)} different "
            "settings, and do not belong in one table; rerun `tools/quality run`, which measures "
            "the outdated ones again"
        )
    return records


def comparison(summary: Summary) -> Table:
    """Return the differences between pairs of models, and shares of the teacher's average."""
    rows = {row.name: row for row in summary.rows}
    table = Table(
        "Differences of the medians; bold if all seeds of one model score above all of the other",
        ["", *map(column_title, summary.averaged), "average", "share of the teacher's average"],
    )
    for ours, theirs in COMPARED:
        cells = [difference(rows[ours], rows[theirs], column) for column in summary.averaged]
        table.rows.append([f"{ours} vs. {theirs}", *cells, _gap(rows[ours], rows[theirs]), ""])
    teacher = rows[TEACHER].average
    for row in summary.rows:
        share = f"{row.average / teacher:.1%}" if teacher and row.average is not None else MISSING
        average = MISSING if row.average is None else f"{row.average:.1f}"
        table.rows.append([row.name, *[""] * len(summary.averaged), average, share])
    return table


def difference(ours: Row, theirs: Row, column: str) -> str:
    """Return the difference of two medians, bold if the ranges do not overlap.

    It is never bold for a single seed, which has no range.
    """
    if column not in ours.scores or column not in theirs.scores:
        return MISSING
    one, other = ours.scores[column], theirs.scores[column]
    text = f"{one.median - other.median:+.1f}".translate(MINUS)
    apart = one.low > other.high or one.high < other.low
    return f"**{text}**" if apart and min(one.n, other.n) > 1 else text


def _gap(ours: Row, theirs: Row) -> str:
    if ours.average is None or theirs.average is None:
        return MISSING
    return f"{ours.average - theirs.average:+.1f}".translate(MINUS)


def probe_table(results: Results) -> Table:
    """Return the probe and the held-out relation loss of each model before fine-tuning."""
    table = Table(
        "Without fine-tuning: Spearman on STS-B dev, and the held-out relation loss",
        [
            "model",
            "last block",
            "block below",
            *(f"loss, {heads} relation heads" for heads in HELD_OUT_HEADS),
        ],
    )
    for name in MODELS:
        record = results.record(f"models/{name}")
        if record is None:
            table.rows.append([name, *[MISSING] * (2 + len(HELD_OUT_HEADS))])
            continue
        result = record["result"]
        losses = result.get("held_out_loss", {})
        cells = [f"{losses[str(heads)]:.4f}" if losses else "–" for heads in HELD_OUT_HEADS]
        table.rows.append(
            [name, f"{result['probe'][LAST]:.3f}", f"{result['probe'][BELOW]:.3f}", *cells]
        )
    return table


def ablations_from(results: Results) -> dict[str, list[dict[str, float]]]:
    """Return the figures of each finished distillation seed, by variant."""
    finished: dict[str, list[dict[str, float]]] = {name: [] for name in ABLATIONS}
    for name, runs in finished.items():
        for seed in SMALL.seeds:
            if record := results.record(f"ablations/{name}-seed{seed}"):
                result = record["result"]
                losses = {
                    f"R{heads}": loss for heads, loss in result.get("held_out_loss", {}).items()
                }
                runs.append({**losses, LAST: result["probe"][LAST], BELOW: result["probe"][BELOW]})
    return finished


def ablation_table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Return each variant's figures, as median (lowest to highest), and the conclusion."""
    columns = {f"R{heads}": f"loss, {heads} relation heads" for heads in HELD_OUT_HEADS}
    columns |= {LAST: "probe, last block", BELOW: "probe, block below"}
    table = Table(
        "Short runs: median over distillation seeds (lowest to highest); compared with base by "
        "Welch's test",
        ["variant", "n", *columns.values(), "conclusion"],
    )
    for name, seeds in runs.items():
        cells = [
            _range([run[key] for run in seeds if key in run], 3 if key in (LAST, BELOW) else 4)
            for key in columns
        ]
        conclusion = "the defaults" if name == "base" else conclude(name, seeds, runs["base"])
        table.rows.append(
            [name, str(len(seeds)), *(cells if seeds else [MISSING] * len(columns)), conclusion]
        )
    return table


def _range(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return f"{median} ({low}–{high})"


def conclude(
    name: str, ours: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]
) -> str:
    """Return whether a variant is better or worse than the default, and what follows from that.

    The comparison uses the held-out loss with the most relation heads, if both sides have it, and
    the probe of the better block. For the number of relation heads it uses the probe alone: a loss
    favours the students that were trained with as many heads.
    """
    if min(len(ours), len(base)) < len(SMALL.seeds):
        return MISSING
    verdicts: list[float] = []
    texts = []
    top = f"R{max(HELD_OUT_HEADS)}"
    losses = [
        [run[top] for run in side] if top in side[0] and name not in OTHER_LOSS else []
        for side in (ours, base)
    ]
    probes = [[max(run[LAST], run[BELOW]) for run in side] for side in (ours, base)]
    # A lower loss and a higher probe are better.
    for label, better, values in (("loss", -1, losses), ("probe", 1, probes)):
        if not all(values):
            continue
        gap, chance = _welch(*values)
        texts.append(f"{label} {gap:+.4f} (p = {chance:.2g})".translate(MINUS))
        verdicts.append(better * gap if chance < SIGNIFICANT else 0.0)
    figures = ", ".join(texts)
    if all(verdict >= 0 for verdict in verdicts) and any(verdicts):
        return f"{DEFAULTS[name]}: {figures}; better, the default should change"
    if all(verdict <= 0 for verdict in verdicts) and any(verdicts):
        return f"{DEFAULTS[name]}: {figures}; worse, the default stays"
    if any(verdicts):
        return f"{DEFAULTS[name]}: {figures}; the measures disagree, the default stays"
    return f"{DEFAULTS[name]}: {figures}; not significant, the default stays"


def _welch(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the difference of the means, and its p-value by Welch's test."""
    gap = statistics.fmean(ours) - statistics.fmean(others)
    if len({*ours}) == len({*others}) == 1:  # without any spread the test would divide by 0
        return gap, 1.0 if gap == 0 else 0.0
    return gap, float(ttest_ind(ours, others, equal_var=False).pvalue)


def draw_curves(results: Results, path: Path) -> None:
    """Draw each student's held-out loss and probe over its training tokens.

    A dashed line shows the teacher's probe.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    keys = ("validation_loss", f"probe/{LAST}")
    for number, name in enumerate(STUDENTS):
        if record := results.record(f"models/{name}"):
            curve = record["result"]["curve"]
            for key, axes in zip(keys, panels, strict=True):
                tokens = [point["tokens"] / 1e6 for point in curve]
                axes.plot(
                    tokens, [point[key] for point in curve], "o-", color=COLORS[number], label=name
                )
    if teacher := results.record(f"models/{TEACHER}"):
        panels[1].axhline(
            teacher["result"]["probe"][LAST], color="black", linestyle="--", label=TEACHER
        )
    for axes, label in zip(
        panels,
        ("held-out relation loss at the student's own tap", "STS-B dev, Spearman"),
        strict=True,
    ):
        axes.set(xlabel="million tokens", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path)


def draw_ablations(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw every run's figures, with one panel per measure."""
    names = list(runs)[::-1]
    figure = Figure(figsize=(10, 1 + 0.4 * len(runs)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    top = max(HELD_OUT_HEADS)
    measures: Iterable[tuple[str, str]] = (
        (f"R{top}", f"held-out relation loss, {top} heads"),
        (LAST, "STS-B probe"),
    )
    for (key, label), axes in zip(measures, panels, strict=True):
        for number, variant in enumerate(names):
            values = [run[key] for run in runs[variant] if key in run]
            if values:
                axes.plot(values, [number] * len(values), "o", color=COLORS[0], alpha=0.6)
                axes.plot([statistics.median(values)], [number], "|", color="black", markersize=16)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    figure.savefig(path)
