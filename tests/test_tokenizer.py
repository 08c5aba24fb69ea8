"""Loading tokenizers: the ids are those of tokenizer.json, and what cannot be used is refused with
a reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_text import WORDS, save_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scaledistill.data.prepare.text import TextEncoder, Vocabulary, tokenizer_fingerprint
from scaledistill.data.tokenizer import PROBES, gives_same_ids, load_tokenizer
from scaledistill.errors import DataError

# Cased words beside lower-case ones, letters with accents, a CJK character, a word with its
# punctuation.
RICH = [
    *WORDS,
    "The",
    "the",
    "quick",
    "Quick",
    "caf\u00e9",
    "cafe",
    "\u5317",
    "don't",
    "3",
    "\U0001f600",
    "Alpha,",
    "Alpha",
]


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))


def bert_folder(folder: Path, tokenizer_class: str = "BertTokenizer", **config: Any) -> Path:
    """Save a tokenizer as one of a class that transformers rebuilds from the vocabulary."""
    save_tokenizer(folder, RICH)
    edit(
        folder / "tokenizer_config.json",
        lambda found: found.update(tokenizer_class=tokenizer_class),
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "type_vocab_size": 2} | config)
    )
    return folder


def lower(on: bool, **rules: Any) -> Callable[[Any], object]:
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
    }
    return lambda content: content.update(normalizer=normalizer | {"lowercase": on} | rules)


RULES: dict[str, Callable[[Any], object]] = {
    "cased": lower(False),
    "accents kept": lower(True, strip_accents=False),
    "no CJK": lower(True, handle_chinese_chars=False),
    "white space": lambda content: content.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    "no normaliser": lambda content: content.update(normalizer=None),
    "model": lambda content: content.update(
        model={"type": "WordLevel", "unk_token": "[UNK]", "vocab": content["model"]["vocab"]}
    ),
    "added token": lambda content: content["added_tokens"].append(
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        | {"id": len(RICH) + 5, "content": "quick\u00e9"}
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokenizer_class", ["BertTokenizer", "DistilBertTokenizerFast"])
def test_the_ids_are_those_of_tokenizer_json(
    tmp_path: Path, rule: str, tokenizer_class: str
) -> None:
    folder = bert_folder(tmp_path / "model", tokenizer_class)
    edit(folder / "tokenizer.json", RULES[rule])
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    truth.no_truncation()
    truth.no_padding()
    tokenizer = load_tokenizer(folder)
    texts = [*PROBES, "The caf\u00e9 Alpha, \u5317\u5317 quick\u00e9 don't"]
    for text in texts:
        assert tokenizer(text)["input_ids"] == truth.encode(text).ids
        assert (
            TextEncoder(tokenizer)([text]).ids_n.tolist()
            == truth.encode(text, add_special_tokens=False).ids
        )
    assert tokenizer.get_vocab() == truth.get_vocab()
    assert (tokenizer.cls_token, tokenizer.mask_token_id) == ("[CLS]", 4)
    assert "token_type_ids" in tokenizer.model_input_names
    tokenizer.save_pretrained(tmp_path / "export")
    assert gives_same_ids(AutoTokenizer.from_pretrained(tmp_path / "export"), tokenizer)
    unchanged = load_tokenizer(bert_folder(tmp_path / "plain", tokenizer_class))
    if rule != "model":  # without word pieces in the probe both models give the same ids
        assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(unchanged)


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_a_byte_level_tokenizer_is_that_of_tokenizer_json(
    tmp_path: Path, add_prefix_space: bool
) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["the old green river"] * 9, trainer)
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=add_prefix_space
    )
    names = dict(
        zip(
            ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special, strict=True
        )
    )
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(tmp_path)
    changed(tokenizer_class="RobertaTokenizer")(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "type_vocab_size": 1}')
    tokenizer = load_tokenizer(tmp_path)
    for text in PROBES:
        assert tokenizer(text)["input_ids"] == made.encode(text).ids
    assert list(tokenizer("one", "two")) == ["input_ids", "attention_mask"]
    vocabulary = Vocabulary.of(tokenizer)
    assert (vocabulary.cls_id, vocabulary.pad_id, vocabulary.sep_id, vocabulary.unk_id) == (
        0,
        1,
        2,
        None,
    )


def test_a_difference_is_reported_once_where_text_shows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bert_folder(tmp_path)
    # The class's is taken.
    edit(folder / "tokenizer.json", lambda content: content.update(post_processor=None))
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer).__name__ == "BertTokenizer"
    assert tokenizer("one", "two")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert not caplog.records
    edit(folder / "tokenizer.json", lower(False))
    for _ in range(2):
        load_tokenizer(folder)
    [record] = caplog.records
    assert (
        "transformers rebuilds it as BertTokenizer, which reads \"The Quick BROWN fox doesn't"
        in record.getMessage()
    )
    assert record.getMessage().endswith("tokenizer.json; tokenizer.json is used")


def test_shards_made_before_still_match(tmp_path: Path) -> None:
    """Fingerprints as they were before tokenizer.json was compared."""
    plain = load_tokenizer(save_tokenizer(tmp_path / "plain"))
    rebuilt = load_tokenizer(bert_folder(tmp_path / "bert"))
    assert tokenizer_fingerprint(plain)[:16] == "314bf52bac802ff2"
    assert tokenizer_fingerprint(rebuilt)[:16] == "e3a278e2cea36adc"


def test_tokens_that_only_the_config_names_keep_their_ids(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    edit(folder / "tokenizer.json", lower(False))
    expected = AutoTokenizer.from_pretrained(folder)
    edit(folder / "tokenizer_config.json", lambda found: found.update(mask_token="<mask>"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.mask_token_id == len(expected) == len(RICH) + 5


def test_a_vocabulary_file_alone_is_enough(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert TextEncoder(load_tokenizer(tmp_path))(["One two"]).ids_n.tolist() == [5, 6]


def files(**contents: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_text(
                content if isinstance(content, str) else json.dumps(content)
            )

    return write


def changed(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", lambda found: found.update(keys))


def without(*tokens: str) -> Callable[[Path], None]:
    def change(content: Any) -> None:
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["content"] not in tokens
        ]
        for token in tokens:
            del content["model"]["vocab"][token]

    return lambda folder: edit(folder / "tokenizer.json", change)


def bare(config: dict[str, Any], **contents: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        files(config__json=config, **contents)(folder)

    return write


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no files": (
        bare({"model_type": "bert"}),
        "loaded: .* has none of tokenizer.json, vocab.txt, vocab.json, .*: copy",
    ),
    "only companions": (
        bare({"model_type": "bert"}, tokenizer_config__json={"tokenizer_class": "BertTokenizer"}),
        "loaded: .* has none of tokenizer.json",
    ),
    "empty vocabulary": (bare({"model_type": "bert"}, vocab__txt=""), "cannot be (used|loaded): "),
    "a vocabulary that is not read": (
        bare({"model_type": "roberta"}, vocab__txt="one\ntwo\n"),
        "used: it has no tokens but .*, so that all text would be unknown",
    ),
    "no merges": (
        bare(
            {"model_type": "roberta"},
            vocab__json={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4},
        ),
        "cannot be (used|loaded): ",
    ),
    "config a list": (
        files(tokenizer_config__json=[]),
        "loaded: its tokenizer_config.json is not a JSON object",
    ),
    "definition a string": (
        files(tokenizer__json='"text"'),
        "loaded: its tokenizer.json is not a JSON object",
    ),
    "definition empty": (files(tokenizer__json={}), "loaded: "),
    "length a string": (
        changed(model_max_length="512"),
        "used: model_max_length in its .* is '512'; expected a number",
    ),
    "added tokens as strings": (
        changed(added_tokens_decoder={"0": "[PAD]"}),
        "loaded: Found a <class 'str'>",
    ),
    "added tokens a list": (changed(added_tokens_decoder=["[PAD]"]), "loaded: "),
    "special token a number": (changed(cls_token=7), "loaded: "),
    "padding side": (changed(padding_side="both"), "loaded: Padding side should be"),
    "no UNK": (
        without("[UNK]"),
        r"loaded: WordPiece error: Missing \[UNK\] token from the vocabulary",
    ),
    "no CLS": (
        without("[CLS]"),
        r"used: its cls_token '\[CLS\]' is not in its vocabulary; correct it in",
    ),
    "no SEP": (without("[SEP]"), r"used: its sep_token '\[SEP\]' is not in its vocabulary"),
    "model of a newer tokenizers": (
        lambda folder: edit(
            folder / "tokenizer.json", lambda content: content["model"].update(type="FancyPiece")
        ),
        "loaded: data did not match any variant",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used_is_refused(tmp_path: Path, case: str) -> None:
    save_tokenizer(tmp_path)
    change, reason = BROKEN[case]
    change(tmp_path)
    with pytest.raises(
        DataError, match=f"^tokenizer '.*' cannot be {reason}" if "cannot" not in reason else reason
    ) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_a_sentencepiece_vocabulary_alone_names_the_packages_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path)
    bare({"model_type": "deberta-v2"}, spm__model="unread")(tmp_path)
    monkeypatch.setattr("scaledistill.data.tokenizer.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"loaded: .*: pip install sentencepiece protobuf; expected"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"type_vocab_size": 2}, True),
        ({"type_vocab_size": 1}, False),
        ({"type_vocab_size": 0, "model_type": "deberta-v2"}, False),
        ({"type_vocab_size": None}, True),  # as BERT's default
        # Its config does not say: the class decides.
        ({"type_vocab_size": None, "model_type": "distilbert"}, None),
    ],
)
@pytest.mark.parametrize("tokenizer_class", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_segment_ids_are_given_by_the_model(
    tmp_path: Path, config: dict[str, Any], expected: bool | None, tokenizer_class: str
) -> None:
    folder = bert_folder(tmp_path / "model", tokenizer_class, **config)
    if config["type_vocab_size"] is None:
        edit(folder / "config.json", lambda found: found.pop("type_vocab_size"))
    tokenizer = load_tokenizer(folder)
    if expected is None:
        expected = tokenizer_class == "BertTokenizer"
    assert ("token_type_ids" in tokenizer("one", "two")) == expected
    assert ("token_type_ids" in tokenizer.model_input_names) == expected
    tokenizer.save_pretrained(tmp_path / "export")
    assert (
        "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path / "export")("one", "two")
    ) == expected


def test_the_unknown_token_is_the_one_of_the_model(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path)
    assert Vocabulary.of(load_tokenizer(folder)).unk_id == 1
    changed(unk_token="[MASK]")(folder)
    assert Vocabulary.of(load_tokenizer(folder)).unk_id == 1
