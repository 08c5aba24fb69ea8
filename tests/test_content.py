"""Content by first bytes: binary formats are named, and text that quotes JSON is not JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from scaledistill.data.prepare.content import binary_content, content_of, json_form

LINES = [
    {"id": str(i), "url": "https://example.org", "text": "the {old} [river]\n\n" * (i + 1)}
    for i in range(9)
]
JSON_LINES = "".join(json.dumps(line) + "\n" for line in LINES).encode()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x1f\x8b\x08\0", "gzip data"),
        (b"\x28\xb5\x2f\xfd\x04", "zstd data"),
        (b"BZh91AY&SY\0", "bzip2 data"),
        (b"\x5d\0\0\x80\0", "data in the legacy .lzma format"),
        (b"PK\x03\x04\x14", "a zip archive or an office document"),
        (b"PAR1\x15\x04", "a Parquet table"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"a.txt".ljust(257, b"\0") + b"ustar  \0", "a tar archive"),
        (b"\xff\xfeT\0e\0", "UTF-16 text"),
        (b"\xef\xbb\xbf\n <!doctype HTML><p>", "an HTML page"),
        (b"<html>", "an HTML page"),
        (b'<?xml version="1.0"?>', "XML"),
        (b'<mediawiki xmlns="', "XML"),
        (b'<doc id="12" url="', "the <doc> form of wikiextractor"),
        (b"WARC/1.0\r\n", "WARC records"),
    ],
)
def test_what_is_known(head: bytes, name: str) -> None:
    found = content_of(head)
    assert found is not None
    assert found.name == name
    assert found.remedy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "BZh is no word",
        "PAR1 was a format",
        "<p align=center> in Markdown",
        "<htmlish>",
        "% PDF",
        "日本語",
    ],
)
def test_text_is_left_alone(text: str) -> None:
    head = text.encode()
    assert content_of(head) is None
    assert binary_content(head) is None
    assert json_form(head) is None


def test_nul_bytes() -> None:
    found = binary_content(b"abc\0def")
    assert found is not None
    assert found.name == "1 NUL bytes among its first 7, like binary data or UTF-16 text"
    assert binary_content(b"scanned text, " * 100 + b"\0") is None


@pytest.mark.parametrize(
    "head",
    [
        JSON_LINES,
        b"\xef\xbb\xbf\n\n" + JSON_LINES,
        JSON_LINES[:-20],  # as a head may be cut
        JSON_LINES.splitlines()[0],
        b'{"text": "cut\n' + JSON_LINES,  # damaged: the reader names the line
        JSON_LINES.replace(b'{"', b' {  "').replace(b"\n", b"\r\n"),
        b'{"text": "' + b"long " * 20_000,
    ],
)
def test_json_lines(head: bytes) -> None:
    assert json_form(head) == "lines"


@pytest.mark.parametrize(
    ("value", "indent", "form"),
    [
        (LINES, 1, "array"),
        (LINES, None, "array"),
        (LINES[0], 4, "object"),
        ({"data": LINES}, 2, "object"),
        (LINES, 0, "array"),
    ],
)
def test_one_json_value(value: object, indent: int | None, form: str) -> None:
    head = json.dumps(value, indent=indent).encode()
    assert json_form(head) == form
    assert json_form(head[: len(head) * 2 // 3]) == form  # cut or damaged
    assert json_form(head + b"\n" + head) == form


def quoting(lines: Sequence[str]) -> bytes:
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    "head",
    [
        quoting(["[1] A footnote", "[2] Another", '["Hello," she said]']),
        quoting(['{"json": "header"}', "", "and then", "text, as static site generators have it"]),
        json.dumps({"title": "x", "date": "y"}, indent=1).encode() + b"\n\nThe text of the page.",
        quoting(["The answer was", '{"text": "the old river"}', "in", "JSON."]),
        quoting(["{x} is a set", "{y} as well"]),
        quoting(["{'text': 'Python, not JSON'}"] * 3),
        quoting(["{", "}", "{}", "[]"]),
        b"[" * 100_000,
    ],
)
def test_text_that_quotes_json(head: bytes) -> None:
    assert json_form(head) is None
