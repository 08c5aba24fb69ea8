"""Input paths: each is a plain file that can be read, given once, and not empty; else it is refused
by its own name.

In: paths as given or found by a pattern. Out: nothing, or a `DataError` before any work is done.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from scaledistill.data.prepare.compression import COMPRESSIONS, StoredError, open_stored
from scaledistill.errors import DataError

_SHOWN_FILES = 5
# Bytes: what compressors make of an empty file, with a long name in it.
_LARGEST_COMPRESSED_NOTHING = 512

_SPECIAL_FILES = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_inputs(paths: Sequence[Path]) -> None:
    """Check that every path is a readable file with something in it, and that none is there twice.

    Raises:
        DataError: the first that is not, or all the empty ones.
    """
    names: dict[object, Path] = {}
    empty = []
    for path in paths:
        status = _status(path)
        keys: list[object] = [path.resolve()]
        if status.st_nlink > 1:  # the numbers alone are not unique on every file system
            keys.append((status.st_dev, status.st_ino))
        for key in keys:
            if key in names:
                raise DataError(_twice(names[key], path))
        names.update(dict.fromkeys(keys, path))
        if _is_empty(path, status.st_size):
            empty.append(path)
    if empty:
        shown = ", ".join(map(str, empty[:_SHOWN_FILES]))
        more = f" and {len(empty) - _SHOWN_FILES} more" if len(empty) > _SHOWN_FILES else ""
        are, them = ("input file is", "it") if len(empty) == 1 else ("input files are", "them")
        raise DataError(
            f"{len(empty)} {are} empty, of {len(paths)}: {shown}{more}; leave {them} out, or make "
            f"{them} again"
        )


def _status(path: Path) -> os.stat_result:
    """Return what the system says of a plain file."""
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
    except OSError as error:  # a folder that may not be entered, links in a circle, a name too long
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
    """Tell an empty file, and a compressed one of nothing; a damaged one is left to its reader."""
    if size == 0 or size > _LARGEST_COMPRESSED_NOTHING or path.suffix.lower() not in COMPRESSIONS:
        return size == 0
    try:
        with open_stored(path) as stream:
            return not stream.read(1)
    except (StoredError, DataError, OSError):
        return False
