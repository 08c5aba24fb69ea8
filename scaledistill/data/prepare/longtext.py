"""Cut long documents before they are tokenised, and keep their position in the input.

Inputs: a text and a tokenizer. Outputs: pieces of the text whose token ids, joined, are those of
the whole text. Not handled here: encoding the pieces (`data.prepare.text`). A tokenizer takes about
90 bytes of memory per character of a call, hence the pieces. Worker processes import this module,
so it imports nothing heavy at the top.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from scaledistill.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

PIECE_CHARACTERS = 1 << 18  # about 0.2 s of tokenising
LONG_CHARACTERS = 2 * PIECE_CHARACTERS
"""Longer documents are cut into pieces."""
LARGEST_PIECE_CHARACTERS = 1 << 22  # 0.4 GB of a worker's memory
LARGEST_DOCUMENT_BYTES = 1 << 30
"""Longer documents are refused: memory holds the text of one document two or three times."""
_CONSPICUOUS_CHARACTERS = 1 << 26

# Places to cut, best first: before a space between words, before other white space, beside
# punctuation, between ideographs (which BERT's rules separate).
_IDEOGRAPH = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<=[^\W_])(?= [^\W_])",
        r"(?<=\S)(?=\s)",
        r"(?<=\w)(?=[^\w\s])",
        r"(?<=[^\w\s])(?=\w)",
        rf"(?<={_IDEOGRAPH})(?={_IDEOGRAPH})",
    )
)
_TRIES = 8  # of each kind of place in a window
_CONTEXT = 128  # characters on each side that are tokenised to test whether a cut changes ids
_SPACES = ("▁", "Ġ")  # the space in tokens of SentencePiece and of byte-level tokenizers


class LongText(str):
    """A long document that carries its position in the input."""

    where: str


def placed(text: str, where: str) -> str:
    """Attach a position (file and line) to a long document, for messages.

    A short document is returned unchanged.
    """
    if len(text) <= LONG_CHARACTERS:
        return text
    if len(text) > _CONSPICUOUS_CHARACTERS:
        logger.warning(
            "%s: one document of %s characters; if each line is a document, use --documents line",
            where,
            f"{len(text):,}",
        )
    long_text = LongText(text)
    long_text.where = where
    return long_text


_LINES_OR_PARTS = (
    "if each line of the file is a document, use --documents line, else break it up "
    "(by blank lines, for example)"
)


def too_long(where: str, remedy: str = _LINES_OR_PARTS) -> DataError:
    """Return the error for a document above `LARGEST_DOCUMENT_BYTES`."""
    limit = f"{LARGEST_DOCUMENT_BYTES >> 20:,} MiB"
    return DataError(f"{where}: one document of more than the limit of {limit}; {remedy}")


class Cutter:
    """Cuts texts where the ids of the parts are the ids of the whole.

    A tokenizer splits a text into words, by rules that look at few characters, and tokenises each
    word by itself. So a cut between two words changes nothing if the words on both sides stay the
    same. This is tested by tokenising the neighbourhood whole and cut. If there are no words (a
    SentencePiece model without a pre-tokenizer), a cut before a space works as well, provided that
    no token of the vocabulary spans two words.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spaces = "".join(_SPACES)
        spans_words = re.compile(f"[^{spaces}][{spaces}]").search
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        # BPE only, whose tokens come from merges alone: a Unigram model scores a whole text, up to
        # rounding, so that a distant cut may change the result.
        self._tokens_end_at_spaces = type(tokenizer.model).__name__ == "BPE" and not any(
            map(spans_words, vocabulary)
        )

    def pieces(self, text: str, where: str) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of a text, about `PIECE_CHARACTERS` long, and whether each is the last.

        Raises:
            DataError: `LARGEST_PIECE_CHARACTERS` in a row have no place to cut.
        """
        where = getattr(text, "where", where)
        start = 0
        while len(text) - start > LONG_CHARACTERS:
            end, next_start = self._next_cut(text, start)
            if end - start > LARGEST_PIECE_CHARACTERS:
                raise DataError(
                    f"{where}: a document of {len(text):,} characters, of which this tokenizer "
                    f"must take more than {LARGEST_PIECE_CHARACTERS:,} at once: there is no white "
                    "space to cut it at, or the tokenizer does not split text into words; if each "
                    "line is a document, use --documents line, else break it up"
                )
            if end - start > LONG_CHARACTERS:
                logger.warning(
                    "%s: %s characters of a document of %s are tokenised at once, because there is "
                    "no place to cut them",
                    where,
                    f"{end - start:,}",
                    f"{len(text):,}",
                )
            yield text[start:end], next_start >= len(text)
            start = next_start
        if start < len(text):
            yield text[start:], True

    def _next_cut(self, text: str, start: int) -> tuple[int, int]:
        """Return the end of the piece that begins at `start`, and the start of the next one."""
        first = start + PIECE_CHARACTERS // 2
        while first < len(text) and first - start < LARGEST_PIECE_CHARACTERS:
            last = first + PIECE_CHARACTERS // 2
            for place in _PLACES:
                for found in reversed(deque(place.finditer(text, first, last), _TRIES)):
                    at = found.start()
                    # Some tokenizers put a space before any text; for them, drop the text's own.
                    for skipped in (0, 1) if text[at] == " " else (0,):
                        if self._can_cut(text, at, at + skipped):
                            return at, at + skipped
            first = last
        end = min(len(text), max(first, start + LARGEST_PIECE_CHARACTERS + 1))
        return end, end

    def _can_cut(self, text: str, end: int, start: int) -> bool:
        """Return whether a piece may end at `end` and the next start at `start` with equal ids."""
        after = text[start : start + _CONTEXT]
        # Two lengths, because rules that count characters from the start of a text may give equal
        # ids for one of them by chance.
        return all(
            self._is_seam(text[max(0, end - length) : end], text[end:start], after)
            for length in (_CONTEXT, _CONTEXT - 1)
        )

    def _is_seam(self, before: str, between: str, after: str) -> bool:
        """Return whether `before` and `after` have the ids of the whole, cut at that point."""
        left, right, whole = (
            self._tokenizer.encode(text, add_special_tokens=False)
            for text in (before, after, before + between + after)
        )
        middle = len(left.ids)
        if not left.ids or not right.ids or left.ids + right.ids != whole.ids:
            return False
        # All unknown tokens have one id, so equal ids do not prove that the cut is between the same
        # two tokens.
        if whole.offsets[middle - 1][1] > len(before) or whole.offsets[middle][0] < len(before):
            return False
        if whole.word_ids[middle - 1] != whole.word_ids[middle]:
            return True
        last, first = whole.tokens[middle - 1], whole.tokens[middle]
        return (
            self._tokens_end_at_spaces and first.startswith(_SPACES) and not last.endswith(_SPACES)
        )
