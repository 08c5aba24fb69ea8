"""SQuAD 2.0: features, answers from outputs, and the official scores."""

from __future__ import annotations

import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_text import save_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from scaledistill.errors import DataError
from scaledistill.glue.plan import _check_tokenizer
from scaledistill.glue.read import Answers, Examples
from scaledistill.glue.squad import (
    add_positions,
    best_answers,
    majority_squad_scores,
    make_features,
    squad_scores,
)
from scaledistill.glue.tasks import find_tasks

CONTEXT = " ".join(f"word{i}" for i in range(60))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "?", *CONTEXT.split()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def example(*answers: str) -> Examples:
    starts = tuple(CONTEXT.index(answer) for answer in answers)
    return Examples(["q"], [("  who?", CONTEXT)], [Answers(answers, starts)], "")


@pytest.mark.parametrize("max_length", [24, 80])
@pytest.mark.parametrize("answer", ["word0", "word17 word18", "word59", None])
def test_the_answer_comes_back(
    tokenizer: PreTrainedTokenizerFast, answer: str | None, max_length: int
) -> None:
    examples = example(*([answer] if answer else []))
    features, origins = make_features(tokenizer, examples, [0], max_length)
    add_positions(features, origins, examples)
    assert (len(features) > 1) == (max_length == 24)
    assert all(len(feature["input_ids"]) <= max_length for feature in features)
    logits = []
    for feature in features:
        scores = np.zeros((2, len(feature["input_ids"])), np.float32)
        scores[0, feature["start_positions"]] = scores[1, feature["end_positions"]] = 5
        logits.append(scores)
    holding = [feature for feature in features if feature["start_positions"] != 0]
    assert bool(holding) == (answer is not None)
    # A feature without the answer says "none" as loudly as the other says where: only the lowest
    # such score counts.
    for scores, feature in zip(logits, features, strict=True):
        if answer and feature["start_positions"] == 0:
            scores[:, 0] = 0
    assert best_answers(origins, logits, examples) == [answer or ""]


def test_every_word_of_the_context_is_in_a_feature(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = example()
    features, origins = make_features(tokenizer, examples, [0], 24)
    covered = {CONTEXT[span[0] : span[1]] for origin in origins for span in origin.spans_T if span}
    assert covered == set(CONTEXT.split())
    question = tokenizer("who?")["input_ids"]
    assert all(feature["input_ids"][: len(question)] == question for feature in features)


def test_a_question_that_leaves_no_room(tokenizer: PreTrainedTokenizerFast) -> None:
    for question, least in (("who? " * 10, 36), ("who? " * 200, 532)):
        examples = Examples(["q"], [(question, CONTEXT)], [Answers((), ())], "")
        with pytest.raises(
            DataError,
            match=rf"max_length={least // 2} leaves too little room .* max_length to {least} or",
        ):
            make_features(tokenizer, examples, [0], least // 2)
        assert make_features(tokenizer, examples, [0], least)[0]


def test_what_is_no_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = example()
    features, origins = make_features(tokenizer, examples, [0], 80)
    logits = np.zeros((2, len(features[0]["input_ids"])), np.float32)
    assert best_answers(origins, [logits], examples) == [""]  # not better than [CLS]
    # Ends before it starts: each with [CLS]-like others gives less.
    logits[0, 30], logits[1, 20] = 9, 9
    found = best_answers(origins, [logits], examples)[0]
    assert found.count(" ") < 30
    logits[:] = 0
    logits[0, 5], logits[1, 50] = 9, 9  # longer than an answer may be
    assert (
        best_answers(origins, [logits], examples)[0] != CONTEXT[: CONTEXT.index("word46")].strip()
    )
    logits[:] = 0
    logits[:, 1] = 9  # in the question
    assert best_answers(origins, [logits], examples) == [""]


def independent(found: str, golden: list[str]) -> tuple[float, float]:
    """SQuAD's rules again: words lower-case, without punctuation and articles; the best of the
    given answers.
    """

    def plain(text: str) -> str:
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    golden = [answer for answer in golden if plain(answer)] or [""]

    def overlap(answer: str) -> float:
        one, other = plain(found).split(), plain(answer).split()
        if not one or not other:
            return float(one == other)
        same = sum(min(count, Counter(other)[word]) for word, count in Counter(one).items())
        return (
            0.0
            if not same
            else 2 * (same / len(one)) * (same / len(other)) / (same / len(one) + same / len(other))
        )

    return max(map(overlap, golden)), max(float(plain(found) == plain(answer)) for answer in golden)


def test_scores_of_random_answers() -> None:
    generator = np.random.default_rng(1)
    words = ["The", "cat,", "sat", "on", "a", "mat.", "an", "U.S.", "cat", "(sat)"]

    def text(most: int) -> str:
        return " ".join(generator.choice(words, generator.integers(0, most)))

    found = [text(4) for _ in range(1000)]
    golden = [[text(4) or "x" for _ in range(generator.integers(0, 4))] for _ in found]
    labels = [Answers(tuple(answers), (0,) * len(answers)) for answers in golden]
    examples = Examples([""] * 1000, [("", "")] * 1000, labels, "")
    expected = np.mean([independent(*pair) for pair in zip(found, golden, strict=True)], axis=0)
    scores = squad_scores(found, examples)
    assert [scores["f1"], scores["exact"]] == pytest.approx(100 * expected)


def test_scores_by_hand() -> None:
    labels = [
        Answers(("the Cat", "dog"), (0, 0)),
        Answers((), ()),
        Answers(("big mat",), (0,)),
        Answers((), ()),
    ]
    examples = Examples([""] * 4, [("", "")] * 4, labels, "")
    assert squad_scores(["cat!", "", "mat", "mat"], examples) == pytest.approx(
        {"f1": 25 * (1 + 1 + 2 / 3 + 0), "exact": 50}
    )


def test_a_tokenizer_without_cls_is_refused_before_work_begins(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, cls=None)
    config = BertConfig(vocab_size=100)
    _check_tokenizer(folder, config, find_tasks(["rte"]))
    with pytest.raises(
        DataError,
        match=r"^model: its tokenizer has no cls_token, which stands for no answer in SQuAD",
    ):
        _check_tokenizer(folder, config, find_tasks(["rte", "squad2"]))


def test_the_majority_answer() -> None:
    """The most common answer of the training set is given to all; there it is none at all."""
    none, word = Answers((), ()), Answers(("word1",), (6,))
    train = Examples(["a", "b", "c"], [("who?", CONTEXT)] * 3, [word, none, none], "")
    dev = Examples(["d", "e", "f", "g"], [("who?", CONTEXT)] * 4, [none, word, word, word], "")
    assert majority_squad_scores(train, dev) == {"f1": 25.0, "exact": 25.0}
