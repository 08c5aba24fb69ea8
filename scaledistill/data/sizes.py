"""Numbers of a data set that a command line needs at once: imports nothing heavy."""

from __future__ import annotations

import re
from typing import NamedTuple

ROWS_PER_BLOCK = 256
ROWS_PER_SHARD = 65_536
"""Rows of blocks and shards, unless the caller says otherwise."""
MAX_PARTS = 9999


class Part(NamedTuple):
    """One of several equal parts of the work of making shards."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "I/N"; raise ValueError if it is none."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]) <= MAX_PARTS:
            raise ValueError(
                f"found {text!r}, expected I/N with I from 1 to N, for instance 1/4 to 4/4 on four "
                f"machines (N is at most {MAX_PARTS})"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def folder_name(self) -> str:
        """The name of the part's folder."""
        return f"part-{self.number:04d}-of-{self.of:04d}"

    def owns(self, unit: int) -> bool:
        """Return whether a unit of work, counted from 0, belongs to this part."""
        return unit % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"
