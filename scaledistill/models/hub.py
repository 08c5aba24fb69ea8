"""Look up a model on the hub; its name is resolved to a commit once per run.

Inputs: names and the files wanted. Outputs: local folders. Imports nothing heavy before a lookup.
Not handled here: which rank downloads (`preflight.fetching`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")


class UnavailableError(Exception):
    """An earlier request to the hub for this model failed."""


@dataclass(frozen=True)
class Snapshot:
    """A model's local files at one commit."""

    folder: Path
    patterns: frozenset[str]
    """The patterns of the files that were requested."""

    @property
    def commit(self) -> str | None:
        """The commit, if the folder is in the hub cache, which names folders by commit."""
        return self.folder.name if COMMIT.fullmatch(self.folder.name) else None


Known = dict[tuple[str, str | None], Snapshot | str]
"""By name and revision: the snapshot, or the message of the error."""

_known: ContextVar[Known | None] = ContextVar("known hub models", default=None)


@contextmanager
def names_resolved_once() -> Iterator[None]:
    """Ask the hub once for each name while the block lasts; also a decorator.

    Nested blocks share the results.
    """
    if _known.get() is not None:
        yield
        return
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def known_models() -> Known:
    """Return this block's results, for another rank of this machine to `learn`."""
    return dict(_known.get() or {})


def learn(known: Mapping[tuple[str, str | None], Snapshot | str]) -> None:
    """Take over another rank's results, if this rank can see their folders."""
    here = _known.get()
    if here is not None:
        for key, found in known.items():
            if isinstance(found, str) or found.folder.is_dir():
                here[key] = found


def model_folder(
    name: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder of a model's files that match `patterns`, downloaded if needed.

    Args:
        cache_dir: the folder of the downloads, by default the hub's usual cache.

    Raises:
        Exception: whatever `huggingface_hub` raises if the hub does not provide them.
        UnavailableError: it failed before, with the same message.
    """

    def download(version: str | None) -> Path:
        from huggingface_hub import snapshot_download

        log.info("looking for %s on the hub", name)
        return Path(
            snapshot_download(
                name, revision=version, allow_patterns=list(patterns), cache_dir=cache_dir
            )
        )

    known = _known.get()
    if known is None:
        return download(revision)
    found = known.get((name, revision))
    if isinstance(found, str):
        raise UnavailableError(found)
    if found and found.patterns.issuperset(patterns):
        return found.folder
    try:
        # By commit, so that a branch that moves meanwhile does not mix files of two versions.
        folder = download(found.commit or revision if found else revision)
    except Exception as error:
        known[name, revision] = str(error)
        raise
    known[name, revision] = Snapshot(
        folder, frozenset(patterns) | (found.patterns if found else frozenset())
    )
    return folder


def has_file(name: str, folder: Path, file: str) -> bool:
    """Return whether the hub has a file of a model that its local `folder` lacks.

    Also True if the hub gives no answer.
    """
    from huggingface_hub import HfApi

    commit = folder.name if COMMIT.fullmatch(folder.name) else None
    try:
        return file in HfApi().list_repo_files(name, revision=commit)
    except Exception:  # noqa: BLE001 (no network, offline mode, an outage: the client raises many)
        return True
