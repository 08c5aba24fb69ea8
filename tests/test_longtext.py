"""Long documents: the ids of the pieces are those of the whole, for each kind of tokenizer and
white space.
"""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from scaledistill.data.prepare import longtext
from scaledistill.data.prepare.longtext import Cutter, LongText, placed
from scaledistill.errors import DataError

SPECIAL = ["[UNK]"]
CHARACTERS = 12_000
SEPARATORS = {
    "words": [" "],
    "mixed": [" "] * 5
    + ["\n", "\n\n", "  ", "\t", " \n ", "\u3000", "\u00a0", "\r\n", ". ", ", ", "-", "   "],
    "lines": ["\n"],
    "none": [""],
}
OTHER_WORDS = [
    "don't",
    "naïve",
    "Привет",
    "3.14",
    "1,000",
    "e\u0301a",
    "北京",
    "。",
    "😀",
    "नमस्ते",
    "ไทย",
    "<x>",
    "``",
]


def text_of(kind: str, seed: int = 0, characters: int = CHARACTERS) -> str:
    rng = random.Random(seed)
    if kind == "ideographs":
        return "".join(
            rng.choice("。、の") if rng.random() < 0.1 else chr(rng.randrange(0x4E00, 0x9FFF))
            for _ in range(characters)
        )
    words = [
        "".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(200)
    ] + OTHER_WORDS
    parts: list[str] = []
    while characters > 0:
        parts.append(rng.choice(words) + rng.choice(SEPARATORS[kind]))
        characters -= len(parts[-1])
    return "".join(parts)


def wordpiece(
    normalizer: normalizers.Normalizer | None, pre: pre_tokenizers.PreTokenizer
) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    return trained(Tokenizer(models.WordPiece(unk_token="[UNK]")), trainer, normalizer, pre)


def byte_level(
    normalizer: normalizers.Normalizer | None, pre: pre_tokenizers.PreTokenizer
) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(Tokenizer(models.BPE()), trainer, normalizer, pre)


def unigram(
    normalizer: normalizers.Normalizer | None, pre: pre_tokenizers.PreTokenizer
) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
    )
    return trained(Tokenizer(models.Unigram()), trainer, normalizer, pre)


def trained(
    made: Tokenizer,
    trainer: trainers.Trainer,
    normalizer: normalizers.Normalizer | None,
    pre: pre_tokenizers.PreTokenizer,
) -> Tokenizer:
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre
    made.train_from_iterator([text_of("mixed", 1)], trainer)
    return made


def whole_text_bpe(prefix: bool) -> Tokenizer:
    """A BPE model like Gemma's or Llama's: no pre-tokenizer, the whole text is one word."""
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    made = trained(
        Tokenizer(models.BPE()), trainer, None, pre_tokenizers.Metaspace(prepend_scheme="never")
    )
    definition = json.loads(made.to_str())
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    definition |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}}
    return Tokenizer.from_str(json.dumps(definition))


def build(name: str) -> Tokenizer:
    squeeze = normalizers.Replace(Regex(" {2,}"), " ")
    metaspace, byte = pre_tokenizers.Metaspace, pre_tokenizers.ByteLevel
    if name == "bert":
        return wordpiece(
            normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        )
    if name == "roberta":
        return byte_level(None, byte(add_prefix_space=False))
    if name == "roberta with a prefix":
        return byte_level(normalizers.NFC(), byte(add_prefix_space=True))
    if name == "xlm-r":
        words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace()])
        return unigram(normalizers.Sequence([normalizers.NFKC(), squeeze]), words)
    if name == "deberta":
        strip = normalizers.Sequence([normalizers.Strip(), squeeze, normalizers.NFKC()])
        return unigram(strip, metaspace(prepend_scheme="always"))
    if name == "first":
        made = unigram(normalizers.NFKC(), metaspace(prepend_scheme="first"))
        made.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True), AddedToken("a b")])
        return made
    if name == "fixed length":
        return wordpiece(None, pre_tokenizers.FixedLength(length=5))
    return whole_text_bpe(prefix=name == "llama")


NAMES = (
    "bert",
    "roberta",
    "roberta with a prefix",
    "xlm-r",
    "deberta",
    "first",
    "gemma",
    "llama",
    "fixed length",
)
CUT_EVERYWHERE = {"bert", "roberta"}
"""Those that have a place to cut in text without any white space."""
KINDS = (*SEPARATORS, "ideographs")


@pytest.fixture
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longtext, "PIECE_CHARACTERS", 1500)
    monkeypatch.setattr(longtext, "LONG_CHARACTERS", 3000)
    monkeypatch.setattr(longtext, "LARGEST_PIECE_CHARACTERS", 30_000)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_short_pieces")
def test_ids_of_the_pieces_are_those_of_the_whole(name: str) -> None:
    tokenizer = build(name)
    cutter = Cutter(tokenizer)
    for seed, kind in enumerate(KINDS, 2):
        text = text_of(kind, seed)
        pieces = list(cutter.pieces(text, "document"))
        assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
        ids = [
            token
            for piece, _ in pieces
            for token in tokenizer.encode(piece, add_special_tokens=False).ids
        ]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids, kind
        if name in CUT_EVERYWHERE or (kind in ("words", "mixed") and name != "fixed length"):
            assert max(len(piece) for piece, _ in pieces) <= 3000, kind


@pytest.mark.usefixtures("_short_pieces")
def test_without_a_place_to_cut(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutter = Cutter(build("xlm-r"))
    text = "ab" * 5000
    assert list(cutter.pieces(text, "document 7")) == [(text, True)]
    assert (
        "document 7: 10,000 characters of a document of 10,000 are tokenised at once, because there"
        in caplog.text
    )
    monkeypatch.setattr(longtext, "LARGEST_PIECE_CHARACTERS", 6000)
    with pytest.raises(
        DataError,
        match=(
            r"^document 7: a document of 10,000 characters, .* more than 6,000 at once: .* "
            r"--documents line"
        ),
    ):
        list(cutter.pieces(text, "document 7"))
    long_text = placed("words " * 1000 + text, "a.txt, line 3")
    with pytest.raises(DataError, match=r"^a.txt, line 3: a document of 16,000 characters"):
        list(cutter.pieces(long_text, "document 7"))


def test_places(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longtext, "LONG_CHARACTERS", 10)
    monkeypatch.setattr(longtext, "_CONSPICUOUS_CHARACTERS", 1500)
    assert type(placed("short", "a.txt, line 3")) is str
    found = placed("long " * 200, "a.txt, line 3")
    assert isinstance(found, LongText)
    assert (found, found.where, caplog.text) == ("long " * 200, "a.txt, line 3", "")
    placed("long " * 400, "a.txt, line 3")
    assert (
        "a.txt, line 3: one document of 2,000 characters; if each line is a document, "
        "use" in caplog.text
    )
