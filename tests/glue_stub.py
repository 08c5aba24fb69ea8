"""The GLUE runner with fine-tuning that takes no time: for tests of how processes are started,
stopped and lost.

`COMMAND` starts such a worker.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import types
from typing import Any

from scaledistill.glue import worker
from scaledistill.glue.cell import Cell
from scaledistill.glue.tasks import TASKS

COMMAND = (sys.executable, __file__)


def fine_tune(cell: Cell, *_: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    time.sleep(float(os.environ.get("GLUE_STUB_SECONDS", "0")))
    if cell.seed == 13:
        raise ValueError("unlucky")
    score = hashlib.sha256(cell.path(worker.Path()).name.encode()).digest()[0] / 3
    scores = {
        metric: score / number for number, metric in enumerate(TASKS[cell.task].metrics, start=1)
    }
    return {
        "scores": scores,
        "epochs": [],
        "train_rows": 40,
        "all_train_rows": 40,
        "seconds": 0.1,
    }, [{"id": "0", "prediction": score}]


if __name__ == "__main__":
    sys.modules["scaledistill.glue.finetune"] = types.SimpleNamespace(  # type: ignore[assignment]
        fine_tune=fine_tune, take_share=lambda **share: None
    )
    worker.main()
