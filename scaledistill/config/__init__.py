"""A run's configuration: its schema, and loading it from JSON with `--set`."""

from scaledistill.config.load import load_config, parse_config
from scaledistill.config.schema import DistillConfig

__all__ = ["DistillConfig", "load_config", "parse_config"]
