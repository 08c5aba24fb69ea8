"""Write a summary into an output folder: `summary.md`, `.csv`, `.json` and `.png`.

Inputs: a `Summary`. Outputs: files. Not handled here: their content (`summary`, `picture`).
"""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path

from scaledistill.glue.picture import draw
from scaledistill.glue.summary import Summary
from scaledistill.storage.files import write_json


def write_summary(summary: Summary, output: Path) -> None:
    """Write `summary.md`, `.csv`, `.json` and `.png` into a folder."""
    (output / "summary.md").write_text(summary.markdown())
    with (output / "summary.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            [
                *(
                    "model",
                    "published",
                    "task",
                    "metric",
                    "median",
                    "low",
                    "high",
                    "n",
                    "learning_rate",
                    "epochs",
                ),
                *("one_answer_seeds", "majority_class"),
            ]
        )
        chosen = {(choice.model, choice.task): choice for choice in summary.choices}
        for row in summary.rows:
            for column, score in row.scores.items():
                task, metric = column.split("/")
                choice = None if row.published else chosen[row.name, task]
                picked = [choice.learning_rate, choice.epochs] if choice else ["", ""]
                numbers = [score.median, score.low, score.high, score.n]
                marks = [
                    len(choice.only_answers) if choice else "",
                    summary.majority.get(column, ""),
                ]
                table.writerow(
                    [row.name, row.published or "", task, metric, *numbers, *picked, *marks]
                )
    write_json(output / "summary.json", asdict(summary))
    draw(summary, output / "summary.png")
