"""SQuAD 2.0: the model's features, answers from its outputs, and the official scores.

Inputs: `Examples` of the task and a fast tokenizer. Outputs: features for training and prediction,
answers, scores. A context that does not fit into one feature is cut into overlapping ones. Not
handled here: reading the files (`read`).

Legend: N features, T tokens of one of them.
"""

from __future__ import annotations

import collections
import math
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from scaledistill.errors import Field, SourceError
from scaledistill.glue.read import Answers, Examples

STRIDE = 128  # tokens that neighbouring features of a context share
MOST_CANDIDATES = 20  # starts, and ends, that are considered in a feature
LONGEST_ANSWER = 30  # tokens
Features = list[dict[str, Any]]


@dataclass(frozen=True)
class Origin:
    """Where a feature comes from."""

    row: int
    """The row of the examples."""
    null: int
    """The position of the token that means "no answer": [CLS]."""
    spans_T: list[tuple[int, int] | None]
    """The characters of the context that each token covers; None outside the context."""


def stride_of(max_length: int) -> int:
    """Return how many tokens neighbouring features of `max_length` tokens share."""
    return min(STRIDE, max_length // 3)


def check_questions(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], max_length: int
) -> None:
    """Check that each question leaves room for its context.

    Raises:
        SourceError: a question does not.
    """
    ids = tokenizer(list(questions), add_special_tokens=False)["input_ids"] if questions else []
    fixed = max(map(len, ids), default=0) + tokenizer.num_special_tokens_to_add(pair=True) + 1
    if fixed + stride_of(max_length) > max_length:
        least = min(fixed + STRIDE, math.ceil(1.5 * fixed))
        raise SourceError(
            "max_length",
            max_length,
            "leaves too little room beside the longest question of SQuAD 2.0",
            ("set ", Field("max_length"), f" to {least} or more"),
        )


def make_features(
    tokenizer: PreTrainedTokenizerFast, examples: Examples, rows: Sequence[int], max_length: int
) -> tuple[Features, list[Origin]]:
    """Return the features of these rows and the origin of each feature.

    A feature has at most `max_length` tokens.

    Raises:
        DataError: a question leaves too little room for its context.
    """
    features, origins = [], []
    stride = stride_of(max_length)
    check_questions(tokenizer, [examples.texts[row][0].strip() for row in rows], max_length)
    for row in rows:
        question, context = examples.texts[row]
        encoded = tokenizer(
            question.strip(),
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for number, ids in enumerate(encoded["input_ids"]):
            inside = [side == 1 for side in encoded.sequence_ids(number)]
            spans = zip(inside, encoded["offset_mapping"][number], strict=True)
            origins.append(
                Origin(
                    row,
                    ids.index(tokenizer.cls_token_id),
                    [span if of else None for of, span in spans],
                )
            )
            names = [name for name in tokenizer.model_input_names if name in encoded]
            features.append({name: encoded[name][number] for name in names})
    return features, origins


def add_positions(features: Features, origins: Sequence[Origin], examples: Examples) -> None:
    """Add `start_positions` and `end_positions` to the features, in place.

    They are the first answer's tokens, or [CLS] if the answer is not in the feature.
    """
    for feature, origin in zip(features, origins, strict=True):
        start, end = _tokens_of(examples.labels[origin.row], origin)
        feature |= {"start_positions": start, "end_positions": end}


def _tokens_of(answers: Answers, origin: Origin) -> tuple[int, int]:
    if answers.texts:
        first, last = answers.starts[0], answers.starts[0] + len(answers.texts[0]) - 1
        starts = [
            token
            for token, span in enumerate(origin.spans_T)
            if span and span[0] <= first < span[1]
        ]
        ends = [
            token for token, span in enumerate(origin.spans_T) if span and span[0] <= last < span[1]
        ]
        if starts and ends:
            return starts[0], ends[-1]
    return origin.null, origin.null


def best_answers(
    origins: Sequence[Origin], logits: Sequence[np.ndarray], examples: Examples
) -> list[str]:
    """Return the answer for each example: the best span of all of its features.

    The answer is "" if [CLS] scores at least as high in every one of them.

    Args:
        logits: for each feature, [2, T]: start and end.
    """
    null = np.full(len(examples.texts), np.inf)
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples.texts)
    for origin, (start_T, end_T) in zip(origins, logits, strict=True):
        row = origin.row
        null[row] = min(null[row], start_T[origin.null] + end_T[origin.null])
        for score, first, last in _spans(origin, start_T, end_T):
            if score > best[row][0]:
                best[row] = score, examples.texts[row][1][first:last]
    return [text if score > null[row] else "" for row, (score, text) in enumerate(best)]


def _spans(
    origin: Origin, start_T: np.ndarray, end_T: np.ndarray
) -> Iterator[tuple[float, int, int]]:
    """Yield the score of each possible answer, with its first and last character."""
    for start in np.argsort(-start_T)[:MOST_CANDIDATES].tolist():
        for end in np.argsort(-end_T)[:MOST_CANDIDATES].tolist():
            first, last = origin.spans_T[start], origin.spans_T[end]
            if first and last and start <= end < start + LONGEST_ANSWER:
                yield float(start_T[start] + end_T[end]), first[0], last[1]


def squad_scores(found: Sequence[str], examples: Examples) -> dict[str, float]:
    """Return "f1" and "exact" in percent over all questions, as the official script does."""
    f1, exact = [], []
    for text, answers in zip(found, examples.labels, strict=True):
        golden = [answer for answer in map(_words, answers.texts) if answer] or [[]]
        words = _words(text)
        f1.append(max(_f1(words, answer) for answer in golden))
        exact.append(max(float(words == answer) for answer in golden))
    return {"f1": 100 * float(np.mean(f1)), "exact": 100 * float(np.mean(exact))}


def majority_squad_scores(train: Examples, dev: Examples) -> dict[str, float]:
    """Return the scores of always giving the most common training answer, in percent."""
    counts = collections.Counter(label.texts[0] if label.texts else "" for label in train.labels)
    answer = min(counts, key=lambda text: (-counts[text], text))
    return squad_scores([answer] * len(dev.labels), dev)


def _words(text: str) -> list[str]:
    """Return the words to compare: lower case, without punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(found: list[str], golden: list[str]) -> float:
    if not found or not golden:
        return float(found == golden)
    same = sum((collections.Counter(found) & collections.Counter(golden)).values())
    return 2 * same / (len(found) + len(golden))
