"""Input paths: what cannot be read is refused at once, by its own name."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import socket
from pathlib import Path

import pytest
import zstandard

from scaledistill.data.prepare.paths import check_inputs
from scaledistill.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one")
    return tmp_path


def refuses(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_inputs([Path(name) for name in names])


def test_links_that_lead_nowhere(folder: Path) -> None:
    Path("b.txt").symlink_to("gone")
    Path("c.txt").symlink_to("c.txt")
    refuses(
        ["a.txt", "b.txt"],
        r"input file 'b.txt' is a link to 'gone', which does not exist; mend or remove the link",
    )
    refuses(
        ["c.txt"],
        r"input file 'c.txt' cannot be reached: Too many levels of symbolic links; check the path",
    )
    refuses(["a.txt/b"], r"input file 'a.txt/b' does not exist \(looked in .*\); check the path")
    refuses(["-"], r"input file '-' does not exist .*; write standard input to a file first")
    refuses(["x" * 300], r"input file 'x+' cannot be reached: File name too long; check the path")


def test_what_is_no_file(folder: Path) -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, what in (
            ("pipe", "a pipe"),
            ("link", "a pipe"),
            ("socket", "a socket"),
            ("/dev/zero", "a device"),
        ):
            refuses(
                ["a.txt", name],
                f"input '{name}' is {what}, which cannot be read as a file; write its text to",
            )


def test_permissions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.txt").chmod(0)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read it all
    refuses(
        ["a.txt"],
        r"input file 'a.txt' may not be read \(mode ----------\); ask its owner for permission",
    )


def test_a_file_by_two_names(folder: Path) -> None:
    Path("sub").mkdir()
    Path("soft.txt").symlink_to("a.txt")
    os.link("a.txt", "hard.txt")
    Path("same.txt").write_text("one")
    check_inputs([Path("a.txt"), Path("same.txt")])
    refuses(
        ["a.txt", "a.txt"],
        "input file a.txt is given twice; its documents would count double: name it once",
    )
    for name in ("soft.txt", "hard.txt", "sub/../a.txt", str(folder / "a.txt")):
        refuses(
            ["same.txt", "a.txt", name],
            f"input file {name} is the same file as a.txt, by a link or another way to",
        )


def test_all_empty_files_are_listed(folder: Path) -> None:
    Path("0.txt").touch()
    refuses(["0.txt"], "1 input file is empty, of 1: 0.txt; leave it out, or make it again")
    refuses(["a.txt", "0.txt"], "1 input file is empty, of 2: 0.txt; leave it out")
    for i in range(7):
        Path(f"{i}.txt").touch()
    names = [f"{i}.txt" for i in range(7)]
    refuses(
        ["a.txt", *names],
        "7 input files are empty, of 8: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more; leave them "
        "out, or",
    )


def test_compressed_files_of_nothing(folder: Path) -> None:
    made = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.compress,
        ".bz2": bz2.compress,
    }
    for suffix, compress in made.items():
        Path(f"empty{suffix}").write_bytes(compress(b""))
        Path(f"full{suffix}").write_bytes(compress(b"a"))
        Path(f"cut{suffix}").write_bytes(compress(b"a")[:-3])  # left to its reader, which says more
    refuses(
        [f"empty{suffix}" for suffix in made],
        "4 input files are empty, of 4: empty.gz, empty.xz, empty.zst, empty",
    )
    check_inputs([Path(f"{name}{suffix}") for name in ("full", "cut") for suffix in made])
