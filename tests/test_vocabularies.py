"""Tokenizers shaped like published ones, from text to an exported student: many tokens, other names
of the special ones, no token types.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from ranks import run_ranks
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    DebertaV2Tokenizer,
    EsmConfig,
    EsmModel,
    EsmTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from scaledistill.config.load import parse_config
from scaledistill.data.prepare.make import make_shards
from scaledistill.data.prepare.text import Vocabulary, tokenizer_fingerprint
from scaledistill.data.reader import ShardReader
from scaledistill.data.tokenizer import load_tokenizer
from scaledistill.errors import DataError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
}
WORDS = [f"▁word{number}" for number in range(66_000)]
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO"
# As in facebook/esm2_t6_8M_UR50D.
ESM_TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, ".", "-", "<null_1>", "<mask>"]


def xlmr(folder: Path) -> None:
    """66,004 pieces of a Unigram model, more than 16 bits hold; <s>, </s>; one token type."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -8.0) for word in WORDS] + [("▁", -9.0)]
    pieces += [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    published = json.loads(path.read_text()) | {"tokenizer_class": "XLMRobertaTokenizer"}
    path.write_text(json.dumps(published))
    size = tokenizer.get_vocab_size()
    config = XLMRobertaConfig(
        **SIZES, vocab_size=size, max_position_embeddings=34, type_vocab_size=1
    )
    XLMRobertaModel(config).save_pretrained(folder)


def deberta(folder: Path) -> None:
    """A Unigram model; the mask token is the last; the model has more ids, and no token types."""
    pieces = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0)]
    pieces += [(word, -8.0) for word in WORDS[:300]] + [("▁", -9.0)]
    pieces += [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    DebertaV2Tokenizer(vocab=pieces, unk_id=3).save_pretrained(folder)
    config = DebertaV2Config(
        **SIZES,
        vocab_size=400,
        max_position_embeddings=32,
        relative_attention=True,
        pos_att_type="p2c|c2p",
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    )
    DebertaV2Model(config).save_pretrained(folder)


def esm(folder: Path) -> None:
    """One token per residue; <cls>, <eos> and no separator; a tokenizer without fast form."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(ESM_TOKENS))
    names = {f"{name}_token": f"<{name}>" for name in ("cls", "eos", "pad", "mask", "unk")}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**names, "tokenizer_class": "EsmTokenizer"})
    )
    config = EsmConfig(
        **SIZES,
        vocab_size=len(ESM_TOKENS),
        pad_token_id=1,
        mask_token_id=32,
        max_position_embeddings=34,
        position_embedding_type="rotary",
        token_dropout=True,
    )
    EsmModel(config).save_pretrained(folder)


MAKERS = {"xlm-roberta": xlmr, "deberta-v2": deberta, "esm": esm}


def documents_of(name: str) -> list[str]:
    generator = random.Random(0)
    words = WORDS[:300] if name == "deberta-v2" else WORDS
    if name == "esm":
        return ["".join(generator.choices(RESIDUES[:20], k=40)) for _ in range(40)]
    return [
        " ".join(word.removeprefix("▁") for word in generator.choices(words, k=40))
        for _ in range(40)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A run's settings for each, with its teacher and shards."""
    root = tmp_path_factory.mktemp("vocabularies")
    trees = {}
    for name, make in MAKERS.items():
        teacher, shards = root / f"teacher-{name}", root / f"shards-{name}"
        with torch.random.fork_rng():
            torch.manual_seed(1)
            make(teacher)
        make_shards(
            iter(documents_of(name)),
            shards,
            tokenizer=load_tokenizer(teacher),
            sequence_length=16,
            source={"kind": "test"},
            workers=1,
        )
        student = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "init": "teacher"}
        tree = tiny_tree(
            root,
            teacher,
            shards,
            students={"l2": student},
            relations={"num_heads": 2},
            train={"max_steps": 3, "warmup_steps": 1},
        )
        tree["run"]["folder"] = str(root / f"run-{name}")
        trees[name] = tree
    return trees


def states_of(trees: list[dict[str, Any]]) -> list[str]:
    from scaledistill.distributed.ranks import process_group
    from scaledistill.training.loop import distill

    with process_group(60):
        return [distill(parse_config(tree)).state for tree in trees]


def test_from_text_to_an_exported_student(runs: dict[str, dict[str, Any]]) -> None:
    assert run_ranks(states_of, 1, list(runs.values()), timeout=200)[0] == ["done"] * 3
    for name, tree in runs.items():
        source = load_tokenizer(tree["teacher"]["model"])
        export = Path(tree["run"]["folder"]) / "export/l2"
        tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModel.from_pretrained(export)
        texts = [documents_of(name)[0], documents_of(name)[1][:9]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        assert sorted(batch) == ["attention_mask", "input_ids"], name
        expected = source(texts[0]).input_ids
        assert batch["input_ids"][0].tolist() == [*expected[:31], expected[-1]]
        assert model(**batch).last_hidden_state.isfinite().all()


def test_shards(runs: dict[str, dict[str, Any]]) -> None:
    """The ids of every row are the tokenizer's, between its own special tokens."""
    dtypes = {"xlm-roberta": "u32", "deberta-v2": "u16", "esm": "u16"}
    ends = {"xlm-roberta": (0, 2, 1), "deberta-v2": (1, 2, 0), "esm": (0, 2, 1)}
    for name, tree in runs.items():
        reader = ShardReader(Path(tree["data"]["train"]))
        assert reader.manifest.dtype == dtypes[name]
        tokenizer = load_tokenizer(tree["teacher"]["model"])
        assert Vocabulary.of(tokenizer)[1:4] == ends[name]
        assert reader.manifest.tokenizer["sha256"] == tokenizer_fingerprint(tokenizer)
        first = tokenizer(documents_of(name)[0]).input_ids
        assert (first[0], first[-1]) == ends[name][:2]
        assert ends[name][2] not in first
        assert tokenizer.unk_token_id not in first
        if name == "xlm-roberta":
            assert max(max(tokenizer(text).input_ids) for text in documents_of(name)) > 65_535
        assert len(first) == 42  # a token for each word or residue


def test_the_fast_form_of_esm(runs: dict[str, dict[str, Any]]) -> None:
    folder = runs["esm"]["teacher"]["model"]
    slow, fast = EsmTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in ("MKTAYIAK QR<mask>L", "mkt", "MKTxAY.-\n<null_1>J", "", "ACDE<cls>"):
        assert fast(text).input_ids == slow(text).input_ids, text
    assert fast("MK", "TA").input_ids == slow("MK", "TA").input_ids
    assert fast.convert_ids_to_tokens(fast("MK").input_ids) == ["<cls>", "M", "K", "<eos>"]


def test_neither_separator_nor_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<cls>": 0, "<pad>": 1, "a": 2, "?": 3}, "?"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<cls>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no sep_token; expected cls, sep and pad tokens"):
        Vocabulary.of(load_tokenizer(tmp_path))
