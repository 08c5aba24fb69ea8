"""Summarise a folder of cells: the best hyper-parameters per model and task, and their scores.

Inputs: an output folder of `grid`. Outputs: a `Summary`, and its tables as Markdown. Not handled
here: running cells (`grid`), drawing (`picture`), writing files (`output`).

For each model and task, the chosen hyper-parameters are those with the highest median of the task's
first dev metric over the seeds; in a tie the lower learning rate, then fewer epochs. Those without
all seeds (cells missing or failed) are considered only if none has all seeds. Scores are those
after the last epoch. Nothing is rescaled.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scaledistill.errors import DataError, counted
from scaledistill.glue.cell import Cell, read_error, read_predictions, read_record
from scaledistill.glue.metrics import only_answer
from scaledistill.glue.tasks import TASKS
from scaledistill.metrics.benchmark import Table
from scaledistill.storage.files import read_json

GRID = "grid.json"
PUBLISHED = Path(__file__).with_name("published.json")
"""Scores of other models, and their sources."""
BASELINE = "baseline"
MAJORITY = "majority class"  # the baseline's row; a model's name cannot have a space
ONE_ANSWER = {"classification": "one class", "regression": "one value", "span": "one answer"}
NOT_AVERAGED = ("wnli",)  # its dev set contradicts its training set; it is usually left out


@dataclass(frozen=True)
class Score:
    """A metric over `n` seeds, in percent."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Return the score of at least one value, one per seed."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    @property
    def spread(self) -> float:
        """Half of the range, in percentage points."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Choice:
    """The hyper-parameters chosen for a model and a task, and their scores."""

    model: str
    task: str
    learning_rate: float
    epochs: int
    scores: dict[str, Score]
    """By metric."""
    n: int
    """Number of finished seeds."""
    planned: int
    """Number of seeds in the grid."""
    tried: int
    """Number of pairs of learning rate and epochs that were compared."""
    only_answers: tuple[str, ...] = ()
    """For each seed whose model gave one answer for all dev examples, that answer."""


@dataclass(frozen=True)
class Row:
    """A row of the table: one of our models, published scores or the baseline."""

    name: str
    parameters: int | None
    scores: dict[str, Score]
    """By "task/metric"."""
    average: float | None
    published: str | None = None
    """The source of published scores, or `BASELINE`; None for our models."""


@dataclass(frozen=True)
class Summary:
    """The content of the tables."""

    columns: list[str]
    """"task/metric", in the order of the tables."""
    averaged: list[str]
    """The columns in the average: the first metric of each task that all of our models have."""
    rows: list[Row]
    choices: list[Choice]
    failures: list[tuple[str, str]]
    """The title of each cell without a record, and the reason."""
    conditions: list[str]
    """What a reader must know about the settings, one sentence each."""
    majority: dict[str, float] = field(default_factory=dict)
    """By "task/metric", the score of always predicting the most common training label."""

    def figures(self) -> list[dict[str, Any]]:
        """Return our scores and the baseline's by name, for `--json`.

        A figure counts the seeds whose model gave only one answer, if there are any. The figures
        depend on the finished cells only.
        """
        found = []
        for row in self._ours():
            for column, score in row.scores.items():
                found.append(
                    {
                        "name": f"{row.name}/{column}",
                        "value": score.median,
                        "unit": "%",
                        "n": score.n,
                    }
                )
            if row.average is not None:
                n = len(self.averaged)
                found.append(
                    {"name": f"{row.name}/average", "value": row.average, "unit": "%", "n": n}
                )
        for choice in self.choices:
            if count := len(choice.only_answers):
                name = f"{choice.model}/{choice.task}/one answer only"
                found.append({"name": name, "value": count, "unit": "seeds", "n": choice.n})
        for column, value in self.majority.items():
            found.append({"name": f"{MAJORITY}/{column}", "value": value, "unit": "%", "n": 1})
        return found

    def tables(self) -> list[Table]:
        """Return the table of scores, and of the chosen hyper-parameters if there was a choice."""
        seeds = {choice.planned for choice in self.choices}
        title = "Dev scores, %: median over the seeds ± half the range"
        sized = any(row.parameters is not None for row in self.rows)
        head = [
            "model",
            *(["parameters"] if sized else []),
            *map(column_title, self.columns),
            *(["average"] if self.averaged else []),
        ]
        scores = Table(title + (f", n = {min(seeds)}" if len(seeds) == 1 else ""), head)
        chosen = {(choice.model, choice.task): choice for choice in self.choices}
        for row in [*self._ours(), *self._majority_rows(), *self._published()]:
            cells = [
                self._text(row, column, chosen.get((row.name, column.partition("/")[0])))
                for column in self.columns
            ]
            average = (
                [("–" if row.average is None else f"{row.average:.1f}")] if self.averaged else []
            )
            name = f"{row.name} (published)" if row.published not in (None, BASELINE) else row.name
            size = "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M"
            scores.rows.append([name, *([size] if sized else []), *cells, *average])
        if all(choice.tried == 1 for choice in self.choices):
            return [scores]
        tasks = list(dict.fromkeys(column.partition("/")[0] for column in self.columns))
        picked = Table(
            "Chosen: learning rate × epochs (number tried)",
            ["model", *(TASKS[task].title for task in tasks)],
        )
        for row in self._ours():
            found = [chosen.get((row.name, task)) for task in tasks]
            texts = [
                f"{one.learning_rate:g} × {one.epochs} ({one.tried})" if one else "–"
                for one in found
            ]
            picked.rows.append([row.name, *texts])
        return [scores, picked]

    def notes(self) -> list[str]:
        """Return the notes on the tables, one sentence each."""
        notes = [*self.one_answer_notes(), *self.conditions]
        if self.majority:
            notes.append(
                f"{MAJORITY.capitalize()}: always predicting the most common label of the training "
                "set (for STS-B one value, whose correlation counts as 0)."
            )
        if self.averaged:
            text = f"Average: over {', '.join(map(column_title, self.averaged))}"
            left_out = [
                column for column in self.columns if column.partition("/")[0] in NOT_AVERAGED
            ]
            notes.append(text + ("; WNLI is excluded, as is usual." if left_out else "."))
        if published := [f"{row.name} ({row.published})" for row in self.rows if row.published]:
            notes.append(
                "Published, with other hyper-parameters, seeds and selection: "
                f"{', '.join(published)}."
            )
        return notes

    def one_answer_notes(self) -> list[str]:
        """Return a sentence for each model and task with seeds that gave only one answer."""
        notes = []
        for choice in self.choices:
            if not choice.only_answers:
                continue
            answers = " or ".join(dict.fromkeys(choice.only_answers))
            predict = "seed predicts" if choice.n == 1 else "seeds predict"
            notes.append(
                f"{choice.model} on {TASKS[choice.task].title}: {len(choice.only_answers)} of "
                f"{choice.n} {predict} {answers} for every dev example. Such scores say nothing "
                f"about the model; compare them with those of the {MAJORITY}."
            )
        return notes

    def markdown(self) -> str:
        """Return the tables, the notes and the failed cells as Markdown."""
        parts = [table.markdown() for table in self.tables()]
        parts.append("\n".join(f"- {note}" for note in self.notes()))
        if self.failures:
            lines = [f"- {cell}: {_first_line(error)}" for cell, error in self.failures]
            parts.append(
                "\n".join([f"**Not finished: {counted(len(self.failures), 'cell')}**", "", *lines])
            )
        return "\n\n".join(parts) + "\n"

    def only_answers(self, row: Row, column: str) -> int:
        """Return how many seeds of a row gave only one answer in the column's task."""
        task = column.partition("/")[0]
        found = [
            choice for choice in self.choices if (choice.model, choice.task) == (row.name, task)
        ]
        return len(found[0].only_answers) if found and row.published is None else 0

    def _ours(self) -> list[Row]:
        return [row for row in self.rows if row.published is None]

    def _published(self) -> list[Row]:
        return [row for row in self.rows if row.published is not None]

    def _majority_rows(self) -> list[Row]:
        """Return the baseline's row; [] if no finished cell has its scores."""
        if not self.majority:
            return []
        averaged = [self.majority[column] for column in self.averaged if column in self.majority]
        average = (
            statistics.fmean(averaged) if averaged and len(averaged) == len(self.averaged) else None
        )
        scores = {column: Score.of([value]) for column, value in self.majority.items()}
        return [Row(MAJORITY, None, scores, average, published=BASELINE)]

    def _text(self, row: Row, column: str, choice: Choice | None) -> str:
        score = row.scores.get(column)
        if score is None:
            return "–" if row.published else "none finished"
        if row.published:
            return f"{score.median:.1f}"
        mark = ""
        if choice and choice.only_answers:
            share = ""
            if len(choice.only_answers) < choice.n:
                share = f" in {len(choice.only_answers)} of {choice.n}"
            mark = f" ({ONE_ANSWER[TASKS[choice.task].kind]}{share})"
        spread = f" ±{score.spread:.1f}" if score.n > 1 else ""
        short = f" ({choice.n} of {choice.planned})" if choice and choice.n < choice.planned else ""
        return f"{score.median:.1f}{spread}{short}{mark}"


def summary_of(output: Path, *, published: bool = False) -> Summary:
    """Summarise an output folder of `grid`, finished or not.

    Args:
        published: add rows of published scores for the same columns.

    Raises:
        DataError: a grid has never been run in the folder.
    """
    grid = read_json(output / GRID)
    if grid is None:
        raise DataError(f"{output} has no {GRID}; expected the output folder of a GLUE grid")
    cells = [Cell.from_dict(cell) for cell in grid["cells"]]
    records = {cell: record for cell in cells if (record := read_record(cell, output))}
    names = list(dict.fromkeys(cell.model for cell in cells))
    tasks = [name for name in TASKS if any(cell.task == name for cell in cells)]
    columns = [f"{task}/{metric}" for task in tasks for metric in TASKS[task].metrics]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for name in names:
        for task in tasks:
            groups[name, task] = [cell for cell in cells if (cell.model, cell.task) == (name, task)]
    choices = []
    for group in filter(None, groups.values()):
        finished = {cell: records[cell] for cell in group if cell in records}
        if choice := choose(group, {cell: record["scores"] for cell, record in finished.items()}):
            choices.append(replace(choice, only_answers=_only_answers(choice, finished, output)))
    majority: dict[str, float] = {}
    for cell, record in records.items():
        # Records of earlier versions do not have it.
        majority |= {
            f"{cell.task}/{name}": value
            for name, value in record.get("majority_scores", {}).items()
        }
    scores = {name: _scores(choice for choice in choices if choice.model == name) for name in names}
    firsts = [f"{task}/{TASKS[task].metrics[0]}" for task in tasks if task not in NOT_AVERAGED]
    averaged = [column for column in firsts if all(column in scores[name] for name in names)]
    averaged = averaged if len(averaged) > 1 else []
    rows = [
        Row(
            name=name,
            parameters=grid["models"][name]["parameters"],
            scores=scores[name],
            average=statistics.fmean(scores[name][column].median for column in averaged)
            if averaged
            else None,
        )
        for name in names
    ]
    return Summary(
        columns=columns,
        averaged=averaged,
        rows=[*rows, *(_published(columns) if published else [])],
        choices=choices,
        failures=[
            (cell.title, read_error(cell, output) or "not run yet")
            for cell in cells
            if cell not in records
        ],
        conditions=_conditions(cells, records, grid["quick"]),
        majority=majority,
    )


def choose(cells: Sequence[Cell], scores: Mapping[Cell, Mapping[str, float]]) -> Choice | None:
    """Return the best hyper-parameters of a model and a task; None if no cell is finished.

    Args:
        cells: all planned cells of one model and one task.
        scores: those of the finished cells, by metric.
    """
    pairs: dict[tuple[float, int], list[Cell]] = {}
    for cell in cells:
        pairs.setdefault((cell.learning_rate, cell.epochs), []).append(cell)
    task = TASKS[cells[0].task]
    finished = {
        pair: [scores[cell] for cell in group if cell in scores] for pair, group in pairs.items()
    }
    planned = len({cell.seed for cell in cells})  # by all grids of the folder together
    candidates = [pair for pair, found in finished.items() if len(found) == planned]
    if not candidates:
        most = max(map(len, finished.values()))
        candidates = [pair for pair, found in finished.items() if len(found) == most > 0]
    if not candidates:
        return None
    medians = {
        pair: statistics.median(one[task.metrics[0]] for one in finished[pair])
        for pair in candidates
    }
    best = min(candidates, key=lambda pair: (-medians[pair], pair))
    return Choice(
        model=cells[0].model,
        task=task.name,
        learning_rate=best[0],
        epochs=best[1],
        scores={
            metric: Score.of([one[metric] for one in finished[best]]) for metric in task.metrics
        },
        n=len(finished[best]),
        planned=planned,
        tried=len(candidates),
    )


def _only_answers(
    choice: Choice, records: Mapping[Cell, Mapping[str, Any]], output: Path
) -> tuple[str, ...]:
    """Return the answers of those seeds of the choice that gave only one answer."""
    found = []
    for cell, record in records.items():
        if (cell.learning_rate, cell.epochs) != (choice.learning_rate, choice.epochs):
            continue
        # Records of earlier versions do not have it, but their predictions are still there.
        if "only_answer" in record:
            answer = record["only_answer"]
        else:
            answer = only_answer(cell.task, read_predictions(cell, output))
        if answer is not None:
            found.append(answer)
    return tuple(found)


def column_title(column: str) -> str:
    """Return "CoLA matthews" for "cola/matthews"."""
    task, metric = column.split("/")
    return f"{TASKS[task].title} {metric.replace('_', ' ')}"


def _scores(choices: Any) -> dict[str, Score]:
    return {
        f"{choice.task}/{metric}": score
        for choice in choices
        for metric, score in choice.scores.items()
    }


def _published(columns: Sequence[str]) -> list[Row]:
    rows = []
    for model in json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"]:
        known = model["scores"]
        scores = {column: Score.of([known[column]]) for column in columns if column in known}
        if scores:
            rows.append(
                Row(model["name"], model["parameters"], scores, None, published=model["source"])
            )
    return rows


def _conditions(
    cells: Sequence[Cell], records: Mapping[Cell, Mapping[str, Any]], quick: bool
) -> list[str]:
    """Return the sentences on what the scores depend on."""
    pairs = sorted({(cell.learning_rate, cell.epochs) for cell in cells})
    chosen = "; hyper-parameters were chosen on the same sets" if len(pairs) > 1 else ""
    sentences = [f"Scores are those of the dev sets after the last epoch{chosen}."]
    if quick:
        sentences.insert(
            0,
            "A quick look: few hyper-parameters and rows; not to be compared with published "
            "numbers.",
        )
    limits = {cell.conditions.max_train_rows for cell in cells if cell.conditions.max_train_rows}
    if limits:
        cut = {
            cell.task
            for cell, record in records.items()
            if record["train_rows"] < record["all_train_rows"]
        }
        titles = [task.title for task in TASKS.values() if task.name in cut]
        which = f"cut: {', '.join(titles)}" if titles else "none is cut"
        sentences.append(
            f"At most {min(limits):,} training rows per task, the same ones for all ({which})."
        )
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell.learning_rate for cell in cells}))
    epochs = ", ".join(map(str, sorted({cell.epochs for cell in cells})))
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
    sizes = ", ".join(map(str, sorted({cell.conditions.batch_size for cell in cells})))
    grouped = any(cell.conditions.group_by_length for cell in cells)
    sentences.append(
        f"Learning rates {rates}; epochs {epochs}; seeds {seeds}; batch size {sizes}"
        + (", rows of similar length together." if grouped else ".")
    )
    return sentences


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
