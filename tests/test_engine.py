from __future__ import annotations

import copy
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaledistill.config.load import parse_config
from scaledistill.config.resolved import ResolvedRun
from scaledistill.config.schema import DistillConfig, EngineSettings
from scaledistill.engines import parameter_groups
from scaledistill.engines.deepspeed import resolve_block
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
    "fsdp-offload": {
        "name": "fsdp",
        "fsdp": {"cpu_offload": True, "activation_checkpointing": True},
    },
}


def losses_of(trees: list[dict[str, Any]]) -> list[list[float]]:
    """Make a run's steps for each configuration in turn, in this rank; return the losses."""
    from scaledistill.data.stream import ShardStream
    from scaledistill.distributed.ranks import process_group
    from scaledistill.metrics.stopwatch import Stopwatch
    from scaledistill.preflight import checks
    from scaledistill.training.session import open_session
    from scaledistill.training.step import train_step

    losses = []
    with process_group(60) as ranks:
        for tree in trees:
            run = checks.plan_run(parse_config(tree), ranks.world_size, ranks.device).run
            session = open_session(run, ranks, resume=False)
            with session.stream() as stream:
                assert isinstance(stream, ShardStream)
                steps = [
                    train_step(session, stream, lambda: None, Stopwatch())
                    for _ in range(run.config.train.max_steps)
                ]
            losses.append([step.loss for step in steps])
    return losses


@pytest.mark.parametrize(
    ("precision", "world_sizes", "first", "later"),
    [
        ("fp32", (1, 2), 1e-6, 1e-4),
        pytest.param("bf16", (2,), 1e-3, 1e-2, marks=pytest.mark.full),
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
    blocks: dict[str, Any] = {
        "train": {**train, "precision": precision},
        "teacher": {"dtype": "fp32"},
    }
    trees = [
        tiny_tree(tmp_path, tiny_teacher, tiny_shards, engine=engine, **blocks)
        for engine in ENGINES.values()
    ]
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


def timeouts_of_groups(tree: dict[str, Any], timeout_seconds: int) -> list[float]:
    """Return the timeouts of all process groups that stand in a run, in seconds."""
    import torch.distributed as dist

    from scaledistill.distributed.ranks import gather_objects, process_group
    from scaledistill.preflight import checks
    from scaledistill.training.session import open_session

    with process_group(timeout_seconds) as ranks:
        open_session(checks.plan_run(parse_config(tree), 2, ranks.device).run, ranks, resume=False)
        dist.new_group([0, 1])
        groups = [group._get_backend(ranks.device) for group in dist.distributed_c10d._world.pg_map]
        seconds = [group.options._timeout.total_seconds() for group in groups]
        gather_objects("no rank leaves before the others are done")
    assert dist.distributed_c10d.default_pg_timeout.total_seconds() == 1800
    return seconds


@pytest.mark.parametrize(("name", "num_groups"), [("zero1", 3), ("zero3", 3), ("fsdp", 2)])
def test_every_group_has_the_run_s_timeout(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path, name: str, num_groups: int
) -> None:
    placement = "replicate" if name == "zero1" else "shard"
    blocks = {"engine": ENGINES[name], "teacher": {"placement": placement, "dtype": "fp32"}}
    seconds = run_ranks(
        timeouts_of_groups, 2, tiny_tree(tmp_path, tiny_teacher, tiny_shards, **blocks), 71
    )[0]
    assert seconds == [71.0] * num_groups  # the job's, DeepSpeed's, and one that someone else makes


def bytes_held_after(
    trees: list[dict[str, Any]], in_own_group: bool
) -> list[tuple[int, int, list[str]]]:
    """Make each configuration's run; return what tensors hold at its last step and after it, and
    whose they are.
    """
    from contextlib import nullcontext

    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.loop import distill
    from scaledistill.training.step import train_step

    def tensors() -> list[torch.Tensor]:
        return [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]

    def held_bytes() -> int:
        storages = {
            held.untyped_storage()._cdata: held.untyped_storage().nbytes() for held in tensors()
        }
        return sum(storages.values())

    during = 0

    def measured(*arguments: Any) -> Any:
        nonlocal during
        result = train_step(*arguments)
        during = held_bytes()
        return result

    linear, ends = torch.nn.functional.linear, []
    with process_group(60) if in_own_group else nullcontext():
        before = held_bytes()
        for tree in trees:
            result = distill(parse_config(tree), fresh=True, train_step=measured)
            assert result.state == "done"
            names = (
                "ZeroEngine",
                "FsdpEngine",
                "Teacher",
                "Session",
                "BertModel",
                "FSDPBertModel",
            )
            alive = [
                type(held).__name__ for held in gc.get_objects() if type(held).__name__ in names
            ]
            ends.append((during - before, held_bytes() - before, alive))
            assert torch.nn.functional.linear is linear
    return ends


@pytest.mark.parametrize(
    ("world_size", "runs"),
    [
        (1, [("zero1", "bf16"), ("zero3-offload", "fp32")]),
        (2, [("zero1", "fp32"), ("zero2", "bf16"), ("fsdp", "fp32")]),
        pytest.param(2, list(itertools.product(ENGINES, ("fp32", "bf16"))), marks=pytest.mark.full),
    ],
)
def test_runs_leave_nothing_in_memory(
    tmp_path: Path,
    tiny_teacher: Path,
    tiny_shards: Path,
    world_size: int,
    runs: list[tuple[str, str]],
) -> None:
    train = {"global_batch_size": 8, "max_steps": 2, "warmup_steps": 0}
    trees = []
    for name, precision in runs:
        placement = "shard" if name in ("zero3", "zero3-offload", "fsdp") else "replicate"
        blocks = {"engine": ENGINES[name], "teacher": {"placement": placement, "dtype": "fp32"}}
        trees.append(
            tiny_tree(
                tmp_path,
                tiny_teacher,
                tiny_shards,
                train={**train, "precision": precision},
                **blocks,
            )
        )
    for during, after, alive in run_ranks(bytes_held_after, world_size, trees, world_size > 1)[0]:
        assert during > 50_000
        # The ranks of FSDP's mesh, which stands as long as its group.
        assert (after < 200, alive) == (True, [])


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
    """Return the collectives of one step of each configuration, those of single numbers left
    out.
    """
    from scaledistill.distributed.ranks import process_group
    from scaledistill.metrics.stopwatch import Stopwatch
    from scaledistill.preflight import checks
    from scaledistill.training.session import open_session
    from scaledistill.training.step import train_step

    found = []
    with process_group(60) as ranks:
        for tree in trees:
            run = checks.plan_run(parse_config(tree), ranks.world_size, ranks.device).run
            session = open_session(run, ranks, resume=False)
            with (
                pytest.MonkeyPatch.context() as monkeypatch,
                session.stream() as stream,
                Collectives(monkeypatch) as collectives,
            ):
                train_step(session, stream, lambda: None, Stopwatch())
            # The losses of the student and the stop requests: 8 numbers.
            found.append([call for call in collectives.calls if call[2] > 8])
    return found


def test_gradients_travel_in_fp32_during_the_backward(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    """In two micro-batches of a bf16 student, under the default engine and the others."""
    train = {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 2, "precision": "bf16"}
    engines: dict[str, dict[str, Any]] = {
        "default": zero(2, reduce_bucket_size=1000),
        "zero3": zero(3, reduce_bucket_size=1000),
        "fsdp": {"name": "fsdp"},
        "zero1": zero(1, reduce_bucket_size=1000),
        "stated": {
            "deepspeed": {"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}
        },
    }
    assert EngineSettings().deepspeed == {"zero_optimization": {"stage": 2}}
    trees = [
        tiny_tree(
            tmp_path,
            tiny_teacher,
            tiny_shards,
            engine=engine,
            train=train,
            teacher={"dtype": "fp32"},
        )
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


def block_for(config: DistillConfig, world_size: int) -> dict[str, Any]:
    return resolve_block(ResolvedRun(config, config, world_size, "cpu"))


def test_what_deepspeed_would_guess_is_written_out() -> None:
    given = block_of(
        bf16={"enabled": "auto"}, zero_optimization={"stage": 3, "reduce_bucket_size": "auto"}
    )
    before = copy.deepcopy(given.engine.deepspeed)
    block = block_for(given, world_size=2)
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
        (
            {"gradient_accumulation_steps": 8},
            r"gradient_accumulation_steps: not allowed here; it follows from",
        ),
        (
            {"optimizer": {}},
            r"engine\.deepspeed\.optimizer: not allowed here; the optimizer is AdamW",
        ),
        (
            {"scheduler": {}},
            r"engine\.deepspeed\.scheduler: not allowed here; the learning rate is a function",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            r"zero_optimization\.stage: found 0, expected 1, 2 or 3",
        ),
        ({"zero_optimization": {}}, r"zero_optimization\.stage: found None, expected 1, 2 or 3"),
        (
            {"gradient_clipping": 0.5},
            r"gradient_clipping: found 0\.5, expected 1\.0 by train\.max_grad_norm",
        ),
        (
            {"fp16": {"enabled": True}},
            r"fp16\.enabled: found True, expected False by train\.precision",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_sise": 1000}},
            r"zero_optimization\.reduce_bucket_sise: unknown key; did you mean "
            r"'reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"devic": "cpu"}}},
            r"offload_optimizer\.devic: unknown key; did you mean 'device'",
        ),
        (
            {"bf16": {"check_grad_overflow": False}},
            r"bf16\.check_grad_overflow: found False, expected True",
        ),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            r"zero_optimization\.compute_grad_norm: found False, expected True",
        ),
        ({"bf16": True}, r"engine\.deepspeed\.bf16: found True, expected a block"),
        ({"bf16": "auto"}, r"engine\.deepspeed\.bf16: found 'auto', expected a block"),
        ({"data_types": None}, r"engine\.deepspeed\.data_types: found None, expected a block"),
        (
            {"aio": {"block_size": 1048576}},
            r"engine\.deepspeed\.aio: not allowed here; it is read for device='nvme'",
        ),
        (
            {"compile": {"deepcompile": True}},
            r"engine\.deepspeed\.compile: not allowed here; set train\.compile",
        ),
        (
            {"communication_data_type": "int8"},
            r"communication_data_type: found 'int8', expected 'fp32', 'bf16' or",
        ),
        (
            {"communication_data_type": ["fp32"]},
            r"communication_data_type: found \['fp32'\], expected 'fp32'",
        ),
        (
            {"prescale_gradients": True},
            r"prescale_gradients: found True, expected False; ZeRO's stages 2 and 3 cannot",
        ),
        (
            {"gradient_predivide_factor": 0},
            r"gradient_predivide_factor: found 0, expected 1\.0; .*; remove the key",
        ),
        (
            {"steps_per_print": 0},
            r"steps_per_print: found 0, expected null or a whole number, 1 or more",
        ),
        ({"gradient_clipping": True}, r"gradient_clipping: found True, expected a number"),
        (
            {"bf16": {"bf16_master_weights_and_grads": True}},
            r"found True, expected False; master weights and moments",
        ),
        (
            {"bf16": {"enable": True}},
            r"engine\.deepspeed\.bf16\.enable: unknown key; did you mean 'enabled'",
        ),
        (
            {"fp16": {"loss_scale_window": 0}},
            r"fp16\.loss_scale_window: found 0, expected a whole number, 1 or more",
        ),
        (
            {"fp16": {"min_loss_scale": True}},
            r"fp16\.min_loss_scale: found True, expected a whole number, 1 or more",
        ),
        (
            {"fp16": {"loss_scale": -1}},
            r"fp16\.loss_scale: found -1, expected a number, 0 \(dynamic\) or more",
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            r"grad_accum_dtype: found 'bf16', expected 'fp32'; gradients are",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "cpu", "nvme_path": "/nvme"},
                }
            },
            r"offload_optimizer\.nvme_path: found '/nvme', expected None; it is read for "
            r"device='nvme' only",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": True}},
            r"zero_optimization\.offload_param: found True, expected a block such as \{'device': "
            r"'cpu'\}",
        ),
        (
            {"communication_data_type": "fp64"},
            r"communication_data_type: found 'fp64', expected 'fp32', 'bf16' or 'fp16'; remove it "
            r"to take 'fp32'",
        ),
        (
            {"communication_data_type": "auto"},
            r"communication_data_type='auto': DeepSpeed does not resolve it",
        ),
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
            r"reduce_bucket_size: found 'large', expected a whole number, 1 or more; remove it to "
            r"take 5000000",
        ),
    ],
)
def test_bad_blocks_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block_for(block_of(**block), world_size=1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "round_robin_gradients",
            True,
            "expected False; DeepSpeed then mixes up weights",
        ),
        ("parameter_alignment", True, "expected False; it pads the flat buffers"),
        ("contiguous_gradients", False, "expected True; gradients that are reduced one by one"),
        (
            "sub_group_size",
            0,
            "expected a whole number, 1 or more; correct the value or remove the key",
        ),
        ("allgather_bucket_size", -1, "expected a whole number, 1 or more; correct"),
        (
            "reduce_bucket_size",
            1.5,
            "expected a whole number, 1 or more; remove it to take 5000000",
        ),
        ("stage3_max_live_parameters", float("inf"), "expected a whole number, 0 or more; correct"),
        ("stage3_prefetch_bucket_size", None, "expected a whole number, 0 or more; correct"),
        ("overlap_comm", "yes", "expected true, false or null; correct"),
        ("reduce_scatter", 1, "expected true or false; correct"),
        ("zero_hpz_partition_size", 2, "expected 1; a second partition of the weights"),
        ("zero_quantized_weights", True, "expected False; quantized communication changes"),
        ("zero_quantized_gradients", True, "expected False; quantized communication changes"),
        (
            "elastic_checkpoint",
            True,
            "expected False; DeepSpeed's checkpoints are not used; remove the key",
        ),
        ("cpu_offload", True, "expected None; DeepSpeed has replaced it by offload_optimizer="),
        ("zenflow", {"topk_ratio": 0.1}, "expected None; it updates some weights steps later"),
        (
            "leaf_module",
            {"classes": ["BertLayer"]},
            "expected None; blocks are gathered part by part",
        ),
        ("mics_shard_size", 2, "not allowed here; DeepSpeed has removed it"),
        ("offload_optimizer.ratio", 0.5, "expected 1.0; a part of the moments cannot be offloaded"),
        (
            "offload_optimizer.super_offload",
            True,
            "expected False; it steps by DeepSpeed's CPU optimizer",
        ),
        ("offload_optimizer.pin_memory", "no", "expected true or false; correct"),
        ("offload_optimizer.device", ["cpu"], "expected 'cpu' or 'none'; NVMe is not supported"),
        ("offload_param.max_in_cpu", 5, "expected 1000000000; it is read for device='nvme' only"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_zero_cannot_do_here_is_refused(
    stage: int, key: str, value: Any, message: str
) -> None:
    block, _, name = key.rpartition(".")
    settings = {block: {name: value}} if block else {key: value}
    found = "" if "not allowed" in message else f"found {value!r}, "
    with pytest.raises(ConfigError) as error:
        block_for(block_of(zero_optimization={"stage": stage, **settings}), world_size=2)
    assert str(error.value).startswith(
        f"engine.deepspeed.zero_optimization.{key}: {found}{message}"
    )


def test_defaults_may_be_written_out_and_sizes_as_floats() -> None:
    examples = {"round_robin_gradients": False, "contiguous_gradients": True, "sub_group_size": 1e9}
    offload = {"device": "cpu", "pin_memory": True, "buffer_count": 4, "fast_init": False}
    zero_block = {"stage": 3, **examples, "offload_optimizer": offload, "offload_param": None}
    block = block_for(
        block_of(zero_optimization=zero_block, prescale_gradients=False), world_size=2
    )
    assert block["zero_optimization"]["sub_group_size"] == 1_000_000_000
    assert isinstance(block["zero_optimization"]["sub_group_size"], int)


def refused_by_deepspeed(tree: dict[str, Any]) -> str:
    from scaledistill.engines import zero

    def changed(run: ResolvedRun) -> dict[str, Any]:
        block = resolve_block(run)
        block["zero_optimization"] |= {"allgather_bucket_size": "large"}
        return block

    zero.resolve_block = changed
    try:
        losses_of([tree])
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_deepspeed_s_own_check_is_a_config_error(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, engine=ENGINES["zero1"])
    [message] = run_ranks(refused_by_deepspeed, 1, tree)
    assert message.startswith(
        "engine.deepspeed.zero_optimization.allgather_bucket_size: Input should be a valid integer"
    )


# Every key of the block with more than one value, by the stages that read it, with other values
# than DeepSpeed's.
VARIED: list[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = [
    ((1, 2), {"allgather_bucket_size": 1000}, {}),
    ((1, 2), {"allgather_partitions": False}, {}),
    ((1, 2), {"use_multi_rank_bucket_allreduce": False}, {}),
    ((1, 2, 3), {"reduce_scatter": False}, {}),
    ((1, 2, 3), {"overlap_comm": False, "reduce_bucket_size": 1000}, {}),
    ((1, 2, 3), {"overlap_comm": True, "reduce_bucket_size": 500}, {}),
    ((1, 2, 3), {"enable_sanity_checks": True, "log_trace_cache_warnings": True}, {}),
    ((1, 2, 3), {"offload_optimizer": {"device": "cpu", "pin_memory": False}}, {}),
    ((1, 2, 3), {}, {"communication_data_type": "fp32", "zero_allow_untested_optimizer": True}),
    (
        (1, 2, 3),
        {},
        {
            "steps_per_print": 1,
            "wall_clock_breakdown": True,
            "memory_breakdown": True,
            "dump_state": True,
        },
    ),
    ((3,), {"memory_efficient_linear": False}, {}),
    ((3,), {"sub_group_size": 700}, {}),
    ((3,), {"offload_param": {"device": "cpu", "pin_memory": False}}, {}),
    ((3,), {"stage3_allgather_sequential": True}, {}),
    ((3,), {"stage3_use_all_reduce_for_fetch_params": True}, {}),
    (
        (3,),
        {
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        {},
    ),
    (
        (3,),
        {
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        {},
    ),
    (
        (3,),
        {"stage3_param_persistence_threshold": 10**6, "stage3_model_persistence_threshold": 10**4},
        {},
    ),
]


def losses_carried_over(
    trees: list[dict[str, Any]],
) -> list[tuple[list[float], list[float], list[float]]]:
    """Return for each configuration the losses of steps 3 and 4: its own, and after its state has
    moved on.

    The second are of a plain engine (the first configuration's) that goes on from it, as an export
    or another engine does; the third of an engine of its own kind that does.
    """
    from scaledistill.distributed.ranks import broadcast_object, process_group
    from scaledistill.metrics.stopwatch import Stopwatch
    from scaledistill.preflight import checks
    from scaledistill.training.session import open_session
    from scaledistill.training.step import train_step

    with process_group(60) as ranks:

        def opened(tree: dict[str, Any], **student: str) -> Any:
            tree = {**tree, "students": {"l2": {**tree["students"]["l2"], **student}}}
            run = checks.plan_run(parse_config(tree), ranks.world_size, ranks.device).run
            return open_session(run, ranks, resume=False)

        def steps(session: Any) -> list[float]:
            with session.stream() as stream:
                return [
                    train_step(session, stream, lambda: None, Stopwatch()).loss for _ in range(2)
                ]

        def moved(tree: dict[str, Any], export: Path, state: Any) -> list[float]:
            session = opened(tree, init=str(export))
            session.step = 2
            session.students[0].engine.load_state(state)
            return steps(session)

        ends = []
        for tree in trees:
            session = opened(tree)
            steps(session)
            export = session.export(session.students[0], "moved", {})
            state = broadcast_object(session.students[0].engine.state())
            ends.append(
                (steps(session), moved(trees[0], export, state), moved(tree, export, state))
            )
    return ends


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_allowed_key_keeps_weights_and_moments_in_their_places(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path, stage: int, precision: str
) -> None:
    train = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": 40,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
    }
    blocks: dict[str, Any] = {
        "train": {**train, "precision": precision},
        "teacher": {"dtype": "fp32"},
    }
    engines = [zero(stage)]
    for stages, zero_settings, settings in VARIED:
        if stage in stages:
            engines.append({"deepspeed": {**zero(stage, **zero_settings)["deepspeed"], **settings}})
    trees = [
        tiny_tree(tmp_path, tiny_teacher, tiny_shards, engine=engine, **blocks)
        for engine in engines
    ]
    ends = run_ranks(losses_carried_over, 2, trees, timeout=600)[0]
    expected, tolerance = ends[0][0], 1e-4 if precision == "fp32" else 2e-2
    for engine, (own, by_plain, by_its_kind) in zip(engines, ends, strict=True):
        assert own == pytest.approx(expected, rel=tolerance), engine
        assert by_plain == pytest.approx(own, rel=tolerance / 10), engine
        assert by_its_kind == pytest.approx(own, rel=tolerance / 100), engine


def test_the_matrix_has_every_key_that_may_vary() -> None:
    from scaledistill.engines import deepspeed as block

    varied: set[str] = set()
    for _, zero_settings, settings in VARIED:
        varied |= {*zero_settings, *settings}
    free = [
        key
        for key, check in {**block.TOP_KEYS, **block.ZERO_KEYS}.items()
        if "; remove the key" not in check[2]
    ]
    # The blocks themselves, what `train` settles, and the stage.
    settled = {
        "zero_optimization",
        "bf16",
        "fp16",
        "data_types",
        "gradient_clipping",
        "compute_grad_norm",
        "stage",
    }
    assert set(free) - settled == varied


def waits_for_the_device(tree: dict[str, Any]) -> list[int]:
    """Return how often each step of a run made DeepSpeed wait for the device."""
    from deepspeed.accelerator import get_accelerator

    from scaledistill.training.loop import distill
    from scaledistill.training.step import train_step

    waits, by_step = 0, []

    def synchronize(*_: Any) -> None:
        nonlocal waits
        waits += 1

    get_accelerator().synchronize = synchronize

    def counted(*arguments: Any) -> Any:
        nonlocal waits
        waits = 0
        result = train_step(*arguments)
        by_step.append(waits)
        return result

    distill(parse_config(tree), train_step=counted)
    return by_step


@pytest.mark.parametrize("placement", ["replicate", "shard"])
def test_deepspeed_s_timer_does_not_wait_for_the_device(
    placement: str, tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> None:
    train = {"max_steps": 5, "global_batch_size": 4, "micro_batch_size": 2}
    blocks = {"train": train, "teacher": {"placement": placement}, "engine": ENGINES["zero2"]}
    tree = tiny_tree(tmp_path, tiny_teacher, tiny_shards, **blocks)
    assert run_ranks(waits_for_the_device, 1, tree)[0] == [0] * 5


def test_the_loss_scaler_s_state_is_json() -> None:
    import json

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from scaledistill.engines.zero import scaler_state

    settings = {
        "scale_window": 1000,
        "min_scale": 1.0,
        "delayed_shift": 2,
        "consecutive_hysteresis": False,
    }
    scaler = DynamicLossScaler(init_scale=2.0**16, **settings)
    scaler.cur_iter, scaler.last_overflow_iter = 7, 5
    state = json.loads(json.dumps(scaler_state(scaler)))
    assert state == {
        "cur_scale": 2.0**16,
        "cur_iter": 7,
        "last_overflow_iter": 5,
        "cur_hysteresis": 2,
    }


def test_the_known_zero_keys_are_deepspeed_s() -> None:
    from deepspeed.runtime.zero import config, offload_config

    from scaledistill.engines import deepspeed

    def names(model: Any) -> list[str]:
        return sorted({field.alias or name for name, field in model.model_fields.items()})

    assert sorted(deepspeed.ZERO_KEYS) == names(config.DeepSpeedZeroConfig)
    offload = deepspeed.OFFLOAD_KEYS
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
