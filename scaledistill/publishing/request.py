"""What an export is asked to be, and the checks that need no model.

Inputs: options. Outputs: errors. Imports nothing heavy, so that mistakes are found at once. Not
handled here: reading the student (`publishing.source`), writing it (`publishing.formats`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaledistill.errors import ConfigError, SettingError, SourceError, did_you_mean, near_miss
from scaledistill.storage.files import no_such_folder

SENTENCE = "sentence-transformers"
NEEDS: dict[str, tuple[str, ...]] = {
    "transformers": (),
    SENTENCE: ("sentence_transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
}
"""The packages that each format needs, of the extra "export"."""
FORMATS = tuple(NEEDS)


@dataclass(frozen=True)
class Options:
    """What to write, and what to measure on."""

    formats: tuple[str, ...]
    num_layers: int | None = None
    """Keep the first blocks only, in every form; by default, forms with vectors leave out a last
    block whose output was not trained."""
    data_folder: Path | None = None
    """GLUE files, for the STS-B probe."""
    sample: Path | None = None
    """A text file with a sentence per line, for the comparison with PyTorch."""
    licence: str | None = None
    base_model: str | None = None
    glue: Path | None = None
    """An output folder of the GLUE grid."""
    glue_model: str | None = None
    """The student's name there."""


def check_source(folder: Path) -> None:
    """Raise SourceError unless there is such a folder."""
    if not folder.is_dir():
        remedy = "give the folder of a run, a checkpoint or an export"
        raise SourceError("source", str(folder), f": {no_such_folder(folder, remedy)}")


def check_formats(formats: Sequence[str]) -> None:
    """Raise ConfigError unless all formats exist and their packages are installed."""
    for name in formats:
        if name not in NEEDS:
            near = did_you_mean(near_miss(name, NEEDS))
            raise SettingError("formats", name, f"is unknown{near}", f"use {', '.join(NEEDS)}")
        missing = [one for one in NEEDS[name] if importlib.util.find_spec(one) is None]
        if missing:
            raise ConfigError(
                f"--format {name} needs {' and '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed; "
                "pip install 'scaledistill[export]'"
            )


def check_output(folder: Path, *, force: bool) -> None:
    """Raise SettingError if `folder` exists, unless it is an older export and `force` is set.

    Names that are not UTF-8, which tokenizers cannot write, are refused too.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(folder).decode(errors="replace")
        raise SettingError("output", shown, "is not UTF-8", "name another folder") from None
    if not folder.exists():
        return
    if not force:
        raise SettingError(
            "output", str(folder), "exists", "name another folder, or replace it with --force"
        )
    from scaledistill.models.export import EXPORT  # here, because it loads torch

    if not (folder / EXPORT).is_file():
        raise SettingError(
            "output",
            str(folder),
            f"has no {EXPORT}, so it is not an export and --force does not replace it",
            "name another folder",
        )
