"""Models on the hub within a run: a name is resolved to a commit once, and every file comes from
that commit.

Inputs: names, and how to download. Outputs: local folders. Which rank downloads is left to
`fetching`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")


class UnavailableError(Exception):
    """The hub did not give a model when it was asked before."""


@dataclass(frozen=True)
class Snapshot:
    """What a run has of a model at a commit."""

    folder: Path
    patterns: frozenset[str]
    """Of the files that were asked for."""

    @property
    def commit(self) -> str | None:
        """The hub's cache names its folders by commit."""
        return self.folder.name if COMMIT.fullmatch(self.folder.name) else None


Known = dict[tuple[str, str | None], Snapshot | str]
"""By name and revision: what there is, or why there is nothing."""

_known: ContextVar[Known | None] = ContextVar("known hub models", default=None)


@contextmanager
def names_resolved_once() -> Iterator[None]:
    """Ask the hub once for each name while the block lasts; also as a decorator. Blocks within
    share what is known.
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
    """Return what is known in this block, for another rank of this machine to `learn`."""
    return dict(_known.get() or {})


def learn(known: Mapping[tuple[str, str | None], Snapshot | str]) -> None:
    """Take over what another rank knows, as far as its folders are there for this one too."""
    here = _known.get()
    if here is not None:
        for key, found in known.items():
            if isinstance(found, str) or found.folder.is_dir():
                here[key] = found


def model_folder(
    name: str, revision: str | None, patterns: Sequence[str], download: Callable[[str | None], str]
) -> Path:
    """Return the folder of a model's files that match `patterns`, downloaded unless it is known to
    have them.

    Args:
        download: fetches these files at a revision, and returns their folder; what it raises is
            passed on.

    Raises:
        UnavailableError: it has failed before, with the same message.
    """
    known = _known.get()
    if known is None:
        return Path(download(revision))
    found = known.get((name, revision))
    if isinstance(found, str):
        raise UnavailableError(found)
    if found and found.patterns.issuperset(patterns):
        return found.folder
    try:
        # By commit: a branch that moves meanwhile must not mix the files of two versions.
        folder = Path(download(found.commit or revision if found else revision))
    except Exception as error:
        known[name, revision] = str(error)
        raise
    known[name, revision] = Snapshot(
        folder, frozenset(patterns) | (found.patterns if found else frozenset())
    )
    return folder
