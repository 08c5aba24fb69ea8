"""Write a trained student as a folder that plain transformers loads.

Inputs: a config, the student's full fp32 state dict, the source of its tokenizer and the facts of
the run. Outputs: a folder with config, safetensors, tokenizer and model card, put in place only
after it was read back and checked. Not handled here: gathering the state from an engine, and when
to export.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from scaledistill.data.tokenizer import (
    TOKENIZER_FILES,
    gives_same_ids,
    load_tokenizer,
    return_token_types,
)
from scaledistill.errors import DataError, SourceError, named
from scaledistill.models.architectures import build_encoder, takes_token_types
from scaledistill.models.card import README, card_text
from scaledistill.models.teacher import load_encoder, quiet_transformers, resolve_folder
from scaledistill.storage.files import read_json, set_default_mode, sync, write_json
from scaledistill.storage.remote import without_credentials

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)
EXPORT, SETTINGS = "scaledistill.json", "distill.json"
FORMAT = {"format": "scaledistill-export", "version": 1}


def export_student(
    folder: str | Path,
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    *,
    tap: str | None = "last",
    tokenizer_source: str | Path,
    revision: str | None = None,
    card: Mapping[str, object],
    metadata: Mapping[str, Any] | None = None,
    settings: str | None = None,
    check: Callable[[PreTrainedModel], None] = lambda model: None,
) -> Path:
    """Write a student into `folder`, replacing what is there, and return the folder.

    Only one rank calls this. The export is written to a folder beside `folder`, read back with
    `AutoModel`, compared bit for bit and run once. Then the two folders are exchanged in one step,
    so that there is a good export at every moment. After a failure the old one is still there.

    Args:
        folder: ends up with config.json, model.safetensors, the tokenizer without truncation or
            padding, README.md, and scaledistill.json with the facts for a later export.
        config: the student's; written unchanged.
        state: every parameter of the full student by its name, fp32.
        tap: the student's tap, "last" or "extra", for the model card; None if it is no student.
        tokenizer_source: folder or hub name (at `revision`) of the tokenizer: the teacher's.
        card: facts for the model card, in order, label to value; None leaves one out. "init", how
            the student was initialised, is required.
        metadata: further fields of the card for the hub, such as `base_model` (see `models.card`).
        settings: the settings of the run as JSON, written to distill.json.
        check: called with the model that was read back, in eval mode, before it is put in place; if
            it raises, the old export stays.

    Raises:
        DataError: the tokenizer cannot be loaded, or the model that was read back differs from the
            state or gives no finite output.
        OSError: the disk is full or not writable.
        ValueError: the state is not that of the config, or not fp32.
    """
    target = Path(os.path.realpath(folder))  # follow a link, so that it stays a link
    check_state(config, state)
    fresh = target.with_name(f".{target.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        config.save_pretrained(fresh)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        set_default_mode(fresh / "model.safetensors")
        save_tokenizer(tokenizer_source, revision, fresh, config)
        text = card_text(Path(folder).name, config, card, metadata or {}, tap=tap)
        (fresh / README).write_text(text, encoding="utf-8")
        record = {"tap": tap, "card": dict(card), "metadata": dict(metadata or {})}
        write_json(fresh / EXPORT, {**FORMAT, **record})
        if settings is not None:
            (fresh / SETTINGS).write_text(without_credentials(settings), encoding="utf-8")
        kept = "the old export is kept" if target.exists() else "nothing was exported"
        check(_check_export(fresh, weights, kept))
        for path in (*fresh.iterdir(), fresh):
            sync(path)
        exchange(fresh, target)
        sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Path(folder)


def check_state(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the state has the config's parameters, shapes and fp32."""
    expected = {
        name: tensor.shape
        for name, tensor in build_encoder(config, device="meta").state_dict().items()
    }
    for name in sorted(expected.keys() | state.keys()):
        found = state.get(name)
        if (
            name not in expected
            or found is None
            or (found.shape, found.dtype) != (expected[name], torch.float32)
        ):
            what = "nothing" if found is None else f"{list(found.shape)} {found.dtype}"
            wanted = (
                f"{list(expected[name])} torch.float32" if name in expected else "no such parameter"
            )
            raise ValueError(
                f"the student's state has {what} for {name}; its config expects {wanted}"
            )


def save_tokenizer(
    source: str | Path, revision: str | None, folder: Path, config: PreTrainedConfig
) -> None:
    """Write the tokenizer so that plain `AutoTokenizer` gives the ids of the source's files.

    It pads on the right, as the rows of the training did: a teacher's may pad on the left, which
    would shift the positions that the student has learned.

    Args:
        folder: has the config.json of the model.
        config: the model's.

    Raises:
        DataError: the source has none, or it is not read back as it was written.
    """
    with named(model="tokenizer_source"):
        origin = resolve_folder(source, revision, TOKENIZER_FILES)
    with quiet_transformers():
        try:
            tokenizer = load_tokenizer(origin)
        except DataError as error:
            raise SourceError(
                "tokenizer_source",
                str(source),
                f"has no tokenizer to export ({error})",
                "give the folder with tokenizer.json",
            ) from error
        return_token_types(tokenizer, takes_token_types(config))
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        written = read_json(path) or {}
        # transformers 4 knows neither this class name nor this key.
        if written.get("tokenizer_class") == "TokenizersBackend":
            written["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(written.get("extra_special_tokens"), list):
            written["additional_special_tokens"] = written.pop("extra_special_tokens")
        write_json(path, written)
        read = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder))
        same_tokens = read.all_special_tokens == tokenizer.all_special_tokens
        if not (same_tokens and gives_same_ids(read, tokenizer) and read.padding_side == "right"):
            raise DataError(
                f"transformers does not read the tokenizer of {source} back as its tokenizer.json "
                f"says, in a folder of a model of type {config.model_type!r} (it makes a "
                f"{type(read).__name__}); the student needs another architecture"
            )


def _check_export(folder: Path, weights: Mapping[str, Tensor], kept: str) -> PreTrainedModel:
    """Return the model that the folder loads to.

    Raises:
        DataError: it differs from `weights`, or its output is not finite.
    """
    if broken := next(
        (name for name, tensor in weights.items() if not tensor.isfinite().all()), None
    ):
        raise DataError(
            f"{folder}: the student's weight {broken} is not finite, so its output is not finite; "
            f"{kept}. If an earlier checkpoint is good, remove the newer ones from checkpoints/ "
            "and rerun the same command"
        )
    with named(model="the export"):
        model = load_encoder(folder)
    read = model.state_dict()
    # Compared as integers, so that -0.0 and 0.0 differ.
    if different := [
        name
        for name in weights
        if not torch.equal(read[name].view(torch.int32), weights[name].view(torch.int32))
    ]:
        raise DataError(
            f"{folder}: {different[0]} was read back with other values than written; check the "
            f"disk; {kept}"
        )
    with torch.no_grad():
        output = model(
            input_ids=torch.arange(3, 11)[None] % model.config.vocab_size
        ).last_hidden_state
    if not output.isfinite().all():
        raise DataError(
            f"{folder}: the student's output is not finite; {kept}. If an earlier checkpoint is "
            "good, remove the newer ones from checkpoints/ and rerun the same command"
        )
    return model


def exchange(fresh: Path, target: Path) -> None:
    """Put `fresh` in the place of `target`, in one step if the system can."""
    if not target.exists():
        fresh.rename(target)
        return
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if (
        swap is None
        or swap(AT_FDCWD, os.fsencode(fresh), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE) != 0
    ):
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)
