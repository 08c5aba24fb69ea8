"""Expensive things that tests share: a tiny teacher with its tokenizer, and shards made with it."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaledistill.config.load import parse_config
from scaledistill.config.schema import DistillConfig

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for others give way to the other processes of the suite, and do not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The same on every machine; `fast_bf16` tests both ways.
os.environ.setdefault("SCALEDISTILL_CPU_BF16", "0")
# A shell's background job, and all that it starts, ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
ENCODER_SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
TEACHER_SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
WORDS = [f"w{number:03}" for number in range(195)]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all but the tests of GPUs: ranks, engines and figures are those of CPUs."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # Launches that tiny batches choose are not for runs.
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()


@pytest.fixture(params=[False, True], ids=["slow-bf16", "fast-bf16"])
def fast_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test twice: as on a CPU without and with bf16 units, in subprocesses and ranks too."""
    monkeypatch.setenv("SCALEDISTILL_CPU_BF16", str(int(request.param)))
    return request.param


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer BERT of width 32 with a word-level vocabulary of 200."""
    return write_tiny_teacher(tmp_path_factory.mktemp("teacher"))


def write_tiny_teacher(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(**TEACHER_SIZES, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """About 400 training rows of 16 tokens, the last one padded, in `train`, and some in
    `validation`.
    """
    return write_tiny_shards(tmp_path_factory.mktemp("shards"), tiny_teacher)


def write_tiny_shards(folder: Path, teacher: Path) -> Path:
    from scaledistill.data.prepare.make import make_shards
    from scaledistill.data.prepare.text import load_tokenizer

    generator = random.Random(3)
    documents = [" ".join(generator.choices(WORDS, k=generator.randint(3, 60))) for _ in range(230)]
    make_shards(
        iter(documents),
        folder,
        tokenizer=load_tokenizer(teacher),
        sequence_length=16,
        source={"kind": "test"},
        held_out_fraction=0.1,
        workers=1,
        rows_per_shard=256,
        overwrite=True,
    )
    return folder


@pytest.fixture
def tiny_config(
    tmp_path: Path, tiny_teacher: Path, tiny_shards: Path
) -> Callable[..., DistillConfig]:
    """Return a function that makes a run's configuration; keyword arguments override blocks."""

    def make(**blocks: dict[str, Any]) -> DistillConfig:
        return parse_config(tiny_tree(tmp_path, tiny_teacher, tiny_shards, **blocks))

    return make


@pytest.fixture
def config_file(tmp_path: Path, tiny_teacher: Path, tiny_shards: Path) -> Callable[..., Path]:
    """Return a function that writes such a configuration to a file."""

    def make(**blocks: dict[str, Any]) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(tiny_tree(tmp_path, tiny_teacher, tiny_shards, **blocks)))
        return path

    return make


def tiny_tree(
    tmp_path: Path, model: Path, shards: Path, /, **blocks: dict[str, Any]
) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "run": {"folder": str(tmp_path / "run"), "timeout_seconds": 60},
        "teacher": {"model": str(model), "layer": 3},
        "students": {
            "l2": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "init": "teacher"}
        },
        "relations": {"num_heads": 4},
        "data": {
            "train": str(shards / "train"),
            "sequence_length": 16,
            "num_lanes": 4,
            "window_rows": 32,
        },
        "train": {
            "global_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "precision": "fp32",
        },
        "logging": {"every_steps": 1},
    }
    for name, block in blocks.items():
        tree[name] = {**tree.get(name, {}), **block}
    return tree
