"""Make a train and a held-out data set of shards from documents.

Inputs: an iterator of documents, a tokenizer. Outputs: `OUTPUT/train` and, if requested,
`OUTPUT/validation`, each complete with its manifest or absent. The bytes depend on the documents
and the settings, not on the number of workers. Not handled here: reading text
(`data.prepare.sources`), packing (`data.prepare.text`).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

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
_UNKNOWN_SAMPLE_TOKENS = 1_000_000


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
    _check_rows(sequence_length, rows_per_shard)
    _check_selection(held_out_fraction, held_out_max_documents, max_documents, max_tokens, workers)
    if not 0 <= max_unknown_fraction <= 1:
        raise SettingError(
            "max_unknown_fraction",
            max_unknown_fraction,
            remedy="expected 0 to 1, for instance 0.05",
        )
    start = time.perf_counter()
    vocabulary = Vocabulary.of(tokenizer)
    selection = {
        "seed": seed,
        "held_out_fraction": held_out_fraction,
        "held_out_max_documents": held_out_max_documents,
        "max_documents": max_documents,
        "max_tokens": max_tokens,
        "last_row": last_row,
        "max_unknown_fraction": max_unknown_fraction,
    }
    facts = {
        "name": tokenizer.name_or_path,
        "sha256": tokenizer_fingerprint(tokenizer),
        "cls_token_id": vocabulary.cls_id,
        "sep_token_id": vocabulary.sep_id,
        "unk_token_id": vocabulary.unk_id,
    }
    writers: dict[str, ShardWriter] = {}
    sample: list[list[str]] = []

    def check_unknown(smallest_sample: int) -> None:
        for split, counts in report.splits.items():
            enough = counts.tokens >= smallest_sample
            if enough and too_many_unknown(counts.unknown, counts.tokens, max_unknown_fraction):
                raise _too_many_unknown(
                    split, counts, max_unknown_fraction, tokenizer, itertools.chain(*sample)
                )

    with contextlib.ExitStack() as stack:

        def open_split(split: str) -> Packer:
            writer = ShardWriter(
                output / split,
                sequence_length=sequence_length,
                vocab_size=vocabulary.size,
                tokenizer=facts,
                pad_token_id=vocabulary.pad_id,
                source={**source, **selection, "split": split},
                rows_per_block=min(ROWS_PER_BLOCK, rows_per_shard),
                rows_per_shard=rows_per_shard,
                overwrite=overwrite,
            )
            writers[split] = writer
            return Packer(stack.enter_context(writer).write, vocabulary, sequence_length)

        train = open_split("train")
        report = ShardReport(train=train.counts)
        validation = train
        if held_out_fraction:
            validation = open_split("validation")
            report.validation = validation.counts
        elif manifest_path(output / "validation").exists():
            raise DataError(
                f"{output / 'validation'} was made by another run and may share documents with "
                "this one's train; remove it, set ",
                Field("held_out_fraction"),
                ", or name another output folder",
            )
        held_out = _HeldOut(held_out_fraction, held_out_max_documents)
        packing = _Packing(report, train, validation, held_out, max_tokens)

        if isinstance(documents, Generator):
            stack.callback(documents.close)
        encoder = TextEncoder(tokenizer, seed=seed)
        pieces: deque[_Piece | None] = deque()
        chunks = _chunks(documents, max_documents, encoder, pieces)
        encoded = parallel_map(encoder, _first_and_last_kept(chunks, sample), workers=workers)
        stack.enter_context(contextlib.closing(encoded))
        for ids_n, lengths, keys in encoded:
            packing.add(pieces.popleft(), ids_n, lengths, keys)
            report.seconds = time.perf_counter() - start
            check_unknown(_UNKNOWN_SAMPLE_TOKENS)
            if on_progress is not None:
                on_progress(report)
            if packing.is_full:
                break

        if report.documents == 0:
            raise DataError(
                f"the source {dict(source)} gave no document; check its path and options"
            )
        if report.validation is not None and not report.validation.documents:
            raise SourceError(
                "held_out_fraction",
                held_out_fraction,
                f"chose none of {report.documents} documents",
                "use a larger one",
            )
        train.finish(last_row)
        if report.validation is not None:
            validation.finish(last_row)
        check_unknown(1)
        for split, counts in report.splits.items():
            writers[split].tokenizer_facts["unknown_tokens"] = counts.unknown
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
        if chosen and length:
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

    def add(
        self, piece: _Piece | None, ids_n: np.ndarray, lengths: np.ndarray, keys: np.ndarray
    ) -> None:
        """Add the documents of a chunk, or one piece of a long document.

        Args:
            piece: None if the chunk holds whole documents.
            ids_n: the ids of all, end to end.
            lengths: of each in `ids_n`.
            keys: of each; unused for a piece, which has its document's key.
        """
        is_end, end = piece is None or piece.is_last, 0
        keys_of = keys.tolist() if piece is None else [piece.key]
        for length, key in zip(lengths.tolist(), keys_of, strict=True):
            self._tokens += length
            self._document_tokens += length
            if is_end:
                self._report.documents += 1
                self._report.empty_documents += not self._document_tokens
                self._document_tokens = 0
            split = self._validation if self._held_out.chooses(key, length) else self._train
            split.add(ids_n[end : end + length], is_end=is_end)
            end += length
            if is_end and self._max_tokens is not None and self._tokens >= self._max_tokens:
                self.is_full = True
                return


def _first_and_last_kept(chunks: Iterator[list[str]], kept: list[list[str]]) -> Iterator[list[str]]:
    """Pass chunks on; `kept` holds the last and the first one."""
    first: list[str] = []
    for chunk in chunks:
        first = first or chunk
        kept[:] = [chunk, first]
        yield chunk


def _too_many_unknown(
    split: str,
    counts: PackCounts,
    bound: float,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
) -> DataError:
    examples = ", ".join(map(repr, unknown_words(tokenizer, texts)))
    return DataError(
        f"{counts.unknown_fraction:.1%} of the {counts.tokens:,} tokens for {split} are unknown to "
        f"the tokenizer {tokenizer.name_or_path}{f' (such as {examples})' if examples else ''}, "
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
    workers: int | None,
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
    if workers is not None and workers < 0:
        raise SettingError("workers", workers, remedy="expected 0 (this process alone) or more")


class _Piece(NamedTuple):
    """What a piece carries of its long document."""

    key: float  # see EncodedDocuments
    is_last: bool


def _chunks(
    documents: Iterator[str],
    max_documents: int | None,
    encoder: TextEncoder,
    pieces: deque[_Piece | None],
) -> Iterator[list[str]]:
    """Group documents into work items; the grouping does not change the result.

    A long document becomes several items. `pieces` gets an entry for each list that is yielded:
    None for whole documents.
    """
    chunk: list[str] = []
    num_characters = 0
    for number, document in enumerate(documents, 1):
        is_long = len(document) > LONG_CHARACTERS
        if not is_long:
            chunk.append(document)
            num_characters += len(document)
        is_full = num_characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS
        if chunk and (is_full or is_long or number == max_documents):
            pieces.append(None)
            yield chunk
            chunk, num_characters = [], 0
        if is_long:
            key = encoder.key(document)
            for text, is_last in encoder.pieces(document, f"document {number}"):
                pieces.append(_Piece(key, is_last))
                yield [text]
        if number == max_documents:
            return
    if chunk:
        pieces.append(None)
        yield chunk
