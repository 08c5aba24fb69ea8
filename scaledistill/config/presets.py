"""The presets and launchers that come with the package.

Inputs: names. Outputs: paths and one-line descriptions. An installed package has them in
`templates`; a clone, or an editable install of one, in its folders configs/ and launch/. Not
handled here: writing them for the user (`cli.init`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from scaledistill.errors import ConfigError, DataError, did_you_mean, near_miss

PACKAGE = Path(__file__).resolve().parents[1]
CLONE = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None
"""The repository, if the package is used from a clone of it."""


def templates(name: Literal["configs", "launch"]) -> Path:
    """Return the folder of the presets or launchers.

    Raises:
        DataError: the installation lacks it.
    """
    folder = (CLONE or PACKAGE / "templates") / name
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: this installation is incomplete; install it again")
    return folder


def presets() -> dict[str, Path]:
    """Return the presets' files by name."""
    return {path.stem: path for path in sorted(templates("configs").glob("*.json"))}


def find_preset(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        ConfigError: there is none of this name.
    """
    known = presets()
    if name not in known:
        hint = did_you_mean(near_miss(name, known)) or f"; there are {', '.join(known)}"
        raise ConfigError(f"--preset {name}: no such preset{hint}")
    return known[name]


def read_preset(path: Path) -> dict[str, Any]:
    """Return the settings in a preset's file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def summary(tree: dict[str, Any]) -> str:
    """Describe a preset in one line: teacher, students, batch, length, engine."""
    teacher, train, engine = tree["teacher"], tree["train"], tree.get("engine", {})
    sizes = [f"{one['num_layers']}×{one['hidden_size']}" for one in tree["students"].values()]
    parts = [
        f"{Path(teacher['model']).name} layer {teacher['layer']} → {', '.join(sizes)}",
        f"{train['global_batch_size']}×{tree['data']['sequence_length']} tokens",
        f"{train['max_steps']:,} steps",
    ]
    zero = engine.get("deepspeed", {}).get("zero_optimization", {})
    if "offload_optimizer" in zero:
        parts.append("optimizer state in host memory")
    return ", ".join(parts)
