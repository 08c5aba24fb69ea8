"""The model card of an export: README.md with metadata that the hub reads.

Inputs: a student's config, the facts of its run, later its scores. Outputs: the card's text, or a
changed README.md. Not handled here: the other files of an export (`models.export`), measuring.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from scaledistill.models.architectures import (
    architecture_of,
    build_encoder,
    encoder_options,
    key_value_heads,
    set_depth,
)
from scaledistill.models.view import capture_view
from scaledistill.storage.files import is_path, write_bytes

README = "README.md"
RELATION = "finetune"
"""The hub knows "finetune", "adapter", "merge" and "quantized"; the tags say "distillation"."""
TAGS = ("distillation", "minilmv2", "scaledistill")
INIT_TEXT = {
    "random": "their random initialisation",
    "teacher": "the weights cut from the teacher's layers at the start",
}
UNTRAINED = (
    "The loss uses query, key and value of the last layer, so the parameters above them, "
    "{parameters:.1f} M, got no gradient and hold {init}; fine-tuning trains them."
)
UNTRAINED_NORM = (
    "Only the norm after the last layer got no gradient, and holds {init}; fine-tuning trains it."
)
ALL_TRAINED = (
    "None: the loss was taken from a query, key and value projection after the last layer, \
which is not part of this model."
)
SHARED = "None: all layers are the same block, whose parameters the loss trains."
NO_LICENCE = """\
None is stated here: it depends on the teacher's and on the data's. State yours before you \
publish this."""
LICENCE = "{license}. Check that the licences of the teacher and of the training data allow it."
CARD = """\
# {name}

A {model_type} {kind} of {num_layers} layers × {hidden_size} \
({heads}, FFN {intermediate_size}),
{parameters:.1f} M parameters, distilled with MiniLMv2's self-attention relation loss
([arXiv 2012.15828](https://arxiv.org/abs/2012.15828)) by scaledistill.

| | |
|---|---|
{facts}

## Use

{use}

## Untrained parts

{untrained}

## Licence

{licence}
"""
USE = """\
```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}"{options})
hidden = model(**tokenizer("some text", return_tensors="pt")).last_hidden_state
```

The weights are fp32. There is no pooler and no head: fine-tune it for a task, with
`AutoModelForSequenceClassification` and the like."""


def card_text(
    name: str,
    config: PreTrainedConfig,
    facts: Mapping[str, object],
    metadata: Mapping[str, Any],
    *,
    tap: str | None,
) -> str:
    """Return the text of a student's model card, with its metadata.

    Args:
        facts: the table of the card, label to value; None leaves one out. "init" is required.
        metadata: further fields of `ModelCardData`, such as `base_model` and `license`.
        tap: "last" if the last block was trained up to its query, key and value only, "extra" if it
            was trained whole; None if the model is no student.
    """
    student = build_encoder(config, device="meta")
    sizes = {key: tensor.numel() for key, tensor in student.state_dict().items()}
    text = CARD.format(
        name=name,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        kind="decoder" if architecture_of(config).is_causal(config) else "encoder",
        heads=_heads_text(config),
        intermediate_size=getattr(config, architecture_of(config).ffn_width),
        parameters=sum(sizes.values()) / 1e6,
        facts="\n".join(
            f"| {label} | {value} |" for label, value in facts.items() if value is not None
        ),
        use=use_text(name, config),
        untrained=_untrained_text(config, sizes, str(facts["init"]), tap),
        licence=licence_text(metadata.get("license")),
    )
    data = ModelCardData(
        **{
            "library_name": "transformers",
            "pipeline_tag": "feature-extraction",
            "tags": list(TAGS),
            "base_model_relation": RELATION if metadata.get("base_model") else None,
            **metadata,
        }
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _heads_text(config: PreTrainedConfig) -> str:
    heads, shared = config.num_attention_heads, key_value_heads(config)
    own = "" if shared == heads else f", {shared} of keys and values"
    return f"{heads} heads{own}"


def use_text(name: str, config: PreTrainedConfig) -> str:
    """Return how the transformers model `name` is loaded."""
    options = "".join(f", {option}={value}" for option, value in encoder_options(config).items())
    return USE.format(name=name, options=options)


def licence_text(licence: str | None) -> str:
    """Return the section on the licence, None if it is not known."""
    return LICENCE.format(license=licence) if licence else NO_LICENCE


def untrained_parameters(config: PreTrainedConfig, tap: str = "last") -> list[str]:
    """Return the names of a student's parameters that get no gradient in training.

    With tap "last" these are the ones above its last block's query, key and value; with "extra"
    the norm after the last block, if the architecture has one.
    """
    student = build_encoder(config, device="meta")
    tapped, layer = student, config.num_hidden_layers
    if tap == "extra":
        deeper = copy.deepcopy(config)
        set_depth(deeper, layer + 1)
        tapped, layer = build_encoder(deeper, device="meta"), layer + 1
    trained = capture_view(tapped, layer).module.state_dict()
    return sorted(set(student.state_dict()) - set(trained))


def teacher_metadata(model: str, folder: Path | None) -> dict[str, Any]:
    """Return what a student's card takes over from its teacher: name, licence and languages.

    Args:
        model: the teacher's hub name or folder.
        folder: where its files are, if known. A folder in the hub's cache gives the name.
    """
    found: dict[str, Any] = {}
    local = is_path(model) or Path(model).is_dir()
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", f"{Path(model).resolve()}/")
    if cached:
        found["base_model"] = f"{cached[1]}/{cached[2]}"
    elif not local:
        found["base_model"] = model
    card = read_card(folder or Path(model))
    if card is not None:
        for key in ("license", "license_name", "license_link", "language"):
            if value := card.data.get(key):
                found[key] = value
    return found


def read_card(folder: Path) -> ModelCard | None:
    """Return a folder's model card; None if it has no readable one."""
    try:
        text = (folder / README).read_text(encoding="utf-8")
        card = ModelCard(text, ignore_metadata_errors=True)
        # YAML 1.1 takes `no`, Norwegian, for false.
        language = card.data.get("language")
        if isinstance(language, list):
            card.data["language"] = ["no" if one is False else one for one in language]
        elif language is False:
            card.data["language"] = "no"
        return card
    except Exception:  # noqa: BLE001 (someone else's file: YAML may fail in many ways)
        return None


def restate(metadata: Any, **fields: Any) -> None:
    """Set fields of a card's metadata; another licence removes the name and link of the former."""
    if fields.get("license", metadata.get("license")) != metadata.get("license"):
        for key in ("license_name", "license_link"):
            metadata.pop(key, None)
    for key, value in fields.items():
        metadata[key] = value


def write_metadata(folder: Path, **fields: Any) -> None:
    """Set fields of the metadata in an export's model card; None removes one."""
    card = read_card(folder)
    if card is None:
        card = ModelCard(f"---\ntags: []\n---\n\n# {folder.name}\n")
    restate(card.data, **fields)
    if card.data.get("base_model") and not card.data.get("base_model_relation"):
        card.data["base_model_relation"] = RELATION
    # huggingface_hub keeps the line breaks of the text and writes the metadata anew.
    body = card.text.lstrip("\n")
    write_bytes(folder / README, f"---\n{card.data.to_yaml()}\n---\n\n{body}".encode())


def write_results(folder: Path, name: str, results: Sequence[EvalResult]) -> None:
    """Add results to the `model-index` of an export's card; equal entries get the new value."""
    card = read_card(folder)
    kept = list((card.data.get("eval_results") if card else None) or [])
    kept = [one for one in kept if not any(one.is_equal_except_value(new) for new in results)]
    write_metadata(folder, model_name=name, eval_results=[*kept, *results])


def write_card_section(folder: Path, title: str, text: str) -> None:
    """Write a section of an export's model card.

    It takes the place of a section of the same title, or else that before the licence.
    """
    path = folder / README
    sections = path.read_text(encoding="utf-8").split("\n## ")
    section = f"{title}\n\n{text.strip()}\n"
    titles = [section.partition("\n")[0] for section in sections]
    if title in titles[1:]:
        sections[titles.index(title, 1)] = section
    else:
        place = titles.index("Licence", 1) if "Licence" in titles[1:] else len(sections)
        sections.insert(place, section)
    write_bytes(path, "\n## ".join(sections).encode())


def card_section(folder: Path, title: str) -> str | None:
    """Return the text of a section of a folder's model card; None if it has none."""
    card = read_card(folder)
    for section in (card.text if card else "").split("\n## ")[1:]:
        found, _, text = section.partition("\n")
        if found == title:
            return text.strip()
    return None


def _untrained_text(
    config: PreTrainedConfig, sizes: Mapping[str, int], init: str, tap: str | None
) -> str:
    names = untrained_parameters(config, tap) if tap else []
    if not names:
        return SHARED if architecture_of(config).repeats_block else ALL_TRAINED
    text = UNTRAINED if tap == "last" else UNTRAINED_NORM
    return text.format(
        parameters=sum(sizes[key] for key in names) / 1e6,
        init=INIT_TEXT.get(init, f"the weights of the model it started from, `{init}`"),
    )
