"""Fine-tune and score models from Python, and at the end of a run.

Inputs: a model (with bertdistiller's argument names), or the configuration of a finished run.
Outputs: scores in an output folder, a table, a section of the student's model card. Not handled
here: running the fine-tunings (`grid`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from scaledistill.config.naming import teacher_names
from scaledistill.config.schema import DistillConfig, EvaluationSettings, RunEvaluation
from scaledistill.config.wording import explain
from scaledistill.errors import (
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_STOPPED,
    ConfigError,
    DataError,
    Problems,
    SettingError,
    SourceError,
    counted,
    joined,
    named,
    plain_type,
)
from scaledistill.glue.card import write_scores
from scaledistill.glue.grid import GridResult, GridStoppedError, run_grid
from scaledistill.glue.metrics import check_installed
from scaledistill.glue.plan import (
    MODEL_FILES,
    check_lengths,
    check_room,
    flops_per_parameter,
    grid_size,
    plan_model,
    plan_tasks,
    positions,
)
from scaledistill.glue.read import read_split
from scaledistill.glue.summary import column_title, summary_of
from scaledistill.glue.tasks import TASKS
from scaledistill.models.teacher import resolve_folder
from scaledistill.run.folder import Status, StopRequest, failures_told

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

TEACHER = "teacher"
ARGUMENTS = {
    "data_folder": "data_dir",
    "learning_rates": "learning_rate",
    "seeds": "seed",
    "batch_size": "per_device_train_batch_size",
    "max_length": "max_seq_length",
    "output": "output_dir",
}
"""The arguments of `evaluate` whose names differ from those of the settings."""
SETTINGS = {name: f"evaluation.{name}" for name in RunEvaluation.model_fields}
"""The settings of a run's evaluation."""
EIGHT_TASKS = ("mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "cola", "stsb")


def evaluate(
    model_name_or_path: str | Path,
    tasks: str | Sequence[str] = EIGHT_TASKS,
    learning_rate: float | Sequence[float] = (1e-5, 3e-5, 5e-5),
    epochs: int | Sequence[int] = (3, 5, 10),
    output_dir: str | Path = "./evaluation_results",
    per_device_train_batch_size: int = 32,
    max_seq_length: int | None = None,
    seed: int | Sequence[int] = (1, 2, 3),
    data_dir: str | Path | None = None,
    max_train_rows: int | None = None,
    workers: int | None = None,
    model_name: str | None = None,
) -> GridResult:
    """Fine-tune a model on each task with a grid of hyper-parameters and score it on the dev sets.

    Each learning rate, number of epochs and seed is one cell. Cells that are finished in
    `output_dir` are not run again, and other models' scores there are kept. Failed cells are in the
    result's `failures`.

    Args:
        model_name_or_path: a folder or hub name, with its tokenizer.
        tasks: some of "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli",
            "squad2".
        max_seq_length: maximum tokens per example (default: 128; SQuAD 2.0: 384).
        data_dir: folder with the tasks' original files (default: from the hub).
        max_train_rows: maximum training rows per task (default: all).
        workers: number of cells that run at a time (default: one per GPU; one without GPUs).
        model_name: the model's name in tables (default: the last part of `model_name_or_path`).

    Raises:
        ConfigError, DataError: model, data or settings cannot be used, or `output_dir` has scores
            of another model of this name. Nothing has run in that case.
    """
    try:
        settings = EvaluationSettings(
            tasks=[tasks] if isinstance(tasks, str) else list(tasks),
            data_folder=None if data_dir is None else str(data_dir),
            learning_rates=[learning_rate]
            if isinstance(learning_rate, (int, float))
            else list(learning_rate),
            epochs=[epochs] if isinstance(epochs, int) else list(epochs),
            seeds=[seed] if isinstance(seed, int) else list(seed),
            batch_size=per_device_train_batch_size,
            max_length=max_seq_length,
            max_train_rows=max_train_rows,
        )
    except ValidationError as error:
        with named(**ARGUMENTS):
            raise joined(explain(error.errors(), {}, EvaluationSettings)) from error
    name = model_name or Path(os.path.abspath(model_name_or_path)).name
    with named(**ARGUMENTS):
        models = {name: str(model_name_or_path)}
        return run_grid(models, settings, Path(output_dir), workers=workers)


def create_summary_table(
    results_dir: str | Path,
    save: bool = True,
    output_file: str = "summary_table.csv",
    include_average: bool = True,
    round_decimals: int = 2,
) -> pandas.DataFrame:
    """Return the scores in a folder of `evaluate`: a row per model, a column per task and metric.

    A score is the median over the seeds, for the hyper-parameters with the highest median, in
    percent; Matthews' correlation is × 100 too, but not rescaled. The average is over the first
    metric of each task that all models have, without WNLI.

    Raises:
        DataError: `results_dir` is not a folder that `evaluate` wrote.
    """
    import pandas

    summary = summary_of(Path(results_dir))
    for note in summary.one_answer_notes():  # the table has bare numbers, so no room for a mark
        log.warning("%s", note)
    rows = {}
    for row in summary.rows:
        rows[row.name] = {
            column_title(column): row.scores[column].median
            for column in summary.columns
            if column in row.scores
        }
        if include_average and row.average is not None:
            rows[row.name]["Average"] = row.average
    table = pandas.DataFrame.from_dict(rows, orient="index").round(round_decimals)
    if save:
        table.to_csv(Path(results_dir) / output_file)
    return table


@dataclass(frozen=True)
class PlannedEvaluation:
    """What the evaluation at the end of a run will do."""

    size: str
    """The number of fine-tunings, and how it comes about."""
    flops_per_parameter: float
    """FLOPs of all fine-tunings of one model, per parameter of its encoder."""
    teacher_parameters: int
    """Parameters of the teacher's encoder; 0 if the teacher is not scored."""

    def flops(self, student_parameters: int) -> float:
        """Return the approximate FLOPs of all fine-tunings.

        Args:
            student_parameters: parameters of the student's encoder.
        """
        return self.flops_per_parameter * (student_parameters + self.teacher_parameters)


def plan_evaluation(
    config: DistillConfig, students: Mapping[str, PreTrainedConfig]
) -> PlannedEvaluation:
    """Check, before a run, its evaluation's settings and data, and the teacher if it is scored.

    Args:
        students: the configs of their models, of which only the lengths are checked.

    Raises:
        ConfigError, DataError: one line for every problem.
        ValueError: the run has no `evaluation`.
    """
    settings = _settings_of(config)
    problems = Problems()
    if settings.probe:
        data_folder = Path(settings.data_folder) if settings.data_folder else None
        problems.attempt(read_split, TASKS[settings.probe], "dev", data_folder)
    if settings.tasks:
        tasks, data = plan_tasks(settings, problems)
    else:
        tasks, data = [], {}
        problems.attempt(check_installed)  # among what `plan_tasks` checks
    if settings.include_teacher and not settings.tasks:
        problems.found.append(
            SettingError(
                "include_teacher",
                expected="needs tasks to score the teacher on",
                remedy="name some, or turn it off",
            )
        )
    if settings.include_teacher and TEACHER in config.students:
        problems.found.append(
            SettingError(
                "include_teacher",
                expected=f"needs the name {TEACHER!r} in the tables",
                remedy="give the student another name",
            )
        )
    whole_teacher = None
    if settings.include_teacher and tasks:
        whole_teacher = problems.attempt(
            lambda: plan_model(TEACHER, _teacher_folder(config), tasks)
        )
    for name, shape in students.items():
        check_lengths(f"the student {name}", positions(shape), data.values(), problems)
    folder = problems.attempt(lambda: Path(_teacher_folder(config)))
    if folder:  # the students have the teacher's tokenizer
        whose = f"the student{'' if len(config.students) == 1 else 's'} "
        check_room(whose + " and ".join(config.students), folder, data.values(), problems)
    problems.found = [_of_evaluation(problem) for problem in problems.found]
    problems.raise_all()
    return PlannedEvaluation(
        size=grid_size(len(config.students) + settings.include_teacher, settings),
        flops_per_parameter=flops_per_parameter(data.values(), settings),
        teacher_parameters=whole_teacher.encoder_parameters if whole_teacher else 0,
    )


def evaluate_run(config: DistillConfig, message: str) -> tuple[str, int, str]:
    """Score the exported students of a finished run, and write the scores into their model cards.

    Only one rank calls this.

    Args:
        message: how the run ended.

    Returns:
        The new state of the run ("done", "stopped" or "failed"), as in `status.json`, its exit code
        and its message.

    Raises:
        ConfigError, DataError: see `run_grid`.
        ValueError: the run has no `evaluation`.
    """
    folder, settings = Path(config.run.folder), _settings_of(config)
    torch.cuda.empty_cache()  # the worker processes need the memory
    status = Status(folder, config.train.max_steps)
    trained = [name for name in config.students if name not in status.dropped]
    exports = {name: folder / "export" / name for name in trained}
    output, several = folder / "evaluation", len(exports) > 1
    answer = "stopping; finished fine-tunings are kept"
    stop = StopRequest(
        folder, watch_file=True, logs=True, max_hours=config.run.max_hours, answer=answer
    )
    with stop.listening(), failures_told(status, of_settings=True):
        who = "the students are" if several else "the student is"
        status.write("evaluating", f"{message}; {who} being fine-tuned and scored")
        models = {name: str(export) for name, export in exports.items()}
        if settings.include_teacher:
            models[TEACHER] = _teacher_folder(config)
        try:
            with named(**SETTINGS):
                result = run_grid(models, settings, output, own_output=True, stop=stop.reason)
        except GridStoppedError:
            why = (
                f"the evaluation was stopped ({stop.acknowledge()}); rerun the same command to "
                "resume"
            )
            end = ("stopped", EXIT_STOPPED, f"{message}; {why}")
        else:
            for name, export in exports.items():
                write_scores(export, name, output)
            whose = "their" if several else "its"
            end = ("done", EXIT_DONE, f"{message}; {whose} scores are in {output}/summary.md")
            if result.failures:
                why = (
                    f"{counted(len(result.failures), 'fine-tuning')} failed, {output}/summary.md "
                    "says why"
                )
                end = ("failed", EXIT_ENVIRONMENT, f"{message}; {why}")
        state, exit_code, text = end
        status.write(state, text, exit_code)
    return end


def _of_evaluation(problem: ConfigError | DataError) -> ConfigError | DataError:
    """Return a problem as one of the run's `evaluation`: by its setting, or else by the block."""
    if not (isinstance(problem, SettingError | SourceError) and problem.field in SETTINGS):
        problem = plain_type(problem)("evaluation: ", *problem.pieces)
    problem.rename(SETTINGS)
    return problem


def _settings_of(config: DistillConfig) -> RunEvaluation:
    if config.evaluation is None:
        raise ValueError("the configuration has no evaluation block")
    return config.evaluation


def _teacher_folder(config: DistillConfig) -> str:
    """Return the folder of the teacher and its tokenizer; for a hub name, of the right revision."""
    with named(**teacher_names(config.teacher)):
        return str(resolve_folder(config.teacher.model, config.teacher.revision, MODEL_FILES))
