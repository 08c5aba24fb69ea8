"""Scores of predictions, × 100, with scikit-learn and scipy; nothing is rescaled.

Enters: predictions and labels of one dev split. Leaves: the split's metrics by name. Answers of SQuAD are scored by
`squad`.

Legend: N examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from scaledistill.errors import DataError
from scaledistill.glue.tasks import Task


def check_installed() -> None:
    """Check that the libraries that compute the scores are there.

    Raises:
        DataError: they are not.
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
    """Return the metrics that a split of a task gives, in percent, by the names in `task.metrics`.

    A correlation (Matthews, Pearson, Spearman) with constant predictions is 0.

    Args:
        predictions: class ids, or values where the task is a regression: [N].
        labels: likewise.
    """
    check_installed()
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    def correlation(function: Callable[..., tuple[float, float]]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant input, which is handled here
            value = float(function(predictions, labels)[0])
        return 0.0 if np.isnan(value) else value

    by_name: dict[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy_score(labels, predictions),
        "f1": lambda: f1_score(labels, predictions, zero_division=0),
        "matthews": lambda: matthews_corrcoef(labels, predictions),
        "pearson": lambda: correlation(pearsonr),
        "spearman": lambda: correlation(spearmanr),
    }
    if len(task.dev_splits) > 1:  # each has a metric of its own: accuracy_m of dev_matched, accuracy_mm of the other
        name = task.metrics[task.dev_splits.index(split)]
        return {name: 100 * float(by_name[name.partition("_")[0]]())}
    return {name: 100 * float(by_name[name]()) for name in task.metrics}
