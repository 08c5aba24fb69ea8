"""The settings of a run as frozen pydantic models; unknown keys are refused.

Inputs: plain values, which `load` reads. Outputs: a frozen `DistillConfig`, and its resolved JSON.
Not handled here: checks that need the number of ranks, the models or the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from scaledistill.config.defaults import BATCH_SIZE, EPOCHS, LEARNING_RATES, SEEDS

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
INIT_WORDS = ("random", "teacher")
"""Values of a student's `init` that are neither a folder nor a model's name."""
TRAINED_ALONE = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
"""Settings of a student that override those of the same names in `train`."""
MAY_CHANGE = "may change on resume"
"""Marks a field whose change alters no result, or rounding only; a resume refuses others."""
CONTENT_STAYS = "may change on resume, but not what it names"
"""Marks the name of the data or the teacher, which are identified by their hashes."""
SCHEMA_KEY = "$schema"
"""A key that editors read; it may stand at the top of a configuration and is ignored."""
NUM_LANES, WINDOW_ROWS = 32, 16_384
"""Defaults of `data.num_lanes` and `data.window_rows`."""
STUDENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Settings(BaseModel):
    """A block of the configuration file."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class RunSettings(Settings):
    """The run itself: its folder, seed and time limits."""

    folder: Annotated[NonEmpty, MAY_CHANGE]
    """Everything that the run writes goes here."""
    seed: NotNegative = 1
    """Seeds the sample order, the random initialisation and dropout."""
    deterministic: bool = False
    """Ask PyTorch for deterministic algorithms, so that a run resumed on GPUs is bit-identical. On
    CPUs it is so in any case."""
    max_hours: Annotated[Annotated[float, Field(gt=0)] | None, MAY_CHANGE] = None
    """Stop after this many hours, as on a signal; rerun the same command to resume."""
    timeout_seconds: Annotated[Positive, MAY_CHANGE] = 1800
    """If no rank finishes a step, a validation batch or other work for this long, the job ends and
    names the ranks that are behind."""
    lost_rank_seconds: Annotated[Positive, MAY_CHANGE] = 120
    """If a rank sends no heartbeat for this long (killed, stopped, its node gone), the job ends."""


class TeacherSettings(Settings):
    """The teacher model, the block to learn from and how it runs."""

    model: Annotated[NonEmpty, CONTENT_STAYS]
    """A folder or a hub name, with weights in safetensors."""
    revision: Annotated[NonEmpty | None, CONTENT_STAYS] = None
    """Branch, tag or commit on the hub."""
    layer: Positive
    """The block whose Q/K/V the student learns, counted from 1; nothing above it is loaded."""
    dtype: Precision = "auto"
    """Precision of the teacher's forward. "auto": that of `train.precision`; if that is "auto" too,
    bf16 where it is fast, including CPUs with bf16 units (AMX, AVX512-BF16)."""
    placement: Annotated[Literal["replicate", "shard", "offload"], MAY_CHANGE] = "replicate"
    """Where the teacher's weights are kept. "replicate": whole on every rank; "shard": in equal
    parts on the ranks, gathered block by block in the forward; "offload": the same parts, in host
    memory."""
    trust_remote_code: Annotated[bool, MAY_CHANGE] = False
    """Run Python code that comes with the model. Off: such models are refused."""


class StudentSettings(Settings):
    """The size and initialisation of a student, and where its Q/K/V are taken."""

    num_layers: Positive
    """Number of blocks."""
    hidden_size: Positive
    """Width of the blocks' outputs."""
    num_attention_heads: Positive
    """Attention heads of a block; they must divide the width."""
    num_key_value_heads: Positive | None = None
    """Heads of keys and values in grouped-query attention, each shared by equally many query heads
    (default: as many query heads share one as in the teacher, or with `architecture` as in that
    architecture's default config)."""
    head_dim: Positive | None = None
    """Width of a head, where the architecture lets it differ from `hidden_size` /
    `num_attention_heads` (default: the teacher's if it differs there, else that quotient)."""
    intermediate_size: Positive | None = None
    """FFN width (default: 4 × `hidden_size`; ModernBERT: 1.5 ×)."""
    architecture: NonEmpty | None = None
    """The student's `model_type`, such as "modernbert", if it is not the teacher's. It then has the
    teacher's vocabulary, special tokens and positions, and else the defaults of that architecture;
    `init` cannot be "teacher"."""
    init: NonEmpty = "random"
    """"random", "teacher" (its weights, cut by layers, whole heads and width) or the folder of a
    model of this shape."""
    layer_map: list[Positive] | None = None
    """The teacher's layer, counted from 1, for each layer of the student (default: evenly spaced up
    to `teacher.layer`)."""
    tap: Literal["last", "extra"] = "last"
    """Where the student's Q/K/V come from. "last": its last block, whose attention output and FFN
    then learn nothing; "extra": a projection after the last block, so that every block learns; the
    export leaves the projection out."""
    relation_heads: Positive | None = None
    """Relation heads for this student (default: `relations.num_heads`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout while distilling. The exported config keeps the teacher's values, or the defaults of
    `architecture`."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of this student (default: `train.learning_rate`)."""
    warmup_steps: NotNegative | None = None
    """Steps of warm-up of this student (default: `train.warmup_steps`)."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of this student (default: `train.weight_decay`)."""
    max_grad_norm: Annotated[float, Field(ge=0)] | None = None
    """Clipping of this student's gradients (default: `train.max_grad_norm`)."""

    @model_validator(mode="after")
    def _check(self) -> StudentSettings:
        if self.layer_map is not None and self.init != "teacher":
            raise ValueError(
                f"layer_map is read only with init='teacher', found init={self.init!r}; remove one "
                "of them"
            )
        if self.layer_map is not None and len(self.layer_map) != self.num_layers:
            raise ValueError(
                f"layer_map names {len(self.layer_map)} teacher layers, expected "
                f"num_layers={self.num_layers} of them"
            )
        return self


class RelationSettings(Settings):
    """The relation loss: heads, pairs and implementation."""

    num_heads: Positive
    """Number of relation heads R; it must divide every width that a pair uses (64 is usual for
    large teachers, 48 for base ones)."""
    pairs: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {"qq": 1.0, "kk": 1.0, "vv": 1.0}
    )
    """Relation pairs and their weights."""
    backend: Annotated[Literal["auto", "reference", "sdpa", "triton"], MAY_CHANGE] = "auto"
    """"reference": plain PyTorch, whole maps; "sdpa": tiles, on the CPU; "triton": kernels, on the
    GPU; "auto": one of the last two, if available."""

    @field_validator("pairs")
    @classmethod
    def _check_pairs(cls, pairs: dict[str, float]) -> dict[str, float]:
        known = [a + b for a in "qkv" for b in "qkv"]
        if unknown := [pair for pair in pairs if pair not in known]:
            raise ValueError(f"unknown pair {unknown[0]!r}, expected some of {', '.join(known)}")
        if not any(weight > 0 for weight in pairs.values()):
            raise ValueError(
                'no pair has a weight above 0; the usual pairs are {"qq": 1, "kk": 1, "vv": 1}'
            )
        return pairs


class SourceSettings(Settings):
    """One of several data sets to train on."""

    shards: Annotated[NonEmpty, CONTENT_STAYS]
    """Folder or URL of its shards."""
    weight: Annotated[float, Field(gt=0)]
    """Its share of the samples, relative to the other weights."""
    name: Annotated[NonEmpty | None, MAY_CHANGE] = None
    """Its name in metrics and messages (default: its number in the list, from 0)."""


TAGS = ("[one]", "[list]")
"""Parts of the paths in pydantic's errors: which type of a setting of two types was given."""
TrainingData = Annotated[
    Annotated[NonEmpty, Tag("[one]")]
    | Annotated[list[SourceSettings], Field(min_length=1), Tag("[list]")],
    Discriminator(lambda value: "[list]" if isinstance(value, list) else "[one]"),
]


class DataSettings(Settings):
    """The shards to read, and how their rows are shuffled and cached."""

    train: Annotated[TrainingData, CONTENT_STAYS]
    """Folder or URL of the training shards, made by `scaledistill shards make`, or a list of
    several with weights: [{"shards": "shards/wiki/train", "weight": 0.7}, …]. Each is shuffled and
    goes through epochs of its own."""
    validation: Annotated[NonEmpty | None, MAY_CHANGE] = None
    """Folder or URL of held-out shards."""
    sequence_length: Positive
    """Tokens per row T; must be that of the shards."""
    attention: Literal["row", "document"] = "row"
    """"row": every token of a row sees the whole row, as in BERT's training; "document": every
    token sees only its own document."""
    num_lanes: Positive = NUM_LANES
    """Lanes that the epoch is cut into; more lanes shuffle better and need more memory."""
    window_rows: Positive = WINDOW_ROWS
    """Rows shuffled together in a lane. Memory: at most num_lanes × window_rows × T × 2¼ bytes."""
    prefetch_batches: Annotated[Positive, MAY_CHANGE] = 4
    """Micro-batches prepared ahead of the step."""
    cache_folder: Annotated[NonEmpty | None, MAY_CHANGE] = None
    """Local folder for shards from URLs (default: ~/.cache/scaledistill)."""
    cache_bytes: Annotated[Positive, MAY_CHANGE] = 100_000_000_000
    """Maximum size of that folder, in bytes."""

    @property
    def sources(self) -> dict[str, SourceSettings]:
        """The training data by setting, with their names: "data.train", or "data.train.0", …"""
        if isinstance(self.train, str):
            return {"data.train": SourceSettings(name="train", shards=self.train, weight=1.0)}
        return {
            f"data.train.{number}": source.model_copy(update={"name": source.name or str(number)})
            for number, source in enumerate(self.train)
        }

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        names: dict[str | None, str] = {}
        for setting, source in self.sources.items():
            setting = setting.removeprefix("data.")
            if not STUDENT_NAME.fullmatch(source.name or ""):
                raise ValueError(
                    f"{setting}.name={source.name!r}: use only letters, digits, '-' and '_'; it is "
                    "part of metric names"
                )
            if source.name in names:
                raise ValueError(
                    f"{setting} and {names[source.name]} are both named {source.name!r}; rename one"
                )
            names[source.name] = setting
        return self


class TrainSettings(Settings):
    """Batch sizes, optimizer, schedule, precision and validation."""

    global_batch_size: Positive
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Annotated[Positive | Literal["auto"] | None, MAY_CHANGE] = None
    """Sequences per rank and forward; the accumulation steps follow from it. A size above a rank's
    share of the batch is cut to that share, with a note in the log; one above the whole batch is
    refused. "auto": as many as fit in memory (default: the whole share)."""
    max_steps: Positive
    """Optimizer steps of the run."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up, at the end of which the learning rate is at its peak."""
    schedule: Literal["linear", "cosine", "warmup_stable_decay"] = "linear"
    """The learning rate after the warm-up. "linear" and "cosine": decay to 0 at `max_steps`;
    "warmup_stable_decay": the peak, until the last `decay_steps` decay to 0 as 1 - sqrt. Any
    checkpoint before that decay can be trained on with another `max_steps` or `decay_steps`."""
    decay_steps: Positive | None = None
    """Steps of decay at the end of "warmup_stable_decay" (default: a tenth of `max_steps`, or what
    the warm-up leaves)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW weight decay; biases and LayerNorms are exempt."""
    adam_betas: Annotated[
        list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)
    ] = Field(default_factory=lambda: [0.9, 0.999])
    """AdamW's β₁ and β₂."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW's ε."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this global norm; 0 disables clipping."""
    precision: Precision = "auto"
    """Precision of the student's forward and backward; master weights and moments are fp32. "auto":
    bf16 on GPUs that support it, fp32 on CPUs, whose bf16 LayerNorm gradients are inaccurate."""
    compile: Annotated[bool | Literal["auto"], MAY_CHANGE] = "auto"
    """Apply torch.compile to the blocks of teacher and student (not to the student's under ZeRO-3).
    "auto": on GPUs, unless `run.deterministic` is on, which excludes it."""
    max_skipped_steps: Annotated[NotNegative, MAY_CHANGE] = 10
    """Steps in a row that may be skipped for a non-finite loss or gradient; with one more, a
    student has diverged."""
    on_divergence: Annotated[Literal["stop", "drop"], MAY_CHANGE] = "stop"
    """If a student diverges: "stop" ends the run; "drop" exports the student as it is, removes it
    from the run and continues training the others. The last student left ends the run."""
    validation_every_steps: Annotated[NotNegative, MAY_CHANGE] = 0
    """Steps between validation losses; one is also computed at the end. 0: never."""
    validation_rows: Annotated[Positive, MAY_CHANGE] = 1024
    """Held-out rows over which the validation loss is averaged."""

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}; lower "
                "it"
            )
        if self.decay_steps is not None and self.schedule != "warmup_stable_decay":
            raise ValueError(
                f"decay_steps={self.decay_steps} is read only with "
                f"schedule='warmup_stable_decay', found schedule={self.schedule!r}; remove one of "
                "them"
            )
        if self.decay_steps is not None and self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} are together "
                f"more than max_steps={self.max_steps}; lower one of them"
            )
        if (
            isinstance(self.micro_batch_size, int)
            and self.micro_batch_size > self.global_batch_size
        ):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is more than "
                f"global_batch_size={self.global_batch_size}; "
                'lower it, or set it to "auto" for as many as fit in memory'
            )
        return self


class FsdpSettings(Settings):
    """FSDP2 (`fully_shard`): weights, gradients and optimizer state sharded over the ranks."""

    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward and gather them again for its backward, to
    save memory."""
    cpu_offload: bool = False
    """Keep the shards in host memory, and run the optimizer step there."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward and recompute the rest."""


class EngineSettings(Settings):
    """The engine that shards the student's training state, and its own settings."""

    name: Literal["deepspeed", "fsdp"] = "deepspeed"
    """"deepspeed": DeepSpeed ZeRO; "fsdp": PyTorch's FSDP2. They agree up to rounding."""
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 2}})
    """DeepSpeed's own settings, checked key by key. Batch sizes, optimizer, schedule and clipping
    come from `train`."""
    fsdp: FsdpSettings = Field(default_factory=FsdpSettings)
    """Read with name="fsdp"."""


class CheckpointSettings(Settings):
    """When checkpoints are saved, how many are kept and where they are copied."""

    every_steps: NotNegative = 1000
    """Steps between saves; one more is made at the end. 0: only at the end or on a stop request."""
    keep: Positive = 2
    """Number of newest checkpoints to keep."""
    remote: NonEmpty | None = None
    """Folder to which each checkpoint is also copied: a path or a URL (s3://, gs://). If the run
    folder has no checkpoint, or only older ones, the run resumes from here. `--fresh` renames its
    content."""
    max_failed_saves: NotNegative = 3
    """Saves in a row that may fail (disk full) without ending the run; one more ends it."""


class LoggingSettings(Settings):
    """How often metrics are logged, and to which trackers."""

    every_steps: Positive = 50
    """Steps between rows of metrics.jsonl, and between updates of the display."""
    trackers: list[NonEmpty] = Field(default_factory=list)
    """Trackers of accelerate that get the same metrics: "tensorboard", "wandb", … A tracker that
    fails does not end the run."""
    project: NonEmpty | None = None
    """The trackers' project, in MLflow the experiment (default: the name of `run.folder`)."""
    run_name: NonEmpty | None = None
    """The run's name in the trackers (default: the name of `run.folder`). A resumed run continues
    under the same name."""


class EvaluationSettings(Settings):
    """Fine-tuning on GLUE and SQuAD 2.0: a grid of learning rate × epochs × seed per task."""

    tasks: Annotated[list[NonEmpty], Field(min_length=1)]
    """"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "squad2"."""
    data_folder: NonEmpty | None = None
    """Folder with the tasks' original files, one folder per task (default: from the hub)."""
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        default_factory=lambda: list(LEARNING_RATES)
    )
    """Peak learning rates; linear warm-up and decay."""
    epochs: Annotated[list[Positive], Field(min_length=1)] = Field(
        default_factory=lambda: list(EPOCHS)
    )
    """Numbers of epochs."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        default_factory=lambda: list(SEEDS)
    )
    """Seeds of the new head, the order of rows and dropout."""
    batch_size: Positive = BATCH_SIZE
    """Examples per step."""
    max_length: Positive | None = None
    """Maximum tokens per example (default: 128; SQuAD 2.0: 384)."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the steps over which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW weight decay; biases and LayerNorms are exempt."""
    group_by_length: bool = False
    """Batch rows of similar length, with transformers' sampler: a half to two thirds less padding
    to compute, but the order of the rows is less random."""
    max_train_rows: Positive | None = None
    """Maximum training rows per task, the same rows for every model and seed (default: all)."""
    scores_each_epoch: bool = False
    """Also score after each earlier epoch, for the record; this takes time and changes no
    result."""


class RunEvaluation(EvaluationSettings):
    """What is scored in a run: fine-tuning of the exported student, a probe, or both.

    The fine-tuning runs at the end of the run, and the scores go into the student's model card.
    """

    tasks: list[NonEmpty] = Field(default_factory=list)
    """Some of "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli" and "squad2"; if
    empty, nothing is fine-tuned."""
    probe: Literal["stsb"] | None = None
    """At each validation, score the current student without fine-tuning: Spearman's correlation of
    STS-B's dev labels with the cosine of mean-pooled hidden states. Logged as
    "probe/stsb_spearman" for the last block's output, and as "probe/stsb_spearman_below" for the
    output of the block below, which is the last one that tap "last" trains completely."""
    include_teacher: bool = False
    """Also score the full teacher model, for comparison."""


class DistillConfig(Settings):
    """The settings of a whole run."""

    run: RunSettings
    teacher: TeacherSettings
    students: dict[str, StudentSettings]
    """Students by name; the name is part of metric names and of the export folder. All learn from
    one forward of the teacher; each has its own engine, optimizer and exports."""
    relations: RelationSettings
    data: DataSettings
    train: TrainSettings
    engine: Annotated[EngineSettings, MAY_CHANGE] = Field(default_factory=EngineSettings)
    checkpoint: Annotated[CheckpointSettings, MAY_CHANGE] = Field(
        default_factory=CheckpointSettings
    )
    logging: Annotated[LoggingSettings, MAY_CHANGE] = Field(default_factory=LoggingSettings)
    evaluation: Annotated[RunEvaluation | None, MAY_CHANGE] = None
    """What is scored during the run and at its end (default: nothing; `scaledistill glue` scores
    the export at any time)."""

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if not self.students:
            raise ValueError("students has 0 entries, expected at least one")
        if bad := [name for name in self.students if not STUDENT_NAME.fullmatch(name)]:
            raise ValueError(
                f"students.{bad[0]}: use only letters, digits, '-' and '_' in a name; it names a "
                "folder"
            )
        for name, student in self.students.items():
            if f"{name}-best" in self.students:
                raise ValueError(
                    f"students.{name}-best: the best student {name!r} is exported under this name; "
                    "rename it"
                )
            if (student.warmup_steps or 0) > self.train.max_steps:
                raise ValueError(
                    f"students.{name}.warmup_steps={student.warmup_steps} is more than "
                    f"train.max_steps={self.train.max_steps}; lower it"
                )
        if self.evaluation and not (self.evaluation.tasks or self.evaluation.probe):
            found = (
                "found [] (list, 0 entries)"
                if "tasks" in self.evaluation.model_fields_set
                else "not set"
            )
            raise ValueError(
                f"evaluation.tasks: {found}; expected a list of at least one, or evaluation.probe"
            )
        if self.evaluation and self.evaluation.probe and not self.train.validation_every_steps:
            raise ValueError(
                f"evaluation.probe={self.evaluation.probe!r} is measured at each validation, and "
                "train.validation_every_steps is 0; set it, and data.validation"
            )
        if self.train.validation_every_steps and self.data.validation is None:
            raise ValueError(
                f"train.validation_every_steps={self.train.validation_every_steps} needs "
                "data.validation, which is not set; name a folder of held-out shards or set it to 0"
            )
        return self

    def for_student(self, name: str) -> DistillConfig:
        """Return the settings of a run with this student alone; its own override `train`."""
        student = self.students[name]
        own = {key: getattr(student, key) for key in TRAINED_ALONE}
        train = self.train.model_copy(
            update={key: value for key, value in own.items() if value is not None}
        )
        return self.model_copy(update={"students": {name: student}, "train": train})

    def relation_heads(self, student: str) -> int:
        """Return the number of relation heads of a student."""
        return self.students[student].relation_heads or self.relations.num_heads

    def to_json(self) -> str:
        """Return the resolved configuration as JSON, with every default written out."""
        return json.dumps(self.model_dump(), indent=2) + "\n"


@cache
def may_change() -> frozenset[str]:
    """Return the settings, and whole blocks, that a resume may change; those of all students."""
    return frozenset(_marked(DistillConfig))


def _marked(block: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in block.model_fields.items():
        if MAY_CHANGE in field.metadata or CONTENT_STAYS in field.metadata:
            yield prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _marked(field.annotation, f"{prefix}{name}.")


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "key: old -> new" for each setting whose change alters the result; both are resolved
    configs.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in may_change())
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
