from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaledistill.config import DistillConfig, EngineSettings
from scaledistill.configfile import parse_config
from scaledistill.engines import parameter_groups
from scaledistill.engines.deepspeed_block import resolve_block
from scaledistill.errors import ConfigError


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage, **settings}}}


ON_HOST = {"device": "cpu"}
ENGINES: dict[str, dict[str, Any]] = {
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero1-offload": zero(1, offload_optimizer=ON_HOST),
    "zero2-offload": zero(2, offload_optimizer=ON_HOST),
    "zero3-offload": zero(3, offload_optimizer=ON_HOST, offload_param=ON_HOST),
    "fsdp": {"name": "fsdp"},
    "fsdp-offload": {"name": "fsdp", "fsdp": {"cpu_offload": True, "activation_checkpointing": True}},
}


def losses_of(trees: list[dict[str, Any]]) -> list[list[float]]:
    """Make a run's steps for each configuration in turn, in this rank; return the losses."""
    from scaledistill import doctor
    from scaledistill.data.stream import ShardStream
    from scaledistill.distributed import process_group
    from scaledistill.session import open_session
    from scaledistill.speed import Stopwatch
    from scaledistill.step import train_step

    losses = []
    with process_group(60) as ranks:
        for tree in trees:
            config = doctor.check(parse_config(tree), ranks.world_size, ranks.device).config
            session = open_session(config, ranks, resume=False)
            with session.stream() as stream:
                assert isinstance(stream, ShardStream)
                steps = [train_step(session, stream, lambda: None, Stopwatch()) for _ in range(config.train.max_steps)]
            losses.append([step.losses["loss"] for step in steps])
    return losses


@pytest.mark.parametrize(
    ("precision", "world_sizes", "first", "later"),
    [
        ("fp32", (1, 2), 1e-6, 1e-4),
        ("bf16", (2,), 1e-3, 1e-2),
        pytest.param("bf16", (1, 2), 1e-3, 1e-2, marks=pytest.mark.full),
    ],
)
def test_all_engines_agree(
    tmp_path: Path,
    tiny_teacher: Path,
    tiny_shards: Path,
    precision: str,
    world_sizes: tuple[int, ...],
    first: float,
    later: float,
) -> None:
    train = {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 5, "learning_rate": 1e-3}
    blocks: dict[str, Any] = {"train": {**train, "precision": precision}, "teacher": {"dtype": "fp32"}}
    trees = [tiny_tree(tmp_path, tiny_teacher, tiny_shards, engine=engine, **blocks) for engine in ENGINES.values()]
    runs = {
        (world_size, name): losses
        for world_size in world_sizes
        for name, losses in zip(ENGINES, run_ranks(losses_of, world_size, trees)[0], strict=True)
    }
    expected = runs[world_sizes[0], "zero1"]
    assert len(expected) == 5
    assert expected[-1] < expected[0]
    for which, losses in runs.items():
        assert losses[0] == pytest.approx(expected[0], rel=first), which
        assert losses == pytest.approx(expected, rel=later), which


class Collectives(TorchDispatchMode):
    """Notes each reduction over ranks: whether autograd was running, the dtype, the elements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: list[tuple[bool, torch.dtype, int]] = []
        self._in_autograd = False
        backward = torch.Tensor.backward

        def watched(*args: Any, **kwargs: Any) -> None:
            self._in_autograd = True
            backward(*args, **kwargs)
            self._in_autograd = False

        monkeypatch.setattr(torch.Tensor, "backward", watched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in str(func):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=torch.Tensor.numel)
            self.calls.append((self._in_autograd, largest.dtype, largest.numel()))
        return func(*args, **(kwargs or {}))


def gradient_collectives(trees: list[dict[str, Any]]) -> list[list[tuple[bool, torch.dtype, int]]]:
    """Return the collectives of one step of each configuration, those of single numbers left out."""
    from scaledistill import doctor
    from scaledistill.distributed import process_group
    from scaledistill.session import open_session
    from scaledistill.speed import Stopwatch
    from scaledistill.step import train_step

    found = []
    with process_group(60) as ranks:
        for tree in trees:
            config = doctor.check(parse_config(tree), ranks.world_size, ranks.device).config
            session = open_session(config, ranks, resume=False)
            with (
                pytest.MonkeyPatch.context() as monkeypatch,
                session.stream() as stream,
                Collectives(monkeypatch) as collectives,
            ):
                train_step(session, stream, lambda: None, Stopwatch())
            found.append([call for call in collectives.calls if call[2] > 5])  # losses and stop requests: 5 numbers
    return found


def test_gradients_travel_in_fp32_during_the_backward(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> None:
    """In two micro-batches of a bf16 student, under the default engine and the others."""
    train = {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 2, "precision": "bf16"}
    engines: dict[str, dict[str, Any]] = {
        "default": zero(2, reduce_bucket_size=1000),
        "zero3": zero(3, reduce_bucket_size=1000),
        "fsdp": {"name": "fsdp"},
        "zero1": zero(1, reduce_bucket_size=1000),
        "stated": {"deepspeed": {"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}},
    }
    assert EngineSettings().deepspeed == {"zero_optimization": {"stage": 2}}
    trees = [
        tiny_tree(tmp_path, tiny_teacher, tiny_shards, engine=engine, train=train, teacher={"dtype": "fp32"})
        for engine in engines.values()
    ]
    calls = dict(zip(engines, run_ranks(gradient_collectives, 2, trees)[0], strict=True))
    for name in ("default", "zero3", "fsdp", "zero1"):
        assert {dtype for _, dtype, _ in calls[name]} == {torch.float32}, name
    assert {dtype for _, dtype, _ in calls["stated"]} == {torch.bfloat16}
    for name in ("default", "zero3"):
        during = [number for in_autograd, _, number in calls[name] if in_autograd]
        after = [number for in_autograd, _, number in calls[name] if not in_autograd]
        assert len(during) > 2 * len(after), name
        assert len(after) == 2, name  # the last bucket of each micro-batch
    assert all(in_autograd for in_autograd, _, _ in calls["fsdp"])
    assert len(calls["fsdp"]) == 3  # two blocks and the embeddings, in the last micro-batch only
    assert [in_autograd for in_autograd, _, _ in calls["zero1"]] == [False]


def block_of(**deepspeed: Any) -> DistillConfig:
    return parse_config(
        {
            "run": {"folder": "r"},
            "teacher": {"model": "m", "layer": 1},
            "students": {"s": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}},
            "relations": {"num_heads": 1},
            "data": {"train": "t", "sequence_length": 8},
            "train": {
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "max_steps": 1,
                "learning_rate": 1.0,
                "precision": "bf16",
            },
            "engine": {"deepspeed": {"zero_optimization": {"stage": 2}, **deepspeed}},
        }
    )


def test_what_deepspeed_would_guess_is_written_out() -> None:
    given = block_of(bf16={"enabled": "auto"}, zero_optimization={"stage": 3, "reduce_bucket_size": "auto"})
    before = copy.deepcopy(given.engine.deepspeed)
    block = resolve_block(given, world_size=2)
    assert block["bf16"]["enabled"] is True
    assert block["fp16"]["enabled"] is False
    assert block["communication_data_type"] == "fp32"
    assert block["gradient_clipping"] == 1.0
    assert block["zero_optimization"]["reduce_bucket_size"] == 64
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [block[size] for size in sizes] == [8, 2, 2]
    assert given.engine.deepspeed == before


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"zero_optimisation": {}},
            r"engine\.deepspeed\.zero_optimisation: unknown key; did you mean 'zero_optimization'",
        ),
        (
            {"train_batch_size": 8},
            r"engine\.deepspeed\.train_batch_size: not allowed here; set train\.global_batch_size",
        ),
        ({"gradient_accumulation_steps": 8}, r"gradient_accumulation_steps: not allowed here; it follows from"),
        ({"optimizer": {}}, r"engine\.deepspeed\.optimizer: not allowed here; the optimizer is AdamW"),
        ({"scheduler": {}}, r"engine\.deepspeed\.scheduler: not allowed here; the learning rate is a function"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage: found 0, expected 1, 2 or 3"),
        ({"zero_optimization": {}}, r"zero_optimization\.stage: found None, expected 1, 2 or 3"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping: found 0\.5, expected 1\.0 by train\.max_grad_norm"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled: found True, expected False by train\.precision"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_sise": 1000}},
            r"zero_optimization\.reduce_bucket_sise: unknown key; did you mean 'reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"devic": "cpu"}}},
            r"offload_optimizer\.devic: unknown key; did you mean 'device'",
        ),
        ({"bf16": {"check_grad_overflow": False}}, r"bf16\.check_grad_overflow: found False, expected True"),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            r"zero_optimization\.compute_grad_norm: found False, expected True",
        ),
        ({"bf16": True}, r"engine\.deepspeed\.bf16: found True, expected a block"),
        (
            {"communication_data_type": "fp64"},
            r"communication_data_type: found 'fp64', expected 'fp32', 'bf16' or 'fp16'; remove it to take 'fp32'",
        ),
        ({"communication_data_type": "auto"}, r"communication_data_type='auto': DeepSpeed does not resolve it"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            r"offload_param\.device='cpu' needs zero_optimization\.stage=3, found 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.device: found 'nvme', expected 'cpu' or 'none'",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "large"}},
            r"reduce_bucket_size: found 'large', expected a number of elements",
        ),
    ],
)
def test_bad_blocks_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_block(block_of(**block), world_size=1)


def wrong_zero_value(tree: dict[str, Any]) -> str:
    try:
        losses_of([tree])
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_deepspeed_s_own_check_is_a_config_error(tmp_path, tiny_teacher, tiny_shards) -> None:
    zero = {"stage": 1, "allgather_bucket_size": "large"}
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, engine={"deepspeed": {"zero_optimization": zero}})
    [message] = run_ranks(wrong_zero_value, 1, tree)
    assert message.startswith(
        "engine.deepspeed.zero_optimization.allgather_bucket_size: Input should be a valid integer"
    )


def test_the_loss_scaler_s_state_is_json() -> None:
    import json

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from scaledistill.engines.deepspeed import scaler_state

    settings = {"scale_window": 1000, "min_scale": 1.0, "delayed_shift": 2, "consecutive_hysteresis": False}
    scaler = DynamicLossScaler(init_scale=2.0**16, **settings)
    scaler.cur_iter, scaler.last_overflow_iter = 7, 5
    state = json.loads(json.dumps(scaler_state(scaler)))
    assert state == {"cur_scale": 2.0**16, "cur_iter": 7, "last_overflow_iter": 5, "cur_hysteresis": 2}


def test_the_known_zero_keys_are_deepspeed_s() -> None:
    from deepspeed.runtime.zero import config, offload_config

    from scaledistill.engines import deepspeed_block

    def names(model: Any) -> list[str]:
        return sorted({field.alias or name for name, field in model.model_fields.items()})

    assert sorted(deepspeed_block.ZERO_KEYS) == names(config.DeepSpeedZeroConfig)
    offload = deepspeed_block.OFFLOAD_KEYS
    assert sorted(offload["optimizer"]) == names(offload_config.DeepSpeedZeroOffloadOptimizerConfig)
    assert sorted(offload["param"]) == names(offload_config.DeepSpeedZeroOffloadParamConfig)


def test_vectors_are_exempt_from_weight_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, exempt = parameter_groups(module, 0.01)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert [p.shape for p in exempt["params"]] == [(4,), (4,), (4,)]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    counted = sum(p.numel() for p in itertools.chain(decayed["params"], exempt["params"]))
    assert counted == sum(p.numel() for p in module.parameters())
