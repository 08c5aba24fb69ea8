"""Pack documents into rows of token ids: tokenizer, encoder and packer.

Inputs: documents (`str`) and a fast tokenizer. Outputs: full rows of ids with the bounds of every
document's pieces. Not handled here: reading text (`data.prepare.sources`), writing shards
(`data.shards`), the whole run (`data.prepare.make`). Worker processes import this module, so it
imports nothing heavy at the top.

Legend: N rows, T positions of a row, n tokens of a document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from scaledistill.data.prepare.longtext import Cutter
from scaledistill.data.tokenizer import load_tokenizer as load_tokenizer
from scaledistill.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Cases, accents, scripts, numbers and white space that reveal different rules in tokenizers with
# equal vocabularies.
_PROBE = (
    "The Quick brown fox's naïve café, 北京 Ünïversität: 3.14159 & 1,000\n\t  re-tokenised? "
    "(don't) Привет x²=α"
)
_HASHED_CHARACTERS = 1 << 20  # at a time


def hash_text(update: Callable[[bytes], object], text: str) -> None:
    """Pass a text to a hash's `update`, piece by piece: no copy of a whole long text is made."""
    for first in range(0, len(text), _HASHED_CHARACTERS):
        update(text[first : first + _HASHED_CHARACTERS].encode())


# --- tokenizer ---


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 of the vocabulary, the special ids and the ids of a probe text.

    The tokenizer is not modified. Truncation, padding and library versions are excluded: equal
    fingerprints mean equal ids.

    Raises:
        DataError: the tokenizer has no fast form.
    """
    encoder = TextEncoder(tokenizer)
    special = _wrapping_ids(tokenizer) | {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("mask", "unk")
    }
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": special,
        "probe": encoder([_PROBE]).ids_n.tolist(),
    }
    return hashlib.sha256(
        json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


_STAND_INS = {"cls": ("cls", "bos", "eos"), "sep": ("sep", "eos"), "pad": ("pad", "eos")}


class Vocabulary(NamedTuple):
    """The facts about a tokenizer that packing needs."""

    size: int
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int | None = None
    """The id of text outside the vocabulary; None if there is no such text (byte-level ones)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smaller of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """Read the ids of [CLS], [SEP] and [PAD], by whatever name (RoBERTa: <s>, </s>, <pad>).

        The tokens of beginning and end stand in for a missing [CLS] and [SEP] (decoders, ESM), and
        that of the end for a missing beginning or padding, as when such models were trained.

        Raises:
            DataError: one of the three is missing.
        """
        ids = _wrapping_ids(tokenizer)
        missing = [f"{name}_token" for name, token_id in ids.items() if token_id is None]
        if missing:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)}; expected cls, "
                "sep and pad tokens, because every document is wrapped in [CLS] … [SEP], or an "
                "eos token in their place: use the teacher's tokenizer"
            )
        size = 1 + max(tokenizer.get_vocab().values())
        return cls(size, ids["cls"], ids["sep"], ids["pad"], _unknown_id(tokenizer))


def _wrapping_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the ids of the tokens around a document and of padding, by BERT's names."""
    return {
        name: next(
            (i for each in names if (i := getattr(tokenizer, f"{each}_token_id")) is not None),
            None,
        )
        for name, names in _STAND_INS.items()
    }


def _unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the id that the tokenizer's model gives to unknown text.

    The tokenizer's other files may name another token.
    """
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else backend.token_to_id(token)


def unknown_words(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], most: int = 5
) -> list[str]:
    """Return a few distinct unknown pieces of the texts, at most 20 characters each."""
    unknown, found = _unknown_id(tokenizer), dict[str, None]()
    for text in itertools.islice(texts, 1000):
        encoding = tokenizer.backend_tokenizer.encode(text[:10_000], add_special_tokens=False)
        spans = [
            span
            for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id == unknown
        ]
        found |= dict.fromkeys(text[start : min(end, start + 20)] for start, end in spans)
        if len(found) >= most:
            break
    return list(found)[:most]


class EncodedDocuments(NamedTuple):
    """Token ids of some documents, end to end, without special tokens."""

    ids_n: np.ndarray  # uint16 or uint32
    lengths: np.ndarray  # int64, tokens of each document
    keys: np.ndarray  # float64 in [0, 1), a hash of (seed, text) of each document


class TextEncoder:
    """Picklable function from documents to `EncodedDocuments`; text such as "[CLS]" stays text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r} has no fast form; expected tokenizer.json"
            )
        self._state = (backend.to_str(), Vocabulary.of(tokenizer).dtype, seed)
        self.__setstate__(self._state)

    def __getstate__(self) -> tuple[str, np.dtype[Any], int]:
        return self._state

    def __setstate__(self, state: tuple[str, np.dtype[Any], int]) -> None:
        from tokenizers import Tokenizer

        self._state = state
        definition, self._dtype, seed = state
        self._salt = hashlib.sha256(str(seed).encode()).digest()
        self._backend: Tokenizer = Tokenizer.from_str(definition)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # lost in pickles and JSON, so set here
        self._cutter: Cutter | None = None

    def __call__(self, documents: Sequence[str]) -> EncodedDocuments:
        """Encode documents without special tokens and hash each one.

        Raises:
            DataError: the tokenizer cannot encode a document.
        """
        try:
            encodings = self._backend.encode_batch_fast(documents, add_special_tokens=False)
        except Exception as error:  # tokenizers has no exception class of its own
            raise DataError(
                f"the tokenizer cannot encode this text ({error}); check its vocabulary and "
                "tokenizer.json"
            ) from error
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(itertools.chain.from_iterable(ids), self._dtype, int(lengths.sum()))
        return EncodedDocuments(
            flat, lengths, np.fromiter(map(self.key, documents), np.float64, len(ids))
        )

    def key(self, document: str) -> float:
        """Return the hash of seed and text, in [0, 1)."""
        digest = hashlib.blake2b(digest_size=6, key=self._salt)
        hash_text(digest.update, document)
        return int.from_bytes(digest.digest(), "little") / 2.0**48

    def pieces(self, document: str, where: str) -> Iterator[tuple[str, bool]]:
        """Cut a long document; yield each piece and whether it is the last.

        The ids of the pieces, joined, are those of the document.

        Raises:
            DataError: there is no place to cut it; the message begins with `where`.
        """
        if self._cutter is None:
            self._cutter = Cutter(self._backend)
        return self._cutter.pieces(document, where)


# --- packer ---


@dataclass
class PackCounts:
    """Counts of the packed rows.

    `tokens` are tokens of text, without [CLS], [SEP] and padding; `unknown` are [UNK].
    """

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    unknown: int = 0
    padding: int = 0
    dropped_tokens: int = 0

    @property
    def unknown_fraction(self) -> float:
        """The fraction of the tokens that are unknown."""
        return self.unknown / self.tokens if self.tokens else 0.0


class Packer:
    """Pack documents one after another into full rows and pass them to `write` in blocks.

    Every piece of a document is wrapped in [CLS] … [SEP]; what does not fit continues in the next
    row. One or two positions left at the end of a row cannot hold a piece (three are needed), so
    they are padded, and counted in `padding`.

    Args:
        write: called with ids [N, T] and the pieces, int64 [pieces, 3]: row in this call, start,
            end (exclusive).

    Raises:
        ConfigError: `sequence_length` is below 3.
    """

    def __init__(
        self,
        write: Callable[[np.ndarray, np.ndarray], None],
        vocabulary: Vocabulary,
        sequence_length: int,
        *,
        rows_per_write: int = 256,
    ) -> None:
        if sequence_length < 3:
            raise ConfigError(
                f"sequence_length={sequence_length} is too short for [CLS] token [SEP]; use 3 or "
                "more, for example 512"
            )
        self.counts = PackCounts()
        self._write = write
        self._vocabulary = vocabulary
        self._shape = (rows_per_write, sequence_length)
        self._row = self._column = 0
        self._is_inside = False  # a document whose end has not come yet
        self._held_n = np.empty(0, vocabulary.dtype)
        self._start_block()

    def add(self, ids_n: np.ndarray, *, is_end: bool = True) -> None:
        """Append one document's token ids, without special tokens; an empty document adds nothing.

        Args:
            is_end: False if more ids of the document follow in the next call.
        """
        self.counts.documents += not self._is_inside and len(ids_n) > 0
        self.counts.tokens += len(ids_n)
        self._is_inside = not is_end and (self._is_inside or len(ids_n) > 0)
        if len(self._held_n):
            ids_n = np.concatenate([self._held_n, ids_n])
            self._held_n = ids_n[:0]
        start = 0
        while start < len(ids_n):
            space = self._shape[1] - self._column
            if space < 3:
                self._end_row()
                continue
            if not is_end and len(ids_n) - start < space - 2:
                # More ids of this document may belong to the row's piece: wait for them.
                self._held_n = ids_n[start:]
                return
            length = min(space - 2, len(ids_n) - start)
            row_T, first, last = self._ids_NT[self._row], self._column, self._column + length + 1
            row_T[first] = self._vocabulary.cls_id
            row_T[first + 1 : last] = ids_n[start : start + length]
            self.counts.unknown += self._num_unknown(row_T[first + 1 : last])
            row_T[last] = self._vocabulary.sep_id
            self._pieces.append((self._row, first, last + 1))
            self._column = last + 1
            start += length

    def finish(self, last_row: Literal["pad", "drop"]) -> None:
        """Pad or drop a partial last row (3 positions or more are free), and write what is left."""
        if self._column and last_row == "drop" and self._shape[1] - self._column >= 3:
            while self._pieces and self._pieces[-1][0] == self._row:
                _, start, end = self._pieces.pop()
                self.counts.dropped_tokens += end - start - 2
                self.counts.unknown -= self._num_unknown(
                    self._ids_NT[self._row, start + 1 : end - 1]
                )
            self.counts.tokens -= self.counts.dropped_tokens
        elif self._column:
            self._end_row()
        self._flush()

    def _num_unknown(self, ids_n: np.ndarray) -> int:
        unknown = self._vocabulary.unk_id
        return 0 if unknown is None else int(np.count_nonzero(ids_n == unknown))

    def _end_row(self) -> None:
        self.counts.padding += self._shape[1] - self._column
        self._row += 1
        self._column = 0
        if self._row == self._shape[0]:
            self._flush()

    def _flush(self) -> None:
        if self._row:
            self.counts.rows += self._row
            self._write(self._ids_NT[: self._row], np.array(self._pieces, np.int64))
        self._start_block()

    def _start_block(self) -> None:
        self._ids_NT = np.full(self._shape, self._vocabulary.pad_id, self._vocabulary.dtype)
        self._pieces: list[tuple[int, int, int]] = []
        self._row = self._column = 0
