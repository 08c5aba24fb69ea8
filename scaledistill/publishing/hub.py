"""Upload an export to the hub, folder by folder.

Inputs: the folder of an export, the name of a repository. Outputs: a list of the files that would
go; on request, their upload. Imports nothing heavy. Not handled here: writing the export
(`publishing.formats`).
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scaledistill.errors import DataError, SettingError, SourceError
from scaledistill.storage.files import no_such_folder

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

log = logging.getLogger(__name__)

README = "README.md"
OWNED = frozenset(
    [
        *("model.safetensors", "export.json", "scaledistill.json", "distill.json"),
        *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
        "config_sentence_transformers.json",
        *("onnx/config.json", "onnx/model.onnx", "onnx/model.onnx.data", "onnx/model_int8.onnx"),
    ]
)
"""Paths that exports write, by form; the model and tokenizer of all forms have the same names."""
OWNED_FOLDER = "0_Transformer/"
"""Where the form sentence-transformers has its model, if another is at the top."""
EXPORT = "scaledistill.json"
"""Each export has it; see `models.export`."""
LICENCES = "apache-2.0, mit, cc-by-4.0, cc-by-sa-4.0, cc-by-nc-4.0, other"


@dataclass(frozen=True)
class Upload:
    """What would be uploaded."""

    repo: str
    export: Path
    folders: dict[str, dict[str, int]]
    """By folder, relative to the export, the root last: sizes in bytes by file name."""
    changes: dict[str, str]
    """The fields of the model card's metadata that would be set first."""
    has_base_model: bool = True
    """Whether the model card then names the teacher."""

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(sum(files.values()) for files in self.folders.values())


def plan_upload(
    export: Path, repo: str, *, licence: str | None = None, base_model: str | None = None
) -> Upload:
    """Check an export and return what would be uploaded; nothing is sent or changed.

    Args:
        licence: required if the model card states none.
        base_model: the teacher's hub name, if the model card lacks it.

    Raises:
        SettingError: `repo` is not a repository's name, or the licence is missing.
        SourceError: `export` is not an export.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise SettingError(
            "repo", repo, "is not a repository", "use name/id, such as your-name/l6-h384"
        ) from None
    if not export.is_dir():
        remedy = "give the folder that `scaledistill export` wrote"
        raise SourceError("export", str(export), f": {no_such_folder(export, remedy)}")
    card = _card(export)
    if not any((export / name).is_file() for name in ("config.json", "onnx/model.onnx")):
        raise SourceError(
            "export", str(export), "has no config.json", "give what `scaledistill export` wrote"
        )
    if not (licence or card.data.get("license")):
        raise SettingError(
            "licence",
            expected=": the model card states none, and neither did the teacher's",
            remedy=f"choose one that teacher and data allow: {LICENCES}",
        )
    wanted = {"license": licence, "base_model": base_model}
    changes = {key: value for key, value in wanted.items() if value and card.data.get(key) != value}
    has_base_model = bool(base_model or card.data.get("base_model"))
    return Upload(repo, export, _files(export), changes, has_base_model)


def upload(planned: Upload, *, private: bool = False) -> str:
    """Create the repository if needed, upload the files, and return its address.

    The model card is changed first as planned. The root, with the model card, comes last; with it,
    files are removed that only an older export in the repository had. A file that the repository
    already has is not sent again, so rerunning resumes.

    Raises:
        DataError: the hub refuses something or cannot be reached; the message has no token.
    """
    from huggingface_hub import HfApi

    if planned.changes:
        from scaledistill.models.card import (
            card_section,
            licence_text,
            write_card_section,
            write_metadata,
        )

        write_metadata(planned.export, **planned.changes)
        if card_section(planned.export, "Licence") is not None:
            text = licence_text(_card(planned.export).data.get("license"))
            write_card_section(planned.export, "Licence", text)
    api = HfApi(library_name="scaledistill")
    with _explained(planned.repo):
        address = api.create_repo(planned.repo, private=private, exist_ok=True)
        sent = {
            f"{folder}/{name}" if folder else name
            for folder, files in planned.folders.items()
            for name in files
        }
        there = api.list_repo_files(planned.repo)
        owned = [path for path in there if path in OWNED or path.startswith(OWNED_FOLDER)]
        old = sorted(set(owned) - sent) if EXPORT in there else []
        if old:
            log.info("removing files of an older export: %s", ", ".join(old))
        for folder, files in planned.folders.items():
            log.info("uploading %s (%d files)", folder or "the files at the top", len(files))
            api.upload_folder(
                repo_id=planned.repo,
                folder_path=planned.export / folder,
                path_in_repo=folder,
                allow_patterns=[glob.escape(name) for name in files],
                delete_patterns=None if folder else [glob.escape(path) for path in old],
                commit_message=f"Upload {folder or 'model card and model'} with scaledistill",
            )
    return str(address)


def _card(export: Path) -> ModelCard:
    """Return the model card of an export.

    Raises:
        SourceError: it has none, or its metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        return ModelCard((export / README).read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 (YAML of any kind)
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(
            "export", str(export), f"has no usable {README} ({reason})", "export it again"
        ) from None


def _files(export: Path) -> dict[str, dict[str, int]]:
    """Return the sizes of the files by folder; hidden ones and links to elsewhere stay out."""
    root = export.resolve()
    found: dict[str, dict[str, int]] = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if hidden or not path.is_file() or not path.resolve().is_relative_to(root):
            continue
        folder = "/".join(parts[:-1])
        found.setdefault(folder, {})[parts[-1]] = path.stat().st_size
    return {folder: found[folder] for folder in sorted(found, key=lambda name: (not name, name))}


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into an error with a remedy, without the token."""
    from huggingface_hub import get_token

    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it raises may state the token)
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = {
            401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "use a token that may write to it, and check its owner's name",
        }.get(status or 0, "check the network and the name, then rerun the same command to resume")
        text = " ".join(str(error).split())
        if token := get_token():
            text = text.replace(token, "<token>")
        # Without the original, whose requests hold the token.
        raise DataError(f"{repo} was not uploaded: {text}; {remedy}") from None
