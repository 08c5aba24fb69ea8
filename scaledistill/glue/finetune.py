"""Fine-tune a model on a task and score it: the work of one cell.

Inputs: a cell, the folders of the model and of the data. Outputs: the cell's record and the
prediction for each dev example. The scores are those after the last epoch; the record also has the
earlier epochs. Not handled here: tokenised features and scores (`features`), the cell's files
(`cell`).

Legend: C classes, T tokens of a feature.
"""

from __future__ import annotations

import inspect
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from scaledistill.errors import DataError, DivergedError, named
from scaledistill.glue.cell import Cell
from scaledistill.glue.features import Features, prepare
from scaledistill.glue.files import model_sha256
from scaledistill.glue.metrics import only_answer
from scaledistill.glue.tasks import TASKS, Task
from scaledistill.models.architectures import ARCHITECTURES
from scaledistill.models.teacher import quiet_transformers, read_config
from scaledistill.models.weights import check_complete, check_finite

OnProgress = Callable[[float], None]
PREDICTION_BATCH = 64


def take_share(gpu: str | None, threads: int) -> None:
    """Limit this process to one GPU and a number of threads.

    Call it before anything initialises CUDA.

    Args:
        gpu: an entry of `CUDA_VISIBLE_DEVICES`; None leaves the variable unchanged.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)


def fine_tune(
    cell: Cell,
    model_folder: Path,
    data_folder: Path | None,
    on_progress: OnProgress,
    scores_each_epoch: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fine-tune a model and score it; return the record and the predictions.

    Args:
        model_folder: has the model's config, weights and tokenizer.
        data_folder: as for `read_split`.
        on_progress: called with the finished fraction of the training steps.
        scores_each_epoch: score after each epoch, not only after the last.

    Raises:
        DataError: the model lacks weights, or the data differs from the data that the cell was
            planned with.
        DivergedError: the loss, a weight or an output is not finite.
    """
    start = time.perf_counter()
    task = TASKS[cell.task]
    set_seed(cell.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode fills new tensors, which takes time and is not needed here. mypy does not
    # know the attribute.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model, new_weights = _load_model(model_folder, task, cell.model)
    if model_sha256(model_folder) != cell.model_sha256:
        raise DataError(
            f"the model {cell.model} in {model_folder} has changed since the grid was started; "
            "start the grid again, with a copy of the model if a run still exports it"
        )
    data = prepare(
        cell, model_folder, data_folder, list(inspect.signature(model.forward).parameters)
    )
    row = ARCHITECTURES.get(model.config.model_type)
    if row and row.causal:  # the head reads the last token that is not padding
        model.config.pad_token_id = data.tokenizer.pad_token_id
    collate = DataCollatorWithPadding(data.tokenizer)
    epochs: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []

    def end_epoch(train_loss: float) -> None:
        if not math.isfinite(train_loss):
            raise DivergedError(
                f"the training loss of epoch {len(epochs) + 1} is not finite; try a lower learning "
                f"rate than {cell.learning_rate:g}"
            )
        epoch: dict[str, Any] = {"epoch": len(epochs) + 1, "train_loss": train_loss}
        if not (scores_each_epoch or epoch["epoch"] == cell.epochs):
            if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
                raise DivergedError(
                    f"weights after epoch {epoch['epoch']} are not finite; try a lower learning "
                    f"rate than {cell.learning_rate:g}"
                )
            epochs.append(epoch)
            return
        predictions.clear()
        found: dict[str, float] = {}
        for split in data.dev:
            logits = _predict(model, split.features, collate)
            if not all(np.isfinite(array).all() for array in logits):
                raise DivergedError(
                    f"outputs after epoch {len(epochs) + 1} are not finite; try a lower learning "
                    f"rate than {cell.learning_rate:g}"
                )
            split_scores, split_predictions = split.score(logits)
            found |= split_scores
            predictions.extend(split_predictions)
        epochs.append({**epoch, "scores": found})

    train_seconds = _train(cell, model, data.train, collate, on_progress, end_epoch)
    device = next(model.parameters()).device
    record = {
        "scores": epochs[-1]["scores"],
        "majority_scores": data.majority,
        "only_answer": only_answer(task.name, predictions),
        "epochs": epochs,
        "train_rows": data.train_rows,
        "all_train_rows": data.all_train_rows,
        "dev_rows": {split.name: split.rows for split in data.dev},
        "new_weights": new_weights,
        "parameters": model.num_parameters(),
        "seconds": time.perf_counter() - start,
        "train_seconds": train_seconds,
        "tokens_per_second": cell.epochs
        * sum(len(row["input_ids"]) for row in data.train)
        / train_seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bf16" if _bf16() else "fp32",
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name)
            for name in ("scaledistill", "torch", "transformers", "scikit-learn")
        }
        | {"python": platform.python_version()},
    }
    return record, predictions


def _load_model(folder: Path, task: Task, name: str) -> tuple[PreTrainedModel, list[str]]:
    """Return the model with a head for the task, and the names of newly initialised weights.

    A head in the folder is used if its shapes fit, as in transformers.
    """
    with named(model=f"model {name}"):
        config = read_config(folder)
    if task.kind == "classification":
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
        config.problem_type = "single_label_classification"
    elif task.kind == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.num_labels = 2  # start and end
    auto = (
        AutoModelForQuestionAnswering if task.kind == "span" else AutoModelForSequenceClassification
    )
    with quiet_transformers():
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # for a head; the encoder's sizes are checked below
            output_loading_info=True,
        )
    encoder = f"{model.base_model_prefix}."
    wrong: dict[str, tuple[list[int] | None, list[int]]] = {
        key: (list(found), list(expected)) for key, found, expected in info["mismatched_keys"]
    }
    missing: dict[str, tuple[None, list[int]]] = {key: (None, []) for key in info["missing_keys"]}
    needed = {
        key: shapes
        for key, shapes in (wrong | missing).items()
        if key.startswith(encoder) and ".pooler." not in key
    }
    with named(model=f"model {name}"):
        check_complete(needed)
        for key, tensor in model.state_dict().items():
            check_finite(key, tensor)
    return model, sorted({*wrong, *missing})


class _Epochs(TrainerCallback):
    """Reports the progress after each step, and each epoch's mean loss at its end."""

    def __init__(self, on_progress: OnProgress, end_epoch: Callable[[float], None]) -> None:
        self._on_progress, self._end_epoch = on_progress, end_epoch
        self.paused_seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._on_progress(state.global_step / state.max_steps)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:  # once an epoch, after its last step
            start = time.perf_counter()
            self._end_epoch(float(logs["loss"]))
            self.paused_seconds += time.perf_counter() - start


def _train(
    cell: Cell,
    model: PreTrainedModel,
    features: Features,
    collate: DataCollatorWithPadding,
    on_progress: OnProgress,
    end_epoch: Callable[[float], None],
) -> float:
    """Train the model in place; return the seconds taken, without those of `end_epoch`."""
    conditions = cell.conditions
    steps = cell.epochs * math.ceil(len(features) / conditions.batch_size)
    on_gpu = torch.cuda.is_available()
    with quiet_transformers():
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written there
            per_device_train_batch_size=conditions.batch_size,
            learning_rate=cell.learning_rate,
            num_train_epochs=cell.epochs,
            seed=cell.seed,
            # accelerate adds the epoch's number: with 1000 × seed, no two seeds share a row order.
            data_seed=1000 * cell.seed,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(conditions.warmup_fraction * steps),
            weight_decay=conditions.weight_decay,
            train_sampling_strategy="group_by_length" if conditions.group_by_length else "random",
            bf16=_bf16(),
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="epoch",
            # The filter would replace a diverged loss by the last finite one.
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
        )
        callback = _Epochs(on_progress, end_epoch)
        trainer = Trainer(
            model, arguments, data_collator=collate, train_dataset=features, callbacks=[callback]
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start - callback.paused_seconds


def _bf16() -> bool:
    """Whether to train in bf16 autocast: on GPUs that support bf16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@torch.no_grad()
def _predict(
    model: PreTrainedModel, features: Features, collate: DataCollatorWithPadding
) -> list[np.ndarray]:
    """Return the outputs for each feature, in order: float32 [C], or for spans [2, T].

    The two rows of a span's outputs are the start and end logits.
    """
    device = next(model.parameters()).device
    inputs = [{name: value for name, value in row.items() if name != "labels"} for row in features]
    # Longest first, so that batches have rows of similar length and little padding.
    order = sorted(range(len(inputs)), key=lambda row: -len(inputs[row]["input_ids"]))
    outputs: list[np.ndarray] = [np.empty(0)] * len(inputs)
    training = model.training
    model.eval()
    for first in range(0, len(order), PREDICTION_BATCH):
        rows = order[first : first + PREDICTION_BATCH]
        batch = {
            name: tensor.to(device)
            for name, tensor in collate([inputs[row] for row in rows]).items()
        }
        with torch.autocast(device.type, torch.bfloat16, enabled=_bf16()):
            out = model(**batch)
        logits = (
            out.logits
            if "logits" in out
            else torch.stack([out.start_logits, out.end_logits], dim=1)
        )
        for row, values in zip(rows, logits.float().cpu().numpy(), strict=True):
            outputs[row] = values if "logits" in out else values[:, : len(inputs[row]["input_ids"])]
    model.train(training)
    return outputs
