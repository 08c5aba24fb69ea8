"""Hostile models, tokenizers and checkpoints."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.hostile import Box, Evil, case

REMOTE_CODE = "import os\nos.system({command!r})\nclass Evil: pass\n"
DEEP = "[" * 200_000 + "]" * 200_000


def load(box: Box) -> object:
    from scaledistill.models.teacher import load_encoder

    return load_encoder(box.folder, num_layers=3)


def load_sharded(box: Box) -> object:
    from scaledistill.models.teacher import encoder_on_meta

    _, weights = encoder_on_meta(box.folder, num_layers=3)
    return [weights[name] for name in weights]


def copy_teacher(box: Box, **changes: Any) -> dict[str, Any]:
    """Copy the sound teacher, with changes to its config."""
    shutil.copytree(box.teacher, box.folder, dirs_exist_ok=True)
    config = json.loads((box.folder / "config.json").read_text()) | changes
    (box.folder / "config.json").write_text(json.dumps(config))
    return config


def write_pickle(path: Path, box: Box) -> None:
    import torch

    torch.save({"embeddings.word_embeddings.weight": Evil(box.canary)}, path)


def write_header(path: Path, header: dict[str, Any] | bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


def entry(shape: list[int], end: int) -> dict[str, Any]:
    return {
        "embeddings.word_embeddings.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [0, end],
        }
    }


@case("pickled weights only")
def pickled_weights(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    (box.folder / "model.safetensors").unlink()
    write_pickle(box.folder / "pytorch_model.bin", box)
    return lambda: load(box)


@case("cannot be read")
def pickled_weights_named_safetensors(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    write_pickle(box.folder / "model.safetensors", box)
    return lambda: load(box)


@case("cannot be read")
def pickled_weights_named_safetensors_for_a_sharded_teacher(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    write_pickle(box.folder / "model.safetensors", box)
    return lambda: load_sharded(box)


def with_index(box: Box, file: str) -> None:
    copy_teacher(box)
    (box.folder / "model.safetensors").rename(box.outside / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": file}}
    (box.folder / "model.safetensors.index.json").write_text(json.dumps(index))


@case("expected safetensors files in the same folder")
def an_index_of_pickles(box: Box) -> Callable[[], object]:
    with_index(box, "pytorch_model.bin")
    write_pickle(box.folder / "pytorch_model.bin", box)
    return lambda: load(box)


@case("expected safetensors files in the same folder")
def an_index_that_points_outside(box: Box) -> Callable[[], object]:
    with_index(box, "../outside/model.safetensors")
    return lambda: load(box)


@case("is not a weight index")
def an_index_nested_too_deep(box: Box) -> Callable[[], object]:
    with_index(box, "model.safetensors")
    (box.folder / "model.safetensors.index.json").write_text(DEEP)
    return lambda: load(box)


@case("cannot be read")
def a_header_of_2_60_bytes(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    write_header(box.folder / "model.safetensors", {}, 1 << 60)
    return lambda: load(box)


@case("cannot be read")
def a_header_of_2_63_bytes_for_a_sharded_teacher(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    write_header(box.folder / "model.safetensors", {}, (1 << 63) + 8)
    return lambda: load_sharded(box)


@case("cannot be read")
def a_tensor_beyond_the_file(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    write_header(box.folder / "model.safetensors", entry([1 << 20, 1 << 20], 1 << 42))
    return lambda: load(box)


@case("cannot be read")
def a_shape_whose_product_wraps(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    write_header(box.folder / "model.safetensors", entry([1 << 32, 1 << 32], 64))
    return lambda: load(box)


@case("cannot be read")
def a_header_nested_too_deep(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    write_header(box.folder / "model.safetensors", DEEP.encode())
    return lambda: load(box)


@case("cannot be loaded")
def a_vocabulary_of_2_40(box: Box) -> Callable[[], object]:
    copy_teacher(box, vocab_size=1 << 40)
    return lambda: load(box)


@case("model=")
def a_vocabulary_of_2_40_for_a_sharded_teacher(box: Box) -> Callable[[], object]:
    copy_teacher(box, vocab_size=1 << 40)
    return lambda: load_sharded(box)


@case("model=")
def a_width_of_2_40(box: Box) -> Callable[[], object]:
    copy_teacher(box, hidden_size=1 << 40)
    return lambda: load(box)


@case("config.json cannot be used")
def a_config_nested_too_deep(box: Box) -> Callable[[], object]:
    copy_teacher(box)
    (box.folder / "config.json").write_text(DEEP)
    return lambda: load(box)


def with_remote_code(box: Box, model_type: str) -> None:
    code = {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    copy_teacher(box, auto_map=code, model_type=model_type)
    (box.folder / "evil.py").write_text(REMOTE_CODE.format(command=box.command()))


@case("which is refused; if you trust that code, set trust_remote_code=true")
def remote_code_of_an_unknown_model(box: Box) -> Callable[[], object]:
    with_remote_code(box, "evil")
    return lambda: load(box)


@case(None)
def remote_code_beside_a_known_model(box: Box) -> Callable[[], object]:
    with_remote_code(box, "bert")
    return lambda: load(box)


@case("model='pipe:")
def a_command_as_the_model(box: Box) -> Callable[[], object]:
    from scaledistill.models.teacher import load_encoder

    return lambda: load_encoder(f"pipe:{box.command()}")


@case("remote code is never run")
def remote_code_of_a_tokenizer(box: Box) -> Callable[[], object]:
    from scaledistill.data.prepare.text import load_tokenizer

    with_remote_code(box, "evil")
    (box.folder / "tokenizer.json").unlink()
    settings = {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    (box.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return lambda: load_tokenizer(box.folder)


def with_checkpoint(box: Box, name: str, content: bytes) -> Callable[[], object]:
    """Commit a checkpoint with hashes that hold, one of its files hostile; return what a resume
    does with it.
    """
    import torch
    import torch.distributed as dist

    from scaledistill.checkpoint.format import newest_checkpoint
    from scaledistill.distributed.ranks import Ranks
    from scaledistill.storage.files import sha256_of

    folder = box.folder / "step-000000003"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"step": 3}))
    (folder / name).write_bytes(content)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in folder.iterdir()
    }
    manifest = {"format": "scaledistill-checkpoint", "version": 1, "files": files}
    if name != "manifest.json":
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def resume() -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        checkpoint = newest_checkpoint(box.folder, Ranks(0, 1, 0, torch.device("cpu")))
        if checkpoint:
            checkpoint.tensors("l2.weights")

    return resume


@case("l2.weights.safetensors")
def a_pickle_in_a_checkpoint(box: Box) -> Callable[[], object]:
    return with_checkpoint(box, "l2.weights.safetensors", pickle.dumps(Evil(box.canary)))


@case("l2.weights.safetensors")
def a_header_of_2_60_bytes_in_a_checkpoint(box: Box) -> Callable[[], object]:
    return with_checkpoint(box, "l2.weights.safetensors", struct.pack("<Q", 1 << 60) + bytes(64))


@case("state.json")
def a_state_nested_too_deep(box: Box) -> Callable[[], object]:
    return with_checkpoint(box, "state.json", DEEP.encode())


@case(None)
def a_checkpoint_manifest_nested_too_deep(box: Box) -> Callable[[], object]:
    return with_checkpoint(box, "manifest.json", DEEP.encode())
