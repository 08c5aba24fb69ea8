"""A run's configuration: its schema, and loading it from a file with `--set`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaledistill.config.load import load_config as load_config
    from scaledistill.config.load import parse_config as parse_config
    from scaledistill.config.schema import DistillConfig as DistillConfig

# Imported on first use: pydantic and the schema take longer than all else that --help needs.
_HOMES = {"DistillConfig": "schema", "load_config": "load", "parse_config": "load"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
