"""Hostile locations of data, and hostile shards."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from typing import Any

from faults.hostile import Box, Case, Evil, case


def location(name: str, text: str) -> Case:
    """A location of shards that is refused as such."""

    def prepare(box: Box) -> Callable[[], object]:
        from scaledistill.data.reader import ShardReader

        return lambda: ShardReader(text.format(command=box.command(), shards=box.shards / "train"))

    return Case(name, prepare, "not an allowed URL")


a_command = location("a command as the data", "pipe:{command}")
a_command_as_a_url = location("a command as a URL", "pipe://{command}")
a_chain = location("a chain of file systems", "simplecache::file://{shards}")
a_chain_on_an_allowed_scheme = location(
    "a chain on an allowed scheme", "https://example.org::file://{shards}"
)
a_shell = location("a remote shell", "ssh://localhost{shards}")
a_local_url = location("a file URL", "file://{shards}")


@case("is a URL or a command")
def a_command_as_text(box: Box) -> Callable[[], object]:
    from scaledistill.data.prepare.sources import expand

    return lambda: expand([f"pipe:{box.command()}"])


def shards_with(box: Box, change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
    """Copy the sound shards with another manifest, its own hash right; return what a run does with
    them.
    """
    shutil.copytree(box.shards / "train", box.folder, dirs_exist_ok=True)
    path = box.folder / "shards.manifest"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), **manifest}))
    return lambda: read_shards(box)


def read_shards(box: Box) -> None:
    from scaledistill.data.reader import ShardReader

    reader = ShardReader(box.folder)
    for shard, entry in enumerate(reader.manifest.shards):
        reader.read(shard, range(len(entry.block_rows)))


def set_first(**values: Any) -> Callable[[dict[str, Any]], object]:
    """Change the first shard of a manifest."""
    return lambda manifest: manifest["shards"][0].update(values)


def manifest_case(name: str, change: Callable[[dict[str, Any]], object], refusal: str) -> Case:
    return Case(name, lambda box: shards_with(box, change), refusal)


a_shard_outside = manifest_case(
    "a shard outside its folder", set_first(file="../outside/x.tar"), "should match pattern"
)
an_absolute_shard = manifest_case(
    "a shard with an absolute name", set_first(file="/etc/passwd"), "should match pattern"
)
a_shard_of_2_60 = manifest_case(
    "a shard of 2^60 bytes", set_first(bytes=1 << 60), "bytes, expected 1152921504606846976"
)
a_block_of_2_60 = manifest_case(
    "a block of 2^60 rows", set_first(rows=1 << 60, block_rows=[1 << 60]), "expected 1 to 65535"
)
documents_of_2_60 = manifest_case(
    "documents of 6 × 2^60 bytes", set_first(documents_bytes=[6 << 60]), "out of order"
)
rows_of_2_60 = manifest_case(
    "2^60 rows in all", lambda manifest: manifest.update(rows=1 << 60), "but the shards hold"
)
a_sequence_of_2_60 = manifest_case(
    "a sequence of 2^60 tokens",
    lambda manifest: manifest.update(sequence_length=1 << 60),
    "less than or equal to 65535",
)


def manifest_text(name: str, text: str, refusal: str) -> Case:
    def prepare(box: Box) -> Callable[[], object]:
        (box.folder / "shards.manifest").write_text(text)
        return lambda: read_shards(box)

    return Case(name, prepare, refusal)


a_deep_manifest = manifest_text(
    "a manifest nested too deep", "[" * 200_000 + "]" * 200_000, "is not a JSON object"
)
a_long_number = manifest_text(
    "a number of a million digits", f'{{"rows": {"1" * 1_000_000}}}', "is not a JSON object"
)


@case("block")
def a_shard_full_of_pickles(box: Box) -> Callable[[], object]:
    from scaledistill.data.manifest import Manifest

    shutil.copytree(box.shards / "train", box.folder, dirs_exist_ok=True)
    shard = Manifest.load(box.folder).shards[0]
    stream = io.BytesIO()
    evil = pickle.dumps(Evil(box.canary))
    info = tarfile.TarInfo("000000000.pyd")
    info.size = len(evil)
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(info, io.BytesIO(evil))
    (box.folder / shard.file).write_bytes(
        stream.getvalue()[: shard.bytes].ljust(shard.bytes, b"\0")
    )
    return lambda: read_shards(box)
