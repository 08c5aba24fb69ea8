"""Write scores into the model card of an export: tables for people, `model-index` for the hub.

Inputs: an output folder of the grid. Outputs: a changed README.md. Not handled here: the rest of
the card (`models.card`).
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult

from scaledistill.errors import SettingError
from scaledistill.glue.cell import Cell, read_record
from scaledistill.glue.summary import GRID, Choice, Row, Summary, column_title, summary_of
from scaledistill.glue.tasks import TASKS
from scaledistill.metrics.benchmark import Table
from scaledistill.models.card import write_card_section, write_results
from scaledistill.storage.files import read_json

TASK_TYPES = {
    "classification": ("text-classification", "Text Classification"),
    "regression": ("sentence-similarity", "Sentence Similarity"),
    "span": ("question-answering", "Question Answering"),
}
METRIC_TYPES = {
    "matthews": "matthews_correlation",
    "pearson": "pearson",
    "spearman": "spearmanr",
    "f1": "f1",
    "exact": "exact_match",
}


def scored_row(name: str, output: Path) -> Row:
    """Return a model's row of a grid's table.

    Raises:
        DataError: a grid has never been run in `output`.
        SettingError: it has no such model.
    """
    return _row(summary_of(output), name, output)


def write_scores(export: Path, name: str, output: Path) -> None:
    """Write the scores of a model into an export's model card.

    Args:
        name: the model's name in the grid.
        output: the output folder of the grid, finished or not.

    Raises:
        DataError: a grid has never been run in `output`.
        SettingError: it has no such model.
    """
    summary = summary_of(output)
    _row(summary, name, output)
    table = _seeds_table(summary, name, output)
    text = "\n\n".join([summary.markdown().strip(), table.markdown()])
    write_card_section(export, "Evaluation", text)
    if results := _results(summary, name):
        write_results(export, export.name, results)


def _row(summary: Summary, name: str, output: Path) -> Row:
    known = {row.name: row for row in summary.rows}
    if name not in known:
        raise SettingError(
            "name", name, f"is not a model of {output}", f"use {' or '.join(known) or 'another'}"
        )
    return known[name]


def _results(summary: Summary, name: str) -> list[EvalResult]:
    """Return the entries of `model-index`, in percent: the medians over the seeds."""
    results = []
    for choice in _chosen(summary, name):
        task = TASKS[choice.task]
        kind, title = TASK_TYPES[task.kind]
        squad = task.kind == "span"
        for metric, score in choice.scores.items():
            results.append(
                EvalResult(
                    task_type=kind,
                    task_name=title,
                    dataset_type="rajpurkar/squad_v2" if squad else "nyu-mll/glue",
                    dataset_name=task.title if squad else f"GLUE {task.title}",
                    dataset_config="squad_v2" if squad else choice.task,
                    dataset_split="validation_mismatched"
                    if metric.endswith("_mm")
                    else "validation_matched"
                    if metric.endswith("_m")
                    else "validation",
                    metric_type=METRIC_TYPES.get(metric, metric.partition("_")[0]),
                    # Equal for any number of seeds, so that later scores replace earlier ones.
                    metric_name=f"{column_title(f'{choice.task}/{metric}')}, %, median of seeds",
                    metric_value=round(score.median, 2),
                )
            )
    return results


def _seeds_table(summary: Summary, name: str, output: Path) -> Table:
    """Return the scores of each seed, with the chosen hyper-parameters."""
    grid = read_json(output / GRID) or {}
    cells = [Cell.from_dict(cell) for cell in grid["cells"] if cell["model"] == name]
    seeds = sorted({cell.seed for cell in cells})
    table = Table(
        f"Dev scores of {name} by seed, %",
        ["task", "learning rate × epochs", *(f"seed {seed}" for seed in seeds)],
    )
    for choice in _chosen(summary, name):
        picked = (choice.task, choice.learning_rate, choice.epochs)
        found = {
            cell.seed: record["scores"]
            for cell in cells
            if (cell.task, cell.learning_rate, cell.epochs) == picked
            and (record := read_record(cell, output))
        }
        for metric in choice.scores:
            scores = [f"{found[seed][metric]:.1f}" if seed in found else "–" for seed in seeds]
            setting = f"{choice.learning_rate:g} × {choice.epochs}"
            table.rows.append([column_title(f"{choice.task}/{metric}"), setting, *scores])
    return table


def _chosen(summary: Summary, name: str) -> list[Choice]:
    return [choice for choice in summary.choices if choice.model == name]
