"""Long documents: where one stands in the input, and how it is taken apart before it is tokenised.

In: a text and a tokenizer. Out: pieces of the text whose token ids, one after the other, are those
of the whole text. A tokenizer takes some 90 bytes of memory for each character that it is given at
once. Worker processes import this module, so it imports nothing heavy at the top.
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
"""Longer documents are taken apart."""
LARGEST_PIECE_CHARACTERS = 1 << 22  # 0.4 GB of a worker's memory
LARGEST_DOCUMENT_BYTES = 1 << 30
"""Longer documents are refused: the text of one document is held in memory, two or three times."""
_CONSPICUOUS_CHARACTERS = 1 << 26

# Places to cut, the best first: before a space between words, before other white space, beside
# punctuation, between ideographs (which BERT's rules set apart).
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
_CONTEXT = 128  # characters on each side that are tokenised to see whether a cut changes the ids
_SPACES = ("▁", "Ġ")  # what tokens have for a space: SentencePiece's and the byte-level ones


class LongText(str):
    """A long document that knows where it stands in the input."""

    where: str


def placed(text: str, where: str) -> str:
    """Give a long document its place (a file and line), for messages; a short one is returned as it
    is.
    """
    if len(text) <= LONG_CHARACTERS:
        return text
    if len(text) > _CONSPICUOUS_CHARACTERS:
        logger.warning(
            "%s: one document of %s characters; if its lines are documents of their own, use "
            "--documents line",
            where,
            f"{len(text):,}",
        )
    long_text = LongText(text)
    long_text.where = where
    return long_text


_LINES_OR_PARTS = (
    "if the lines of the file are documents of their own, use --documents line, else break it up "
    "(by blank lines, for instance)"
)


def too_long(where: str, remedy: str = _LINES_OR_PARTS) -> DataError:
    """Return the error for a document above `LARGEST_DOCUMENT_BYTES`."""
    limit = f"{LARGEST_DOCUMENT_BYTES >> 20:,} MiB"
    return DataError(f"{where}: one document of more than {limit}, the most that is read; {remedy}")


class Cutter:
    """Takes texts apart where the ids of the parts are the ids of the whole.

    A tokenizer splits a text into words, by rules that look at few characters, and tokenises each
    word by itself. So a cut between two words changes nothing, if the words on both sides stay what
    they are; which is seen by tokenising the neighbourhood whole and cut. Where there are no words
    (a SentencePiece model without a pre-tokenizer) a cut before a space serves as well, if no token
    of the vocabulary goes from one word into the next.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spaces = "".join(_SPACES)
        spans_words = re.compile(f"[^{spaces}][{spaces}]").search
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        # Merges alone make BPE's tokens; a Unigram model weighs all of a text, up to rounding.
        self._tokens_end_at_spaces = type(tokenizer.model).__name__ == "BPE" and not any(
            map(spans_words, vocabulary)
        )

    def pieces(self, text: str, where: str) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of a text, some `PIECE_CHARACTERS` long, and whether each is the last.

        Raises:
            DataError: `LARGEST_PIECE_CHARACTERS` follow each other without a place to cut.
        """
        where = getattr(text, "where", where)
        start = 0
        while len(text) - start > LONG_CHARACTERS:
            end, next_start = self._next_cut(text, start)
            if end - start > LARGEST_PIECE_CHARACTERS:
                raise DataError(
                    f"{where}: a document of {len(text):,} characters, where this tokenizer has to "
                    f"take more than {LARGEST_PIECE_CHARACTERS:,} of them at once: it has no white "
                    "space to cut it at, or the tokenizer does not split text into words; if its "
                    "lines are documents of their own, use --documents line, else break it up"
                )
            if end - start > LONG_CHARACTERS:
                logger.warning(
                    "%s: %s characters of a document of %s are tokenised at once, for want of a "
                    "place to cut them",
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
                    # Some tokenizers put a space before any text; for them the space of the text is
                    # left out.
                    for skipped in (0, 1) if text[at] == " " else (0,):
                        if self._can_cut(text, at, at + skipped):
                            return at, at + skipped
            first = last
        end = min(len(text), max(first, start + LARGEST_PIECE_CHARACTERS + 1))
        return end, end

    def _can_cut(self, text: str, end: int, start: int) -> bool:
        """Tell whether the ids stay the same if a piece ends at `end` and the next one begins at
        `start`.
        """
        after = text[start : start + _CONTEXT]
        # Two lengths, because rules that count characters from the start of a text may agree with
        # one by chance.
        return all(
            self._is_seam(text[max(0, end - length) : end], text[end:start], after)
            for length in (_CONTEXT, _CONTEXT - 1)
        )

    def _is_seam(self, before: str, between: str, after: str) -> bool:
        left, right, whole = (
            self._tokenizer.encode(text, add_special_tokens=False)
            for text in (before, after, before + between + after)
        )
        middle = len(left.ids)
        if not left.ids or not right.ids or left.ids + right.ids != whole.ids:
            return False
        # Unknown tokens are all alike, so equal ids don't show that the cut lies between the same
        # two.
        if whole.offsets[middle - 1][1] > len(before) or whole.offsets[middle][0] < len(before):
            return False
        if whole.word_ids[middle - 1] != whole.word_ids[middle]:
            return True
        last, first = whole.tokens[middle - 1], whole.tokens[middle]
        return (
            self._tokens_end_at_spaces and first.startswith(_SPACES) and not last.endswith(_SPACES)
        )
