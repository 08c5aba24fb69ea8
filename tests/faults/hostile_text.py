"""Hostile text: archives, compressed files, Parquet, `datasets`."""

from __future__ import annotations

import lzma
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.hostile import Box, Evil, case


def documents(path: Path) -> list[str]:
    from scaledistill.data.prepare.sources import webdataset_documents

    return list(webdataset_documents([path]))


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(
    box: Box, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT
) -> Path:
    """Write an archive whose headers may say anything."""
    content = b""
    for info, data in members:
        content += info.tobuf(form) + data + bytes(-len(data) % 512)
    path = box.folder / "text.tar"
    path.write_bytes(content + bytes(1024))
    return path


SOUND = member("0.txt", b"sound")


@case(None)
def rewrite_variables(box: Box) -> Callable[[], object]:
    path = write_tar(box, member("1.txt", b"text"))

    def read() -> None:
        for name in ("WDS_REWRITE", "GOPEN_REWRITE"):
            os.environ[name] = f"{path}=pipe:{box.command()}"
        os.environ["USE_AIS_FOR"] = "file"
        assert documents(path) == ["text"]

    return read


@case("leaves its folder")
def a_member_with_an_absolute_name(box: Box) -> Callable[[], object]:
    path = write_tar(box, SOUND, member(f"{box.outside}/1.txt", b"text"))
    return lambda: documents(path)


@case("leaves its folder")
def a_member_with_dots_in_its_name(box: Box) -> Callable[[], object]:
    path = write_tar(box, SOUND, member("../outside/1.txt", b"text"))
    return lambda: documents(path)


@case("is not a plain file")
def a_symbolic_link(box: Box) -> Callable[[], object]:
    path = write_tar(box, SOUND, member("1.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
    return lambda: documents(path)


@case("is not a plain file")
def a_hard_link(box: Box) -> Callable[[], object]:
    path = write_tar(box, SOUND, member("1.txt", type=tarfile.LNKTYPE, linkname="../outside/x"))
    return lambda: documents(path)


@case("is not a plain file")
def a_device(box: Box) -> Callable[[], object]:
    path = write_tar(box, SOUND, member("1.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5))
    return lambda: documents(path)


@case("expected a .txt or .json member")
def a_pickled_member(box: Box) -> Callable[[], object]:
    path = write_tar(box, SOUND, member("1.pyd", pickle.dumps(Evil(box.canary))))
    return lambda: documents(path)


@case(None)
def a_pickled_member_beside_text(box: Box) -> Callable[[], object]:
    evil = pickle.dumps(Evil(box.canary))
    path = write_tar(
        box,
        *(member(f"1.{kind}", evil) for kind in ("pkl", "pth", "pyd")),
        member("1.txt", b"text"),
    )
    return lambda: documents(path)


@case("text.tar")
def a_member_of_2_60_bytes(box: Box) -> Callable[[], object]:
    path = write_tar(box, member("1.txt", b"text", size=1 << 60))
    return lambda: documents(path)


@case("text.tar")
def a_name_of_2_40_bytes(box: Box) -> Callable[[], object]:
    path = write_tar(
        box, member("././@LongLink", b"name\0", type=tarfile.GNUTYPE_LONGNAME, size=1 << 40), SOUND
    )
    return lambda: documents(path)


@case("text.tar")
def an_extended_header_of_2_40_bytes(box: Box) -> Callable[[], object]:
    path = write_tar(box, member("x", b"11 path=1\n", type=tarfile.XHDTYPE, size=1 << 40), SOUND)
    return lambda: documents(path)


@case("is a sparse file")
def a_sparse_member_of_2_40_bytes(box: Box) -> Callable[[], object]:
    info, _ = member("1.txt", type=tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 0)  # one piece: nothing at 0
    header[483:495] = bytes([128]) + (1 << 40).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    path = box.folder / "text.tar"
    path.write_bytes(bytes(header) + bytes(1024))
    return lambda: documents(path)


@case("is a sparse file")
def a_sparse_member_of_2_40_bytes_by_an_extended_header(box: Box) -> Callable[[], object]:
    info, data = member("1.txt", b"1\n0\n0\n".ljust(512, b"\0"))
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(1 << 40),
    }
    path = write_tar(box, (info, data), form=tarfile.PAX_FORMAT)
    return lambda: documents(path)


def read_text(box: Box, name: str, content: bytes) -> Callable[[], object]:
    from scaledistill.data.prepare.sources import file_documents

    path = box.folder / name
    path.write_bytes(content)
    return lambda: list(file_documents([path]))


@case("text.jsonl, line 1: not JSON")
def a_line_nested_too_deep(box: Box) -> Callable[[], object]:
    return read_text(box, "text.jsonl", b"[" * 200_000)


@case("text.txt.zst")
def a_zstd_frame_that_declares_2_60_bytes(box: Box) -> Callable[[], object]:
    frame = struct.pack("<I", 0xFD2FB528) + b"\xe0" + struct.pack("<Q", 1 << 60) + b"\x01\x00\x00"
    return read_text(box, "text.txt.zst", frame)


@case("text.txt.xz")
def an_xz_dictionary_of_4_gb(box: Box) -> Callable[[], object]:
    content = bytearray(lzma.compress(b"text", preset=0))
    end = 12 + (content[12] + 1) * 4 - 4  # of the first block's header, before its crc
    content[content.index(b"\x21\x01", 12) + 2] = 40
    content[end : end + 4] = struct.pack("<I", zlib.crc32(content[12:end]))
    return read_text(box, "text.txt.xz", bytes(content[:-8]))


@case("text.parquet")
def a_parquet_footer_of_2_gb(box: Box) -> Callable[[], object]:
    return read_text(
        box, "text.parquet", b"PAR1" + bytes(64) + struct.pack("<I", (1 << 31) - 9) + b"PAR1"
    )


@case("cannot be read")
def a_data_set_with_a_script(box: Box) -> Callable[[], object]:
    from scaledistill.data.prepare.sources import dataset_documents

    folder = box.folder / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.system({box.command()!r})\n")
    return lambda: list(dataset_documents(str(folder), config=None, split="train"))
