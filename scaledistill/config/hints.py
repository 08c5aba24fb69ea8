"""Names that users know from other tools, and what to type here instead.

Inputs: an unknown option or misplaced argument of the command line, or an unknown key of the
configuration. Outputs: the end of an error message, which says what to type. Not handled here:
reading the configuration (`load`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scaledistill.errors import did_you_mean, near_miss


class Advice(NamedTuple):
    """What to do instead: set a setting, or what `text` says."""

    text: str
    """Follows the setting's name; without a setting, the whole advice."""
    setting: str | None = None
    value: str | None = None
    """The value to set."""
    takes_given: bool = True
    """The value that the user gave has the form and unit of the setting."""

    def as_key(self, student: str) -> str:
        """Return the advice for a configuration file, in which the student has this name."""
        return self._render("set", "" if self.value is None else f"={self.value}", student)

    def as_option(self, given: str) -> str:
        """Return the advice for the command line, with the value that the user gave."""
        value = self.value or (given if self.takes_given else "…")
        if self.setting is not None and re.search(r"[\s[{]", value):
            return f"type --set {shlex.quote(f'{self.setting}={value}')}{self.text}"
        return self._render("type --set", f"={value}")

    def _render(self, verb: str, value: str, student: str = "<name>") -> str:
        if self.setting is None:
            return self.text
        return f"{verb} {self.setting.format(student=student)}{value}{self.text}"


def use(
    setting: str, text: str = "", value: str | None = None, *, takes_given: bool = True
) -> Advice:
    """Return the advice to use a setting; see `Advice`."""
    return Advice(text, setting, value, takes_given)


MAX_STEPS = use(
    "train.max_steps",
    ", which counts optimizer steps: epochs × training rows ÷ train.global_batch_size "
    "(--validate prints rows and epochs)",
    takes_given=False,
)
BATCH = use("train.global_batch_size", ", the sequences of an optimizer step over all ranks")
MICRO_BATCH = use(
    "train.micro_batch_size",
    ', the sequences per forward of a rank (or "auto"), and train.global_batch_size, the sequences '
    "of an optimizer step over all ranks",
    takes_given=False,
)
ACCUMULATION = Advice(
    "it follows from train.global_batch_size, train.micro_batch_size and the number of ranks"
)
RATE = use("train.learning_rate", ", the peak")
WARMUP = use(
    "train.warmup_steps", ", a number of steps: the ratio × train.max_steps", takes_given=False
)
LENGTH = use(
    "data.sequence_length",
    ", which is that of the shards (--sequence-length of `scaledistill shards make`)",
)
FOLDER = use("run.folder")
RESUME = Advice(
    "rerun the same command: it resumes from the newest checkpoint in run.folder by itself"
)
START_OVER = Advice("use --fresh to start over; the old run folder is renamed, not deleted")
SHARDS = use(
    "data.train",
    ", a folder of shards that `scaledistill shards make` makes from text",
    takes_given=False,
)
NUM_RANKS = Advice(
    "type --num-ranks N for the ranks of this machine, or give it to a launcher, before the "
    "script: torchrun --nproc-per-node N launch/distill.py …"
)
LAUNCHER = Advice(
    "give it to the launcher, before the script: torchrun --nproc-per-node N launch/distill.py …, "
    "or deepspeed --num_gpus N launch/distill.py …"
)
OPTIMIZER = Advice(
    "the optimizer is AdamW, set by train.learning_rate, train.weight_decay, train.adam_betas, …"
)
SCHEDULE = use(
    "train.schedule",
    ': "linear", "cosine" or "warmup_stable_decay", which keeps the peak rate until the last '
    "train.decay_steps",
    takes_given=False,
)
READ_AHEAD = Advice("shards are read ahead in the background; data.prefetch_batches sets how far")

FOREIGN = {
    "epochs": MAX_STEPS,
    "num_epochs": MAX_STEPS,
    "num_train_epochs": MAX_STEPS,
    "max_epochs": MAX_STEPS,
    "steps": use("train.max_steps"),
    "num_steps": use("train.max_steps"),
    "num_train_steps": use("train.max_steps"),
    "max_train_steps": use("train.max_steps"),
    "total_steps": use("train.max_steps"),
    "batch_size": use(
        "train.global_batch_size",
        ", the sequences of an optimizer step over all ranks; train.micro_batch_size is what a "
        "rank computes at once",
    ),
    "train_batch_size": BATCH,
    "total_batch_size": BATCH,
    "per_device_train_batch_size": MICRO_BATCH,
    "per_gpu_train_batch_size": MICRO_BATCH,
    "per_device_batch_size": MICRO_BATCH,
    "per_device_eval_batch_size": MICRO_BATCH,
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "eval_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_accumulation": ACCUMULATION,
    "accumulation_steps": ACCUMULATION,
    "grad_accum": ACCUMULATION,
    "lr": RATE,
    "peak_lr": RATE,
    "max_lr": RATE,
    "warmup": use("train.warmup_steps", ", a number of steps"),
    "num_warmup_steps": use("train.warmup_steps"),
    "warmup_ratio": WARMUP,
    "warmup_proportion": WARMUP,
    "lr_scheduler_type": SCHEDULE,
    "lr_scheduler": SCHEDULE,
    "lr_schedule": SCHEDULE,
    "lr_decay_style": SCHEDULE,
    "scheduler": SCHEDULE,
    "num_decay_steps": use("train.decay_steps"),
    "num_stable_steps": use(
        "train.decay_steps",
        "; the peak rate is kept until that many steps before train.max_steps",
        takes_given=False,
    ),
    "optim": OPTIMIZER,
    "optimizer": OPTIMIZER,
    "adam_beta1": use("train.adam_betas", ", a list of two", takes_given=False),
    "adam_beta2": use("train.adam_betas", ", a list of two", takes_given=False),
    "betas": use("train.adam_betas"),
    "eps": use("train.adam_epsilon"),
    "gradient_clipping": use("train.max_grad_norm"),
    "clip_grad_norm": use("train.max_grad_norm"),
    "fp16": use("train.precision", value='"fp16"'),
    "bf16": use("train.precision", value='"bf16"'),
    "mixed_precision": use("train.precision"),
    "torch_dtype": use("train.precision", ", and teacher.dtype for the teacher"),
    "tf32": use("train.precision"),
    "torch_compile": use("train.compile"),
    "gradient_checkpointing": use(
        "engine.name", " and engine.fsdp.activation_checkpointing=true", value='"fsdp"'
    ),
    "max_seq_length": LENGTH,
    "max_seq_len": LENGTH,
    "max_length": LENGTH,
    "seq_length": LENGTH,
    "seq_len": LENGTH,
    "block_size": LENGTH,
    "output_dir": FOLDER,
    "output": FOLDER,
    "output_path": FOLDER,
    "save_dir": FOLDER,
    "save_path": FOLDER,
    "run_folder": FOLDER,
    "checkpoint_dir": FOLDER,
    "logging_dir": use("run.folder", "; the logs go there too"),
    "log_dir": use("run.folder", "; the logs go there too"),
    "logging_steps": use("logging.every_steps"),
    "log_every": use("logging.every_steps"),
    "log_interval": use("logging.every_steps"),
    "report_to": use("logging.trackers", ", a list", takes_given=False),
    "log_with": use("logging.trackers", ", a list", takes_given=False),
    "wandb": use("logging.trackers", value='["wandb"]'),
    "wandb_project": use("logging.project"),
    "project_name": use("logging.project"),
    "experiment_name": use("logging.project"),
    "save_steps": use("checkpoint.every_steps"),
    "save_every": use("checkpoint.every_steps"),
    "save_interval": use("checkpoint.every_steps"),
    "checkpointing_steps": use("checkpoint.every_steps"),
    "save_total_limit": use("checkpoint.keep"),
    "save_strategy": use("checkpoint.every_steps"),
    "eval_steps": use("train.validation_every_steps", ", and data.validation"),
    "eval_strategy": use("train.validation_every_steps", ", and data.validation"),
    "evaluation_strategy": use("train.validation_every_steps", ", and data.validation"),
    "eval_interval": use("train.validation_every_steps", ", and data.validation"),
    "num_workers": READ_AHEAD,
    "dataloader_num_workers": READ_AHEAD,
    "dataset": SHARDS,
    "dataset_name": SHARDS,
    "data_dir": SHARDS,
    "data_path": SHARDS,
    "train_file": SHARDS,
    "train_data": SHARDS,
    "train_dataset": SHARDS,
    "validation_file": use("data.validation", ", a folder of held-out shards"),
    "eval_dataset": use("data.validation", ", a folder of held-out shards"),
    "cache_dir": use(
        "data.cache_folder", " for shards from URLs; HF_HOME sets where models are kept"
    ),
    "model": use("teacher.model", "; the student is described in the block students"),
    "model_name": use("teacher.model"),
    "model_name_or_path": use("teacher.model"),
    "teacher_model": use("teacher.model"),
    "teacher_name_or_path": use("teacher.model"),
    "teacher_layer": use("teacher.layer"),
    "tokenizer": Advice("the tokenizer is the teacher's: set teacher.model"),
    "tokenizer_name": Advice("the tokenizer is the teacher's: set teacher.model"),
    "num_hidden_layers": use("students.{student}.num_layers"),
    "num_relation_heads": use("relations.num_heads"),
    "hidden_dropout_prob": use("students.{student}.dropout"),
    "student": Advice(
        'set the block students: {"<name>": {"num_layers": 6, "hidden_size": 384, '
        '"num_attention_heads": 12}}'
    ),
    "zero_stage": use("engine.deepspeed.zero_optimization.stage"),
    "zero_optimization": use("engine.deepspeed.zero_optimization"),
    "deepspeed": Advice("set the block engine.deepspeed in the configuration file"),
    "deepspeed_config": Advice("set the block engine.deepspeed in the configuration file"),
    "fsdp": use("engine.name", "; engine.fsdp has its settings", value='"fsdp"'),
    "resume": RESUME,
    "resume_from": RESUME,
    "resume_from_checkpoint": RESUME,
    "resume_training": RESUME,
    "auto_resume": RESUME,
    "continue": RESUME,
    "load_checkpoint": RESUME,
    "overwrite": START_OVER,
    "overwrite_output_dir": START_OVER,
    "restart": START_OVER,
    "from_scratch": START_OVER,
}
OPTIONS = {
    "nproc_per_node": NUM_RANKS,
    "num_processes": NUM_RANKS,
    "num_gpus": NUM_RANKS,
    "gpus": NUM_RANKS,
    "world_size": LAUNCHER,
    "num_nodes": LAUNCHER,
    "nnodes": LAUNCHER,
    "master_port": LAUNCHER,
    "config_file": Advice("type --config FILE"),
    "config_path": Advice("type --config FILE"),
    "config_name": Advice("type --config FILE"),
    "settings": Advice("type --config FILE"),
    "c": Advice("type --config FILE"),
    "override": Advice("type --set KEY=VALUE"),
    "check": Advice("type --validate"),
    "test": Advice("type --validate for the checks, or --dry-run N for N real steps"),
    "do_train": Advice("leave it out: the command trains"),
    "do_eval": use("train.validation_every_steps", ", or the block evaluation"),
    "verbose": Advice("type --debug"),
    "force": START_OVER,
    "f": START_OVER,
}


def foreign(name: str) -> Advice | None:
    """Return what to do instead of using another tool's option or key; None if it is not known."""
    return FOREIGN.get(name.strip("-").replace("-", "_").lower())


def argument_hint(unknown: Sequence[str], options: Iterable[str], settings: Sequence[str]) -> str:
    """Return the error message for unknown arguments; it is about the first of them.

    Args:
        unknown: the unknown arguments, at least one.
        options: the options of the command line.
        settings: the dotted names of all settings.
    """
    first, *rest = unknown
    if not first.startswith("-"):
        if "=" in first:
            return f"unexpected argument {first!r}; type --set {first}"
        if first.lower().endswith((".json", ".yaml", ".yml")) or "/" in first:
            return f"unexpected argument {first!r}; type --config {first}"
        return (
            f"unexpected argument {first!r}; settings are given as --set KEY=VALUE, the file as "
            "--config FILE"
        )
    option, equals, value = first.partition("=")
    value = value if equals else next((each for each in rest[:1] if not each.startswith("-")), "…")
    name = option.lstrip("-").replace("-", "_")
    if name.lower() in OPTIONS:
        return f"unknown option {option}; {OPTIONS[name.lower()].as_key('<name>')}"
    # Of a student's own setting and that of all students, the second is meant.
    in_train = {setting.rpartition(".")[2] for setting in settings if setting.startswith("train.")}
    settings = [
        setting
        for setting in settings
        if setting == name
        or (
            not setting.startswith("evaluation.")
            and not (setting.startswith("students.") and setting.rpartition(".")[2] in in_train)
        )
    ]
    known = [
        setting for setting in settings if setting == name or setting.rpartition(".")[2] == name
    ]
    near = near_miss(option, options)
    if near and name not in FOREIGN and not known:
        return f"unknown option {option}{did_you_mean(near)}"
    if advice := foreign(name):
        return f"unknown option {option}; {advice.as_option(value)}"
    if known:
        return (
            f"unknown option {option}; type "
            f"{' or '.join(f'--set {setting}={value}' for setting in known)}"
        )
    close = near_miss(name, (setting.rpartition(".")[2] for setting in settings), cutoff=0.75)
    matches = [setting for setting in settings if setting.rpartition(".")[2] == close]
    if matches:
        return (
            f"unknown option {option}; type "
            f"{' or '.join(f'--set {setting}={value}' for setting in matches)}"
        )
    return (
        f"unknown option {option}; settings are given as --set KEY=VALUE, --help lists the options"
    )
