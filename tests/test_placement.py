"""Teachers in parts: the same Q, K and V and hash as whole ones, never whole on a rank, the same
training.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_SIZES, tiny_tree
from encoders import tiny_config
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)

from scaledistill.config.load import parse_config
from scaledistill.data.tokens import TokenInputs
from scaledistill.engines import place_buffers
from scaledistill.errors import DataError
from scaledistill.models.architectures import ARCHITECTURES
from scaledistill.models.teacher import Teacher, encoder_on_meta, load_encoder
from scaledistill.models.view import QKVView

ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}}},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "fsdp": {"name": "fsdp"},
}
FSDP_OPTIONS = {
    "cpu_offload": True,
    "activation_checkpointing": True,
    "reshard_after_forward": False,
}
PLACEMENTS = ("replicate", "shard", "offload")
LAYERS = 8
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of so many layers that two blocks are a small part of it."""
    folder = tmp_path_factory.mktemp("deep")
    config = AutoConfig.for_model("bert", **(ENCODER_SIZES | {"num_hidden_layers": LAYERS}))
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def storages(tensors: Iterator[Tensor]) -> int:
    """Return the bytes that tensors hold, on the meta device none; shared ones count once."""
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in tensors
        if x.device.type != "meta"
    }
    return sum(size for address, size in held.items() if address)


def parameter_bytes(view: nn.Module) -> tuple[int, int]:
    """Return the bytes of a sharded view's parameters on this rank: its parts, and what is gathered
    now.
    """
    from torch.distributed.tensor import DTensor

    state = {
        id(p): p for module in view.modules() for p in module._parameters.values() if p is not None
    }
    parts, whole = [], []
    for parameter in state.values():
        if isinstance(parameter, DTensor):
            parts.append(parameter.to_local())
        elif hasattr(parameter, "ds_tensor"):
            parts.append(parameter.ds_tensor)
            whole.append(parameter.data)
        else:
            whole.append(parameter)
    return storages(iter(parts)), storages(iter(whole))


class Watched(dict[str, Tensor]):
    """Stored weights; measures a view before each is read, when those before it should have been
    dropped.
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.stored, self.module, self.peak = stored, nn.Module(), 0

    def __getitem__(self, name: str) -> Tensor:
        self.peak = max(self.peak, sum(parameter_bytes(self.module)))
        return self.stored[name]


def place(folder: Path, trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Place a teacher on this rank and run it, for each configuration; return output, hash, and the
    bytes held.
    """
    from scaledistill.distributed.ranks import process_group
    from scaledistill.engines import fsdp, shard_teacher, zero
    from scaledistill.preflight.resolve import resolve

    results = []
    with process_group(60) as ranks:
        for tree in trees:
            encoder, stored = encoder_on_meta(folder)
            watched = Watched(stored)

            def shard(
                view: QKVView, *rest: Any, tree: Any = tree, watched: Watched = watched
            ) -> nn.Module:
                watched.module = view.module
                run = resolve(parse_config(tree), ranks.world_size, ranks.device)
                return shard_teacher(run, ranks, view, *rest)

            placed: list[object] = []

            def place_buffers(*arguments: object, placed: list[object] = placed) -> None:
                placed.append(arguments[1])

            for module in (zero, fsdp):
                module.place_buffers = place_buffers
            teacher = Teacher(encoder, LAYERS, dtype=torch.float32, stored=watched, shard=shard)
            assert placed == [ranks.device], "else they stay on the host, beside a GPU"
            running: list[int] = []

            def measure(*_: Any, running: list[int] = running, watched: Watched = watched) -> None:
                running.append(sum(parameter_bytes(watched.module)))

            for layer in watched.module.modules():
                if not list(layer.children()):
                    layer.register_forward_hook(measure)
            for _ in range(3):  # ZeRO-3 learns what to gather ahead from the first
                output = teacher(TokenInputs(IDS))
            parts, left = parameter_bytes(watched.module)
            result = {
                "qkv": [x.numpy() for x in output],
                "sha256": teacher.sha256,
                "parts": parts,
                "left": left,
            }
            results.append({**result, "loading": watched.peak, "running": max(running)})
    return results


def test_no_rank_ever_holds_a_sharded_teacher(deep_teacher, tmp_path, tiny_shards) -> None:
    whole = Teacher(load_encoder(deep_teacher), LAYERS)
    total, *blocks = (
        sum(p.numel() * 4 for p in x.parameters()) for x in (whole.module, *whole.view.blocks)
    )
    embeddings = total - sum(blocks)
    cases = list(itertools.product(("zero1", "fsdp"), ("shard", "offload")))
    trees = [
        tiny_tree(
            tmp_path,
            deep_teacher,
            tiny_shards,
            engine=ENGINES[engine],
            teacher={"placement": placement},
        )
        for engine, placement in cases
    ]
    for results in run_ranks(place, 2, deep_teacher, trees):
        for case, found in zip(cases, results, strict=True):
            for x, y in zip(found["qkv"], whole(TokenInputs(IDS)), strict=True):
                assert torch.equal(torch.from_numpy(x), y), case
            assert found["sha256"] == whole.sha256
            assert total / 2 <= found["parts"] <= 1.05 * total / 2, case  # and a little padding
            assert found["loading"] <= found["parts"] + embeddings, case
            assert found["running"] <= found["parts"] + embeddings + 2 * max(blocks) < total, case
            assert found["left"] <= 2 * max(blocks), case


def test_buffers_are_moved() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    place_buffers(module, torch.device("meta"))
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def losses_of(trees: list[dict[str, Any]]) -> list[list[float]]:
    """Make a run's steps for each configuration in turn, in this rank; return the losses."""
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
                steps = [
                    train_step(session, stream, lambda: None, Stopwatch())
                    for _ in range(run.config.train.max_steps)
                ]
            losses.append([step.loss for step in steps])
    return losses


def agree(cases: list[tuple[str, str]], tmp_path: Path, teacher: Path, shards: Path) -> None:
    train = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "precision": "fp32",
    }

    def tree(engine: dict[str, Any], placement: str) -> dict[str, Any]:
        return tiny_tree(
            tmp_path, teacher, shards, train=train, teacher={"placement": placement}, engine=engine
        )

    trees = [tree(ENGINES[engine], placement) for engine, placement in cases]
    trees.append(tree({"name": "fsdp", "fsdp": FSDP_OPTIONS}, "offload"))
    expected, *others = run_ranks(losses_of, 2, trees, timeout=220)[0]
    assert len(expected) == 10
    assert expected[-1] < expected[0]
    for case, losses in zip([*cases[1:], "fsdp, all options"], others, strict=True):
        assert losses == pytest.approx(expected, rel=1e-4), case


def test_engines_and_placements_agree(tmp_path, tiny_teacher, tiny_shards) -> None:
    pairs = [
        ("zero1", "replicate"),
        ("zero1", "shard"),
        ("zero2", "offload"),
        ("zero3", "shard"),
        ("fsdp", "replicate"),
    ]
    agree([*pairs, ("fsdp", "shard")], tmp_path, tiny_teacher, tiny_shards)


@pytest.mark.full
def test_all_engines_and_placements_agree(tmp_path, tiny_teacher, tiny_shards) -> None:
    agree(list(itertools.product(ENGINES, PLACEMENTS)), tmp_path, tiny_teacher, tiny_shards)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_stored_weights_are_those_of_a_loaded_model(model_type, tmp_path) -> None:
    config = tiny_config(model_type, ENCODER_SIZES)
    # With a prefix, a head.
    encodes = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    with_head = AutoModelForMaskedLM if encodes else AutoModelForCausalLM
    with_head.from_config(config).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for num_layers in (None, 2):
        whole = load_encoder(tmp_path, num_layers=num_layers)
        empty, stored = encoder_on_meta(tmp_path, num_layers=num_layers)
        assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
        assert {name: x.tolist() for name, x in empty.named_buffers()} == {
            name: x.tolist() for name, x in whole.named_buffers()
        }
        assert list(stored) == sorted(whole.state_dict())
        assert all(torch.equal(stored[name], x) for name, x in whole.state_dict().items())


@pytest.mark.parametrize("stated", [None, "bfloat16"])
def test_stored_weights_have_the_dtype_of_a_loaded_model(stated, tiny_teacher, tmp_path) -> None:
    config = json.loads((tiny_teacher / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "dtype": stated, "torch_dtype": stated})
    )
    weights = {name: x.half() for name, x in load_file(tiny_teacher / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, stored = encoder_on_meta(tmp_path)
    assert (
        stored.dtype
        == load_encoder(tmp_path).dtype
        == {None: torch.float16, "bfloat16": torch.bfloat16}[stated]
    )


def test_the_first_names_of_layer_norms(tiny_teacher, tmp_path) -> None:
    weights = load_file(tiny_teacher / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        weights = {
            f"bert.{key.removeprefix('bert.').replace(new, name)}": x for key, x in weights.items()
        }
    assert any("gamma" in key for key in weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_teacher / "config.json").read_text())
    _, stored = encoder_on_meta(tmp_path)
    assert all(
        torch.equal(stored[name], x) for name, x in load_encoder(tiny_teacher).state_dict().items()
    )


def lacking(weights: dict[str, Tensor]) -> None:
    del weights["encoder.layer.1.output.dense.bias"]
    weights["embeddings.LayerNorm.weight"] = torch.ones(5)


@pytest.mark.parametrize("load", [load_encoder, encoder_on_meta])
def test_incomplete_weights_are_refused(load, tiny_teacher, tmp_path) -> None:
    weights = load_file(tiny_teacher / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    weights["embeddings.LayerNorm.weight"] = torch.ones(5)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_teacher / "config.json").read_text())
    message = (
        r"lacks weights that are needed: encoder\.layer\.1\.output\.dense\.bias \(not in the "
        r"file\), "
        r"embeddings\.LayerNorm\.weight \(file: \[5\], config: \[32\]\); give a complete model"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_cut_file_is_refused(tiny_teacher, tmp_path) -> None:
    content = (tiny_teacher / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-9])
    (tmp_path / "config.json").write_text((tiny_teacher / "config.json").read_text())
    with pytest.raises(
        DataError, match=r"model\.safetensors cannot be read \(.*\); fetch the model again"
    ):
        encoder_on_meta(tmp_path)
