"""The Trainer with bertdistiller's names: the same losses, the same scripts, and the Trainer's own
ways of running.
"""

from __future__ import annotations

import copy
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES
from encoders import NAMES, tiny_config
from ranks import free_port, run_ranks
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, TrainerCallback

from scaledistill import (
    MiniLMTrainer,
    MiniLMTrainingArguments,
    create_student,
    prepare_dataset,
    relation_loss,
)
from scaledistill.errors import ConfigError, DataError
from scaledistill.integrations.transformers import _passed_on, _save_whole, named_relations
from scaledistill.models.architectures import build_encoder
from scaledistill.models.view import capture_qkv

PEER = Path(__file__).parent / "peer"
RECORDED = PEER / "bertdistiller-0.1.1"
sys.path.append(str(PEER))
import record  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning",
    "ignore:'pin_memory' argument:UserWarning",
    "ignore:.*lr_scheduler.step.*before.*optimizer.step:UserWarning",
)


def arguments(folder: Path, **changes: Any) -> MiniLMTrainingArguments:
    """Return the arguments of the recorded run, with changes, that write into `folder`."""
    return MiniLMTrainingArguments(
        **{
            **record.ARGUMENTS,
            "relations": record.RELATIONS,
            "output_dir": str(folder),
            "save_strategy": "no",
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evaluation_strategy", "evaluation_strategy: use eval_strategy$"),
        ("group_by_length", 'group_by_length: use train_sampling_strategy="group_by_length"$'),
        ("student_layers", "student_layers: it is unknown; did you mean student_layer\\?$"),
    ],
)
def test_arguments_that_do_not_exist(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^MiniLMTrainingArguments: {message}"):
        arguments(tmp_path, **{name: True})


def test_arguments_of_a_subclass(tmp_path: Path) -> None:
    class Mine(MiniLMTrainingArguments):
        def __init__(self, *, alpha: float = 0.5, **named_values: Any) -> None:
            super().__init__(**named_values)
            self.alpha = alpha

    known = {**record.ARGUMENTS, "output_dir": str(tmp_path)}
    assert Mine(alpha=0.3, **known).alpha == 0.3
    assert copy.deepcopy(Mine(**known)).alpha == 0.5


def models() -> tuple[BertModel, BertModel]:
    """Return the recorded teacher and student."""
    return BertModel.from_pretrained(RECORDED / "teacher"), BertModel.from_pretrained(
        RECORDED / "student"
    )


def train(folder: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Train the recorded student; return its losses, its weights at the end, and what evaluating it
    then gives.
    """
    teacher, student = models()
    trainer = MiniLMTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(folder, logging_steps=1, per_device_eval_batch_size=6, **changes),
        train_dataset=record.examples(),
        # Trainer's mean over ranks is exact where batches are full.
        eval_dataset=record.examples()[:12],
        data_collator=record.collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "saved"))
    # To another process.
    weights = {name: tensor.numpy().copy() for name, tensor in student.state_dict().items()}
    return {
        "losses": losses,
        "weights": weights,
        "evaluated": evaluated,
        "gradients": gradients_of(student),
    }


def gradients_of(student: torch.nn.Module) -> list[str]:
    return [name for name, parameter in student.named_parameters() if parameter.grad is not None]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(train, 1, folder)[0] | {"folder": folder}


def test_the_same_losses_as_bertdistiller(tmp_path: Path) -> None:
    teacher, student = models()
    found = record.losses_of(MiniLMTrainer, arguments(tmp_path), teacher, student)
    expected = json.loads((RECORDED / "losses.json").read_text())["losses"]
    assert len(found) == record.STEPS
    assert found == pytest.approx(expected, abs=1e-5, rel=0)


def test_the_quick_start_of_bertdistiller(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, trainer

    class StopEarly(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 1

    monkeypatch.chdir(tmp_path)
    folder = Path("google-bert/bert-base-uncased")  # a hub name, and here a folder
    sizes = {
        "vocab_size": 200,
        "hidden_size": 48,
        "num_attention_heads": 12,
        "intermediate_size": 48,
    }
    BertModel(
        BertConfig(**sizes, num_hidden_layers=12, max_position_embeddings=32)
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, StopEarly])
    script = runpy.run_path(str(PEER / "quickstart.py"))
    assert script["trainer"].state.global_step == 1
    student = AutoModel.from_pretrained("distilled-model")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (6, 384)
    trained = script["student"].state_dict()
    assert all(
        torch.equal(trained[name], tensor)
        for name, tensor in student.state_dict().items()
        if name in trained
    )


def test_evaluation_is_the_relation_loss_without_gradient(tmp_path: Path) -> None:
    teacher, student = models()
    trainer = MiniLMTrainer(
        model=student,
        teacher_model=str(RECORDED / "teacher"),
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=record.examples()[:10],
        data_collator=record.collate,
    )
    losses = []
    for row in record.examples()[:10]:
        inputs = record.collate([row])
        pair = [
            capture_qkv(model.eval(), layer, **inputs)
            for model, layer in ((teacher, 3), (student, 2))
        ]
        pairs = {"qq": 1.0, "kk": 0.5, "qv": 2.0}
        losses.append(
            relation_loss(
                *pair, num_heads=6, pairs=pairs, mask_BT=inputs["attention_mask"]
            ).total.item()
        )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)
    assert not gradients_of(student)
    loss, found = trainer.compute_loss(
        trainer.model, record.collate(record.examples()[:3]), return_outputs=True
    )
    assert loss.requires_grad
    assert found.q.shape[-1] == 12


def test_padding_may_stand_anywhere(tmp_path: Path) -> None:
    teacher, student = models()
    trainer = MiniLMTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path))
    rows = record.collate(record.examples()[:5])
    positions = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = trainer.compute_loss(trainer.model.eval(), rows | {"position_ids": positions})
    order = rows["attention_mask"].argsort(dim=1, stable=True)  # padding first
    shifted = {
        name: tensor.gather(1, order)
        for name, tensor in (rows | {"position_ids": positions}).items()
    }
    assert not torch.equal(shifted["input_ids"], rows["input_ids"])
    found = trainer.compute_loss(trainer.model, shifted | {"labels": torch.zeros(5)})
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_student_is_trained_in_place_and_saved_whole(one_process: dict[str, Any]) -> None:
    before, after = models()[1].state_dict(), weights_of(one_process)
    saved = load_file(one_process["folder"] / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], after[name]) for name in after)
    _, info = AutoModel.from_pretrained(one_process["folder"] / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    above = {
        name
        for name in after
        if name.startswith(("pooler", "encoder.layer.1")) and ".self." not in name
    }
    assert above <= unchanged
    assert unchanged - above <= {"embeddings.position_ids", "embeddings.token_type_ids"}
    assert one_process["losses"][-1] < one_process["losses"][0]


def test_a_resumed_run_ends_the_same(one_process: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(stop_and_go_on, 1, tmp_path)
    assert torch.equal(
        load_file(tmp_path / "saved" / "model.safetensors")["encoder.layer.0.output.dense.weight"],
        weights_of(one_process)["encoder.layer.0.output.dense.weight"],
    )
    _, info = AutoModel.from_pretrained(tmp_path / "checkpoint-10", output_loading_info=True)
    assert not info["missing_keys"]


def stop_and_go_on(folder: Path) -> None:
    """Train to step 10, lose the process's student, and go on to the end from the checkpoint."""

    class StopEarly(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = control.should_save = state.global_step == 10

    from transformers import trainer

    trainer.DEFAULT_CALLBACKS.append(StopEarly)
    first = train(folder)
    trainer.DEFAULT_CALLBACKS.remove(StopEarly)
    second = train(folder, resume=True)
    assert len(first["losses"]) == 10
    assert len(second["losses"]) == record.STEPS


def test_accumulation_is_a_mean(one_process: dict[str, Any], tmp_path: Path) -> None:
    [found] = run_ranks(train_in_parts, 1, tmp_path)
    assert found["losses"] == pytest.approx(one_process["losses"], abs=1e-3)
    difference = weights_apart(found, one_process)
    assert difference < 1e-5


def train_in_parts(folder: Path) -> dict[str, Any]:
    return train(folder, per_device_train_batch_size=3, gradient_accumulation_steps=2)


def weights_of(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in result["weights"].items()}


def weights_apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    # What shifts all scores of a row alike has rounding for a gradient: the first block's key bias,
    # and v's in "qv".
    shifts = ("layer.0.attention.self.key.bias", "layer.1.attention.self.value.bias")
    names = [name for name in expected["weights"] if not name.endswith(shifts)]
    ours, theirs = weights_of(found), weights_of(expected)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in names)


ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # Trainer's own: DeepSpeed's decays biases and LayerNorms too.
    "zero_allow_untested_optimizer": True,
}


def train_ranked(folder: Path, how: str) -> dict[str, Any]:
    changes: dict[str, Any] = {"per_device_train_batch_size": record.BATCH // 2}
    if how.startswith("zero"):
        import deepspeed

        # As in our engine: compiling this operator takes a minute, and more on a busy machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        stage = {"stage": int(how[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        changes["deepspeed"] = {**ZERO, "zero_optimization": stage}
    if how.startswith("fsdp"):
        changes |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True}}
    if how == "fsdp-sharded":
        changes["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
    return train(folder, **changes)


@pytest.mark.parametrize(
    "how",
    [
        "ddp",
        "zero2",
        pytest.param("zero3", marks=pytest.mark.full),
        pytest.param("fsdp", marks=pytest.mark.full),
        pytest.param("fsdp-sharded", marks=pytest.mark.full),
    ],
)
def test_two_ranks_equal_one_process(one_process: dict[str, Any], tmp_path: Path, how: str) -> None:
    results = run_ranks(train_ranked, 2, tmp_path, how)
    assert results[0]["losses"] == pytest.approx(one_process["losses"], abs=1e-3)
    assert results[0]["evaluated"] == pytest.approx(one_process["evaluated"], rel=1e-4)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == one_process["weights"].keys()
    assert (
        weights_apart(
            {"weights": {name: tensor.numpy() for name, tensor in saved.items()}}, one_process
        )
        < 1e-5
    )


@pytest.mark.full
def test_under_torchrun(one_process: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    paths = [str(Path(__file__).parent), str(PEER)]
    script.write_text(
        f"import sys\nsys.path += {paths!r}\nfrom pathlib import Path\nimport test_trainer\n"
        f"test_trainer.train_ranked(Path({str(tmp_path)!r}), 'ddp')\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert (
        weights_apart(
            {"weights": {name: tensor.numpy() for name, tensor in saved.items()}}, one_process
        )
        < 1e-5
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"qq": 1.0, "kk": 1.0, "vv": 1.0}),
        ({(1, 1): 1.0, (2, 3): 0.5}, {"qq": 1.0, "kv": 0.5}),
        ({"qk": 2}, {"qk": 2.0}),
        (["vv", "kk"], {"vv": 1.0, "kk": 1.0}),
    ],
)
def test_relations(given: Any, expected: dict[str, float], tmp_path: Path) -> None:
    assert named_relations(given) == expected
    made = arguments(tmp_path, relations=given)
    assert made.pairs == expected
    assert json.loads(made.to_json_string())["relations"] == expected


def test_mistakes(tmp_path: Path) -> None:
    for relations, message in (
        ({(1, 4): 1.0}, "relations has 'q4'; a pair is two of"),
        ({"qq": -1.0}, r"relations.qq=-1.0; a weight is a finite number, 0 or more"),
        (7, "relations=7; expected weights of pairs"),
        ([], "relations is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            arguments(tmp_path, relations=relations)
    teacher, student = models()
    for change, message in (
        ({"teacher_layer": 5}, "teacher_layer=5 is beyond the model's 4 layers; use 1 to 4"),
        ({"student_layer": 3}, "student_layer=3 is beyond the model's 2 layers"),
        ({"student_layer": 1}, "student_layer=1, but the student has 2 blocks, of which the later"),
        ({"num_relation_heads": 8}, "num_relation_heads=8 does not divide the student's width 12"),
    ):
        with pytest.raises(ConfigError, match=message):
            MiniLMTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path, **change))
    for name in ("compute_loss_func", "compute_metrics"):
        unused: dict[str, Any] = {name: print}
        with pytest.raises(ConfigError, match=f"^{name} is not used: the loss is that of the"):
            MiniLMTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path), **unused)
    with pytest.raises(ConfigError, match="needs model, the student, and args"):
        MiniLMTrainer(teacher_model=teacher)
    other = BertModel(
        BertConfig(vocab_size=61, hidden_size=12, num_attention_heads=2, num_hidden_layers=2)
    )
    with pytest.raises(
        ConfigError, match="the teacher has 60 tokens, the student 61: both read the same ids"
    ):
        MiniLMTrainer(model=other, teacher_model=teacher, args=arguments(tmp_path))


@pytest.mark.parametrize("which", ["teacher_model", "model"])
def test_weights_that_are_not_finite(which: str, tmp_path: Path) -> None:
    teacher, student = models()
    broken = teacher if which == "teacher_model" else student
    name, weight = next(
        (name, weight) for name, weight in broken.named_parameters() if "query.weight" in name
    )
    weight.data[0, 0] = float("nan")
    with pytest.raises(
        DataError, match=f"^{which}: its weight {name} has values that are not finite"
    ):
        MiniLMTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path))


def test_create_student(tmp_path: Path) -> None:
    teacher, _ = models()
    made = arguments(tmp_path, student_hidden_size=8)
    by_name, by_model = (
        create_student(one, made, use_teacher_weights=True)
        for one in (RECORDED / "teacher", teacher)
    )
    assert all(map(torch.equal, by_name.state_dict().values(), by_model.state_dict().values()))
    assert torch.equal(
        by_name.state_dict()["embeddings.word_embeddings.weight"],
        teacher.state_dict()["embeddings.word_embeddings.weight"][:, :8],
    )
    teacher.config.hidden_dropout_prob = 0.3
    student = create_student(teacher, made)
    assert student.training
    assert student.embeddings.dropout.p == 0.3
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 32)
    with pytest.raises(
        ConfigError,
        match=r"student's intermediate_size=48 is more than .* use_teacher_weights=False",
    ):
        create_student(teacher, arguments(tmp_path), use_teacher_weights=True)


def test_messages_name_the_arguments(tmp_path: Path) -> None:
    teacher, student = models()
    for change, message in (
        (
            {"student_attention_heads": 5},
            "^student_attention_heads=5 does not divide student_hidden_size=8; use 2 or 4$",
        ),
        (
            {"student_layer": 5},
            "^student_layer=5 is more than the 3 teacher layers .*, or use_teacher_weights=False$",
        ),
    ):
        made = arguments(tmp_path, **{"student_hidden_size": 8, "teacher_layer": 3} | change)
        with pytest.raises(ConfigError, match=message):
            create_student(teacher, made, use_teacher_weights="student_layer" in change)
    missing = r"='\./no/model': no such folder"
    with pytest.raises(DataError, match=f"^teacher{missing}"):
        create_student("./no/model", arguments(tmp_path))
    with pytest.raises(DataError, match=f"^teacher_model{missing}"):
        MiniLMTrainer(model=student, teacher_model="./no/model", args=arguments(tmp_path))
    trainer = MiniLMTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(tmp_path, relation_backend="flash"),
    )
    with pytest.raises(ConfigError, match=r"^relation_backend='flash'; expected auto, ref"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})


def task_model() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=60,
        hidden_size=12,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=8,
    )
    return BertForMaskedLM(config)


def train_task_model(
    folder: Path, student: BertForMaskedLM, resume: Path | None = None, **changes: Any
) -> MiniLMTrainer:
    trainer = MiniLMTrainer(
        model=student,
        teacher_model=models()[0],
        args=arguments(folder, **{"max_steps": 2, "warmup_steps": 0, **changes}),
        train_dataset=record.examples()[:24],
        eval_dataset=record.examples()[:6],
        data_collator=record.collate,
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())


def test_create_student_takes_the_hub_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["cache_dir"]))
        return str(RECORDED / "teacher")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    args = arguments(tmp_path)
    student = create_student("some-org/some-model", args, cache_dir=".cache")
    assert asked == [("some-org/some-model", ".cache")]
    assert student.config.hidden_size == args.student_hidden_size


def test_a_task_model_is_saved_with_its_head(tmp_path: Path) -> None:
    student = task_model()
    before = copy.deepcopy(student)
    train_task_model(tmp_path, student).save_model(str(tmp_path / "saved"))
    assert equal(BertForMaskedLM.from_pretrained(tmp_path / "saved"), student)
    assert not torch.equal(
        student.bert.embeddings.word_embeddings.weight,
        before.bert.embeddings.word_embeddings.weight,
    )


def test_a_checkpoint_gives_back_the_whole_student(tmp_path: Path) -> None:
    first, second, third = task_model(), task_model(), task_model()
    assert not torch.equal(
        first.cls.predictions.transform.dense.weight, second.cls.predictions.transform.dense.weight
    )
    train_task_model(tmp_path, first, max_steps=3, save_strategy="steps", save_steps=2)
    train_task_model(
        tmp_path / "again", second, resume=tmp_path / "checkpoint-2", max_steps=3, save_steps=2
    )
    assert equal(first, second)
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # The first.
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    train_task_model(tmp_path / "best", third, **saving, **best)
    assert equal(third, BertForMaskedLM.from_pretrained(tmp_path / "best" / "checkpoint-1"))
    assert not equal(third, BertForMaskedLM.from_pretrained(tmp_path / "best" / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(
        (RECORDED / "student" / "model.safetensors").read_bytes()
    )
    with pytest.raises(
        DataError,
        match=r"model\.safetensors is not a checkpoint of this student: .*bert\.embeddings",
    ):
        train_task_model(tmp_path, task_model(), resume=tmp_path / "checkpoint-2", save_steps=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_every_architecture(name: str, tmp_path: Path) -> None:
    """transformers saves some under the names of their published weights."""
    config = tiny_config(name, ENCODER_SIZES)
    saved, other = build_encoder(config), build_encoder(config)
    saved.half().config.dtype = torch.float16  # as an engine may leave it
    _save_whole(saved, "", torch.float32, str(tmp_path))
    trainer: Any = SimpleNamespace(student=other)
    MiniLMTrainer._load_whole(trainer, str(tmp_path))
    expected = {name: tensor.float() for name, tensor in saved.state_dict().items()}
    assert all(torch.equal(expected[name], each) for name, each in other.state_dict().items())
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_teacher_stored_in_16_bits_runs_in_fp32(stored: torch.dtype, tmp_path: Path) -> None:
    teacher, student = models()
    args = arguments(tmp_path)
    trainer = MiniLMTrainer(model=student, teacher_model=teacher.to(stored), args=args)
    assert {each.dtype for each in trainer.teacher.parameters()} == {torch.float32}
    kept = MiniLMTrainer(
        model=models()[1],
        teacher_model=models()[0].to(stored),
        args=arguments(tmp_path, bf16=True),
    )
    expected = torch.bfloat16 if stored == torch.bfloat16 else torch.float32
    assert {each.dtype for each in kept.teacher.parameters()} == {expected}


@pytest.mark.parametrize("launched", [False, True])
def test_the_teacher_runs_in_the_precision_of_the_training(
    launched: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of `accelerate launch --mixed_precision bf16`, too."""
    teacher, student = models()
    exact = MiniLMTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path))
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    stated = {} if launched else {"bf16": True}
    mixed = MiniLMTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path, **stated))
    assert ("bf16=True on a CPU" in caplog.text) == (mixed.args.device.type == "cpu")
    wrapped = mixed.accelerator.prepare(mixed.model)
    rows = record.collate(record.examples()[:6])
    expected = exact.compute_loss(exact.model.eval(), rows)
    dtypes = []
    mixed.teacher.module.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    found, qkv = mixed.compute_loss(wrapped.eval(), rows, return_outputs=True)
    assert dtypes == [torch.bfloat16]
    assert qkv.q.dtype == torch.bfloat16
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


@pytest.mark.full
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_models_made_after_the_arguments_and_bf16(tmp_path: Path, how: str) -> None:
    [expected] = run_ranks(train_in_documented_order, 1, tmp_path / "one", "one")
    results = run_ranks(train_in_documented_order, 2, tmp_path / "two", how)
    assert results[0]["losses"] == pytest.approx(expected["losses"], rel=0.05)
    saved = load_file(tmp_path / "two" / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert AutoModel.from_pretrained(tmp_path / "two" / "saved").dtype == torch.float32
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected["shapes"]
    if how == "zero3":
        assert results[0]["refused"] == "model"


def train_in_documented_order(folder: Path, how: str) -> dict[str, Any]:
    """Arguments, then the student, then the trainer with the teacher's name."""
    changes: dict[str, Any] = {
        "max_steps": 3,
        "warmup_steps": 0,
        "student_hidden_size": 8,
        "num_relation_heads": 4,
    }
    if how != "one":
        stage = {"stage": int(how[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        stage |= {"stage3_param_persistence_threshold": 0} if how == "zero3" else {}
        changes["deepspeed"] = {**ZERO, "bf16": {"enabled": "auto"}, "zero_optimization": stage}
        changes |= {"per_device_train_batch_size": record.BATCH // 2, "bf16": True}
    args = arguments(folder, logging_steps=1, **changes)
    student = create_student(RECORDED / "teacher", args, use_teacher_weights=True)
    options: dict[str, Any] = {"teacher_model": str(RECORDED / "teacher"), "args": args}
    options |= {"train_dataset": record.examples(), "data_collator": record.collate}
    trainer = MiniLMTrainer(model=student, **options)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    refused = ""
    if how == "zero3":
        try:
            MiniLMTrainer(model=AutoModel.from_pretrained(RECORDED / "student"), **options)
        except ConfigError as error:
            refused = str(error).partition(" was partitioned")[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "shapes": shapes, "refused": refused}


def test_prepare_dataset(tiny_teacher: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, BertTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    texts = Dataset.from_dict({"text": ["w001 w002", "w003 " * 30], "number": [1, 2]})
    others = Dataset.from_dict({"words": [["w004", "w005"]]})
    rows = prepare_dataset([texts, (others, "words")], tokenizer, max_seq_len=8)
    assert sorted(map(len, rows["input_ids"])) == [4, 4, 8]
    assert isinstance(rows[0]["input_ids"], torch.Tensor)
    assert set(rows.column_names) >= {"input_ids", "attention_mask"}
    with pytest.raises(
        ConfigError, match="column 'body' is not in the data set; it has text, number"
    ):
        prepare_dataset([(texts, "body")], tokenizer, max_seq_len=8)
    empty = BertTokenizer()  # what transformers makes of a folder without tokenizer files
    with pytest.raises(
        DataError,
        match=r"has no tokens but .*: its files were missing when it was loaded; copy them",
    ):
        prepare_dataset([texts], empty, max_seq_len=8)
    with pytest.raises(DataError, match=r"column 'text' has rows without text \(None\)"):
        prepare_dataset([Dataset.from_dict({"text": ["w001", None]})], tokenizer, max_seq_len=8)


def test_prepare_dataset_takes_the_tokenizer_s_own_options(tiny_teacher: Path) -> None:
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    texts = Dataset.from_dict({"text": ["w001 w002", "w003 " * 30]})

    def lengths(data: Any, **options: Any) -> list[int]:
        return sorted(
            map(
                len, prepare_dataset([data], tokenizer, 8, tokenization_kwargs=options)["input_ids"]
            )
        )

    assert lengths(texts, truncation="longest_first", max_length=8) == [4, 8]
    assert lengths(texts, truncation=False) == [4, 32]
    assert lengths(texts, padding="max_length") == [8, 8]
    assert lengths(DatasetDict(train=texts)) == [4, 8]  # load_dataset without split


def test_prepare_dataset_says_what_it_cannot_use(tiny_teacher: Path) -> None:
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    texts = Dataset.from_dict({"text": ["w001 w002"], "number": [5], "numbers": [[1, 2]]})

    def refused(data: Any, message: str, length: Any = 8, **options: Any) -> None:
        with pytest.raises((ConfigError, DataError), match=message):
            prepare_dataset(data, tokenizer, length, tokenization_kwargs=options)

    refused(
        [texts],
        "max_seq_len=8, but tokenization_kwargs has max_length=16; give the length as max_seq_len",
        max_length=16,
    )
    refused(
        [texts],
        "return_tensors='pt', but rows differ in length here; leave it out",
        return_tensors="pt",
    )
    refused(
        [DatasetDict(train=texts, test=texts)],
        r"the splits train, test; give one of them, such as data\['train'\]",
    )
    refused(
        [texts.to_iterable_dataset()],
        "a streamed data set.*scaledistill shards make --dataset NAME",
    )
    refused(texts, r"datasets is a Dataset; expected a list of data sets: write datasets=\[data\]")
    refused([], "datasets is empty")
    refused([["w001"]], "datasets has a list; expected datasets.Dataset objects")
    refused(
        [(texts, "number")], r"column 'number' holds int \(5\); expected text, or lists of texts"
    )
    refused([(texts, "numbers")], r"column 'numbers' holds list \(\[1, 2\]\); expected text")
    for length in (2, 0, 8.0, True):
        refused(
            [texts],
            f"max_seq_len={length!r}; expected a whole number above the 2 special tokens",
            length=length,
        )


def test_batches_without_a_mask(tmp_path: Path) -> None:
    teacher, student = models()
    trainer = MiniLMTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path))
    trainer.model.eval()
    ids = torch.arange(5, 29).view(2, 12)
    whole = trainer.compute_loss(
        trainer.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    assert trainer.compute_loss(trainer.model, {"input_ids": ids}).item() == pytest.approx(
        whole.item(), rel=1e-6
    )
    ids[0, -1] = student.config.pad_token_id
    with pytest.raises(
        ConfigError,
        match=r"no attention_mask, but their input_ids hold the padding token 0; use a data_c",
    ):
        trainer.compute_loss(trainer.model, {"input_ids": ids})
    with pytest.raises(
        ConfigError, match="batches have no input_ids, only labels, text; tokenise the data set"
    ):
        trainer.compute_loss(trainer.model, {"labels": ids, "text": ids})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_ratio": 0.25, "warmup_steps": 7}, 7),
        ({"warmup_ratio": 1.0}, 100),
        ({"warmup_ratio": 0.0}, 0),
        ({}, 0),
    ],
)
def test_warmup_ratio_means_what_it_did(
    tmp_path: Path, settings: dict[str, float], expected: int
) -> None:
    assert arguments(tmp_path, **{"warmup_steps": 0, **settings}).get_warmup_steps(100) == expected


def test_a_warmup_ratio_of_steps(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"warmup_ratio=4000; expected a share of the steps from 0 to 1.*use warmup_steps",
    ):
        arguments(tmp_path, warmup_ratio=4000)


@pytest.mark.parametrize(("types", "given"), [(2, True), (1, False), (0, False), (None, True)])
def test_token_type_ids_are_for_models_with_several_types(types: int | None, given: bool) -> None:
    config = BertConfig(type_vocab_size=2)
    if types is None:
        del config.type_vocab_size
    else:
        config.type_vocab_size = types
    found = _passed_on(config, {"input_ids": 1, "token_type_ids": 2, "position_ids": 3})
    assert found == {"position_ids": 3} | ({"token_type_ids": 2} if given else {})


@pytest.mark.full
def test_bertdistiller_beside_us(tmp_path: Path) -> None:
    sys.path.append(str(Path(__file__).parent.parent / "tools" / "bench"))
    from peer import PeerError, default_environment, ready_python

    try:
        python = ready_python(default_environment())
    except PeerError as error:
        pytest.skip(f"bertdistiller cannot be had here: {error}")
    subprocess.run([python, PEER / "record.py", tmp_path], check=True, capture_output=True)
    teacher, student = (
        BertModel.from_pretrained(tmp_path / name) for name in ("teacher", "student")
    )
    found = record.losses_of(MiniLMTrainer, arguments(tmp_path / "ours"), teacher, student)
    expected = json.loads((tmp_path / "losses.json").read_text())["losses"]
    assert math.isfinite(sum(expected))
    assert found == pytest.approx(expected, abs=1e-5, rel=0)
