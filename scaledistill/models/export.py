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
from typing import cast

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
from scaledistill.models.architectures import (
    architecture_of,
    build_encoder,
    encoder_options,
    takes_token_types,
)
from scaledistill.models.teacher import load_encoder, quiet_transformers, resolve_folder
from scaledistill.models.view import capture_view
from scaledistill.storage.files import read_json, set_default_mode, sync, write_bytes, write_json

INIT_TEXT = {
    "random": "their random initialisation",
    "teacher": "the weights cut from the teacher's layers at the start",
}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)
UNTRAINED = """\
The loss uses query, key and value of the last layer. The parameters above them, {parameters:.1f} M,
got no gradient and hold {init}; fine-tuning trains them:

{names}"""
ALL_TRAINED = """\
None: the loss was taken from a query, key and value projection after the last layer, which is not \
part of this
model."""
SHARED = "None: all layers are the same block, whose parameters the loss trains."
CARD = """\
---
library_name: transformers
pipeline_tag: feature-extraction
tags: [distillation, minilmv2, scaledistill]
---

# {name}

A {model_type} encoder of {num_layers} layers × {hidden_size} \
({heads} heads, FFN {intermediate_size}),
{parameters:.1f} M parameters, distilled with MiniLMv2's self-attention relation loss
([arXiv 2012.15828](https://arxiv.org/abs/2012.15828)) by scaledistill.

| | |
|---|---|
{facts}

## Use

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}"{options})
hidden = model(**tokenizer("some text", return_tensors="pt")).last_hidden_state
```

The weights are fp32. There is no pooler and no head: fine-tune it for a task, with
`AutoModelForSequenceClassification` and the like.

## Untrained parts

{untrained}

## Licence

None is stated here: it depends on the teacher's and on the data's. State yours before you \
publish this.
"""


def export_student(
    folder: str | Path,
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    *,
    tap: str = "last",
    tokenizer_source: str | Path,
    revision: str | None = None,
    card: Mapping[str, object],
    check: Callable[[PreTrainedModel], None] = lambda model: None,
) -> Path:
    """Write a student into `folder`, replacing what is there, and return the folder.

    Only one rank calls this. The export is written to a folder beside `folder`, read back with
    `AutoModel`, compared bit for bit and run once. Then the two folders are exchanged in one step,
    so that there is a good export at every moment. After a failure the old one is still there.

    Args:
        folder: ends up with config.json, model.safetensors, the tokenizer without truncation or
            padding, and README.md.
        config: the student's; written unchanged.
        state: every parameter of the full student by its name, fp32.
        tap: the student's tap, "last" or "extra", for the model card.
        tokenizer_source: folder or hub name (at `revision`) of the tokenizer: the teacher's.
        card: facts for the model card, in order, label to value; None leaves one out. "init", how
            the student was initialised, is required.
        check: called with the model that was read back, in eval mode, before it is put in place; if
            it raises, the old export stays.

    Raises:
        DataError: the tokenizer cannot be loaded, or the model that was read back differs from the
            state or gives no finite output.
        OSError: the disk is full or not writable.
        ValueError: the state is not that of the config, or not fp32.
    """
    target = Path(os.path.realpath(folder))  # follow a link, so that it stays a link
    _check_state(config, state)
    fresh = target.with_name(f".{target.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        config.save_pretrained(fresh)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        set_default_mode(fresh / "model.safetensors")
        _save_tokenizer(tokenizer_source, revision, fresh, takes_token_types(config))
        (fresh / "README.md").write_text(
            _card_text(Path(folder).name, config, tap, card), encoding="utf-8"
        )
        kept = "the old export is kept" if target.exists() else "nothing was exported"
        check(_check_export(fresh, weights, kept))
        for path in (*fresh.iterdir(), fresh):
            sync(path)
        _exchange(fresh, target)
        sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Path(folder)


def write_card_section(folder: Path, title: str, text: str) -> None:
    """Insert a section into an export's model card, before the licence.

    It replaces a section of the same title.
    """
    path = folder / "README.md"
    sections = path.read_text(encoding="utf-8").split("\n## ")
    kept = [section for section in sections if not section.startswith(f"{title}\n")]
    place = next(
        (i for i, section in enumerate(kept) if section.startswith("Licence\n")), len(kept)
    )
    kept.insert(place, f"{title}\n\n{text.strip()}\n")
    write_bytes(path, "\n## ".join(kept).encode())


def untrained_parameters(config: PreTrainedConfig) -> list[str]:
    """Return the names of a student's parameters above its last block's Q, K and V.

    They get no gradient in training.
    """
    student = build_encoder(config, device="meta")
    view = capture_view(student, config.num_hidden_layers)
    return sorted(set(student.state_dict()) - set(view.module.state_dict()))


def _card_text(name: str, config: PreTrainedConfig, tap: str, card: Mapping[str, object]) -> str:
    student = build_encoder(config, device="meta")
    sizes = {key: tensor.numel() for key, tensor in student.state_dict().items()}
    init, names = str(card["init"]), untrained_parameters(config)
    untrained = UNTRAINED.format(
        parameters=sum(sizes[key] for key in names) / 1e6,
        names="\n".join(f"- `{key}`" for key in names),
        init=INIT_TEXT.get(init, f"the weights of the model it started from, `{init}`"),
    )
    if tap == "extra":
        untrained = ALL_TRAINED
    if not names:
        untrained = SHARED
    return CARD.format(
        name=name,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate_size=getattr(config, architecture_of(config).ffn_width),
        parameters=sum(sizes.values()) / 1e6,
        facts="\n".join(
            f"| {label} | {value} |" for label, value in card.items() if value is not None
        ),
        options="".join(f", {option}={value}" for option, value in encoder_options(config).items()),
        untrained=untrained,
    )


def _check_state(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> None:
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


def _save_tokenizer(
    source: str | Path, revision: str | None, folder: Path, token_types: bool
) -> None:
    """Write the tokenizer so that plain `AutoTokenizer` gives the ids of the source's files.

    Args:
        token_types: whether it returns token type ids too.

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
        return_token_types(tokenizer, token_types)
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        written = read_json(path) or {}
        # transformers 4 does not know this class name.
        if written.get("tokenizer_class") == "TokenizersBackend":
            write_json(path, written | {"tokenizer_class": "PreTrainedTokenizerFast"})
        read = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder))
        if not gives_same_ids(read, tokenizer):
            raise DataError(
                f"transformers does not read the tokenizer of {source} back as its tokenizer.json "
                'says; set tokenizer_class to "PreTrainedTokenizerFast" in its '
                "tokenizer_config.json"
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


def _exchange(fresh: Path, target: Path) -> None:
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
