"""Score predictions with scikit-learn and scipy; scores are × 100 and not rescaled otherwise.

Inputs: predictions and labels of one dev split. Outputs: the split's metrics by name. Not handled
here: SQuAD's answers (`squad`).

Legend: N examples.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scaledistill.errors import DataError
from scaledistill.glue.tasks import TASKS, Task

# Regression values that differ by less than this count as one: 1 % of STS-B's range.
SAME_VALUE = 0.05


def check_installed() -> None:
    """Check that the libraries that compute the scores are installed.

    Raises:
        DataError: they are not installed.
    """
    try:
        import scipy
        import sklearn
    except ImportError as error:
        raise DataError(
            f"GLUE scores need scikit-learn and scipy ({error}); pip install 'scaledistill[eval]'"
        ) from error
    del scipy, sklearn


def scores(task: Task, split: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the metrics of a split of a task, in percent, by the names in `task.metrics`.

    A correlation (Matthews, Pearson, Spearman) with constant predictions is 0.

    Args:
        predictions: class ids, or values if the task is a regression: [N].
        labels: of the same kind: [N].

    Raises:
        DataError: scikit-learn or scipy is not installed.
    """
    check_installed()
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    def correlation(function: Callable[..., tuple[float, float]]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant input is handled below
            value = float(function(predictions, labels)[0])
        return 0.0 if np.isnan(value) else value

    by_name: dict[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy_score(labels, predictions),
        "f1": lambda: f1_score(labels, predictions, zero_division=0),
        "matthews": lambda: matthews_corrcoef(labels, predictions),
        "pearson": lambda: correlation(pearsonr),
        "spearman": lambda: correlation(spearmanr),
    }
    # MNLI: each dev split has its own metric, accuracy_m or accuracy_mm.
    if len(task.dev_splits) > 1:
        name = task.metrics[task.dev_splits.index(split)]
        return {name: 100 * float(by_name[name.partition("_")[0]]())}
    return {name: 100 * float(by_name[name]()) for name in task.metrics}


def majority_scores(
    task: Task, split: str, train_labels: Sequence[Any], dev_labels: Sequence[Any]
) -> dict[str, float]:
    """Return the metrics of a model that ignores its input, in percent, by name.

    For every dev example it predicts the most common training class, or in a regression the mean
    training value. Its correlations are 0.
    """
    if task.kind == "regression":
        constant: float = float(np.mean(train_labels))
    else:
        # In a tie the smaller id, so that the order of the rows does not matter.
        counts = Counter(train_labels)
        constant = min(counts, key=lambda label: (-counts[label], label))
    return scores(task, split, np.full(len(dev_labels), constant), np.asarray(dev_labels))


def only_answer(task_name: str, predictions: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the one answer that a cell gave for all dev examples; None if it gave several.

    A class is returned by its name, a value with one decimal, no answer as "no answer".

    Args:
        predictions: those of all dev splits, as in the cell's file.
    """
    task = TASKS[task_name]
    found = [row["prediction"] for row in predictions]
    if len(found) < 2:
        return None
    if task.kind == "regression":
        return f"{np.mean(found):.1f}" if max(found) - min(found) < SAME_VALUE else None
    if any(answer != found[0] for answer in found):
        return None
    if task.kind == "span":
        return repr(found[0]) if found[0] else "no answer"
    return task.labels[found[0]]
