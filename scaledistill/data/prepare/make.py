"""Make a train and a held-out data set of shards from documents.

Inputs: an iterator of documents, a tokenizer. Outputs: `OUTPUT/train` and, if requested,
`OUTPUT/validation`, each complete with its manifest or absent. The bytes depend on the documents
and the settings, not on the number of workers. Not handled here: reading text
(`data.prepare.sources`), packing (`data.prepare.text`), dividing the work over machines
(`data.prepare.parts`).

Documents are tokenised independently of each other (`tokenise`), and then packed one after another
in the order of the input (`write_shards`).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from scaledistill.data.manifest import (
    MAX_SEQUENCE_LENGTH,
    MAX_UNKNOWN_FRACTION,
    manifest_path,
    too_many_unknown,
)
from scaledistill.data.prepare.longtext import LONG_CHARACTERS, PIECE_CHARACTERS
from scaledistill.data.prepare.pool import parallel_map
from scaledistill.data.prepare.text import (
    PackCounts,
    Packer,
    TextEncoder,
    Vocabulary,
    tokenizer_fingerprint,
    unknown_words,
)
from scaledistill.data.shards import ShardWriter
from scaledistill.data.sizes import ROWS_PER_BLOCK, ROWS_PER_SHARD
from scaledistill.errors import DataError, Field, SettingError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK_CHARACTERS = PIECE_CHARACTERS
_CHUNK_DOCUMENTS = 4096
# Enough tokens to find, within minutes, that a tokenizer does not fit.
UNKNOWN_SAMPLE_TOKENS = 1_000_000


@dataclass
class ShardReport:
    """Counts of what was read and written; `documents` includes empty and held-out ones."""

    documents: int = 0
    empty_documents: int = 0
    train: PackCounts = field(default_factory=PackCounts)
    validation: PackCounts | None = None
    seconds: float = 0.0

    @property
    def splits(self) -> dict[str, PackCounts]:
        """The counts of each data set, keyed by its folder's name."""
        return {"train": self.train} | ({"validation": self.validation} if self.validation else {})

    @property
    def tokens(self) -> int:
        """The tokens of text in all rows, without [CLS], [SEP] and padding."""
        return sum(counts.tokens for counts in self.splits.values())

    @property
    def tokens_per_second(self) -> float:
        """The tokens of text divided by the wall-clock seconds; 0 before any time was measured."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def measurements(self) -> list[dict[str, object]]:
        """Return every figure as {"name", "value", "unit", "n"}."""
        rows: list[tuple[str, float, str]] = [
            ("documents", self.documents, "documents"),
            ("empty_documents", self.empty_documents, "documents"),
            ("seconds", self.seconds, "s"),
            ("tokens_per_second", self.tokens_per_second, "tokens/s"),
        ]
        for split, counts in self.splits.items():
            rows += [
                (f"{split}/documents", counts.documents, "documents"),
                (f"{split}/rows", counts.rows, "rows"),
                (f"{split}/tokens", counts.tokens, "tokens"),
                (f"{split}/unknown_tokens", counts.unknown, "tokens"),
                (f"{split}/unknown_fraction", counts.unknown_fraction, "fraction"),
                (f"{split}/padding", counts.padding, "positions"),
                (f"{split}/dropped_tokens", counts.dropped_tokens, "tokens"),
            ]
        return [
            {"name": f"make_shards/{name}", "value": value, "unit": unit, "n": 1}
            for name, value, unit in rows
        ]


@dataclass(frozen=True)
class Recipe:
    """What determines the shards, apart from the documents; all values are JSON-able.

    Raises: ConfigError if settings are out of range or contradict each other.
    """

    tokenizer: Mapping[str, object]
    """Facts for the manifests, with at least "name" and "sha256"."""
    vocabulary: Vocabulary
    sequence_length: int
    source: Mapping[str, object]
    """Description of the input, for the manifests."""
    last_row: Literal["pad", "drop"] = "pad"
    held_out_fraction: float = 0.0
    held_out_max_documents: int | None = None
    seed: int = 0
    max_documents: int | None = None
    max_tokens: int | None = None
    max_unknown_fraction: float = MAX_UNKNOWN_FRACTION
    rows_per_shard: int = ROWS_PER_SHARD

    def __post_init__(self) -> None:
        _check_rows(self.sequence_length, self.rows_per_shard)
        _check_selection(
            self.held_out_fraction,
            self.held_out_max_documents,
            self.max_documents,
            self.max_tokens,
        )
        if not 0 <= self.max_unknown_fraction <= 1:
            raise SettingError(
                "max_unknown_fraction",
                self.max_unknown_fraction,
                remedy="expected 0 to 1, for instance 0.05",
            )

    @property
    def selection(self) -> dict[str, object]:
        """The settings that the manifests record."""
        return {
            "seed": self.seed,
            "held_out_fraction": self.held_out_fraction,
            "held_out_max_documents": self.held_out_max_documents,
            "max_documents": self.max_documents,
            "max_tokens": self.max_tokens,
            "last_row": self.last_row,
            "max_unknown_fraction": self.max_unknown_fraction,
        }


def recipe_of(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Recipe:
    """Return the recipe for a tokenizer and the settings of `make_shards`."""
    vocabulary = Vocabulary.of(tokenizer)
    facts = {
        "name": tokenizer.name_or_path,
        "sha256": tokenizer_fingerprint(tokenizer),
        "cls_token_id": vocabulary.cls_id,
        "sep_token_id": vocabulary.sep_id,
        "unk_token_id": vocabulary.unk_id,
    }
    return Recipe(facts, vocabulary, **settings)


class Tokens(NamedTuple):
    """The token ids of some documents, or of one piece of a long document."""

    unit: int
    """Number of the unit of work in the input, from 0: some whole documents or a long one."""
    ids_n: np.ndarray
    """Ids of all, end to end: uint16 or uint32."""
    lengths: np.ndarray
    """Tokens of each, int64."""
    keys: np.ndarray
    """Hash of each document, float64 in [0, 1); of a piece, that of its document."""
    is_end: bool
    """False if more of the document follows in the next `Tokens`."""


def make_shards(
    documents: Iterator[str],
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    sequence_length: int,
    source: Mapping[str, object],
    last_row: Literal["pad", "drop"] = "pad",
    held_out_fraction: float = 0.0,
    held_out_max_documents: int | None = None,
    seed: int = 0,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    max_unknown_fraction: float = MAX_UNKNOWN_FRACTION,
    rows_per_shard: int = ROWS_PER_SHARD,
    workers: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[ShardReport], None] | None = None,
) -> ShardReport:
    """Tokenise and pack the documents into shards under `output`.

    Args:
        source: JSON-able description of the input, for the manifests.
        last_row: what happens to the last row if it is partial; either way it is counted.
        held_out_fraction: fraction of the documents that go to `validation`, chosen by a hash of
            seed and text, so that equal documents stay together. After `held_out_max_documents`
            distinct ones the rest goes to `train`.
        max_documents: stop after this many documents.
        max_tokens: stop after the document that reaches this many tokens.
        max_unknown_fraction: the largest fraction of unknown tokens in a data set, see
            `too_many_unknown`; 1 accepts any. Checked once a million tokens are packed, and at the
            end.
        rows_per_shard: a multiple of 256, or less than 256.
        workers: processes that tokenise; one per available core if None, 0 to use this process
            only.
        on_progress: called with the counts so far, several times a second.

    Raises:
        ConfigError: settings contradict each other.
        DataError: the source is damaged or empty, its text unknown to the tokenizer, or `output` is
            in use. No manifest is left then, nor on Ctrl-C.
    """
    recipe = recipe_of(
        tokenizer,
        sequence_length=sequence_length,
        source=source,
        last_row=last_row,
        held_out_fraction=held_out_fraction,
        held_out_max_documents=held_out_max_documents,
        seed=seed,
        max_documents=max_documents,
        max_tokens=max_tokens,
        max_unknown_fraction=max_unknown_fraction,
        rows_per_shard=rows_per_shard,
    )
    check_workers(workers)
    sample: list[Sequence[str]] = []
    encoded = tokenise(documents, recipe, tokenizer, workers=workers, sample=sample)
    return write_shards(
        encoded,
        output,
        recipe,
        overwrite=overwrite,
        on_progress=on_progress,
        examples=lambda: unknown_words(tokenizer, itertools.chain(*sample)),
    )


def tokenise(
    documents: Iterator[str],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    workers: int | None,
    sample: list[Sequence[str]],
    is_own: Callable[[int], bool] = lambda unit: True,
) -> Generator[Tokens, None, None]:
    """Yield the documents' tokens, in the order of the input; closing it closes `documents` too.

    Args:
        workers: see `make_shards`.
        sample: is filled with texts, for messages.
        is_own: whether to tokenise a unit; the others are only read.
    """
    encoder = TextEncoder(tokenizer, seed=recipe.seed)
    origins: deque[_Origin] = deque()
    chunks = _chunks(documents, recipe.max_documents, encoder, origins, is_own)
    with contextlib.ExitStack() as stack:
        if isinstance(documents, Generator):
            stack.callback(documents.close)
        encoded = parallel_map(encoder, _first_and_last_kept(chunks, sample), workers=workers)
        stack.enter_context(contextlib.closing(encoded))
        for ids_n, lengths, keys in encoded:
            unit, key, is_end = origins.popleft()
            yield Tokens(unit, ids_n, lengths, keys if key is None else np.array([key]), is_end)


def write_shards(
    encoded: Generator[Tokens, None, None],
    output: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    on_progress: Callable[[ShardReport], None] | None = None,
    examples: Callable[[], Sequence[str]] = list,
) -> ShardReport:
    """Pack tokens into the rows of the data sets under `output`, and close `encoded`.

    Args:
        encoded: in the order of the input.
        examples: called for some unknown words, for a message.

    Raises:
        DataError: see `make_shards`.
    """
    start = time.perf_counter()
    writers: dict[str, ShardWriter] = {}
    vocabulary = recipe.vocabulary

    def check_unknown(smallest_sample: int) -> None:
        for split, counts in report.splits.items():
            if counts.tokens >= smallest_sample:
                check_unknown_fraction(split, counts, recipe, examples)

    with contextlib.ExitStack() as stack:

        def open_split(split: str) -> Packer:
            writer = ShardWriter(
                output / split,
                sequence_length=recipe.sequence_length,
                vocab_size=vocabulary.size,
                tokenizer=recipe.tokenizer,
                pad_token_id=vocabulary.pad_id,
                source={**recipe.source, **recipe.selection, "split": split},
                rows_per_block=min(ROWS_PER_BLOCK, recipe.rows_per_shard),
                rows_per_shard=recipe.rows_per_shard,
                overwrite=overwrite,
            )
            writers[split] = writer
            return Packer(stack.enter_context(writer).write, vocabulary, recipe.sequence_length)

        train = open_split("train")
        report = ShardReport(train=train.counts)
        validation = train
        if recipe.held_out_fraction:
            validation = open_split("validation")
            report.validation = validation.counts
        elif manifest_path(output / "validation").exists():
            raise DataError(
                f"{output / 'validation'} was made by another run and may share documents with "
                "this one's train; remove it, set ",
                Field("held_out_fraction"),
                ", or name another output folder",
            )
        held_out = _HeldOut(recipe.held_out_fraction, recipe.held_out_max_documents)
        packing = _Packing(report, train, validation, held_out, recipe.max_tokens)

        stack.enter_context(contextlib.closing(encoded))
        for tokens in encoded:
            packing.add(tokens)
            report.seconds = time.perf_counter() - start
            check_unknown(UNKNOWN_SAMPLE_TOKENS)
            if on_progress is not None:
                on_progress(report)
            if packing.is_full:
                break

        if report.documents == 0:
            raise DataError(
                f"the source {dict(recipe.source)} gave no document; check its path and options"
            )
        if report.validation is not None and not report.validation.documents:
            raise SourceError(
                "held_out_fraction",
                recipe.held_out_fraction,
                f"chose none of {report.documents} documents",
                "use a larger one",
            )
        train.finish(recipe.last_row)
        if report.validation is not None:
            validation.finish(recipe.last_row)
        check_unknown(1)
        for split, counts in report.splits.items():
            writers[split].tokenizer_facts["unknown_tokens"] = counts.unknown
        # Both data sets or none: a new `validation` may share documents with an old `train`.
        for writer in writers.values():
            writer.prepare()
        for writer in writers.values():
            writer.remove_old_manifest()
    report.seconds = time.perf_counter() - start
    return report


class _HeldOut:
    """Chooses the documents of `validation`, by the hash of their text."""

    def __init__(self, fraction: float, max_documents: int | None) -> None:
        self._fraction = fraction
        self._limit = float("inf") if max_documents is None else max_documents
        self._keys: set[float] = set()

    def chooses(self, key: float, length: int) -> bool:
        """Return whether a document, or a piece of one, is held out.

        A document equal to one that is held out is held out too, even after the limit is reached.

        Args:
            key: of the document, from 0 to 1; equal texts have equal keys.
            length: tokens; an empty document does not count towards the limit.
        """
        chosen = key < self._fraction and (key in self._keys or len(self._keys) < self._limit)
        if chosen and length and self._limit < float("inf"):
            self._keys.add(key)
        return chosen


class _Packing:
    """Adds tokenised documents to their split, and counts them."""

    def __init__(
        self,
        report: ShardReport,
        train: Packer,
        validation: Packer,
        held_out: _HeldOut,
        max_tokens: int | None,
    ) -> None:
        self._report, self._train, self._validation = report, train, validation
        self._held_out, self._max_tokens = held_out, max_tokens
        self._tokens = self._document_tokens = 0
        self.is_full = False
        """`max_tokens` is reached; it takes nothing more."""

    def add(self, tokens: Tokens) -> None:
        """Add the documents of a chunk, or one piece of a long document."""
        end = 0
        for length, key in zip(tokens.lengths.tolist(), tokens.keys.tolist(), strict=True):
            self._tokens += length
            self._document_tokens += length
            if tokens.is_end:
                self._report.documents += 1
                self._report.empty_documents += not self._document_tokens
                self._document_tokens = 0
            split = self._validation if self._held_out.chooses(key, length) else self._train
            split.add(tokens.ids_n[end : end + length], is_end=tokens.is_end)
            end += length
            if tokens.is_end and self._max_tokens is not None and self._tokens >= self._max_tokens:
                self.is_full = True
                return


def _first_and_last_kept(
    chunks: Iterator[list[str]], kept: list[Sequence[str]]
) -> Iterator[list[str]]:
    """Pass chunks on; `kept` holds the last and the first one."""
    first: list[str] = []
    for chunk in chunks:
        first = first or chunk
        kept[:] = [chunk, first]
        yield chunk


def check_unknown_fraction(
    split: str, counts: PackCounts, recipe: Recipe, examples: Callable[[], Sequence[str]]
) -> None:
    """Raise DataError if more of the tokens are unknown than the recipe accepts."""
    bound = recipe.max_unknown_fraction
    if not too_many_unknown(counts.unknown, counts.tokens, bound):
        return
    words = ", ".join(map(repr, examples()))
    raise DataError(
        f"{counts.unknown_fraction:.1%} of the {counts.tokens:,} tokens for {split} are unknown to "
        f"the tokenizer {recipe.tokenizer['name']}{f' (such as {words})' if words else ''}, "
        "more than ",
        Field("max_unknown_fraction", bound),
        "; give the teacher's tokenizer with all of its files, or text that it knows, or raise the "
        "bound (1 accepts any)",
    )


def _check_rows(sequence_length: int, rows_per_shard: int) -> None:
    if not 3 <= sequence_length <= MAX_SEQUENCE_LENGTH:
        raise SettingError(
            "sequence_length",
            sequence_length,
            remedy=f"expected 3 ([CLS] token [SEP]) to {MAX_SEQUENCE_LENGTH}, such as 512",
        )
    num_blocks = max(1, -(-rows_per_shard // ROWS_PER_BLOCK))
    if rows_per_shard < 1 or (num_blocks > 1 and rows_per_shard % ROWS_PER_BLOCK):
        raise SettingError(
            "rows_per_shard",
            rows_per_shard,
            remedy=f"use a multiple of {ROWS_PER_BLOCK}, such as {num_blocks * ROWS_PER_BLOCK}, "
            f"or 1 to {ROWS_PER_BLOCK - 1}",
        )


def _check_selection(
    held_out_fraction: float,
    held_out_max_documents: int | None,
    max_documents: int | None,
    max_tokens: int | None,
) -> None:
    if not 0 <= held_out_fraction < 1:
        raise SettingError(
            "held_out_fraction",
            held_out_fraction,
            remedy="expected 0 to below 1, for instance 0.01",
        )
    if held_out_max_documents is not None and not held_out_fraction:
        raise SettingError(
            "held_out_max_documents",
            held_out_max_documents,
            ("has no effect without a ", Field("held_out_fraction")),
            "set both",
        )
    limits = {
        "held_out_max_documents": held_out_max_documents,
        "max_documents": max_documents,
        "max_tokens": max_tokens,
    }
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise SettingError(name, limit, remedy="expected 1 or more, or leave it out")


def check_workers(workers: int | None) -> None:
    """Raise ConfigError for a negative number of workers."""
    if workers is not None and workers < 0:
        raise SettingError("workers", workers, remedy="expected 0 (this process alone) or more")


class _Origin(NamedTuple):
    """Where a work item comes from, see `Tokens`."""

    unit: int
    key: float | None  # of a long document; None for whole documents, which the encoder hashes
    is_end: bool


def _chunks(
    documents: Iterator[str],
    max_documents: int | None,
    encoder: TextEncoder,
    origins: deque[_Origin],
    is_own: Callable[[int], bool],
) -> Iterator[list[str]]:
    """Group documents into work items; the grouping does not change the result.

    A long document becomes several items. `origins` gets an entry for each list that is yielded.
    """
    chunk: list[str] = []
    num_characters = unit = 0
    for number, document in enumerate(documents, 1):
        is_long = len(document) > LONG_CHARACTERS
        if not is_long:
            chunk.append(document)
            num_characters += len(document)
        is_full = num_characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS
        if chunk and (is_full or is_long or number == max_documents):
            if is_own(unit):
                origins.append(_Origin(unit, None, True))
                yield chunk
            chunk, num_characters = [], 0
            unit += 1
        if is_long:
            if is_own(unit):
                key = encoder.key(document)
                for text, is_last in encoder.pieces(document, f"document {number}"):
                    origins.append(_Origin(unit, key, is_last))
                    yield [text]
            unit += 1
        if number == max_documents:
            return
    if chunk and is_own(unit):
        origins.append(_Origin(unit, None, True))
        yield chunk
