"""Pre-flight checks: everything about a run that can be checked without loading weights.

Inputs: a configuration and the number of ranks. Outputs: a `Plan` with the resolved configuration,
or one error that lists every problem. Not handled here: showing the plan (`preflight.report`).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from scaledistill.checkpoint import mirror
from scaledistill.checkpoint.format import newest_state
from scaledistill.config.naming import student_names, teacher_names
from scaledistill.config.schema import DistillConfig, differing_keys
from scaledistill.data.manifest import MAX_UNKNOWN_FRACTION
from scaledistill.data.order import SampleOrder
from scaledistill.data.prepare.text import load_tokenizer, tokenizer_fingerprint
from scaledistill.data.stream import ShardReader
from scaledistill.data.tokenizer import TOKENIZER_FILES
from scaledistill.distributed.ranks import resolve_precision, resolve_teacher_dtype
from scaledistill.engines.deepspeed_block import resolve_block
from scaledistill.errors import ConfigError, DataError, Field, Problems, counted, named
from scaledistill.metrics.trackers import check_trackers
from scaledistill.models.capture import check_layer, max_sequence_length
from scaledistill.models.hub import names_resolved_once
from scaledistill.models.student import check_init, student_config
from scaledistill.models.teacher import (
    check_unused,
    check_weight_files,
    load_config,
    resolve_folder,
)
from scaledistill.preflight.estimate import Estimate, estimate
from scaledistill.preflight.microbatch import free_bytes, predict, with_micro_batch
from scaledistill.relations import check_relation_heads, resolve_backend
from scaledistill.storage.remote import ShardCache, is_url

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its resolved configuration, data and sizes."""

    config: DistillConfig
    """Resolved: precisions and the micro-batch are not "auto"."""
    world_size: int
    order: SampleOrder
    shards: ShardReader
    held_out: ShardReader | None
    student_name: str
    estimate: Estimate
    free_disk_bytes: int
    stated: DistillConfig
    """The configuration before it was resolved."""
    evaluation: str | None = None
    """How many fine-tunings follow the run; None without any, and on ranks that do not check it."""
    evaluation_flops: float = 0.0


@names_resolved_once()
def check(
    config: DistillConfig,
    world_size: int,
    device: torch.device,
    *,
    writes: bool = True,
    fresh: bool = False,
    gpu_bytes: int | None = None,
) -> Plan:
    """Check a configuration against models, data, disk and ranks, and return the plan.

    No weights are read.

    Args:
        config: as given by the user.
        world_size: the number of ranks.
        device: this rank's.
        writes: the run folder will be written to, and needs space.
        fresh: the run will not resume.
        gpu_bytes: size the plan for GPUs with this much memory, whatever `device` is.

    Raises:
        ConfigError: settings do not fit; the message has all problems, one per line.
        DataError: the same, if the first problem is with data or model files.
    """
    problems = Problems()
    attempt = problems.attempt
    [(name, spec)] = config.students.items()
    resolved = attempt(resolve, config, world_size, device)
    teacher = attempt(_teacher_config, config)
    student = attempt(_student_config, config, name, teacher) if teacher else None
    for setting, model in (
        ("teacher.model", config.teacher.model),
        (f"students.{name}.init", spec.init),
    ):
        # Models from the hub are checked when their weights are fetched.
        if model not in ("random", "teacher") and Path(model).is_dir():
            attempt(_check_weights, config, setting, model)
    attempt(_check_trackers, config)
    # Rank 0 alone writes to the remote folder, to probe it.
    if writes and config.checkpoint.remote and os.environ.get("RANK", "0") == "0":
        attempt(mirror.check, config.checkpoint.remote)
    evaluation = None
    if writes and config.evaluation and os.environ.get("RANK", "0") == "0":
        from scaledistill.glue.api import check_evaluation  # imported here: it takes seconds

        evaluation = attempt(check_evaluation, config)
    shards = attempt(_open_set, config, "data.train", config.data.train)
    held_out = (
        attempt(_open_set, config, "data.validation", config.data.validation)
        if config.data.validation
        else None
    )
    for setting, reader in (("data.train", shards), ("data.validation", held_out)):
        if reader and teacher:
            attempt(_check_shards, config, setting, reader, teacher)
    order = attempt(_order, config, shards) if shards else None
    if (
        resolved
        and order
        and writes
        and not fresh
        and (state := newest_state(Path(config.run.folder) / "checkpoints"))
    ):
        attempt(check_same_run, state, resolved, order)
    problems.raise_all()
    if not (resolved and teacher and student and shards and order):
        raise AssertionError("unreachable: an input is missing but no problem was recorded")
    # A plan for GPUs may be made on a machine without any: "auto" must mean the same there.
    sized_for = "cuda" if gpu_bytes else device.type
    if sized_for != device.type and config.relations.backend == "auto":
        resolved = resolved.model_copy(
            update={"relations": resolved.relations.model_copy(update={"backend": "triton"})}
        )
    if config.train.micro_batch_size == "auto":
        free = gpu_bytes or free_bytes(device, int(os.environ.get("LOCAL_SIZE", world_size)))
        size = predict(resolved, name, teacher, student, world_size, free, sized_for)
        resolved = with_micro_batch(resolved, size)
    facts = estimate(resolved, name, teacher, student, world_size, sized_for)
    free = _free_disk_bytes(resolved, facts.checkpoint_bytes if writes else 0)
    plan = Plan(resolved, world_size, order, shards, held_out, name, facts, free, config)
    if evaluation is None or not (config.evaluation and config.evaluation.tasks):
        return plan
    encoder = facts.student_parameters - student.vocab_size * student.hidden_size
    return replace(plan, evaluation=evaluation.size, evaluation_flops=evaluation.flops(encoder))


def resolve(config: DistillConfig, world_size: int, device: torch.device) -> DistillConfig:
    """Return the configuration with precisions, backend, micro-batch and compile resolved.

    A micro-batch of "auto" becomes the rank's whole share of the global batch.

    Raises:
        ConfigError: the global batch is not divisible, the engine's block is wrong, or the device
            or engine lacks a precision.
    """
    train, teacher = config.train, config.teacher
    with named(backend="relations.backend", precision="train.precision", dtype="teacher.dtype"):
        backend = resolve_backend(config.relations.backend, device.type)
        precision = resolve_precision(train.precision, device)
        teacher_dtype = resolve_teacher_dtype(teacher.dtype, train.precision, device)
    batch, share = train.global_batch_size, max(1, train.global_batch_size // world_size)
    stated = train.micro_batch_size if isinstance(train.micro_batch_size, int) else None
    micro = min(stated or share, share)
    if batch % (world_size * micro):
        raise ConfigError(_indivisible(batch, world_size, share, micro if stated else None))
    compiles = _compiles(config, backend, device)
    settled = config.model_copy(
        update={
            "train": train.model_copy(
                update={"precision": precision, "micro_batch_size": micro, "compile": compiles}
            ),
            "teacher": teacher.model_copy(update={"dtype": teacher_dtype}),
            "relations": config.relations.model_copy(update={"backend": backend}),
        }
    )
    if config.engine.name == "deepspeed":
        resolve_block(settled, world_size)
    elif precision == "fp16":
        raise ConfigError(
            "train.precision=fp16 with engine.name=fsdp: it has no loss scaling; use bf16, or "
            "deepspeed"
        )
    return settled


def _indivisible(batch: int, world_size: int, share: int, micro: int | None) -> str:
    """Return the message for an indivisible global batch, with sizes that would work."""
    unit = world_size * (micro or share)
    batches = " or ".join(
        str(size) for size in (batch // unit * unit, batch // unit * unit + unit) if size
    )
    ranks = counted(world_size, "rank")
    if micro is None or batch % world_size:
        what = ranks if micro is None else f"{ranks} × train.micro_batch_size={micro}"
        return f"train.global_batch_size={batch} is not divisible by {what}; use {batches}"
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - micro))[:4])
    return (
        f"train.global_batch_size={batch} is not divisible by {ranks} × "
        f"train.micro_batch_size={micro}; use "
        f"train.micro_batch_size={' or '.join(map(str, nearest))}, or "
        f"train.global_batch_size={batches}"
    )


def clipped_micro_batch(config: DistillConfig, world_size: int) -> str | None:
    """Return a warning if `train.micro_batch_size` is more than a rank's share, which is then used.

    Returns None otherwise.
    """
    stated, share = (
        config.train.micro_batch_size,
        max(1, config.train.global_batch_size // world_size),
    )
    if not isinstance(stated, int) or stated <= share:
        return None
    return (
        f"train.micro_batch_size={stated} is more than a rank's share of train.global_batch_size="
        f"{config.train.global_batch_size} on {counted(world_size, 'rank')}: {share} is used; set "
        f'it to {share} or "auto", or raise train.global_batch_size'
    )


def _compiles(config: DistillConfig, backend: str, device: torch.device) -> bool:
    """Resolve `train.compile`, and check that the compiler it needs is installed."""
    setting, on_gpu = config.train.compile, device.type == "cuda"
    if setting is True and config.run.deterministic:
        raise ConfigError(
            "train.compile=true with run.deterministic=true: what is compiled depends on the step "
            "at which a run was resumed, and so do its last bits; switch one of them off"
        )
    compiles = on_gpu and not config.run.deterministic if setting == "auto" else bool(setting)
    compilers = (
        [os.environ.get("CC", ""), "gcc", "clang"] if on_gpu else [os.environ.get("CXX", "g++")]
    )
    if (compiles or backend == "triton") and not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"train.compile={setting!r} and relations.backend={backend!r} need a compiler, found "
            f"none of {', '.join(filter(None, compilers))}; install one, or set "
            "train.compile=false and relations.backend=reference"
        )
    return compiles


def open_shards(config: DistillConfig, location: str) -> ShardReader:
    """Open a data set, through the local cache if it is a URL.

    Only the first rank of each machine checks that all shards exist: the others see the same files.

    Raises:
        ConfigError, DataError: see `ShardReader`.
    """
    folder, rank = config.data.cache_folder, os.environ.get("RANK")
    cache = ShardCache(Path(folder) if folder else None, limit_bytes=config.data.cache_bytes)
    return ShardReader(
        location,
        cache=cache,
        rank=None if rank is None else int(rank),
        check_sizes=os.environ.get("LOCAL_RANK", "0") == "0",
    )


def _open_set(config: DistillConfig, setting: str, location: str) -> ShardReader:
    try:
        return open_shards(config, location)
    except DataError as error:
        missing = not (is_url(location) or Path(location).is_absolute() or Path(location).exists())
        looked = f" (looked for in the working folder {Path.cwd()})" if missing else ""
        raise DataError(f"{setting}: {error}{looked}") from error


def _check_trackers(config: DistillConfig) -> None:
    with named(trackers="logging.trackers"):
        check_trackers(config.logging.trackers)


def _teacher_config(config: DistillConfig) -> PretrainedConfig:
    with named(**teacher_names(config.teacher)):
        teacher = load_config(
            config.teacher.model, config.teacher.revision, config.teacher.trust_remote_code
        )
        check_layer(config.teacher.layer, teacher.num_hidden_layers)
    limit = max_sequence_length(teacher)
    if config.data.sequence_length > limit:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is more than the {limit} "
            f"positions of teacher.model={config.teacher.model}; make shards with at most {limit}"
        )
    return teacher


def _check_weights(config: DistillConfig, setting: str, model: str) -> None:
    """Check the weights in a folder by the headers of their files."""
    trusted = setting == "teacher.model" and config.teacher.trust_remote_code
    with named(model=Field(setting, model), trust_remote_code="teacher.trust_remote_code"):
        check_weight_files(Path(model))
        check_unused(Path(model), load_config(model, trust_remote_code=trusted))


def student_shape(config: DistillConfig, name: str, teacher: PretrainedConfig) -> PretrainedConfig:
    """Return the model config of a student under training, from its settings.

    Raises:
        ConfigError: see `student_config`.
    """
    spec = config.students[name]
    with named(**student_names(name)):
        return student_config(
            teacher,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_attention_heads,
            intermediate_size=spec.intermediate_size,
            tap=spec.tap,
        )


def _student_config(
    config: DistillConfig, name: str, teacher: PretrainedConfig
) -> PretrainedConfig:
    spec = config.students[name]
    student = student_shape(config, name, teacher)
    options: dict[str, Any] = {
        "layer_map": spec.layer_map,
        "capture_layer": config.teacher.layer,
        "tap": spec.tap,
    }
    with named(**student_names(name)):
        check_init(spec.init, student, teacher, **options)
    heads = f"students.{name}.relation_heads" if spec.relation_heads else "relations.num_heads"
    widths = {"teacher": teacher.hidden_size, f"student {name}": spec.hidden_size}
    with named(num_heads=heads, pairs="relations.pairs"):
        check_relation_heads(config.relation_heads(name), widths, config.relations.pairs)
    return student


def _check_shards(
    config: DistillConfig, setting: str, shards: ShardReader, teacher: PretrainedConfig
) -> None:
    manifest, location = shards.manifest, shards.location
    if manifest.sequence_length != config.data.sequence_length:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length}, but the shards in "
            f"{setting}={location} have rows of {manifest.sequence_length} tokens; set it to "
            f"{manifest.sequence_length} or make shards of that length"
        )
    if manifest.largest_id >= teacher.vocab_size:
        raise DataError(
            f"{setting}={location} holds token id {manifest.largest_id}, beyond the vocabulary of "
            f"teacher.model={config.teacher.model} (ids 0 to {teacher.vocab_size - 1}); make the "
            "shards with its tokenizer"
        )
    if problem := manifest.unknown_problem():
        raise DataError(f"{setting}: {location}: {problem}")
    if (problem := manifest.unknown_problem(MAX_UNKNOWN_FRACTION)) and os.environ.get(
        "RANK", "0"
    ) == "0":
        log.warning("%s: %s: %s", setting, location, problem)  # accepted when the set was made
    with named(**teacher_names(config.teacher)):
        folder = resolve_folder(config.teacher.model, config.teacher.revision, TOKENIZER_FILES)
    expected = tokenizer_fingerprint(load_tokenizer(folder))
    if (found := manifest.tokenizer["sha256"]) != expected:
        raise DataError(
            f"{setting}={location} was made with the tokenizer {manifest.tokenizer['name']} "
            f"(sha256 {str(found)[:12]}…), teacher.model={config.teacher.model} has another "
            f"(sha256 {expected[:12]}…); make the shards again with --tokenizer "
            f"{config.teacher.model}"
        )


def check_same_run(state: Mapping[str, Any], config: DistillConfig, order: SampleOrder) -> None:
    """Refuse to go on from a checkpoint's state where the result would not be that of the run that
    was begun.

    Raises:
        ConfigError: naming the keys that differ.
    """
    before, now = state["config"], config.model_dump()
    steps = [tree["train"]["max_steps"] for tree in (before, now)]
    if steps[0] != steps[1] and state["step"] <= min(before["train"]["warmup_steps"], steps[1]):
        # Warm-up does not depend on it.
        before = {**before, "train": {**before["train"], "max_steps": steps[1]}}
    differences = differing_keys(before, now)
    if len(differences) == 1 and differences[0].startswith("train.max_steps:"):
        raise _other_length(state, config)
    # run.seed is the order's seed.
    named = {line.partition(":")[0].rpartition(".")[2] for line in differences}
    differences += [
        f"data.train: {key} {state['data'].get(key)} -> {value}"
        for key, value in order.fingerprint().items()
        if state["data"].get(key) != value and key not in named
    ]
    if differences:
        raise other_run(state, config, "; ".join(differences))


def _other_length(state: Mapping[str, Any], config: DistillConfig) -> ConfigError:
    """Return the error that refuses another number of steps, with the ways to train longer."""
    before, now = state["config"]["train"]["max_steps"], config.train.max_steps
    [name] = config.students
    folder = Path(config.run.folder)
    step = state["step"]
    done = step == before and (folder / "export" / name).is_dir()
    student = folder / "export" / (name if done else f"{name}-step-{step}")
    export = "" if done else " (write it with --export newest)"
    return ConfigError(
        f"{folder} holds a run at step {step} with other settings: train.max_steps: {before} -> "
        f"{now}. The learning rate decays to 0 at train.max_steps, so that the steps made after "
        f"train.warmup_steps={config.train.warmup_steps} had another one. Set "
        f"train.max_steps={before} to go on; to train longer, start a new run from its student: "
        f"another run.folder and students.{name}.init={student}{export}"
    )


def other_run(state: Mapping[str, Any], config: DistillConfig, differences: str) -> ConfigError:
    """Return the error that refuses to go on with another run."""
    return ConfigError(
        f"{config.run.folder} holds a run at step {state['step']} with other settings: "
        f"{differences}. Restore them to go on, use --fresh to start over (the old folder is kept, "
        "renamed), or set run.folder"
    )


def _order(config: DistillConfig, shards: ShardReader) -> SampleOrder:
    data = config.data
    with named(
        seed="run.seed",
        num_lanes="data.num_lanes",
        window_rows="data.window_rows",
        limit_bytes="data.cache_bytes",
    ):
        shards.check_cache(data.num_lanes)
        return shards.order(
            seed=config.run.seed, num_lanes=data.num_lanes, window_rows=data.window_rows
        )


def _free_disk_bytes(config: DistillConfig, checkpoint_bytes: int) -> int:
    """Return the free bytes on the run folder's disk.

    Raises:
        DataError: they do not suffice for the checkpoints kept and one more, or the folder cannot
            be written to.
    """
    folder = Path(config.run.folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise DataError(
            f"run.folder={config.run.folder}: {existing} is not a writable folder; set another "
            "folder"
        )
    free = shutil.disk_usage(existing).free
    standing = sum(path.stat().st_size for path in folder.glob("checkpoints/step-*/*"))
    needed = max(checkpoint_bytes, (config.checkpoint.keep + 1) * checkpoint_bytes - standing)
    if free < needed:
        raise DataError(
            f"run.folder={config.run.folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB "
            f"needed for checkpoint.keep={config.checkpoint.keep} checkpoints and one being "
            "written; free some space or set another folder"
        )
    return free
