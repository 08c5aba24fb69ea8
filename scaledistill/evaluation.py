"""Fine-tune and score models from Python, and at the end of a run: the GLUE runner under bertdistiller's names.

Enters: a model, or the configuration of a finished run. Leaves: scores in an output folder, a table, a section of the
student's model card. The runner itself is `glue`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from scaledistill.config import DistillConfig, EvaluationSettings, RunEvaluation
from scaledistill.errors import ConfigError
from scaledistill.glue.grid import GridResult, run_grid
from scaledistill.glue.plan import check_data
from scaledistill.glue.summary import column_title, summary_of
from scaledistill.glue.tasks import find_tasks
from scaledistill.models.export import write_card_section

if TYPE_CHECKING:
    import pandas

TASKS = ("mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "cola", "stsb")


def evaluate(
    model_name_or_path: str,
    tasks: str | Sequence[str] = TASKS,
    learning_rate: float | Sequence[float] = (1e-5, 3e-5, 5e-5),
    epochs: int | Sequence[int] = (3, 5, 10),
    output_dir: str | Path = "./evaluation_results",
    per_device_train_batch_size: int = 32,
    max_seq_length: int | None = None,
    seed: int | Sequence[int] = (1, 2, 3),
    data_dir: str | Path | None = None,
    max_train_rows: int | None = None,
    workers: int | None = None,
) -> GridResult:
    """Fine-tune a model on each task with each learning rate, number of epochs and seed, and score it on the dev sets.

    What is finished in `output_dir` is not run again, and other models' scores there stay. Cells that failed are in the
    result's `failures`.

    Args:
        model_name_or_path: a folder or hub name, with its tokenizer; the last part names it in tables.
        tasks: some of "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "squad2".
        max_seq_length: tokens; 128 unless said, 384 for SQuAD 2.0.
        data_dir: folder with the tasks' original files; from the hub unless said.
        workers: fine-tunings at a time; one per GPU unless said.

    Raises:
        ConfigError, DataError: model, data or settings cannot be used; nothing has run then.
    """
    try:
        settings = EvaluationSettings(
            tasks=[tasks] if isinstance(tasks, str) else list(tasks),
            data_folder=None if data_dir is None else str(data_dir),
            learning_rates=[learning_rate] if isinstance(learning_rate, (int, float)) else list(learning_rate),
            epochs=[epochs] if isinstance(epochs, int) else list(epochs),
            seeds=[seed] if isinstance(seed, int) else list(seed),
            batch_size=per_device_train_batch_size,
            max_length=max_seq_length,
            max_train_rows=max_train_rows,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: found {first['input']!r}; {first['msg']}") from error
    name = Path(os.path.abspath(model_name_or_path)).name
    return run_grid({name: model_name_or_path}, settings, Path(output_dir), workers=workers)


def create_summary_table(
    results_dir: str | Path,
    save: bool = True,
    output_file: str = "summary_table.csv",
    include_average: bool = True,
    round_decimals: int = 2,
) -> pandas.DataFrame:
    """Return the scores in a folder of `evaluate`: a row for each model, a column for each task and metric.

    A score is the median over the seeds, with the hyper-parameters of the highest median, in percent as the metric
    gives it: Matthews' correlation is not rescaled. The average is over the first metric of each task that all models
    have, WNLI left out.

    Raises:
        DataError: not such a folder.
    """
    import pandas

    summary = summary_of(Path(results_dir))
    rows = {}
    for row in summary.rows:
        rows[row.name] = {
            column_title(column): row.scores[column].median for column in summary.columns if column in row.scores
        }
        if include_average and row.average is not None:
            rows[row.name]["Average"] = row.average
    table = pandas.DataFrame.from_dict(rows, orient="index").round(round_decimals)
    if save:
        table.to_csv(Path(results_dir) / output_file)
    return table


def check_evaluation(settings: RunEvaluation) -> None:
    """Check, before a run, that its evaluation will find its tasks and their data.

    Raises:
        ConfigError, DataError: see `find_tasks` and `read_split`.
    """
    for task in find_tasks(settings.tasks):
        check_data(task, settings)


def evaluate_run(config: DistillConfig) -> GridResult:
    """Score the exported student of a finished run, and write the scores into its model card. One rank calls this.

    Raises:
        ConfigError, DataError: see `run_grid`.
        ValueError: the run has no `evaluation`.
    """
    if config.evaluation is None:
        raise ValueError("the configuration has no evaluation block")
    gc.collect()
    torch.cuda.empty_cache()  # for the processes that fine-tune
    folder = Path(config.run.folder)
    [name] = config.students
    export = folder / "export" / name
    models = {name: str(export)} | ({"teacher": config.teacher.model} if config.evaluation.include_teacher else {})
    result = run_grid(models, config.evaluation, folder / "evaluation")
    write_card_section(export, "Evaluation", result.summary.markdown())
    return result
