"""The identity of a model: a hash of its files.

Inputs: a folder. Outputs: the hash. Not handled here: checking the files (`plan`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from scaledistill.glue.cell import hash_of
from scaledistill.models.weights import weight_files
from scaledistill.storage.files import sha256_of

# Part of a model's hash, in this order: other files, or another order, would give models with
# finished cells another hash.
HASHED_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "spm.model", "tokenizer_config.json", "special_tokens_map.json"),
)


def model_sha256(folder: Path) -> str:
    """Return one sha256 for a model's config, weights and tokenizer, in hexadecimal."""
    names = ["config.json", *weight_files(folder)]
    names += [name for name in HASHED_TOKENIZER_FILES if (folder / name).is_file()]
    return hash_of(f"{name} {_sha256(folder / name)}" for name in names)


def _sha256(path: Path) -> str:
    found = path.stat()
    return _sha256_of(path, found.st_ino, found.st_mtime_ns, found.st_size)


@cache
def _sha256_of(path: Path, *state: int) -> str:
    return sha256_of(path)
