"""Pre-flight checks: everything about a run that can be checked without loading weights.

Inputs: a configuration and the number of ranks. Outputs: a `Plan` with the resolved configuration,
or one error that lists every problem. Not handled here: showing the plan (`preflight.report`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PretrainedConfig

from scaledistill.checkpoint import mirror
from scaledistill.checkpoint.format import newest_state
from scaledistill.checkpoint.names import committed, step_of
from scaledistill.config.naming import student_names, teacher_names
from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schedule import SCHEDULE_KEYS, from_step, same_rates, with_schedule_of
from scaledistill.config.schema import (
    INIT_WORDS,
    DistillConfig,
    TrainSettings,
    differing_keys,
)
from scaledistill.data.manifest import MAX_UNKNOWN_FRACTION
from scaledistill.data.mixture import Order, Source, mix, mixing_problem, shared_shards
from scaledistill.data.prepare.text import load_tokenizer, tokenizer_fingerprint
from scaledistill.data.reader import ShardReader, check_cache
from scaledistill.data.tokenizer import TOKENIZER_FILES
from scaledistill.distributed.ranks import Ranks
from scaledistill.errors import (
    ConfigError,
    DataError,
    Field,
    Problems,
    SettingError,
    counted,
    named,
)
from scaledistill.metrics.trackers import check_trackers
from scaledistill.models.architectures import (
    architecture_of,
    check_layer,
    max_sequence_length,
    qkv_widths,
)
from scaledistill.models.export import save_tokenizer
from scaledistill.models.hub import names_resolved_once
from scaledistill.models.loss import causal_relations
from scaledistill.models.student import check_init, student_config
from scaledistill.models.teacher import (
    check_weight_files,
    load_config,
    omitted_weights,
    resolve_folder,
)
from scaledistill.preflight.estimate import Estimate, estimate
from scaledistill.preflight.microbatch import free_bytes, predict
from scaledistill.preflight.resolve import resolve, resolve_for_gpus
from scaledistill.preflight.roster import check_added, roster_notes, roster_of, trained_config
from scaledistill.relations import check_relation_heads
from scaledistill.storage.remote import ShardCache, is_url

log = logging.getLogger(__name__)

DataSets = tuple[tuple[Source, ...], Order, ShardReader | None]
"""The training data, the order over it, and the held-out rows."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its resolved configuration, data and sizes."""

    run: ResolvedRun
    order: Order
    sources: tuple[Source, ...]
    """The training data, in the order of the settings."""
    held_out: ShardReader | None
    estimate: Estimate
    free_disk_bytes: int
    evaluation: str | None = None
    """How many fine-tunings follow the run; None without any, and on ranks that do not check it."""
    evaluation_flops: float = 0.0
    notes: tuple[str, ...] = ()
    """Which students are new or left out, if the run resumes."""


@names_resolved_once()
def plan_run(
    config: DistillConfig,
    world_size: int,
    device: torch.device,
    *,
    ranks: Ranks | None = None,
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
        ranks: of a run; None for a process of its own, which checks everything.
        writes: the run folder will be written to, and needs space.
        fresh: the run will not resume.
        gpu_bytes: size the plan for GPUs with this much memory, whatever `device` is.

    Raises:
        ConfigError: settings do not fit; the message has all problems, one per line.
        DataError: the same, if the first problem is with data or model files.
    """
    problems = Problems()
    attempt = problems.attempt
    resolved = attempt(resolve_for_gpus if gpu_bytes else resolve, config, world_size, device)
    teacher = attempt(_teacher_config, config)
    state = None
    if writes and not fresh:
        state = newest_state(Path(config.run.folder) / "checkpoints", config.checkpoint.remote)
    # The others' weights are in the checkpoint; where they started may be gone.
    starting = roster_of(state, config).added if state else tuple(config.students)
    students: dict[str, PretrainedConfig] = {}
    for name in config.students if teacher else ():
        if shape := attempt(_student_config, config, name, teacher, state, name in starting):
            students[name] = shape
    inits = {
        f"students.{name}.init": spec.init
        for name, spec in config.students.items()
        if name in starting
    }
    for setting, model in {"teacher.model": config.teacher.model, **inits}.items():
        # Models from the hub are checked when their weights are fetched.
        if model not in INIT_WORDS and Path(model).is_dir():
            attempt(_check_weights, config, setting, model)
    is_main = ranks is None or ranks.is_main
    # Rank 0 alone has trackers, and writes to the remote folder, to probe it.
    if is_main:
        attempt(_check_trackers, config)
    if writes and config.checkpoint.remote and is_main:
        attempt(mirror.check, config.checkpoint.remote, Path(config.run.folder) / "checkpoints")
    evaluation = None
    if writes and config.evaluation and is_main:
        from scaledistill.glue.api import plan_evaluation  # imported here: it takes seconds

        evaluation = attempt(plan_evaluation, config, students)
    cache = _cache(config)
    locations = {setting: source.shards for setting, source in config.data.sources.items()}
    if config.data.validation:
        locations["data.validation"] = config.data.validation
    readers = {
        setting: attempt(_open_set, setting, location, ranks, cache)
        for setting, location in locations.items()
    }
    for setting, reader in readers.items():
        if reader and teacher:
            attempt(_check_shards, config, setting, reader, teacher, is_main)
    held_out = readers.pop("data.validation", None)
    shards = [reader for reader in readers.values() if reader]
    if held_out and is_main:
        _warn_of_training_rows(held_out, shards)
    ordered = attempt(_order, config, shards) if len(shards) == len(readers) else None
    sources, order = ordered or ((), None)
    notes: list[str] = []
    roster = None
    if resolved and order and state:
        attempt(check_same_run, state, resolved.config, order)
        roster = roster_of(state, config)
        notes = roster_notes(roster, config, state["step"])
    problems.raise_all()
    if not (resolved and teacher and len(students) == len(config.students) and order):
        raise AssertionError("unreachable: an input is missing but no problem was recorded")
    if is_main:
        for name in {shape.model_type: name for name, shape in students.items()}.values():
            _check_tokenizer_export(config, name, students[name])
    if roster:
        students = {name: shape for name, shape in students.items() if name in roster.first_steps}
    if resolved.auto_micro_batch:
        ranks_here = ranks.local_size if ranks else world_size
        free = gpu_bytes or free_bytes(device, ranks_here)
        resolved = resolved.with_micro_batch(predict(resolved, teacher, students, free))
    facts = estimate(resolved, teacher, students)
    free = _free_disk_bytes(config, facts.checkpoint_bytes if writes else 0, fresh=fresh)
    plan = Plan(resolved, order, sources, held_out, facts, free, notes=tuple(notes))
    if evaluation is None or not (config.evaluation and config.evaluation.tasks):
        return plan
    embeddings = sum(shape.vocab_size * shape.hidden_size for shape in students.values())
    flops = evaluation.flops(facts.student_parameters - embeddings)
    return replace(plan, evaluation=evaluation.size, evaluation_flops=flops)


def open_data(config: DistillConfig, ranks: Ranks | None = None) -> DataSets:
    """Open the data sets of a run, through the local cache if they are at URLs.

    Only the first rank of each machine checks that all shards exist: the others see the same files.
    Without `ranks`, they are checked here.

    Raises:
        ConfigError, DataError: see `ShardReader` and `SampleOrder`.
    """
    cache, data = _cache(config), config.data
    shards = [
        _open_set(setting, source.shards, ranks, cache) for setting, source in data.sources.items()
    ]
    held_out = data.validation and _open_set("data.validation", data.validation, ranks, cache)
    return *_order(config, shards), held_out or None


def _cache(config: DistillConfig) -> ShardCache:
    folder = config.data.cache_folder
    return ShardCache(Path(folder) if folder else None, limit_bytes=config.data.cache_bytes)


def _open_set(setting: str, location: str, ranks: Ranks | None, cache: ShardCache) -> ShardReader:
    try:
        return ShardReader(
            location,
            cache=cache,
            rank=None if ranks is None else ranks.rank,
            check_sizes=ranks is None or ranks.local_rank == 0,
        )
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
    _check_reads_rows(config, teacher, f"teacher.model={config.teacher.model}")
    return teacher


def _check_reads_rows(config: DistillConfig, model: PretrainedConfig, name: str) -> None:
    """Raise ConfigError unless a model can attend as `data` says to rows of its length."""
    row, limit = architecture_of(model), max_sequence_length(model)
    if row.no_documents and config.data.attention == "document":
        raise ConfigError(
            f'data.attention="document" is not supported for {row.title}: {row.no_documents}; '
            'use "row"'
        )
    if config.data.sequence_length > limit:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is more than the {limit} "
            f"positions of {name}; make shards with at most {limit}"
        )


def _check_weights(config: DistillConfig, setting: str, model: str) -> None:
    """Check the weights in a folder by the headers of their files."""
    trusted = setting == "teacher.model" and config.teacher.trust_remote_code
    with named(model=Field(setting, model), trust_remote_code="teacher.trust_remote_code"):
        check_weight_files(Path(model))
        omitted_weights(Path(model), load_config(model, trust_remote_code=trusted))


def student_shape(
    config: DistillConfig,
    name: str,
    teacher: PretrainedConfig,
    state: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """Return the model config of a student under training, from its settings.

    Args:
        state: of the checkpoint that has the student, if one has: then no folder is needed that it
            started from.

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
            num_key_value_heads=spec.num_key_value_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size,
            tap=spec.tap,
            architecture=spec.architecture,
            init=spec.init,
            start=trained_config(state, name) if state else None,
        )


def _student_config(
    config: DistillConfig,
    name: str,
    teacher: PretrainedConfig,
    state: Mapping[str, Any] | None,
    starts: bool,
) -> PretrainedConfig:
    """Check a student, and its first weights if it starts in this run; return its model config."""
    spec = config.students[name]
    student = student_shape(config, name, teacher, state)
    options: dict[str, Any] = {
        "layer_map": spec.layer_map,
        "capture_layer": config.teacher.layer,
        "tap": spec.tap,
    }
    if starts:
        with named(**student_names(name)):
            check_init(spec.init, student, teacher, **options)
    with named(student=f"students.{name}"):
        causal_relations(teacher, student)
    if student.model_type != teacher.model_type:
        _check_reads_rows(config, student, f"students.{name}")
    heads = f"students.{name}.relation_heads" if spec.relation_heads else "relations.num_heads"
    widths = {"teacher": qkv_widths(teacher), f"student {name}": qkv_widths(student)}
    with named(num_heads=heads, pairs="relations.pairs"):
        check_relation_heads(config.relation_heads(name), widths, config.relations.pairs)
    return student


def _check_tokenizer_export(config: DistillConfig, name: str, student: PretrainedConfig) -> None:
    """Check that the student can be exported with its tokenizer: some architectures have their own.

    Raises:
        ConfigError: transformers would read another tokenizer from the export.
    """
    with TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        try:
            save_tokenizer(config.teacher.model, config.teacher.revision, Path(folder), student)
        except DataError as error:
            raise ConfigError(f"students.{name}.architecture: {error}") from error


def _check_shards(
    config: DistillConfig,
    setting: str,
    shards: ShardReader,
    teacher: PretrainedConfig,
    is_main: bool,
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
    if (problem := manifest.unknown_problem(MAX_UNKNOWN_FRACTION)) and is_main:
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


def _warn_of_training_rows(held_out: ShardReader, shards: Sequence[ShardReader]) -> None:
    for reader in shards:
        if shared := shared_shards(held_out.manifest, reader.manifest):
            log.warning(
                "data.validation: %d of its %s are in %s too: its loss says little about text that "
                "the student has not seen; hold documents out with `scaledistill shards make "
                "--held-out-fraction`",
                shared,
                counted(len(held_out.manifest.shards), "shard"),
                reader.location,
            )


def check_same_run(state: Mapping[str, Any], config: DistillConfig, order: Order) -> None:
    """Refuse to resume from a checkpoint's state if a setting that affects results changed.

    Students may be added and left out, as long as one of the run's goes on.

    Raises:
        ConfigError: naming the keys that differ.
    """
    before, now = state["config"], config.model_dump()
    earlier, step = with_schedule_of(config.train, before["train"]), state["step"]
    roster = roster_of(state, config)
    then = config.model_copy(update={"train": earlier})
    same = step
    for name in roster.resumed:
        first = roster.first_steps[name]
        one, other = (from_step(each.for_student(name).train, first) for each in (then, config))
        same = min(same, first + same_rates(one, other, step - first))
    if roster.resumed:
        common = before["students"].keys() & now["students"].keys()
        before, now = (
            {**tree, "students": {name: tree["students"][name] for name in common}}
            for tree in (before, now)
        )
    schedule = config.train if same == step else earlier
    before = {
        **before,
        "train": before["train"] | {key: getattr(schedule, key) for key in SCHEDULE_KEYS},
    }
    differences = differing_keys(before, now)
    changed = {line.partition(":")[0].removeprefix("train.") for line in differences}
    if changed and changed <= set(SCHEDULE_KEYS):
        raise _other_schedule(state, config, differences, earlier, same)
    differences += [
        f"students.{name} was dropped at step {found['step']}; to train it again, give it another "
        "name"
        for name, found in (roster.dropped or {}).items()
        if not roster.resumed or any(x.startswith(f"students.{name}.") for x in differences)
    ]
    # run.seed is the order's seed.
    changed = {line.partition(":")[0].rpartition(".")[2] for line in differences}
    differences += [
        f"data.train: {key} {state['data'].get(key)} -> {value}"
        for key, value in order.fingerprint().items()
        if state["data"].get(key) != value and key not in changed
    ]
    if differences:
        raise other_run(state, config, "; ".join(differences))
    check_added(roster, config, step)


def _other_schedule(
    state: Mapping[str, Any],
    config: DistillConfig,
    differences: list[str],
    earlier: TrainSettings,
    same: int,
) -> ConfigError:
    """Return the error that refuses another schedule, with the ways to train on.

    Args:
        earlier: the settings with the schedule of the steps made.
        same: how many of these, from the first on, have the same learning rate under both.
    """
    name = next(iter(config.students))
    folder, step, train = Path(config.run.folder), state["step"], config.train
    if train.schedule == earlier.schedule != "warmup_stable_decay":
        why = (
            "The learning rate decays to 0 at train.max_steps, so that the steps made after "
            f"train.warmup_steps={train.warmup_steps} had another one"
        )
    else:
        why = f"With them, the steps made after step {same} would have had another learning rate"
    changed = [line.partition(":")[0] for line in differences]
    restored = " and ".join(
        f"{key}={json.dumps(getattr(earlier, key.removeprefix('train.')))}" for key in changed
    )
    usable = [path for path in committed(folder / "checkpoints") if step_of(path) <= same]
    if usable:
        longer = (
            f"to train on with the new schedule, copy {usable[0]} to the folder checkpoints of "
            "another run.folder"
        )
    else:
        done = step == earlier.max_steps and (folder / "export" / name).is_dir()
        student = folder / "export" / (name if done else f"{name}-step-{step}")
        export = "" if done else " (write it with --export newest)"
        longer = (
            "to train longer, start a new run from its student: another run.folder and "
            f"students.{name}.init={student}{export}"
        )
    return ConfigError(
        f"{folder} holds a run at step {step} with other settings: {'; '.join(differences)}. "
        f"{why}. Set {restored} to go on; {longer}"
    )


def other_run(state: Mapping[str, Any], config: DistillConfig, differences: str) -> ConfigError:
    """Return the error that refuses to go on with another run."""
    return ConfigError(
        f"{config.run.folder} holds a run at step {state['step']} with other settings: "
        f"{differences}. Restore them to go on, use --fresh to start over (the old folder is kept, "
        "renamed), or set run.folder"
    )


def _order(
    config: DistillConfig, shards: Sequence[ShardReader]
) -> tuple[tuple[Source, ...], Order]:
    """Return the sources of the training data and the order over them.

    Args:
        shards: of all sources, in the order of the settings.
    """
    data, seed = config.data, config.run.seed
    settings = dict(zip(data.sources, shards, strict=True))
    named_manifests = {
        f"{setting} ({reader.location})": reader.manifest for setting, reader in settings.items()
    }
    if problem := mixing_problem(named_manifests):
        raise ConfigError(f"data.train can't be mixed: {problem}")
    with named(
        seed="run.seed",
        num_lanes="data.num_lanes",
        window_rows="data.window_rows",
        limit_bytes="data.cache_bytes",
        **{f"weights.{number}": f"{name}.weight" for number, name in enumerate(settings)},
    ):
        check_cache(shards, data.num_lanes)
        sources = []
        for (setting, spec), reader in zip(data.sources.items(), shards, strict=True):
            try:
                order = reader.order(
                    seed=seed, num_lanes=data.num_lanes, window_rows=data.window_rows
                )
            except SettingError as error:
                if len(shards) == 1:
                    raise
                raise ConfigError(f"{setting}: ", *error.pieces) from error
            sources.append(Source(spec.name or setting, reader, order))
        weights = [spec.weight for spec in data.sources.values()]
        return tuple(sources), mix([each.order for each in sources], weights, seed=seed)


def _free_disk_bytes(config: DistillConfig, checkpoint_bytes: int, *, fresh: bool) -> int:
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
    # A fresh run sets the older checkpoints aside, which frees nothing.
    old = () if fresh else folder.glob("checkpoints/step-*/*")
    standing = sum(path.stat().st_size for path in old)
    needed = max(checkpoint_bytes, (config.checkpoint.keep + 1) * checkpoint_bytes - standing)
    if free < needed:
        raise DataError(
            f"run.folder={config.run.folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB "
            f"needed for checkpoint.keep={config.checkpoint.keep} checkpoints and one being "
            "written; free some space or set another folder"
        )
    return free
