"""Check a block's bytes and view them as arrays; `data.manifest` describes their format.

Inputs: a manifest, one of its shards and a block's bytes. Outputs: ids and documents, and counts of
tokens in them. Not handled here: reading the bytes (`data.reader`).
"""

from __future__ import annotations

import zlib

import numpy as np

from scaledistill.data.manifest import DOCUMENTS_DTYPE, Manifest, Shard
from scaledistill.errors import DataError


def document_problem(documents: np.ndarray, num_rows: int, sequence_length: int) -> str | None:
    """Return what is wrong with int triples [n, 3] (row, start, end), or None.

    They must ascend, be disjoint and non-empty, and stay within [rows, T].
    """
    row, start, end = documents.T
    if not (
        (row >= 0) & (row < num_rows) & (start >= 0) & (start < end) & (end <= sequence_length)
    ).all():
        return (
            f"a document lies outside the {num_rows} rows of {sequence_length} positions, or is "
            "empty"
        )
    if not ((np.diff(row) > 0) | ((np.diff(row) == 0) & (start[1:] >= end[:-1]))).all():
        return "documents overlap or don't ascend by (row, start)"
    return None


def count_tokens(documents: np.ndarray, num_rows: int) -> np.ndarray:
    """Count the real tokens of each row, int64 [num_rows], from triples [n, 3]."""
    length = documents[:, 2].astype(np.int64) - documents[:, 1]
    return np.bincount(documents[:, 0], weights=length, minlength=num_rows).astype(np.int64)


def count_in_text(ids_NT: np.ndarray, documents: np.ndarray, token_id: int) -> int:
    """Count an id in the text of document triples [n, 3].

    The first and the last token of each document are not text.
    """
    # Ascending positions: the hits inside a document are a difference of two binary searches.
    hits = np.flatnonzero(ids_NT.ravel() == token_id)
    row, start, end = documents.astype(np.int64).T
    first = row * ids_NT.shape[1]
    return int(
        (np.searchsorted(hits, first + end - 1) - np.searchsorted(hits, first + start + 1)).sum()
    )


def block_span(manifest: Manifest, shard: Shard, block: int) -> tuple[int, int]:
    """Return a block's first byte in the tar and the number of bytes `decode_block` needs.

    The span covers both members of the block.
    """
    first = int(shard.documents_offset[block])
    ids_bytes = int(shard.block_rows[block]) * manifest.row_bytes
    return first, int(shard.ids_offset[block]) + ids_bytes - first


def decode_block(
    manifest: Manifest, shard: Shard, block: int, data: bytes | memoryview
) -> tuple[np.ndarray, np.ndarray]:
    """Check the bytes of `block_span` and return its ids and documents as views.

    Ids are [rows, T] of u16 or u32, documents [n, 3] of uint16.

    Raises: DataError naming shard and block if the bytes are too few or a crc32 differs.
    """
    first, size = block_span(manifest, shard, block)
    where = f"{shard.file}, block {block}"
    if len(data) != size:
        raise DataError(
            f"{where}: the file ends early: {len(data)} of {size} bytes at byte {first}"
        )
    ids = memoryview(data)[int(shard.ids_offset[block]) - first :]
    documents = memoryview(data)[: shard.documents_bytes[block]]
    for name, member, expected in (
        ("token ids", ids, int(shard.ids_crc32[block])),
        ("document boundaries", documents, int(shard.documents_crc32[block])),
    ):
        if (found := zlib.crc32(member)) != expected:
            raise DataError(
                f"{where}: its {name} are damaged: crc32 {found:08x}, expected {expected:08x}"
            )
    ids_NT = np.frombuffer(ids, manifest.ids_dtype).reshape(-1, manifest.sequence_length)
    return ids_NT, np.frombuffer(documents, DOCUMENTS_DTYPE).reshape(-1, 3)
