"""Read a model folder's weights one by one, under their names in the encoder.

Inputs: a folder and an encoder without weights. Outputs: a mapping of names to CPU tensors that
reads each from its safetensors file on access and keeps none. Not handled here: loading whole
models by transformers' own code (`models.teacher`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scaledistill.errors import Field, SourceError
from scaledistill.models.architectures import Architecture

INDEX = "model.safetensors.index.json"
# The first BERT checkpoints use these names.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

# Buffers that older versions stored and that the model computes itself.
HARMLESS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias)$")
HEADS = (
    "cls",
    "lm_head",
    "classifier",
    "qa_outputs",
    "score",
    "discriminator_predictions",
    "generator_predictions",
)
ADAPTER = re.compile(
    r"(^|[._])(lora|dora|lokr|loha|hada|ia3|oft|boft|vera|adapters?|prefix|prompt|base_layer"
    r"|modules_to_save|original_module)([._]|$)"
)
QUANTISED = re.compile(
    r"(\.SCB|\.weight_format|\.qweight|\.qzeros|\.scales|\.g_idx|_scale|_scale_inv|_zero_point"
    r"|\.weight_packed|\.absmax|\.quant_map|\.quant_state\..*)$"
)
WRAPPER = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
CHANGING = re.compile(f"{ADAPTER.pattern}|{QUANTISED.pattern}|distance_embedding|{WRAPPER.pattern}")
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
UNQUANTISED = "give the model before quantisation, in fp32, bf16 or fp16"
UNWRAPPED = (
    "save the model inside it with save_pretrained: model.module (DistributedDataParallel), "
    "model._orig_mod (torch.compile), merge_and_unload() (PEFT), self.model (a module of your own)"
)


def weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weight files, from its index or the usual name.

    The files may be missing.

    Raises:
        ValueError, KeyError, AttributeError, TypeError: the index is not a weight index.
    """
    if not (folder / "model.safetensors").is_file() and (folder / INDEX).is_file():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return ["model.safetensors"]


def omitted_heads(
    keys: Mapping[str, str], encoder: nn.Module, *, prefix: str, row: Architecture
) -> list[str]:
    """Return the first name parts of heads and poolers, which an encoder does not need.

    Args:
        keys: the names in the files, with safetensors' names of their dtypes.
        encoder: the full one of its config; may be on the meta device.
        prefix: the first part of the encoder's names inside a task model.
        row: of its architecture.

    Raises:
        SourceError: other weights do not belong to the encoder, so that it would compute something
            else without them.
    """
    parameters = {name for name, _ in encoder.named_parameters()}
    known = parameters | {name for name, _ in encoder.named_buffers()}
    unused = (*row.dropped, *row.unused_weights)
    own = {key for key in keys if encoder_names(key, prefix, row)[0] in parameters}
    if coded := sorted(key for key in own if keys[key] not in FLOATS):
        raise SourceError(
            "model",
            expected=f"is quantised: {coded[0]} is stored as {keys[coded[0]]}",
            remedy=UNQUANTISED,
        )
    if not own and (wrapper := _wrapper(keys, parameters, prefix, row)):
        raise SourceError(
            "model",
            expected=f"was saved inside a wrapper: the names of its weights begin with {wrapper!r}",
            remedy=UNWRAPPED,
        )
    children = {name for name, _ in encoder.named_children()}
    heads, foreign = set(), []
    for key in sorted(keys):
        name = encoder_names(key, prefix, row)[0]
        root = name.partition(".")[0]
        if name in known or HARMLESS.search(name):
            continue
        if (
            root == "pooler"
            or root in unused
            or name in unused
            or (root in HEADS and not key.startswith(f"{prefix}."))
        ):
            heads.add(root)
        elif key.startswith(f"{prefix}.") or root in children or CHANGING.search(key):
            foreign.append(key)
        else:
            heads.add(root)
    if not foreign:
        return sorted(heads)
    names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
    what = "has weights that its encoder has no place for"
    remedy = (
        "give a model that transformers loads whole, with the config.json that belongs to its "
        "weights"
    )
    if any(QUANTISED.search(key) for key in foreign):
        what, remedy = "is quantised", UNQUANTISED
    elif any(ADAPTER.search(key) for key in foreign):
        what = "has adapters that are not merged into its weights"
        remedy = "merge them (PEFT: merge_and_unload), then save_pretrained"
    elif any("distance_embedding" in key for key in foreign):
        what, remedy = (
            "has relative positions, which transformers no longer computes",
            "give another model",
        )
    elif all(WRAPPER.search(key) for key in foreign):
        what, remedy = "was saved inside a wrapper", UNWRAPPED
    raise SourceError(
        "model",
        expected=f"{what}: {names}",
        remedy=f"it would compute something else without them: {remedy}",
    )


def _wrapper(
    keys: Iterable[str], parameters: set[str], prefix: str, row: Architecture
) -> str | None:
    """Return what precedes the encoder's own names in a file; None if it lacks them."""
    for key in sorted(keys):
        parts = key.split(".")
        for start in range(1, len(parts)):
            if encoder_names(".".join(parts[start:]), prefix, row)[0] in parameters:
                return ".".join(parts[:start]) + "."
    return None


def encoder_names(key: str, prefix: str, row: Architecture) -> list[str]:
    """Return the encoder's name for a weight in a file, or three that share its rows."""
    name = key.removeprefix(f"{prefix}.")
    for pattern, replacement in row.stored_names:
        name = re.sub(pattern, replacement, name)
    if row.stored_fused and f".{row.stored_fused}." in name:
        return [name.replace(row.stored_fused, path) for path in row.projections]
    for old, new in OLD_NAMES.items():
        if name.endswith(old):
            return [name.removesuffix(old) + new]
    return [name]


def stored_keys(folder: Path) -> dict[str, str]:
    """Return the names of all weights in a folder's files, with safetensors' dtype names.

    Raises: SourceError if a file cannot be read.
    """
    keys: dict[str, str] = {}
    for path in (folder / name for name in weight_files(folder)):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    keys[key] = str(file.get_slice(key).get_dtype())
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return keys


def _damaged(path: Path, error: Exception) -> SourceError:
    return SourceError(
        "model", expected=f": {path.name} cannot be read ({error})", remedy="fetch the model again"
    )


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity; the host waits for its device."""
    return not (tensor.is_floating_point() and tensor.numel()) or all(
        x.isfinite() for x in tensor.aminmax()
    )


def check_cast(name: str, tensor: Tensor, stored: torch.dtype) -> Tensor:
    """Return a weight that was cast from the finite dtype `stored`.

    Raises: SourceError if it overflowed.
    """
    if not is_finite(tensor):
        before, now = (str(dtype).removeprefix("torch.") for dtype in (stored, tensor.dtype))
        raise SourceError(
            "model",
            expected=f": its weight {name} is finite in {before}, but not in {now}, whose maximum "
            f"is {torch.finfo(tensor.dtype).max:g}",
            remedy=("set ", Field("dtype"), ' to "bf16" or "fp32"'),
        )
    return tensor


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """Return a weight.

    Raises: SourceError if it has values that are not finite.
    """
    if not is_finite(tensor):
        raise SourceError(
            "model",
            expected=f": its weight {name} has values that are not finite (NaN or infinite) in "
            f"{tensor.dtype}",
            remedy="fetch the model again, or take an earlier checkpoint of it",
        )
    return tensor


class StoredWeights(Mapping[str, Tensor]):
    """An encoder's weights by name: read on access, in one dtype, and not kept."""

    def __init__(
        self,
        folder: Path,
        encoder: nn.Module,
        *,
        prefix: str,
        row: Architecture,
        dtype: torch.dtype | None,
    ) -> None:
        """Locate each parameter of `encoder` in the folder's files.

        Args:
            encoder: may be on the meta device; its buffers are not looked up.
            prefix: the first part of the encoder's names inside a task model.
            row: of its architecture.
            dtype: of the returned tensors; by default that of the first weight in the files.

        Raises:
            SourceError: a file is damaged, lacks a weight or has it in another shape.
        """
        stored: dict[str, tuple[Path, str, slice]] = {}
        shapes: dict[str, list[int]] = {}
        for path in (folder / name for name in weight_files(folder)):
            try:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a dictionary
                        shape = file.get_slice(key).get_shape()
                        names = encoder_names(key, prefix, row)
                        for part, name in enumerate(names):
                            rows = slice(None)
                            if len(names) > 1:
                                share = shape[0] // len(names)
                                rows = slice(part * share, (part + 1) * share)
                                shapes[name] = [share, *shape[1:]]
                            else:
                                shapes[name] = shape
                            stored[name] = path, key, rows
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
        expected = {name: list(parameter.shape) for name, parameter in encoder.named_parameters()}
        check_complete({name: (shapes.get(name), shape) for name, shape in expected.items()})
        self._stored = {name: stored[name] for name in sorted(expected)}
        self.dtype = dtype or next(
            tensor.dtype for tensor in map(self._read, self._stored) if tensor.is_floating_point()
        )

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def _read(self, name: str) -> Tensor:
        path, key, rows = self._stored[name]
        try:
            with safe_open(path, "pt") as file:
                whole = rows == slice(None)
                tensor = file.get_tensor(key) if whole else file.get_slice(key)[rows]
                return check_finite(name, tensor)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def check_complete(shapes: Mapping[str, tuple[list[int] | None, list[int]]]) -> None:
    """Raise SourceError unless each weight has the expected shape.

    `shapes` maps a name to the shape in the file (None: no such weight) and the expected one.
    """
    wrong = [
        f"{name} (not in the file)"
        if found is None
        else f"{name} (file: {found}, config: {expected})"
        for name, (found, expected) in sorted(
            shapes.items(), key=lambda item: (item[1][0] is not None, item[0])
        )
        if found != expected
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise SourceError(
            "model",
            expected=f"lacks weights that are needed: {', '.join(wrong[:4])}{more}",
            remedy="give a complete model whose config.json belongs to its weights",
        )


def check_adapter(folder: Path) -> None:
    """Raise SourceError if a model's folder has an adapter; adapters are not read."""
    if not (folder / "adapter_config.json").is_file():
        return
    alone = not any(folder.glob("model*.safetensors"))
    what = "is an adapter without its model" if alone else "has an adapter beside its weights"
    raise SourceError(
        "model",
        expected=f"{what} (adapter_config.json), which is not read",
        remedy="merge it (PEFT: merge_and_unload), save_pretrained, and give that folder",
    )
