"""Fine-tune and score models from Python, with bertdistiller's function names; see `glue.api`."""

from scaledistill.glue.api import create_summary_table, evaluate

__all__ = ["create_summary_table", "evaluate"]
