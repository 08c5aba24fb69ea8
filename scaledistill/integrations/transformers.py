"""MiniLMv2 distillation on `transformers.Trainer`, with bertdistiller's names.

Inputs: a teacher, a student and tokenised examples, with any collator that returns
`attention_mask`. Outputs: the student, trained in place, and the Trainer's own checkpoints, which
`AutoModel.from_pretrained` loads. Not handled here: sharded data, exact resume on another number of
ranks and a sharded teacher (`distill`).

Legend: B sequences, T tokens, D width.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import ConfigError, DataError, Field, did_you_mean, named, near_miss
from scaledistill.integrations.datasets import prepare_dataset as prepare_dataset
from scaledistill.models.architectures import (
    base_encoder,
    check_layer,
    qkv_widths,
    takes_token_types,
)
from scaledistill.models.loss import StudentLoss, causal_relations
from scaledistill.models.student import build_student, student_config
from scaledistill.models.teacher import (
    WEIGHT_FILES,
    Teacher,
    load_encoder,
    quiet_transformers,
    resolve_folder,
)
from scaledistill.models.view import capture_view
from scaledistill.models.weights import check_finite
from scaledistill.relations import QKV, check_relation_heads, normalise_pairs
from scaledistill.storage.files import read_json, set_default_mode, write_json

log = logging.getLogger(__name__)

BF16_ON_CPU = (
    "bf16=True on a CPU: PyTorch sums the gradients of LayerNorms over tokens in bf16, 8 % off at "
    "4,096 tokens a batch and 53 % at 16,384; leave bf16 out"
)

LETTERS = dict(enumerate(QKV._fields, start=1))  # bertdistiller's numbers: 1 query, 2 key, 3 value
PASSED_ON = ("token_type_ids", "position_ids")
SIZES = {
    "num_layers": "student_layer",
    "hidden_size": "student_hidden_size",
    "num_attention_heads": "student_attention_heads",
    "intermediate_size": "the student's intermediate_size",  # follows from the width
    "hidden_size / num_attention_heads": "student_hidden_size / student_attention_heads",
    # These follow from the teacher's.
    "num_key_value_heads": "the student's num_key_value_heads",
    "num_attention_heads / num_key_value_heads": "the student's heads / num_key_value_heads",
    "head_dim": "the student's head_dim",
}
STUDENT_NAMES: dict[str, str | Field] = {
    **SIZES,
    **{f"config.{size}": name for size, name in SIZES.items()},
    "teacher_config": "teacher",
    "init": Field("use_teacher_weights", False),
}
"""The arguments of `create_student`, by the parameters of `models.student`."""


REMOVED = {
    "evaluation_strategy": "use eval_strategy",
    "no_cuda": "use use_cpu=True",
    "use_mps_device": "remove it: MPS is detected",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "remove it: resume_from_checkpoint decides whether to resume",
    "save_safetensors": "remove it: weights are always saved as safetensors",
    "group_by_length": 'use train_sampling_strategy="group_by_length"',
    "push_to_hub_token": "use hub_token",
    "fp16_backend": "remove it: PyTorch's autocast is used",
    "half_precision_backend": "remove it: PyTorch's autocast is used",
    "fp16_opt_level": "remove it: PyTorch's autocast is used",
}
"""Arguments that transformers 5 removed, and what to do instead."""


@dataclass
class MiniLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of distillation. Layers count from 1.

    Raises:
        ConfigError: `relations` cannot be read.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "relations"]  # noqa: RUF012 - as its parent has it

    teacher_layer: int = field(
        kw_only=True, metadata={"help": "The teacher's block whose Q/K/V the student learns."}
    )
    student_layer: int = field(
        kw_only=True,
        metadata={"help": "The student's number of blocks; the last one's Q/K/V are trained."},
    )
    student_hidden_size: int = field(kw_only=True, metadata={"help": "The student's width."})
    student_attention_heads: int = field(
        kw_only=True, metadata={"help": "The student's attention heads."}
    )
    num_relation_heads: int = field(
        kw_only=True, metadata={"help": "Relation heads; must divide both widths."}
    )
    relations: dict | str | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": (
                'Weights of relation pairs (default: {"qq": 1, "kk": 1, "vv": 1}); (1, 1) means '
                '"qq".'
            )
        },
    )
    relation_backend: str = field(
        default="auto", kw_only=True, metadata={"help": '"auto", "reference", "sdpa" or "triton".'}
    )
    warmup_ratio: float | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": (
                "Fraction of the steps for warm-up, as before transformers 5; warmup_steps takes "
                "precedence."
            )
        },
    )

    def __new__(cls, *values: Any, **named_values: Any) -> MiniLMTrainingArguments:
        """Refuse unknown arguments with a remedy, before the constructor does."""
        parameters = inspect.signature(cls.__init__).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        for name in named_values if not takes_any else ():
            if name not in parameters:
                near = near_miss(name, parameters, cutoff=0.8)
                remedy = REMOVED.get(name) or f"it is unknown{did_you_mean(near)}"
                raise ConfigError(f"{cls.__name__}: {name}: {remedy}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            self.warmup_steps = warmup_steps_of(self.warmup_ratio, self.warmup_steps)
        super().__post_init__()
        self.relations = named_relations(self.relations)
        if self.ddp_find_unused_parameters is None:
            # Every trained parameter contributes to every loss, so the search is a waste.
            self.ddp_find_unused_parameters = False

    @property
    def pairs(self) -> dict[str, float]:
        """The relation pairs and their weights, by name."""
        return cast(dict[str, float], self.relations)


def warmup_steps_of(ratio: float, steps: float) -> float:
    """Return transformers 5's `warmup_steps` for transformers 4's two settings.

    A result below 1 is a fraction of all steps.

    Raises:
        ConfigError: the ratio is not between 0 and 1.
    """
    if not 0 <= ratio <= 1:
        raise ConfigError(
            f"warmup_ratio={ratio!r}; expected a share of the steps from 0 to 1, such as 0.1; for "
            "a number of steps use warmup_steps"
        )
    return steps or min(ratio, math.nextafter(1.0, 0.0))  # 1.0 would mean a single step


def named_relations(relations: object) -> dict[str, float]:
    """Return the weights of relation pairs by name; None means qq, kk and vv.

    Args:
        relations: weights by name, weights by bertdistiller's pairs of numbers, or a list of either
            kind of pair.

    Raises:
        ConfigError: it is something else, or a pair is unknown or has no usable weight.
    """
    if relations is None:
        relations = ("qq", "kk", "vv")
    if isinstance(relations, Sequence) and not isinstance(relations, str):
        relations = dict.fromkeys(relations, 1.0)
    if not isinstance(relations, Mapping):
        raise ConfigError(
            f'relations={relations!r}; expected weights of pairs, such as {{"qq": 1.0, "kk": 1.0}}'
        )
    weights = {
        "".join(str(LETTERS.get(part, part)) for part in pair)
        if isinstance(pair, Sequence)
        else str(pair): weight
        for pair, weight in relations.items()
    }
    try:
        with named(pairs="relations"):
            return dict(normalise_pairs(weights))
    except TypeError as error:  # a weight is not a number
        raise ConfigError(f"relations: {error}") from None


class MiniLMTrainer(Trainer):
    """Distil `model` from `teacher_model` with everything that `Trainer` offers.

    The trainer wraps and optimises a view of the student that ends at its last block's Q, K and V.
    The view shares the student's parameters; the loss does not reach the others, which stay
    unchanged. `save_model` and checkpoints contain the full student, in its original dtype. The
    student's dropout is active, as set in its config; the teacher runs in eval mode, without
    gradients, in the training precision, and is replicated on every rank.

    DeepSpeed and FSDP train their own copies of the weights: get the student from `save_model`.
    Their checkpoints lack the parameters that the loss does not reach, so resume with a student
    created in the same way as the first.
    """

    args: MiniLMTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: MiniLMTrainingArguments | None = None,
        *other: Any,
        teacher_model: PreTrainedModel | str | Path,
        **options: Any,
    ) -> None:
        """Take over both models; the teacher is frozen in place.

        Args:
            model: the full student; trained in place.
            teacher_model: a supported encoder, a task model around one, or a folder or hub name.
            other, options: passed to `Trainer`.

        Raises:
            ConfigError: a layer does not exist, relation heads do not divide a width, vocabularies
                differ, or a model was partitioned by ZeRO-3 when it was built.
            DataError: the teacher cannot be loaded.
        """
        if model is None or args is None:
            raise ConfigError(
                "MiniLMTrainer needs model, the student, and args, MiniLMTrainingArguments"
            )
        if not isinstance(teacher_model, PreTrainedModel):
            with (
                _built_whole(args),
                named(model="teacher_model", num_layers="teacher_layer"),
            ):
                teacher_model = load_encoder(teacher_model, num_layers=args.teacher_layer)
        _check_models(teacher_model, model, args)
        self._view = capture_view(model, args.student_layer)
        with named(student="model"):
            causal = causal_relations(*(base_encoder(x).config for x in (teacher_model, model)))
        self._loss = StudentLoss(args.num_relation_heads, args.pairs, args.relation_backend, causal)
        view = cast(Any, self._view.module)
        prefix = "" if base_encoder(model) is model else f"{model.base_model_prefix}."
        # Trainer and its callbacks save the module that is trained, the view; let it save the full
        # student instead.
        view.save_pretrained = partial(_save_whole, model, prefix, model.dtype)
        self.student = model
        super().__init__(view, args, *other, **options)
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name, None) is not None:
                raise ConfigError(
                    f"{name} is not used: the loss is that of the relations, and there are no "
                    "predictions; leave it out"
                )
        # It may come from `accelerate launch` instead of `args`.
        precision = self.accelerator.mixed_precision
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._dtype = dtypes.get(precision, torch.float32)
        if precision == "bf16" and args.device.type == "cpu" and self.is_world_process_zero():
            log.warning("%s", BF16_ON_CPU)
        # The loss is a mean over sequences, not scaled by a number of tokens.
        self.model_accepts_loss_kwargs = False
        with named(model="teacher_model"):
            # Autocast lowers fp32. Weights that have the training precision already keep it.
            keeps = teacher_model.dtype == self._dtype
            dtype = teacher_model.dtype if keeps else torch.float32
            self.teacher = Teacher(teacher_model, args.teacher_layer, dtype=dtype).to(args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the relation loss of a batch, a scalar tensor.

        With `return_outputs`, also return the student's Q, K and V.
        """
        mask_BT = self._mask(inputs)
        tokens = TokenInputs(inputs["input_ids"], mask_BT)
        dtype = self._dtype
        with torch.autocast(self.args.device.type, dtype, enabled=dtype != torch.float32):
            target = self.teacher(tokens, **_passed_on(self.teacher.config, inputs))
        found = self._view(tokens, model, **_passed_on(self.student.config, inputs))
        # Exact: this only undoes autocast's upcast.
        target, found = (QKV(*(each.to(dtype) for each in qkv)) for qkv in (target, found))
        with named(backend="relation_backend"):
            loss = self._loss(target, found, tokens).total
        return (loss, found) if return_outputs else loss

    def _mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the mask of real tokens, bool [B, T]; None without mask and padding."""
        if "input_ids" not in inputs:
            raise ConfigError(
                f"batches have no input_ids, only {', '.join(sorted(inputs)) or 'nothing'}; "
                "tokenise the data set, for instance by prepare_dataset, and choose a "
                "data_collator that keeps input_ids"
            )
        if "attention_mask" in inputs:
            return inputs["attention_mask"].bool()
        padding = base_encoder(self.student).config.pad_token_id
        if padding is not None and (inputs["input_ids"] == padding).any():
            raise ConfigError(
                "batches have no attention_mask, but their input_ids hold the padding token "
                f"{padding}; use a data_collator that returns attention_mask, such as "
                "DataCollatorWithPadding(tokenizer)"
            )
        return None

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss of a batch; there are no predictions."""
        with self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the full student. Collective under DeepSpeed and FSDP."""
        if self.is_fsdp_enabled and not _internal_call:
            kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
            if "FULL_STATE_DICT" not in kind:  # `Trainer` would write nothing
                state_dict = self.accelerator.get_state_dict(self.model)
                if self.args.should_save:
                    self._save(output_dir or self.args.output_dir, state_dict=state_dict)
                return
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_whole(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_whole(cast(str, self.state.best_model_checkpoint))

    def _load_whole(self, folder: str) -> None:
        """Load a student that `_save_whole` saved.

        Raises:
            DataError: the file is missing, or belongs to another student.
        """
        path, student = Path(folder) / SAFE_WEIGHTS_NAME, self.student
        load: Any = type(student).from_pretrained
        try:
            with quiet_transformers():
                # The names in the file are those of published models, which transformers knows.
                loaded, found = load(
                    folder,
                    config=copy.deepcopy(student.config),
                    dtype=student.dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = textwrap.shorten(str(error), 300, placeholder=" …")
            raise DataError(f"{path} is not a checkpoint of this student: {reason}") from error
        state, own = loaded.state_dict(), student.state_dict().keys()
        # A student may lack the pooler that its class makes by default.
        wrong = (own - state.keys()) | (own & set(found["missing_keys"]))
        wrong |= set(found["unexpected_keys"]) | {name for name, *_ in found["mismatched_keys"]}
        if wrong:
            names = textwrap.shorten(", ".join(sorted(wrong)), 300, placeholder=" …")
            raise DataError(
                f"{path} is not a checkpoint of this student: missing, unknown or of another size "
                f"are {names}"
            )
        student.load_state_dict({name: state[name] for name in own})


def _save_whole(
    student: PreTrainedModel,
    prefix: str,
    dtype: torch.dtype,
    folder: str,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Save the full student in `dtype`.

    `state_dict` has the view's weights if they were gathered from ranks or engines; they replace
    the student's own.
    """
    trained = {f"{prefix}{name}": tensor for name, tensor in (state_dict or {}).items()}
    whole = {name: tensor.to(dtype) for name, tensor in {**student.state_dict(), **trained}.items()}
    student.save_pretrained(folder, state_dict=whole, **options)
    config = Path(folder) / "config.json"
    # transformers states the dtype that the parameters have now, which engines change.
    if (content := read_json(config)) is not None:
        write_json(config, content | {"dtype": str(dtype).removeprefix("torch.")})
    for path in Path(folder).glob("*.safetensors"):
        set_default_mode(path)


def _passed_on(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs besides ids and mask; no token type ids if a model has only one type."""
    # RoBERTa has one type: ids of a second type, from another tokenizer, would be out of range.
    without = set() if takes_token_types(config) else {"token_type_ids"}
    return {name: inputs[name] for name in PASSED_ON if name in inputs and name not in without}


@contextmanager
def _built_whole(args: TrainingArguments) -> Iterator[None]:
    """Make transformers build unpartitioned models, even if ZeRO-3 is configured.

    A model partitioned by ZeRO-3 can be neither cut nor captured.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def _check_models(
    teacher: PreTrainedModel, student: PreTrainedModel, args: MiniLMTrainingArguments
) -> None:
    _check_whole(teacher, "teacher_model")
    _check_whole(student, "model")
    first, second = base_encoder(teacher).config, base_encoder(student).config
    with named(layer="teacher_layer"):
        check_layer(args.teacher_layer, first.num_hidden_layers)
    with named(layer="student_layer"):
        check_layer(args.student_layer, second.num_hidden_layers)
    if args.student_layer < second.num_hidden_layers:
        raise ConfigError(
            f"student_layer={args.student_layer}, but the student has {second.num_hidden_layers} "
            "blocks, of which the later ones would not be trained; set student_layer to their "
            "number, or make the student with create_student"
        )
    widths = {"teacher": qkv_widths(first), "student": qkv_widths(second)}
    with named(num_heads="num_relation_heads", pairs="relations"):
        check_relation_heads(args.num_relation_heads, widths, args.pairs)
    if first.vocab_size != second.vocab_size:
        raise ConfigError(
            f"the teacher has {first.vocab_size} tokens, the student {second.vocab_size}: both "
            "read the same ids; make the student with create_student from this teacher"
        )
    for name, model in (("teacher_model", teacher), ("model", student)):
        with named(model=name):
            for key, tensor in model.state_dict().items():
                check_finite(key, tensor)


def _check_whole(model: PreTrainedModel, name: str) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            f"{name} was partitioned by ZeRO-3 when it was built, as transformers does once "
            "training arguments exist; load it before creating them, or make the student with "
            "create_student and give the teacher by name"
        )


def create_student(
    teacher: PreTrainedModel | str | Path,
    args: MiniLMTrainingArguments,
    use_teacher_weights: bool = False,
    cache_dir: str | Path | None = None,
) -> PreTrainedModel:
    """Return a student of the sizes in `args`: fp32, without pooler, with the teacher's dropout.

    Args:
        teacher: a model, or a folder or hub name.
        use_teacher_weights: cut the weights from the teacher's layers, evenly spaced up to
            `args.teacher_layer`, by whole heads; otherwise initialise them randomly from
            `args.seed`.
        cache_dir: where a teacher from the hub is kept (default: the hub's own cache folder).

    Raises:
        ConfigError: the architecture is not supported, the sizes do not fit it, or the teacher was
            partitioned by ZeRO-3 when it was built.
        DataError: the teacher cannot be loaded.
    """
    with _built_whole(args):
        if not isinstance(teacher, PreTrainedModel):
            with named(model=Field("teacher", str(teacher)), num_layers="teacher_layer"):
                folder = resolve_folder(teacher, None, WEIGHT_FILES, cache_dir=cache_dir)
                teacher = load_encoder(folder, num_layers=args.teacher_layer)
        _check_whole(teacher, "teacher")
        with named(**STUDENT_NAMES):
            config = student_config(
                base_encoder(teacher).config,
                num_layers=args.student_layer,
                hidden_size=args.student_hidden_size,
                num_attention_heads=args.student_attention_heads,
            )
            return build_student(
                teacher,
                config,
                init="teacher" if use_teacher_weights else "random",
                capture_layer=args.teacher_layer,
                seed=args.seed,
                dropout=None,
            )
