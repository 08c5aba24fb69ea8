"""The session of a run: teacher, students under their engines, data order and current step.

Inputs: a resolved run. Outputs: a `Session` at the step to start or resume from, its
checkpoints and its exports. Not handled here: the step (`training.step`), when to save and export
(`training.loop`).
"""

from __future__ import annotations

import gc
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from scaledistill import __version__
from scaledistill.checkpoint.format import Checkpoint, newest_checkpoint
from scaledistill.checkpoint.saver import Groups, Saver
from scaledistill.config.naming import own_metric, student_names, teacher_names
from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schedule import from_step, learning_rate
from scaledistill.config.schema import DistillConfig
from scaledistill.data.mixture import Order, Source, data_identity, epochs
from scaledistill.data.stream import Batch, ShardReader, ShardStream, iter_validation
from scaledistill.distributed.ranks import (
    BF16_ON_CPU,
    Ranks,
    failing_together,
    gather_objects,
    reported_once,
)
from scaledistill.engines import (
    Engine,
    EngineState,
    create_engine,
    engine_traits,
    shard_teacher,
)
from scaledistill.errors import ConfigError, DataError, PeerError, named
from scaledistill.metrics.stopwatch import measured_matrix_rate, peak_flops
from scaledistill.models.architectures import build_encoder
from scaledistill.models.attention import use_varlen_attention
from scaledistill.models.loss import StudentLoss
from scaledistill.models.student import build_student
from scaledistill.models.teacher import Teacher, encoder_on_meta, load_config, load_encoder
from scaledistill.models.view import capture_view, view_flops
from scaledistill.preflight.checks import (
    DataSets,
    check_same_run,
    open_data,
    other_run,
    student_shape,
)
from scaledistill.preflight.estimate import Estimate
from scaledistill.preflight.fetching import fetch_weights
from scaledistill.preflight.microbatch import choose
from scaledistill.preflight.roster import (
    Roster,
    new_roster,
    roster_notes,
    roster_of,
    student_states,
)
from scaledistill.training.exports import Facts, student_export, write_student

log = logging.getLogger(__name__)

VERSIONED = ("torch", "transformers", "deepspeed", "safetensors")


@dataclass
class Student:
    """A student under training; equal on all ranks unless noted otherwise."""

    name: str
    run: ResolvedRun
    """The settings of a run with this student alone."""
    config: PretrainedConfig
    engine: Engine
    loss: StudentLoss
    dropout: float
    untrained: dict[str, Tensor]
    """Weights of the full model that the training view lacks, as initialised: fp32, on the CPU."""
    checkpoint_bytes: int
    """Size of its weights and moments."""
    flops_per_token: float
    """Three times the forward's, truncated."""
    first_step: int = 0
    """The run's step that is its own step 0; more than 0 if it was added to the run."""
    skipped_steps: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    """Of the best export so far: "step", "validation_loss" and, under "yardstick", the
    `validation_identity`."""
    last_validation: float | None = None
    """The last validation loss; None before the first, or if it was not finite."""
    validated_at: int | None = None
    """The step of the last validation; None before it, and in checkpoints of older versions."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of one of the run's steps, counted from 0."""
        own = from_step(self.run.config.train, self.first_step)
        return learning_rate(step - self.first_step, own)


@dataclass
class Session:
    """A run in progress; equal on all ranks unless noted otherwise."""

    run: ResolvedRun
    ranks: Ranks
    teacher: Teacher
    students: list[Student]
    sources: tuple[Source, ...]
    order: Order
    held_out: ShardReader | None
    teacher_flops_per_token: float
    """The truncated teacher's forward FLOPs."""
    peak_flops: float
    """FLOP/s of all devices: from the data sheet at 16 bits, or else measured briefly in the
    teacher's precision."""
    step: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The students that diverged and were taken out, by name: "step", "reason" and
    "skipped_steps"."""
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        root, settings = Path(self.config.run.folder) / "checkpoints", self.config.checkpoint
        self.saver = Saver(root, self.ranks, keep=settings.keep, remote=settings.remote)

    @property
    def config(self) -> DistillConfig:
        """The run's settings, resolved."""
        return self.run.config

    @property
    def flops_per_token(self) -> float:
        """The teacher's and the students' FLOPs in a step."""
        return self.teacher_flops_per_token + sum(each.flops_per_token for each in self.students)

    @property
    def skipped_steps(self) -> int:
        """The skipped steps of all students, those that were dropped included."""
        dropped = sum(each["skipped_steps"] for each in self.dropped.values())
        return dropped + sum(student.skipped_steps for student in self.students)

    def own_metric(self, metric: str, student: str) -> str:
        """Return the name of a student's metric in this run."""
        return own_metric(metric, student, self.config.students)

    def stream(self, step: int | None = None) -> ShardStream:
        """Return this rank's micro-batches from a step on (default: the current step)."""
        return ShardStream(
            [source.shards for source in self.sources],
            self.order,
            global_batch_size=self.config.train.global_batch_size,
            micro_batch_size=self.run.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            first_sample=(self.step if step is None else step)
            * self.config.train.global_batch_size,
            prefetch_batches=self.config.data.prefetch_batches,
            with_documents=self.config.data.attention == "document",
            device=self.ranks.device,
        )

    def epochs(self) -> dict[str, float]:
        """Return how often the steps so far went through each source; {} if there is only one."""
        if len(self.sources) == 1:
            return {}
        samples = self.step * self.config.train.global_batch_size
        return epochs(self.sources, self.order, samples)

    def validation_batches(self) -> Iterator[Batch]:
        """Return this rank's share of the held-out rows; all ranks get equally many batches.

        Raises:
            ConfigError: `data.validation` is not set.
        """
        if self.held_out is None:
            raise ConfigError("data.validation is not set; name a folder of held-out shards")
        batches = iter_validation(
            self.held_out,
            rows=self.config.train.validation_rows,
            micro_batch_size=self.run.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            with_documents=self.config.data.attention == "document",
        )
        return (
            batch.with_tensors(lambda tensor: tensor.to(self.ranks.device)) for batch in batches
        )

    def validation_identity(self) -> str | None:
        """Return what identifies the held-out rows; only losses on the same rows are comparable."""
        if self.held_out is None:
            return None
        return f"{self.config.train.validation_rows} rows of {self.held_out.manifest.sha256}"

    def save(self) -> None:
        """Gather a checkpoint of the current step for `saver` to write. Collective.

        `saver.settle` returns the outcome.
        """
        num_bytes = sum(student.checkpoint_bytes for student in self.students)
        self.saver.begin(self.step, num_bytes, self._gather)

    def _gather(self) -> tuple[Groups, dict[str, Any]]:
        groups: Groups = {}
        by_student: dict[str, dict[str, Any]] = {}
        for student in self.students:
            state = student.engine.state()
            groups[f"{student.name}.weights"] = {**student.untrained, **state.weights}
            groups[f"{student.name}.exp_avg"] = dict(state.exp_avg)
            groups[f"{student.name}.exp_avg_sq"] = dict(state.exp_avg_sq)
            by_student[student.name] = {
                "optimizer_steps": state.optimizer_steps,
                "loss_scaler": dict(state.loss_scaler),
                "first_step": student.first_step,
                "skipped_steps": student.skipped_steps,
                "best": student.best,
                "last_validation": student.last_validation,
                "validated_at": student.validated_at,
                "model_config": json.loads(student.config.to_json_string(use_diff=False)),
            }
        facts = {
            "step": self.step,
            "samples": self.step * self.config.train.global_batch_size,
            "students": by_student,
            "dropped": dict(self.dropped),
            "data": self.order.fingerprint(),
            "teacher_sha256": self.teacher.sha256,
            "config": self.config.model_dump(),
            "world_size": self.ranks.world_size,
            "versions": versions(),
        }
        return groups, facts

    def drop(self, diverged: Mapping[str, str], *, writes: bool) -> None:
        """Take diverged students out of the run, and export them as they are. Collective.

        Args:
            diverged: the reasons, by student.
            writes: whether this run writes files.
        """
        leaving = [student for student in self.students if student.name in diverged]
        self.students = [student for student in self.students if student.name not in diverged]
        while leaving:
            self._drop(leaving.pop(0), diverged, writes)
        # Frees their engines: two passes, because of cycles through autograd's references.
        for _ in range(2):
            gc.collect()

    def _drop(self, student: Student, diverged: Mapping[str, str], writes: bool) -> None:
        name, reason = student.name, diverged[student.name]
        self.dropped[name] = {
            "step": self.step,
            "reason": reason,
            "skipped_steps": student.skipped_steps,
        }
        kept = "the others train on"
        if writes:
            # Skipped steps have left the weights as the last good step made them.
            try:
                kept = f"exported as {self.export(student, f'{name}-step-{self.step}', {})}; {kept}"
            except (DataError, PeerError) as error:
                kept = f"not exported ({error}); {kept}"
        student.engine.close()
        if self.ranks.is_main:
            log.warning(
                "student %s is dropped at step %d: %s; %s",
                *(name, self.step, reason, kept),
                extra={"event": "dropped"},
            )

    def export(
        self,
        student: Student,
        folder_name: str,
        losses: Mapping[str, float | None],
        check: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> Path:
        """Write a full student as a plain transformers model and verify it. Collective.

        Rank 0 writes the folder, reads it back and compares. `check` is called with the student
        that was read back, with the extra projection if the tap is "extra", before it replaces an
        older export.

        Raises:
            DataError: the export cannot be written, or what was read back differs.
        """
        folder = Path(self.config.run.folder) / "export" / folder_name
        weights = student.engine.weights()
        with failing_together():
            if self.ranks.is_main:
                self._write_export(student, folder, weights, losses, check)
        return folder

    def _write_export(
        self,
        student: Student,
        folder: Path,
        weights: Mapping[str, Tensor],
        losses: Mapping[str, float | None],
        check: Callable[[PreTrainedModel], None],
    ) -> None:
        whole = {**student.untrained, **weights}

        def check_read_back(model: PreTrainedModel) -> None:
            # The export lacks the extra tap's projection, which the loss needs.
            if student.run.config.students[student.name].tap == "extra":
                tapped = build_encoder(student.config)
                tapped.load_state_dict({**whole, **model.state_dict()})
                model = tapped
            model.config._attn_implementation = student.config._attn_implementation
            check(model)

        facts = Facts(
            self.step - student.first_step,
            self.teacher.sha256,
            data_identity(self.order.fingerprint()),
            {label: None if loss is None else f"{loss:.4f}" for label, loss in losses.items()},
            versions(),
        )
        content = student_export(student.run.config, student.config, whole, facts)
        write_student(folder, content, check_read_back)


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    own = {"scaledistill": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in VERSIONED}


def open_session(
    run: ResolvedRun,
    ranks: Ranks,
    *,
    resume: bool,
    sized_by: Estimate | None = None,
    opened: DataSets | None = None,
) -> Session:
    """Set up everything that a run needs. Collective.

    Args:
        run: its settings, resolved for these ranks.
        resume: start from the newest good checkpoint, if there is one.
        sized_by: the estimate that predicted the micro-batch of `run`; given if the largest one
            that fits is wanted. A run resumed on as many ranks, without another student, keeps its
            micro-batch, and so its rounding.
        opened: the data sets, if already open: reading a manifest can take seconds, and memory.

    Raises:
        ConfigError: the run to resume had other settings, another teacher or other data.
        DataError: data or models do not meet the run's needs.
    """
    config = run.config
    teacher_settings = config.teacher
    if ranks.is_main and ranks.device.type == "cpu" and config.train.precision == "bf16":
        log.warning("%s", BF16_ON_CPU)
    if ranks.is_main:
        log.info("loading %s up to layer %d", teacher_settings.model, teacher_settings.layer)
    fetch_weights(teacher_settings.model, teacher_settings.revision, ranks)
    with failing_together():
        sources, order, held_out = opened or open_data(config, ranks)
        if not config.train.validation_every_steps:
            held_out = None
        with named(**teacher_names(teacher_settings)):
            encoder, stored = _open_teacher(config)
            whole = load_config(
                teacher_settings.model,
                teacher_settings.revision,
                teacher_settings.trust_remote_code,
            )
    checkpoint = _checkpoint_to_resume(config, order, ranks) if resume else None
    roster = roster_of(checkpoint.state, config) if checkpoint else new_roster(config)
    if checkpoint and ranks.is_main:
        for note in roster_notes(roster, config, checkpoint.state["step"]):
            log.warning("%s", note)
    names = list(roster.first_steps)
    models: dict[str, PreTrainedModel] = {}
    for name in names:
        source = checkpoint if name not in roster.added else None
        if not source:
            fetch_weights(config.students[name].init, None, ranks)
        with failing_together(), named(**student_names(name)):
            models[name] = _create_student(config, name, encoder, whole, stored, source)
    length = config.data.sequence_length
    teacher_flops = view_flops(whole, config.teacher.layer, length) / length
    flops = {
        name: 3 * view_flops(model.config, model.config.num_hidden_layers, length) / length
        for name, model in models.items()
    }
    with named(**teacher_names(teacher_settings)):
        teacher = _place_teacher(run, encoder, stored, ranks)
    # The teacher has taken over what it needs; the layers above it can be freed.
    del encoder, stored
    if config.data.attention == "document":
        _attend_within_documents(run, teacher, models, ranks)
    _check_same_everywhere(config, teacher, order, ranks, with_micro_batch=not sized_by)
    if checkpoint:
        with reported_once(ranks):
            _check_same_teacher(checkpoint, config, teacher)
    same_ranks = checkpoint and checkpoint.state["world_size"] == ranks.world_size
    if sized_by:
        before = None
        # A student that was added needs memory too.
        if checkpoint and same_ranks and not roster.added:
            before = checkpoint.state["config"]["train"]["micro_batch_size"]
        views = {
            name: capture_view(model, model.config.num_hidden_layers)
            for name, model in models.items()
        }
        size = choose(run, teacher, views, sized_by, ranks, before=before)
        run = run.with_micro_batch(size)
    peak = peak_flops(ranks.device) or measured_matrix_rate(ranks.device, run.teacher_dtype)
    replicated = teacher_settings.placement == "replicate"
    own_engine = engine_traits(run.for_student(names[0]))  # the first student's; all have the same
    if config.train.compile and (replicated or own_engine.compiles_sharded_teacher):
        teacher.view.compile_blocks()
    students = []
    for name in names:
        with reported_once(ranks):
            own = run.for_student(name)
            student = _train_student(
                own, name, models.pop(name), teacher.config, ranks, flops[name]
            )
            students.append(student)
    session = Session(
        run,
        ranks,
        teacher,
        students,
        sources,
        order,
        held_out,
        teacher_flops,
        peak * ranks.world_size,
    )
    if checkpoint:
        _restore(session, checkpoint, roster)
    return session


def _open_teacher(config: DistillConfig) -> tuple[PreTrainedModel, Mapping[str, Tensor] | None]:
    """Return the teacher's encoder; if it will be sharded, its weights are still on disk."""
    teacher = config.teacher
    options: dict[str, Any] = {
        "revision": teacher.revision,
        "num_layers": teacher.layer,
        "trust_remote_code": teacher.trust_remote_code,
    }
    if teacher.placement == "replicate":
        return load_encoder(teacher.model, **options), None
    return encoder_on_meta(teacher.model, **options)


def _checkpoint_to_resume(config: DistillConfig, order: Order, ranks: Ranks) -> Checkpoint | None:
    """Return the newest good checkpoint, if there is one; it is checked to be of this run."""
    root = Path(config.run.folder) / "checkpoints"
    checkpoint = newest_checkpoint(root, ranks, config.checkpoint.remote)
    if checkpoint:
        with reported_once(ranks):
            check_same_run(checkpoint.state, config, order)
    return checkpoint


def _place_teacher(
    run: ResolvedRun,
    encoder: PreTrainedModel,
    stored: Mapping[str, Tensor] | None,
    ranks: Ranks,
) -> Teacher:
    """Place the teacher according to `teacher.placement`. Collective if it is sharded."""
    dtype, layer = run.teacher_dtype, run.config.teacher.layer
    if stored is None:
        return Teacher(encoder, layer, dtype=dtype).to(ranks.device)
    return Teacher(
        encoder, layer, dtype=dtype, stored=stored, shard=partial(shard_teacher, run, ranks)
    )


def _attend_within_documents(
    run: ResolvedRun, teacher: Teacher, models: Mapping[str, PreTrainedModel], ranks: Ranks
) -> None:
    """Use the fast kernel for attention within documents, where there is one."""
    use_varlen_attention(teacher.config, ranks.device, run.teacher_dtype)
    for name, model in models.items():
        dropout = run.config.students[name].dropout
        use_varlen_attention(model.config, ranks.device, run.student_dtype, dropout=dropout)


def _create_student(
    config: DistillConfig,
    name: str,
    encoder: PreTrainedModel,
    teacher: PretrainedConfig,
    stored: Mapping[str, Tensor] | None,
    checkpoint: Checkpoint | None,
) -> PreTrainedModel:
    """Build the full student with the checkpoint's weights, or initialise it by `init`.

    Args:
        encoder: the teacher up to the captured layer.
        teacher: the config of the whole teacher, whose pattern of layers the student continues.
    """
    spec = config.students[name]
    model = build_student(
        encoder,
        student_shape(config, name, teacher, checkpoint.state if checkpoint else None),
        init="random" if checkpoint else spec.init,
        layer_map=None if checkpoint else spec.layer_map,
        tap=spec.tap,
        capture_layer=config.teacher.layer,
        seed=config.run.seed,
        dropout=spec.dropout,
        stored=stored,
    )
    if checkpoint:
        model.load_state_dict(checkpoint.tensors(f"{name}.weights"))
    return model


def _train_student(
    run: ResolvedRun,
    name: str,
    model: PreTrainedModel,
    teacher: PretrainedConfig,
    ranks: Ranks,
    flops_per_token: float,
) -> Student:
    """Cut the student's training view and hand it to an engine. Collective."""
    view = capture_view(model, model.config.num_hidden_layers)
    trained = {parameter_name for parameter_name, _ in view.module.named_parameters()}
    untrained = {
        key: value.clone() for key, value in model.state_dict().items() if key not in trained
    }
    num_bytes = sum(value.nbytes for value in model.state_dict().values())
    num_bytes += 2 * sum(parameter.nbytes for parameter in view.module.parameters())
    # Compile only afterwards: the engine runs a first step with another shape.
    engine = create_engine(run, view, ranks)
    if run.config.train.compile and engine_traits(run).compiles_student:
        view.compile_blocks()
    loss = StudentLoss.of(run.config, name, (teacher, model.config))
    dropout = run.config.students[name].dropout
    return Student(
        name,
        run,
        model.config,
        engine,
        loss,
        dropout,
        untrained,
        num_bytes,
        flops_per_token,
    )


def _check_same_everywhere(
    config: DistillConfig,
    teacher: Teacher,
    order: Order,
    ranks: Ranks,
    *,
    with_micro_batch: bool,
) -> None:
    """Check that settings, teacher and data are equal on all ranks. Collective.

    Each rank reads its own files, so they may differ. A predicted micro-batch may differ from rank
    to rank: it is not compared.

    Raises:
        ConfigError: they differ.
    """
    facts = {
        "settings": config.model_dump(
            exclude={"data": {"train", "validation", "cache_folder"}, "logging": True}
        )
    }
    facts |= {"teacher.model": {"sha256": teacher.sha256}, "data.train": order.fingerprint()}
    if not with_micro_batch:
        facts["settings"]["train"].pop("micro_batch_size")
    facts["settings"]["teacher"].pop("model")  # a path that may differ; its weights are compared
    everyone = gather_objects(facts)
    for rank, other in enumerate(everyone):
        different = [name for name, value in other.items() if value != everyone[0][name]]
        if different:
            with reported_once(ranks):
                raise ConfigError(
                    f"rank {rank} has another {' and '.join(different)} than rank 0; give all "
                    "nodes the same configuration file, hardware, teacher and shards"
                )


def _check_same_teacher(checkpoint: Checkpoint, config: DistillConfig, teacher: Teacher) -> None:
    if checkpoint.state["teacher_sha256"] != teacher.sha256:
        difference = (
            f"teacher.model: the weights of {config.teacher.model} are not those that the run "
            "began with"
        )
        raise other_run(checkpoint.state, config, difference)


def _restore(session: Session, checkpoint: Checkpoint, roster: Roster) -> None:
    session.step = checkpoint.state["step"]
    session.dropped = {name: dict(found) for name, found in (roster.dropped or {}).items()}
    states = student_states(checkpoint.state)
    for student in session.students:
        name = student.name
        student.first_step = roster.first_steps[name]
        if name in roster.added:
            continue
        state = states[name]
        student.engine.load_state(
            EngineState(
                weights=checkpoint.tensors(f"{name}.weights"),
                exp_avg=checkpoint.tensors(f"{name}.exp_avg"),
                exp_avg_sq=checkpoint.tensors(f"{name}.exp_avg_sq"),
                optimizer_steps=state["optimizer_steps"],
                loss_scaler=state["loss_scaler"],
            )
        )
        student.skipped_steps, student.best = state["skipped_steps"], state["best"]
        student.last_validation = state["last_validation"]
        student.validated_at = state.get("validated_at")
