"""Fine-tuning and scoring from Python, under the names that bertdistiller's users know; see
`glue.api`.
"""

from scaledistill.glue.api import create_summary_table, evaluate

__all__ = ["create_summary_table", "evaluate"]
