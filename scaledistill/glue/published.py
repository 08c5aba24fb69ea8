"""Published scores on the dev sets, for comparison; all figures are as published, but for CoLA's.

Sources: the README of MiniLM in microsoft/unilm; bertdistiller's README, whose CoLA figure (MCC +
1) × 50 = 70.04 is given here as MCC × 100. Hyper-parameters, seeds and selection differ from ours,
so compare with care.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A model's published scores, in percent, by "task/metric"."""

    name: str
    source: str
    parameters: int | None
    scores: Mapping[str, float]


def _unilm(name: str, millions: int, mnli: float, squad: float, **others: float) -> Published:
    named = {key.replace("__", "/"): value for key, value in others.items()}
    return Published(
        name, "unilm", millions * 10**6, {"mnli/accuracy_m": mnli, "squad2/f1": squad, **named}
    )


PUBLISHED: tuple[Published, ...] = (
    _unilm("BERT-base → 6×384", 22, 82.8, 72.9),
    _unilm(
        "BERT-base → 6×768",
        66,
        84.2,
        76.3,
        rte__accuracy=72.1,
        cola__matthews=52.5,
        mrpc__f1=88.9,
        sst2__accuracy=92.4,
        qnli__accuracy=90.8,
        qqp__accuracy=91.1,
    ),
    _unilm("BERT-large → 6×384", 22, 83.0, 74.3),
    _unilm("BERT-large → 6×768", 66, 85.0, 77.7),
    _unilm("RoBERTa-large → 6×384", 30, 84.4, 76.4),
    _unilm("RoBERTa-large → 12×384", 41, 86.9, 82.3),
    _unilm("RoBERTa-large → 6×768", 81, 87.0, 81.6),
    Published(
        "BERT-base → 6×384, bertdistiller",
        "bertdistiller 0.1.1",
        None,
        {
            "stsb/pearson": 85.29,
            "rte/accuracy": 59.81,
            "cola/matthews": 40.08,
            "qqp/f1": 85.22,
            "sst2/accuracy": 90.62,
            "mnli/accuracy_m": 81.03,
            "qnli/accuracy": 87.69,
            "mrpc/f1": 86.66,
        },
    ),
)
