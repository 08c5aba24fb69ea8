"""Check input paths before any work is done.

Inputs: paths as given or as matched by a pattern. Outputs: none, or a `DataError` that names the
first path that is not a readable plain file, is empty (a Parquet table without rows too), or is
given twice. Not handled here: what the files hold (`data.prepare.content`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from scaledistill.data.prepare.compression import COMPRESSIONS, StoredError, open_stored
from scaledistill.errors import DataError

PARQUET_SUFFIXES = (".parquet", ".pq")
_SHOWN_FILES = 5
# Compressing an empty file gives at most this many bytes, a long file name included.
_LARGEST_COMPRESSED_NOTHING = 512

_SPECIAL_FILES = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_inputs(paths: Sequence[Path]) -> None:
    """Check that every path is a readable, non-empty file and that none is given twice.

    Raises:
        DataError: naming the first path that is not, or all the empty ones.
    """
    names: dict[object, Path] = {}
    empty = []
    for path in paths:
        status = _status(path)
        keys: list[object] = [path.resolve()]
        # Device and inode numbers are not unique on all file systems: use them for links only.
        if status.st_nlink > 1:
            keys.append((status.st_dev, status.st_ino))
        for key in keys:
            if key in names:
                raise DataError(_twice(names[key], path))
        names.update(dict.fromkeys(keys, path))
        if _is_empty(path, status.st_size):
            empty.append(path)
    if empty:
        are, them = ("input file is", "it") if len(empty) == 1 else ("input files are", "them")
        raise DataError(
            f"{len(empty)} {are} empty, of {len(paths)}: {first_few(empty)}; leave {them} out, or "
            f"make {them} again"
        )


def first_few(paths: Sequence[Path]) -> str:
    """Return the first paths as text, and how many more there are."""
    shown = ", ".join(map(str, paths[:_SHOWN_FILES]))
    more = f" and {len(paths) - _SHOWN_FILES} more" if len(paths) > _SHOWN_FILES else ""
    return f"{shown}{more}"


def _status(path: Path) -> os.stat_result:
    """Return the status of a plain file that may be read.

    Raises:
        DataError: it is missing, unreachable, special or not readable.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            target = os.readlink(path)
            raise DataError(
                f"input file {str(path)!r} is a link to {target!r}, which does not exist; mend or "
                "remove the link"
            ) from error
        remedy = "write standard input to a file first" if str(path) == "-" else "check the path"
        raise DataError(
            f"input file {str(path)!r} does not exist (looked in {Path.cwd()}); {remedy}"
        ) from error
    except OSError as error:  # a folder without permission, a loop of links, a name too long
        raise DataError(
            f"input file {str(path)!r} cannot be reached: {error.strerror}; check the path"
        ) from error
    for is_special, what in _SPECIAL_FILES:
        if is_special(status.st_mode):
            raise DataError(
                f"input {str(path)!r} is {what}, which cannot be read as a file; write its text to "
                "a file first"
            )
    if not os.access(path, os.R_OK):
        raise DataError(
            f"input file {str(path)!r} may not be read (mode {stat.filemode(status.st_mode)}); ask "
            "its owner for permission (chmod a+r)"
        )
    return status


def _twice(first: Path, second: Path) -> str:
    end = "its documents would count double: name it once"
    if first == second:
        return f"input file {first} is given twice; {end}"
    return f"input file {second} is the same file as {first}, by a link or another way to it; {end}"


def _is_empty(path: Path, size: int) -> bool:
    """Return whether a file, or its decompressed content, is empty; its reader reports damage."""
    if path.suffix.lower() in PARQUET_SUFFIXES and size:
        import pyarrow
        import pyarrow.parquet

        try:
            return bool(pyarrow.parquet.read_metadata(path).num_rows == 0)
        except (pyarrow.ArrowException, OSError):
            return False
    if size == 0 or size > _LARGEST_COMPRESSED_NOTHING or path.suffix.lower() not in COMPRESSIONS:
        return size == 0
    try:
        with open_stored(path) as stream:
            return not stream.read(1)
    except (StoredError, DataError, OSError):
        return False
