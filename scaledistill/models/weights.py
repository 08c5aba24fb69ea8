"""The weights in a model folder under their names in the encoder, each read from its safetensors file when asked for.

Enters: a folder and an encoder without weights. Leaves: a mapping of names to tensors on the CPU, which holds none of
them. `models.teacher` loads models whole, by transformers' own code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scaledistill.errors import DataError

INDEX = "model.safetensors.index.json"
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # in BERT's first files


def weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weight files, as its index or the usual name says; they may be missing.

    Raises:
        ValueError, KeyError, AttributeError, TypeError: the index is not one.
    """
    if not (folder / "model.safetensors").is_file() and (folder / INDEX).is_file():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return ["model.safetensors"]


class StoredWeights(Mapping[str, Tensor]):
    """Weights by name in an encoder: read when asked for, in one dtype, and not kept."""

    def __init__(self, folder: Path, encoder: nn.Module, *, prefix: str, dtype: torch.dtype | None, model: str) -> None:
        """Find each parameter of `encoder` in the folder's files.

        Args:
            encoder: may be on the meta device; its buffers are not looked for.
            prefix: what its names begin with inside a task model.
            dtype: of the tensors handed out; that of the first weight in the files unless said.
            model: names the model in messages.

        Raises:
            DataError: a file is damaged, or lacks a weight or has it in another shape.
        """
        self._model = model
        stored: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, list[int]] = {}
        for path in (folder / name for name in weight_files(folder)):
            try:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a dictionary
                        name = key.removeprefix(f"{prefix}.")
                        for old, new in OLD_NAMES.items():
                            name = name.removesuffix(old) + new if name.endswith(old) else name
                        stored[name] = path, key
                        shapes[name] = file.get_slice(key).get_shape()
            except (SafetensorError, OSError) as error:
                raise self._damaged(path, error) from error
        expected = {name: list(parameter.shape) for name, parameter in encoder.named_parameters()}
        check_complete({name: (shapes.get(name), shape) for name, shape in expected.items()}, model)
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
        path, key = self._stored[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> DataError:
        return DataError(f"{self._model}: {path.name} cannot be read ({error}); fetch the model again")


def check_complete(shapes: Mapping[str, tuple[list[int] | None, list[int]]], model: str) -> None:
    """Raise DataError unless, of each weight, the shape found (None: no such weight) is the one expected."""
    wrong = [
        f"{name} (not in the file)" if found is None else f"{name} (file: {found}, config: {expected})"
        for name, (found, expected) in sorted(shapes.items(), key=lambda item: (item[1][0] is not None, item[0]))
        if found != expected
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise DataError(
            f"{model} lacks weights that are needed: {', '.join(wrong[:4])}{more}; give a complete model whose "
            "config.json belongs to its weights"
        )
