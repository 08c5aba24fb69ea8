"""Check tar archives of text before webdataset reads them, because it ignores damage.

Inputs: an open archive. Outputs: the number of its files, or a `DataError`. Not handled here: the
text of the members (`data.prepare.sources`).
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import IO

from scaledistill.data.prepare.compression import READ_BYTES
from scaledistill.data.prepare.longtext import LARGEST_DOCUMENT_BYTES, too_long
from scaledistill.errors import DataError


def count_files(path: Path, file: IO[bytes]) -> int:
    """Walk the archive to its end mark and return how many files webdataset should yield.

    tarfile, and so webdataset, takes a damaged header or a missing end mark for the end of the
    archive. So this function requires the end mark after the last member: at least two blocks, all
    zeros.

    Raises:
        DataError: the archive is damaged or cut, or has members that are not plain files.
    """
    num_files = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                # tarfile would keep them all, half a kilobyte for each.
                archive.members.clear()  # type: ignore[attr-defined]
                if problem := _member_problem(member):
                    raise DataError(
                        f"{path}: member {member.name!r} {problem}; expected plain files in "
                        "folders of the archive: make it again from those"
                    )
                if member.size > LARGEST_DOCUMENT_BYTES and member.name.lower().endswith(
                    (".txt", ".json")
                ):
                    raise too_long(f"{path}, member {member.name!r}", "break it up")
                # webdataset skips names between double underscores, which are its own.
                num_files += member.isreg() and not member.name.split("/")[0].startswith("__")
            end = archive.offset
    # MemoryError: tarfile reads as many bytes as an extended header declares.
    except (tarfile.TarError, MemoryError) as error:
        reason = str(error) or "a header declares more than memory holds"
        raise DataError(
            f"{path} is damaged or not a tar archive: {reason}; fetch or make it again"
        ) from error
    file.seek(end)
    rest_bytes = 0
    while piece := file.read(READ_BYTES):
        rest_bytes += len(piece)
        if piece.count(0) != len(piece):
            raise DataError(
                f"{path}: a damaged header, or another archive, at byte {end}, after {num_files} "
                "files; make it again"
            )
    if rest_bytes < 2 * tarfile.BLOCKSIZE:
        raise DataError(
            f"{path} is cut short: no end mark at byte {end}, after {num_files} files; fetch it "
            "again"
        )
    return num_files


def _member_problem(member: tarfile.TarInfo) -> str | None:
    """Return why a member cannot be read, or None.

    Nothing is unpacked, so links do no harm, but webdataset would skip them silently.
    """
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "has a name that leaves its folder"
    if member.issparse():  # it would read as zeros, as many as it declares
        return "is a sparse file"
    return None if member.isreg() or member.isdir() else "is not a plain file"
