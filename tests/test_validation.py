from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import run_ranks
from test_train import distil, make_tree, rows_of

from scaledistill.errors import DataError

__all__ = ["make_tree"]


def distil_with_failing_exports(tree: dict[str, Any], failing: int) -> tuple[str, list[str]]:
    """Run with a disk on which the first exports of the best student fail; return how the run ended
    and its warnings.
    """
    from scaledistill.training.session import open_session

    warnings = logging.Handler(logging.WARNING)
    messages: list[str] = []
    warnings.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("scaledistill.training.validation").addHandler(warnings)

    def opened(*arguments: Any, **options: Any) -> Any:
        session = open_session(*arguments, **options)
        export = session.export

        def exported(student: Any, folder_name: str, *rest: Any) -> Path:
            nonlocal failing
            if folder_name == "l2-best" and failing > 0:
                failing -= 1
                raise DataError("the disk is full")
            return export(student, folder_name, *rest)

        session.export = exported  # type: ignore[method-assign]
        return session

    return distil(tree, open_session=opened)[0], messages


def test_an_export_of_the_best_that_fails_is_survived(
    make_tree: Callable[..., dict[str, Any]], tiny_shards: Path
) -> None:
    tree = make_tree(
        data={"validation": str(tiny_shards / "validation")},
        train={"learning_rate": 1e-2, "validation_every_steps": 2, "validation_rows": 11},
    )
    state, warnings = run_ranks(distil_with_failing_exports, 1, tree, 1)[0]
    assert state == "done"
    assert warnings == [
        "the disk is full; training continues, there is no best export yet",
    ]
    losses = {row["step"]: row["validation_loss"] for row in rows_of(tree) if row["step"] % 2 == 0}
    folder = Path(tree["run"]["folder"])
    [checkpoint] = (folder / "checkpoints").iterdir()
    best = json.loads((checkpoint / "state.json").read_text())["students"]["l2"]["best"]
    assert best["step"] == min((4, 6), key=lambda step: losses[step])
    assert best["validation_loss"] == losses[best["step"]]
    assert (folder / "export" / "l2-best" / "model.safetensors").exists()
