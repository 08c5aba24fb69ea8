"""Tokenizer, encoder and packer: nothing of a text is lost, cut or turned into a special token."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scaledistill.data.prepare.text import (
    Packer,
    TextEncoder,
    Vocabulary,
    load_tokenizer,
    tokenizer_fingerprint,
    unknown_words,
)
from scaledistill.errors import ConfigError, DataError

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "one",
    "two",
    "[",
    "]",
    "cl",
    "##s",
    "sep",
    "##ta",
    "al",
    ".",
    ",",
]


def save_tokenizer(folder: Path, words: list[str] = WORDS, **special: str | None) -> Path:
    """Save a small BERT tokenizer; like all-MiniLM-L6-v2's its own file cuts and pads, here to 8
    tokens.
    """
    vocabulary = {
        token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    }
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(8)
    backend.enable_padding(length=8, pad_id=0, pad_token="[PAD]")
    names = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")} | special
    tokens: dict[str, Any] = {f"{name}_token": token for name, token in names.items() if token}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary.of(tokenizer)


# --- tokenizer
#


def test_loading_switches_truncation_and_padding_off(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None
    assert len(tokenizer.backend_tokenizer.encode("one " * 50).ids) == 52


def test_fingerprint_ignores_cutting_and_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = tokenizer_fingerprint(tokenizer)
    cutting = PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path))
    cutting.backend_tokenizer.enable_truncation(3)
    assert tokenizer_fingerprint(cutting) == expected
    assert cutting.backend_tokenizer.truncation["max_length"] == 3
    assert not cutting.backend_tokenizer.encode_special_tokens


@pytest.mark.parametrize(
    "change",
    [{"words": WORDS[::-1]}, {"words": [*WORDS, "more"]}, {"mask": None}],
    ids=["order", "more", "special"],
)
def test_fingerprint_tells_tokenizers_apart(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert tokenizer_fingerprint(
        load_tokenizer(save_tokenizer(tmp_path, **change))
    ) != tokenizer_fingerprint(tokenizer)


def test_fingerprint_sees_rules_beside_the_vocabulary(tmp_path: Path) -> None:
    words = [*WORDS, "the", "The", "fox", "quick", "Quick"]
    lower = load_tokenizer(save_tokenizer(tmp_path, words))
    cased = load_tokenizer(tmp_path)
    cased.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert tokenizer_fingerprint(lower) != tokenizer_fingerprint(cased)


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"tokenizer '.*nowhere': no such folder; expected a folder with tokenizer.json",
    ):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"tokenizer '.*' cannot be loaded: .*; expected tokenizer.json and its"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_name_is_looked_up_on_the_hub_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def snapshot_download(name: str, **_: object) -> str:
        calls.append(name)
        if name == "models/cached":
            return str(save_tokenizer(tmp_path / "snapshot"))
        raise OSError("no route to the Hub\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "all-MiniLM-L6-v2").mkdir(parents=True)
    assert load_tokenizer("models/cached").name_or_path == "models/cached"
    found = (
        r"the Hub gave none at revision 'v1' \(no route to the Hub\); did you mean "
        r"models/all-M.*2\?"
    )
    with pytest.raises(
        DataError, match=f"tokenizer 'models/all-MiniLM': no such folder, and {found}"
    ):
        load_tokenizer("models/all-MiniLM", "v1")
    with pytest.raises(
        DataError,
        match=r"gave none \(no route to the Hub\); expected a folder with tokenizer.json, or a",
    ):
        load_tokenizer("bert-large")
    assert calls == ["models/cached", "models/all-MiniLM", "bert-large"]
    with pytest.raises(
        DataError,
        match=r"'./models/all-MiniLM': no such folder; did you mean models/all-MiniLM-L6-v2",
    ):
        load_tokenizer("./models/all-MiniLM")


def test_a_tokenizer_without_cls_is_refused(tmp_path: Path) -> None:
    bare = load_tokenizer(save_tokenizer(tmp_path, cls=None))
    with pytest.raises(DataError, match=r"has no cls_token; expected cls, sep and pad tokens"):
        Vocabulary.of(bare)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"bos": "<s>", "eos": "</s>", "pad": "<pad>"}, (0, 1, 2)),  # Gemma
        ({"bos": "<s>", "eos": "</s>"}, (0, 1, 1)),  # Llama
        ({"eos": "</s>", "pad": "<pad>"}, (1, 1, 2)),  # Qwen
        ({"cls": "<s>", "eos": "</s>", "pad": "<pad>"}, (0, 1, 2)),  # ESM
    ],
)
def test_tokens_of_begin_and_end_stand_in_for_cls_and_sep(
    names: dict[str, str], expected: tuple[int, ...], tmp_path: Path
) -> None:
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "one", "two"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="one")),
        **{f"{name}_token": token for name, token in names.items()},
    )
    tokenizer.save_pretrained(tmp_path)
    vocabulary = Vocabulary.of(load_tokenizer(tmp_path))
    assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.pad_id) == expected
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.eos_token = "two"
    assert tokenizer_fingerprint(tokenizer) != fingerprint


def test_roberta_names_and_large_vocabularies(tmp_path: Path) -> None:
    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(70_000))]
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, words, cls="<s>", sep="</s>", pad="<pad>"))
    vocabulary = Vocabulary.of(tokenizer)
    assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.pad_id) == (5, 6, 7)
    assert vocabulary.size == 70_008
    ids = TextEncoder(tokenizer)(["w69999 <s>"]).ids_n
    assert ids.dtype == np.uint32
    assert ids[0] == 70_007
    assert not {5, 6, 7} & set(ids.tolist())


# --- encoder
#


def test_special_tokens_in_a_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer)
    for _ in range(2):  # the second time as a worker process gets it
        ids = encoder(["one [CLS] two[SEP]", "", "[PAD]"]).ids_n
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        assert tokens == ["one", "[", "cl", "##s", "]", "two", "[", "sep", "]", "[", "[UNK]", "]"]
        encoder = pickle.loads(pickle.dumps(encoder))


def test_encoder_agrees_with_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["Alpha, beta.", "", "gamma " * 100, "ünknown \t\n one"]
    encoded = TextEncoder(tokenizer)(documents)
    expected = [tokenizer.encode(document, add_special_tokens=False) for document in documents]
    assert encoded.ids_n.dtype == np.uint16
    assert encoded.ids_n.tolist() == [token for ids in expected for token in ids]
    assert encoded.lengths.tolist() == [len(ids) for ids in expected]


def test_keys_depend_on_seed_and_text_only(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [f"document {i}" for i in range(4000)]
    keys = TextEncoder(tokenizer, seed=1)(documents).keys
    assert np.array_equal(keys[::-1], TextEncoder(tokenizer, seed=1)(documents[::-1]).keys)
    assert not np.isin(keys, TextEncoder(tokenizer, seed=2)(documents).keys).any()
    assert abs(np.mean(keys < 0.1) - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5


def test_text_that_a_vocabulary_cannot_hold_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    tokenizer.backend_tokenizer.model = models.WordLevel({"one": 0}, unk_token="[GONE]")
    lacking = TextEncoder(tokenizer)
    with pytest.raises(
        DataError, match=r"cannot encode this text \(WordLevel error: Missing \[UNK\] token"
    ):
        lacking(["two"])


def test_unknown_words_are_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["one two", "Xylophone one Xylophone", "a" * 60]
    assert unknown_words(tokenizer, texts) == ["Xylophone", "a" * 20]
    assert unknown_words(tokenizer, texts, most=1) == ["Xylophone"]


# --- packer
#


class Rows:
    """Collects what a packer writes, with rows numbered over all calls."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.pieces: list[tuple[int, int, int]] = []

    def __call__(self, ids_NT: np.ndarray, pieces: np.ndarray) -> None:
        first = sum(map(len, self.blocks))
        self.pieces += [(first + row, start, end) for row, start, end in pieces.tolist()]
        self.blocks.append(ids_NT)

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate(self.blocks)

    def text(self) -> list[int]:
        """The tokens of all pieces without their [CLS] and [SEP]."""
        return [
            token
            for row, start, end in self.pieces
            for token in self.ids[row, start + 1 : end - 1].tolist()
        ]


def pack(
    documents: list[list[int]], vocabulary: Vocabulary, length: int, last_row: Any, rows: int = 4
) -> tuple[Rows, Packer]:
    written = Rows()
    packer = Packer(written, vocabulary, length, rows_per_write=rows)
    for document in documents:
        packer.add(np.array(document, vocabulary.dtype))
    packer.finish(last_row)
    return written, packer


def test_a_case_by_hand(vocabulary: Vocabulary) -> None:
    # 8 positions: 5 tokens leave one position, which cannot hold a piece; 8 tokens go on in the
    # next row.
    written, packer = pack([[11, 12, 13, 14, 15], [21] * 8, [31]], vocabulary, 8, "pad")
    assert written.ids.tolist() == [
        [2, 11, 12, 13, 14, 15, 3, 0],
        [2, 21, 21, 21, 21, 21, 21, 3],
        [2, 21, 21, 3, 2, 31, 3, 0],
    ]
    assert written.pieces == [(0, 0, 7), (1, 0, 8), (2, 0, 4), (2, 4, 7)]
    counts = packer.counts
    assert (
        counts.documents,
        counts.rows,
        counts.tokens,
        counts.padding,
        counts.dropped_tokens,
    ) == (3, 3, 14, 2, 0)


@pytest.mark.parametrize("case", range(60))
def test_packing_loses_nothing(vocabulary: Vocabulary, case: int) -> None:
    rng = random.Random(case)
    length = rng.choice([3, 4, 5, 8, 17, 64])
    longest = rng.choice([1, 4, 3 * length])
    documents = [
        [rng.randrange(5, 20) for _ in range(rng.randrange(longest + 1))]
        for _ in range(rng.randrange(1, 60))
    ]
    documents.append([7])
    corpus = [token for document in documents for token in document]
    written, packer = pack(documents, vocabulary, length, "pad", rows=rng.choice([1, 3, 256]))
    ids_NT, counts = written.ids, packer.counts
    assert written.text() == corpus
    assert (counts.tokens, counts.rows, counts.dropped_tokens) == (len(corpus), len(ids_NT), 0)
    assert counts.documents == sum(map(bool, documents))
    covered = np.zeros(ids_NT.shape, int)
    for row, start, end in written.pieces:
        assert end - start >= 3
        assert (ids_NT[row, start], ids_NT[row, end - 1]) == (vocabulary.cls_id, vocabulary.sep_id)
        covered[row, start:end] += 1
    assert covered.max() == 1
    assert (ids_NT[covered == 0] == vocabulary.pad_id).all()
    assert counts.padding == (covered == 0).sum()
    # Only the last row may have more padding.
    assert (covered[:-1] == 0).sum(axis=1).max(initial=0) <= 2

    kept, packer = (
        pack(documents, vocabulary, length, "drop") if len(ids_NT) > 1 else (written, packer)
    )
    text = kept.text()
    assert text == corpus[: len(text)]
    assert len(text) + packer.counts.dropped_tokens == len(corpus)
    assert packer.counts.tokens == len(text)


@pytest.mark.parametrize("case", range(20))
def test_a_document_in_parts_is_packed_like_the_whole(vocabulary: Vocabulary, case: int) -> None:
    rng = random.Random(case)
    length = rng.choice([3, 4, 5, 8, 17])
    documents = [
        [rng.randrange(5, 20) for _ in range(rng.randrange(4 * length))] for _ in range(20)
    ]
    expected, expected_packer = pack(documents, vocabulary, length, "drop")
    written = Rows()
    packer = Packer(written, vocabulary, length, rows_per_write=4)
    for document in documents:
        cuts = sorted(rng.randrange(len(document) + 1) for _ in range(3))
        parts = [
            document[first:end]
            for first, end in zip([0, *cuts], [*cuts, len(document)], strict=True)
        ]
        for number, part in enumerate(parts, 1):
            packer.add(np.array(part, vocabulary.dtype), is_end=number == len(parts))
    packer.finish("drop")
    assert np.array_equal(written.ids, expected.ids)
    assert (written.pieces, packer.counts) == (expected.pieces, expected_packer.counts)


def test_unknown_tokens_are_counted_in_the_rows(vocabulary: Vocabulary) -> None:
    documents = [[5, 1, 6, 1, 7, 8], [1, 9]]
    counts = pack(documents, vocabulary, 8, "pad")[1].counts
    assert (counts.tokens, counts.unknown, counts.unknown_fraction) == (8, 3, 3 / 8)
    counts = pack(documents, vocabulary, 8, "drop")[1].counts
    assert (counts.tokens, counts.unknown) == (6, 2)
    counts = pack(documents, vocabulary._replace(unk_id=None), 8, "pad")[1].counts
    assert (counts.tokens, counts.unknown) == (8, 0)


def test_dropping_the_last_row(vocabulary: Vocabulary) -> None:
    written, packer = pack([[5] * 6, [6, 7]], vocabulary, 8, "drop")
    assert written.ids.tolist() == [[2, 5, 5, 5, 5, 5, 5, 3]]
    assert (packer.counts.rows, packer.counts.tokens, packer.counts.dropped_tokens) == (1, 6, 2)
    # Two positions free: as full as a row gets.
    written, packer = pack([[5] * 4], vocabulary, 8, "drop")
    assert (packer.counts.rows, packer.counts.padding, packer.counts.dropped_tokens) == (1, 2, 0)


def test_rows_too_short_are_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(
        ConfigError,
        match=r"sequence_length=2 is too short for \[CLS\] token \[SEP\]; use 3 or more",
    ):
        Packer(Rows(), vocabulary, 2)
