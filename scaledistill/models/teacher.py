"""Load an encoder from a folder or the hub and run its lower blocks as a frozen teacher.

Inputs: a model's name and a layer. Outputs: a checked `PreTrainedModel` (also the start of a
student that is initialised from a folder), and `Teacher`, which turns token ids into Q, K and V.
Not handled here: sharding a teacher (the engines).

Legend: B sequences, T tokens, D width of one projection.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from scaledistill.data.tokens import TokenInputs
from scaledistill.errors import DataError, Field, SettingError, SourceError, named
from scaledistill.models.architectures import (
    ARCHITECTURES,
    architecture_of,
    build_encoder,
    check_layer,
    encoder_only,
    encoder_options,
    set_depth,
    settle_padding,
)
from scaledistill.models.configs import check_computation, plain_dict
from scaledistill.models.hub import has_file, model_folder
from scaledistill.models.view import QKVView, capture_view
from scaledistill.models.weights import (
    INDEX,
    StoredWeights,
    check_adapter,
    check_cast,
    check_complete,
    check_finite,
    omitted_heads,
    stored_keys,
    weight_files,
)
from scaledistill.relations import QKV
from scaledistill.storage.files import is_path, near_folder, no_such_folder, read_json

logger = logging.getLogger(__name__)

Shard = Callable[[QKVView, Iterable[tuple[str, Tensor]]], nn.Module]
"""Shards a view's weights over the ranks, block by block, and returns the module that runs them.
The weights come in the order of their names. Collective."""
CONFIG_FILES = ("config.json", "adapter_config.json", "*.py", "README.md")
WEIGHT_FILES = (*CONFIG_FILES, "model.safetensors", "model-*-of-*.safetensors", INDEX)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
CONVERSION = (
    "If you trust them, convert them once: AutoModel.from_pretrained({model}, "
    "use_safetensors=False).save_pretrained(new_folder)"
)


def resolve_folder(
    model: str | Path,
    revision: str | None,
    patterns: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return a model's local folder; for a hub name, that of its files matching `patterns`.

    They are downloaded, or taken from `cache_dir`, by default the hub's usual cache.

    Raises:
        SourceError: it is not a folder and the hub does not provide it.
    """
    if Path(model).is_dir():
        return Path(model)
    if is_path(model):
        remedy = "give a model's folder or its hub name"
        raise SourceError("model", str(model), f": {no_such_folder(model, remedy)}")

    try:
        with quiet_transformers():
            return model_folder(str(model), revision, patterns, cache_dir=cache_dir)
    except Exception as error:
        version = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().partition("\n")[0]
        remedy = (
            "correct the name, or download the model where there is a network and give its folder"
        )
        if near := near_folder(model):
            remedy = f"did you mean the folder {near}? Otherwise {remedy}"
        raise SourceError(
            "model",
            str(model),
            f"is not a folder, and the hub gave no such model{version} ({reason})",
            remedy,
        ) from error


def load_config(
    model: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Read a model's config, without weights.

    Raises:
        SettingError: it needs its own Python code and `trust_remote_code` is off, or its
            `model_type` is not supported.
        SourceError: no such model, no `config.json`, or one that cannot be read.
    """
    folder = resolve_folder(model, revision, CONFIG_FILES)
    found = read_json(folder / "config.json") or {}
    if (
        not trust_remote_code
        and "auto_map" in found
        and found.get("model_type") not in CONFIG_MAPPING
    ):
        raise SettingError(
            "model",
            str(model),
            "runs only with Python code of its own, which is refused",
            ("if you trust that code, set ", Field("trust_remote_code"), "=true"),
        )
    with named(model=Field("model", str(model)), config=Field("model", str(model))):
        config = read_config(folder, trust_remote_code)
        architecture_of(config)
    return config


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a folder's config, of any architecture, and reduce it (`models.configs`).

    Raises:
        SourceError: no `config.json`, one that cannot be read, or one that asks for an unsupported
            computation.
    """
    path = folder / "config.json"
    if not path.is_file():
        check_adapter(folder)
        raise SourceError(
            "model",
            expected="has no config.json",
            remedy="give the folder that save_pretrained wrote",
        )
    found = read_json(path) or {}
    model_type = found.get("model_type")
    own_code = trust_remote_code and "AutoConfig" in (found.get("auto_map") or {})
    try:
        with quiet_transformers():
            if own_code or model_type not in CONFIG_MAPPING:
                return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            known = CONFIG_MAPPING[str(model_type)]
            row = ARCHITECTURES.get(str(model_type))
            config = known.from_dict(plain_dict(found, known, row))
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            "model",
            expected=f": its config.json cannot be used ({reason})",
            remedy="fetch the model again",
        ) from error
    config.name_or_path = str(folder)
    # The config is transformers' own, but the model may have code of its own: keep the reference.
    if trust_remote_code and "auto_map" in found:
        config.auto_map = found["auto_map"]
    settle_padding(config)
    if row:
        check_computation(config, row)
    return config


def load_encoder(
    model: str | Path,
    *,
    revision: str | None = None,
    num_layers: int | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load an encoder's first `num_layers` blocks on the CPU, in eval mode, without pooler or head.

    Args:
        model: a folder or a hub name, with weights in safetensors.
        num_layers: the number of blocks; all by default.
        dtype: of the loaded weights; by default the file's own.

    Raises:
        SettingError: see `load_config`; or fewer blocks than `num_layers`.
        SourceError: no safetensors, a damaged or missing file, or a weight that is missing from the
            file or has another shape there.
    """
    config, folder = _locate(model, revision, num_layers, trust_remote_code)
    options = encoder_options(config) if type(config) in MODEL_MAPPING else {}
    try:
        with quiet_transformers():
            encoder, info = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # reported below, by name and with both shapes
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise _not_loaded(model, error) from error
    encoder = encoder_only(encoder)
    needed = {name for name, _ in encoder.named_parameters()}
    wrong: dict[str, tuple[list[int] | None, list[int]]] = {
        name: (None, []) for name in info["missing_keys"] if name in needed
    }
    wrong |= {
        name: (list(found), list(expected))
        for name, found, expected in info["mismatched_keys"]
        if name in needed
    }
    with named(model=Field("model", str(model))):
        check_complete(wrong)
        for key, tensor in encoder.state_dict().items():
            check_finite(key, tensor)
    return encoder


def encoder_on_meta(
    model: str | Path,
    *,
    revision: str | None = None,
    num_layers: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, StoredWeights]:
    """Return the encoder of `load_encoder` on the meta device, and its weights still on disk.

    Only the parameters are on the meta device; buffers are on the CPU.

    Raises:
        SettingError, SourceError: see `load_encoder`; a damaged weight is detected when it is
            read.
    """
    config, folder = _locate(model, revision, num_layers, trust_remote_code)
    options = (
        encoder_options(config)
        if type(config) in MODEL_MAPPING
        else {"trust_remote_code": trust_remote_code}
    )
    stated = config.dtype is not None
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            encoder = encoder_only(
                AutoModel.from_config(config, dtype=config.dtype or torch.float32, **options)
            ).eval()
    except Exception as error:
        raise _not_loaded(model, error) from error
    dtype = encoder.dtype if stated else None
    with named(model=Field("model", str(model))):
        stored = StoredWeights(
            folder,
            encoder,
            prefix=encoder.base_model_prefix,
            row=architecture_of(config),
            dtype=dtype,
        )
    return encoder, stored


def _not_loaded(model: str | Path, error: Exception) -> SourceError:
    reason = " ".join(str(error).split())
    return SourceError("model", str(model), f"cannot be loaded ({reason})", "fetch the model again")


def _locate(
    model: str | Path,
    revision: str | None,
    num_layers: int | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedConfig, Path]:
    """Return a model's config, cut to `num_layers`, and the folder of its weights."""
    config = copy.deepcopy(load_config(model, revision, trust_remote_code))
    if num_layers is not None:
        with named(layer="num_layers"):
            check_layer(num_layers, config.num_hidden_layers)
    folder = resolve_folder(model, revision, WEIGHT_FILES)
    with named(model=Field("model", str(model))):
        check_weight_files(folder, None if Path(model).is_dir() else str(model))
        heads = omitted_weights(folder, config)
    if heads:
        logger.info(
            "%s: weights that an encoder has no use for are left out: %s", model, ", ".join(heads)
        )
    if num_layers is not None:
        set_depth(config, num_layers)
    return config, folder


def omitted_weights(folder: Path, config: PreTrainedConfig) -> list[str]:
    """Check the names of a model's weights, given its full config; return those of its heads.

    Raises:
        SourceError: weights or adapters change what the encoder computes, but it does not read
            them.
    """
    check_adapter(folder)
    # The names of other architectures are unknown here.
    row = ARCHITECTURES.get(config.model_type)
    if type(config) not in MODEL_MAPPING or row is None:
        return []
    try:
        # A copy, because building sets the dtype of the config.
        encoder = build_encoder(copy.deepcopy(config), device="meta")
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise _not_loaded(folder, error) from error
    return omitted_heads(
        stored_keys(folder),
        encoder,
        prefix=encoder.base_model_prefix,
        row=row,
    )


class Teacher(nn.Module):
    """A frozen encoder, cut at a block: token ids in, that block's Q, K and V out.

    It is always in eval mode and never computes gradients.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        layer: int,
        *,
        dtype: torch.dtype | None = None,
        stored: Mapping[str, Tensor] | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Take over `encoder`: freeze its weights and cast them in place.

        The upper layers are freed once the caller releases `encoder`. Collective if `shard` is
        given.

        Args:
            layer: the block whose Q, K and V are returned, counted from 1.
            dtype: the precision to run in; by default that of `encoder`.
            stored: the weights of an `encoder` on the meta device, from `encoder_on_meta`; needs
                `shard`.
            shard: shards them over the ranks.

        Raises:
            DataError: a weight is too large for `dtype`.
        """
        super().__init__()
        self.view = capture_view(encoder, layer)
        module = self.view.module.requires_grad_(False)
        self.config = self.view.config
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        dtype = dtype or encoder.dtype
        if stored is None or shard is None:
            self.sha256 = weights_sha256(module)
            loaded = encoder.dtype
            self.module = module.to(dtype)
            if dtype != loaded:
                for name, tensor in module.state_dict().items():
                    check_cast(name, tensor, loaded)
        else:
            digest, names = hashlib.sha256(), sorted(module.state_dict())
            weights = (
                (name, _cast(_hashed(digest, name, stored[name]), name, dtype)) for name in names
            )
            module.eval()
            self.module = shard(self.view, weights)
            self.sha256 = digest.hexdigest()
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode for any `mode`: a teacher has no dropout."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, tokens: TokenInputs, **more: Any) -> QKV:
        """Return Q, K and V, each [B, T, D] in the teacher's dtype.

        `more` are further inputs of the model.
        """
        return self.view(tokens, self.module, **more)


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's weights: names, dtypes, shapes and bytes, in the order of the names.

    `Teacher` hashes the weights as they came from the file, before they are cast. So the hash
    depends neither on the precision, the file's layout and the head, nor on the layers above the
    captured one or the teacher's placement.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        _hashed(digest, name, tensor)
    return digest.hexdigest()


def _hashed(digest: Any, name: str, tensor: Tensor) -> Tensor:
    """Add a tensor to a digest, and return the tensor."""
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return tensor


def _cast(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    return check_cast(name, tensor.to(dtype), tensor.dtype)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' reports and progress bars; what matters in them is checked here."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_weight_files(folder: Path, hub_name: str | None = None) -> None:
    """Raise SourceError unless every weight file of a model's folder is there and is safetensors.

    No file is opened. Of the model `hub_name`, the folder has no other files of weights.
    """
    check_adapter(folder)
    try:
        names = weight_files(folder)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SourceError(
            "model",
            expected=f": {INDEX} is not a weight index ({error})",
            remedy="fetch the model again",
        ) from error
    if foreign := [
        name for name in names if not name.endswith(".safetensors") or Path(name).name != name
    ]:
        raise SourceError(
            "model",
            expected=f": {INDEX} names {foreign[0]!r}",
            remedy="expected safetensors files in the same folder",
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED):
            raise SourceError(
                "model",
                expected=f"has pickled weights only ({pickled[0]}), which can run code when loaded",
                remedy=f"expected {missing[0]}. {CONVERSION.format(model='folder')}, and copy the "
                "tokenizer there as well (tokenizer*, vocab*, merges.txt, *.model, "
                "special_tokens_map.json, added_tokens.json)",
            )
        if hub_name and has_file(hub_name, folder, missing[0]):
            raise SourceError(
                "model",
                expected=f"lacks {missing[0]} in the hub's cache ({folder})",
                remedy="rerun where there is a network, without HF_HUB_OFFLINE, to download it",
            )
        if hub_name and not (folder / INDEX).is_file():
            raise SourceError(
                "model",
                expected=f"has no {missing[0]} on the hub",
                remedy="it may have pickled weights, which can run code when loaded. "
                f"{CONVERSION.format(model=repr(hub_name))}, save its tokenizer there likewise, "
                "and give that folder",
            )
        raise SourceError(
            "model",
            expected=f"lacks {missing[0]}",
            remedy="give a folder with all of its safetensors files",
        )
