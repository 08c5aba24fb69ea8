"""Tokenised data sets for `MiniLMTrainer`.

Inputs: data sets of the datasets library with a text column, and a tokenizer. Outputs: one
shuffled data set of tokenised examples. Not handled here: batching and padding (the
data_collator's job).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from scaledistill.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def prepare_dataset(
    datasets: Sequence[Dataset | tuple[Dataset, str]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    default_column: str = "text",
    tokenization_kwargs: Mapping[str, Any] | None = None,
    seed: int = 42,
) -> Dataset:
    """Tokenise, concatenate and shuffle data sets.

    Each example is truncated to `max_seq_len` tokens and the rest is discarded;
    `scaledistill shards make` keeps all text.

    Args:
        datasets: data sets with their text in `default_column`, or pairs of a data set and the name
            of its text column. A `DatasetDict` must have a single split.
        tokenization_kwargs: passed to the tokenizer, which truncates at `max_seq_len` unless
            `truncation` is set to something else.

    Raises:
        ConfigError: a data set lacks the column, has several splits or is streamed, or
            `max_seq_len` is not a usable length.
        DataError: a row has no text, or the tokenizer has no vocabulary.
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has no tokens but "
            f"{', '.join(tokenizer.all_special_tokens)}: its files were missing when it was "
            "loaded; copy them there from the original model"
        )
    from datasets import concatenate_datasets

    options = _tokenizer_options(tokenizer, max_seq_len, tokenization_kwargs or {})
    if not isinstance(datasets, Sequence) or isinstance(datasets, str):
        raise ConfigError(
            f"datasets is a {type(datasets).__name__}; expected a list of data sets: write "
            "datasets=[data]"
        )
    if not datasets:
        raise ConfigError("datasets is empty; give at least one data set")

    def tokenize(column: str, rows: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        return tokenizer([_text_of(value, column) for value in rows[column]], **options)

    tokenised = []
    for item in datasets:
        data, column = item if isinstance(item, tuple) else (item, default_column)
        data = _single_split(data)
        if column not in data.column_names:
            raise ConfigError(
                f"column {column!r} is not in the data set; it has {', '.join(data.column_names)}"
            )
        tokenised.append(
            data.map(partial(tokenize, column), batched=True, remove_columns=data.column_names)
        )
    return concatenate_datasets(tokenised).shuffle(seed=seed).with_format("torch")


def _tokenizer_options(
    tokenizer: PreTrainedTokenizerBase, max_seq_len: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    special = tokenizer.num_special_tokens_to_add()
    if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int) or max_seq_len <= special:
        raise ConfigError(
            f"max_seq_len={max_seq_len!r}; expected a whole number above the {special} special "
            "tokens of each row, such as 128"
        )
    if given.get("max_length") not in (None, max_seq_len):
        raise ConfigError(
            f"max_seq_len={max_seq_len}, but tokenization_kwargs has "
            f"max_length={given['max_length']!r}; give the length as max_seq_len only"
        )
    if given.get("return_tensors") is not None:
        raise ConfigError(
            f"tokenization_kwargs has return_tensors={given['return_tensors']!r}, but rows differ "
            "in length here; leave it out: the data_collator makes the tensors"
        )
    return {"truncation": True, **given, "max_length": max_seq_len}


def _single_split(data: Any) -> Dataset:
    """Return `data`, or its only split if it is a `DatasetDict`."""
    # `load_dataset` without `split` returns a DatasetDict, often with "train" only.
    from datasets import Dataset, IterableDataset, IterableDatasetDict

    if isinstance(data, IterableDataset | IterableDatasetDict):
        raise ConfigError(
            "datasets has a streamed data set, which cannot be shuffled as a whole; load it "
            "without streaming=True, or make shards from it: `scaledistill shards make --dataset "
            "NAME`"
        )
    if isinstance(data, Mapping):
        if len(data) != 1:
            raise ConfigError(
                f"datasets has a DatasetDict with the splits {', '.join(map(str, data))}; give one "
                f"of them, such as data[{next(iter(data), 'train')!r}], or load it with split="
            )
        data = next(iter(data.values()))
    if not isinstance(data, Dataset):
        raise ConfigError(
            f"datasets has a {type(data).__name__}; expected datasets.Dataset objects, or pairs of "
            "one and the name of its text column"
        )
    return data


def _text_of(value: Any, column: str) -> str:
    if value is None:
        raise DataError(f"column {column!r} has rows without text (None); filter them out first")
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    raise DataError(
        f"column {column!r} holds {type(value).__name__} ({textwrap.shorten(repr(value), 40)}); "
        "expected text, or lists of texts: name another column"
    )
