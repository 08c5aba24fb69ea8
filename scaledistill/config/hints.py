"""Names that users know from other tools, and what to type here instead.

Inputs: an unknown option or misplaced argument of the command line, or an unknown key of the
configuration. Outputs: the end of an error message, which says what to type. Not handled here:
reading the configuration (`load`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from scaledistill.errors import did_you_mean, near_miss

MAX_STEPS = (
    "set train.max_steps, which counts optimizer steps: epochs × training rows ÷ "
    "train.global_batch_size (--validate prints rows and epochs)"
)
BATCH = "set train.global_batch_size, the sequences of an optimizer step over all ranks"
MICRO_BATCH = (
    'set train.micro_batch_size, the sequences per forward of a rank (or "auto"), and '
    "train.global_batch_size, the sequences of an optimizer step over all ranks"
)
ACCUMULATION = (
    "it follows from train.global_batch_size, train.micro_batch_size and the number of ranks"
)
RATE = "set train.learning_rate, the peak"
WARMUP = "set train.warmup_steps, a number of steps: the ratio × train.max_steps"
LENGTH = (
    "set data.sequence_length, which is that of the shards (tools/make_shards.py --sequence-length)"
)
FOLDER = "set run.folder"
RESUME = "rerun the same command: it resumes from the newest checkpoint in run.folder by itself"
START_OVER = "use --fresh to start over; the old run folder is renamed, not deleted"
SHARDS = "set data.train, a folder of shards that tools/make_shards.py makes from text"
LAUNCHER = (
    "give it to the launcher, before the script: torchrun --nproc-per-node N launch/distill.py …, "
    "or deepspeed --num_gpus N launch/distill.py …"
)
SCHEDULE = (
    "the schedule is linear: train.warmup_steps of warm-up, then decay to 0 at train.max_steps"
)
READ_AHEAD = "shards are read ahead in the background; data.prefetch_batches sets how far"

FOREIGN = {
    "epochs": MAX_STEPS,
    "num_epochs": MAX_STEPS,
    "num_train_epochs": MAX_STEPS,
    "max_epochs": MAX_STEPS,
    "steps": "set train.max_steps",
    "num_steps": "set train.max_steps",
    "num_train_steps": "set train.max_steps",
    "max_train_steps": "set train.max_steps",
    "total_steps": "set train.max_steps",
    "batch_size": f"{BATCH}; train.micro_batch_size is what a rank computes at once",
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
    "warmup": "set train.warmup_steps, a number of steps",
    "num_warmup_steps": "set train.warmup_steps",
    "warmup_ratio": WARMUP,
    "warmup_proportion": WARMUP,
    "lr_scheduler_type": SCHEDULE,
    "lr_scheduler": SCHEDULE,
    "scheduler": SCHEDULE,
    "optim": (
        "the optimizer is AdamW, set by train.learning_rate, train.weight_decay, "
        "train.adam_betas, …"
    ),
    "optimizer": (
        "the optimizer is AdamW, set by train.learning_rate, train.weight_decay, "
        "train.adam_betas, …"
    ),
    "adam_beta1": "set train.adam_betas, a list of two",
    "adam_beta2": "set train.adam_betas, a list of two",
    "betas": "set train.adam_betas",
    "eps": "set train.adam_epsilon",
    "gradient_clipping": "set train.max_grad_norm",
    "clip_grad_norm": "set train.max_grad_norm",
    "fp16": 'set train.precision="fp16"',
    "bf16": 'set train.precision="bf16"',
    "mixed_precision": "set train.precision",
    "torch_dtype": "set train.precision, and teacher.dtype for the teacher",
    "tf32": "set train.precision",
    "torch_compile": "set train.compile",
    "gradient_checkpointing": (
        'set engine.name="fsdp" and engine.fsdp.activation_checkpointing=true'
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
    "logging_dir": f"{FOLDER}; the logs go there too",
    "log_dir": f"{FOLDER}; the logs go there too",
    "logging_steps": "set logging.every_steps",
    "log_every": "set logging.every_steps",
    "log_interval": "set logging.every_steps",
    "report_to": "set logging.trackers, a list",
    "log_with": "set logging.trackers, a list",
    "wandb": 'set logging.trackers=["wandb"]',
    "wandb_project": "set logging.project",
    "project_name": "set logging.project",
    "experiment_name": "set logging.project",
    "save_steps": "set checkpoint.every_steps",
    "save_every": "set checkpoint.every_steps",
    "save_interval": "set checkpoint.every_steps",
    "checkpointing_steps": "set checkpoint.every_steps",
    "save_total_limit": "set checkpoint.keep",
    "save_strategy": "set checkpoint.every_steps",
    "eval_steps": "set train.validation_every_steps, and data.validation",
    "eval_strategy": "set train.validation_every_steps, and data.validation",
    "evaluation_strategy": "set train.validation_every_steps, and data.validation",
    "eval_interval": "set train.validation_every_steps, and data.validation",
    "num_workers": READ_AHEAD,
    "dataloader_num_workers": READ_AHEAD,
    "dataset": SHARDS,
    "dataset_name": SHARDS,
    "data_dir": SHARDS,
    "data_path": SHARDS,
    "train_file": SHARDS,
    "train_data": SHARDS,
    "train_dataset": SHARDS,
    "validation_file": "set data.validation, a folder of held-out shards",
    "eval_dataset": "set data.validation, a folder of held-out shards",
    "cache_dir": "set data.cache_folder for shards from URLs; HF_HOME sets where models are kept",
    "model": "set teacher.model; the student is described in the block students",
    "model_name": "set teacher.model",
    "model_name_or_path": "set teacher.model",
    "teacher_model": "set teacher.model",
    "teacher_name_or_path": "set teacher.model",
    "teacher_layer": "set teacher.layer",
    "tokenizer": "the tokenizer is the teacher's: set teacher.model",
    "tokenizer_name": "the tokenizer is the teacher's: set teacher.model",
    "num_hidden_layers": "set students.<name>.num_layers",
    "num_relation_heads": "set relations.num_heads",
    "hidden_dropout_prob": "set students.<name>.dropout",
    "student": (
        'set the block students: {"<name>": {"num_layers": 6, "hidden_size": 384, '
        '"num_attention_heads": 12}}'
    ),
    "zero_stage": "set engine.deepspeed.zero_optimization.stage",
    "zero_optimization": "set engine.deepspeed.zero_optimization",
    "deepspeed": "set the block engine.deepspeed in the configuration file",
    "deepspeed_config": "set the block engine.deepspeed in the configuration file",
    "fsdp": 'set engine.name="fsdp"; engine.fsdp has its settings',
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
    "nproc_per_node": LAUNCHER,
    "num_processes": LAUNCHER,
    "num_gpus": LAUNCHER,
    "gpus": LAUNCHER,
    "world_size": LAUNCHER,
    "num_nodes": LAUNCHER,
    "nnodes": LAUNCHER,
    "master_port": LAUNCHER,
    "config_file": "type --config FILE",
    "config_path": "type --config FILE",
    "config_name": "type --config FILE",
    "settings": "type --config FILE",
    "c": "type --config FILE",
    "override": "type --set KEY=VALUE",
    "check": "type --validate",
    "test": "type --validate for the checks, or --dry-run N for N real steps",
    "do_train": "leave it out: the command trains",
    "do_eval": "set train.validation_every_steps, or the block evaluation",
    "verbose": "type --debug",
    "force": START_OVER,
    "f": START_OVER,
}


def foreign(name: str) -> str | None:
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
        return f"unknown option {option}; {OPTIONS[name.lower()]}"
    settings = [
        setting for setting in settings if not setting.startswith("evaluation.") or setting == name
    ]
    known = [
        setting for setting in settings if setting == name or setting.rpartition(".")[2] == name
    ]
    near = near_miss(option, options)
    if near and name not in FOREIGN and not known:
        return f"unknown option {option}{did_you_mean(near)}"
    if advice := foreign(name):
        return f"unknown option {option}; {_as_option(advice, value)}"
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


def _as_option(advice: str, given: str) -> str:
    """Turn "set train.max_steps, …" into what to type on a command line, with the given value."""
    # These settings have another unit or form than the option that the user typed.
    if advice in (MAX_STEPS, MICRO_BATCH, WARMUP, SHARDS) or "a list" in advice:
        given = "…"
    setting = re.match(r"set ([\w.<>]+)(=[^\s,;]+)?(.*)", advice)
    if setting is None or advice.startswith("set the block"):
        return advice
    name, value, more = setting.groups()
    return f"type --set {name}{value or f'={given}'}{more}"
