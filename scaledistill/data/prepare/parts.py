"""Divide the making of shards over machines: `make_part` on each one, then `merge_parts` on one.

Inputs: as `data.prepare.make`. Outputs: of a part, the folder `OUTPUT/part-I-of-N` with the tokens
of every N-th unit of work; of the merge, what `make_shards` writes on one machine, byte for byte.
Not handled here: tokenising and packing (`data.prepare.make`).

Where a document lies in the rows depends on the length of every document before it, in tokens. So
only the tokenising, which takes most of the time, is divided: every part reads all of the input,
and the merge packs all tokens, in the order of the input. Every part hashes the text that it reads,
so that the merge can tell whether all read the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from scaledistill.data.manifest import PARTIAL
from scaledistill.data.prepare.make import (
    UNKNOWN_SAMPLE_TOKENS,
    Recipe,
    ShardReport,
    Tokens,
    check_unknown_fraction,
    check_workers,
    recipe_of,
    tokenise,
    write_shards,
)
from scaledistill.data.prepare.text import PackCounts, Vocabulary, hash_text, unknown_words
from scaledistill.data.sizes import Part
from scaledistill.errors import ConfigError, DataError, Field, SettingError
from scaledistill.storage.files import locked, sync, write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PART_FILE = "shards.part"
"""The description of a part; it is written last."""
IDS_AT_ONCE = 1 << 27
"""The merge holds one file of each part in memory, with these many ids in all: 256 or 512 MB."""
IDS_PER_FILE = 1 << 23
"""At most; fewer if there are many parts."""
_FOLDER = re.compile(r"part-(\d{4})-of-(\d{4})")
AGAIN = "make this part again, or copy its folder again"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _File(_Strict):
    file: str
    bytes: int
    sha256: str


class _Description(_Strict):
    """The content of `shards.part`."""

    format: Literal["scaledistill-part"] = "scaledistill-part"
    version: Literal[1] = 1
    number: int
    of: int
    recipe: dict[str, JsonValue]
    """The fields of `Recipe`."""
    input_documents: int
    input_sha256: str
    """Of the text of all documents of the input."""
    files: tuple[_File, ...]

    @property
    def part(self) -> Part:
        return Part(self.number, self.of)

    def as_recipe(self) -> Recipe:
        fields: dict[str, Any] = dict(self.recipe)
        return Recipe(**{**fields, "vocabulary": Vocabulary(*fields["vocabulary"])})

    def dump(self) -> bytes:
        """Return the file's content, which carries its own hash."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, "sha256": _sha256_of(content)}, indent=1).encode()


def make_part(
    documents: Iterator[str],
    output: Path,
    *,
    part: Part,
    tokenizer: PreTrainedTokenizerFast,
    workers: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[ShardReport], None] | None = None,
    **settings: Any,
) -> ShardReport:
    """Tokenise one part of the documents into `output/part-I-of-N`.

    Args:
        settings: of `make_shards`, the same for all parts.

    Returns:
        The number of documents read and, in `train`, the counts of this part's own.

    Raises:
        ConfigError: settings contradict each other.
        DataError: the source is damaged or empty, its text unknown to the tokenizer, or the part
            exists or is being written. Nothing is left of the part then, nor on Ctrl-C.
    """
    if settings.get("max_tokens") is not None:
        raise SettingError(
            "max_tokens",
            settings["max_tokens"],
            (
                "can't be used with ",
                Field("part", str(part)),
                ", since a part does not know the tokens of the others",
            ),
            ("use ", Field("max_documents")),
        )
    recipe = recipe_of(tokenizer, **settings)
    check_workers(workers)
    start = time.perf_counter()
    source = _Input()
    report = ShardReport()
    sample: list[Sequence[str]] = []
    with _Writer(output, part, overwrite=overwrite) as writer:
        encoded = tokenise(
            source.read(documents),
            recipe,
            tokenizer,
            workers=workers,
            sample=sample,
            is_own=part.owns,
        )
        with contextlib.closing(encoded):
            for tokens in encoded:
                writer.add(tokens)
                _count(report.train, tokens, recipe.vocabulary.unk_id)
                report.documents, report.seconds = source.documents, time.perf_counter() - start
                if report.train.tokens >= UNKNOWN_SAMPLE_TOKENS:
                    check_unknown_fraction(
                        f"part {part}",
                        report.train,
                        recipe,
                        lambda: unknown_words(tokenizer, itertools.chain(*sample)),
                    )
                if on_progress is not None:
                    on_progress(report)
        if not source.documents:
            raise DataError(
                f"the source {dict(recipe.source)} gave no document; check its path and options"
            )
        writer.commit(recipe, source)
    report.documents, report.seconds = source.documents, time.perf_counter() - start
    return report


def merge_parts(
    output: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[ShardReport], None] | None = None,
) -> ShardReport:
    """Write the shards of the parts in `output`, as `make_shards` would on one machine.

    The parts are checked and kept.

    Args:
        on_progress: called with the counts so far, several times a second.

    Raises:
        ConfigError: the parts were made with different settings.
        DataError: a part is missing or damaged, the parts read different text, or the shards cannot
            be written, see `make_shards`. No manifest is left then.
    """
    parts = _open_parts(output)
    return write_shards(
        _merged(output, parts),
        output,
        parts[0].as_recipe(),
        overwrite=overwrite,
        on_progress=on_progress,
    )


class _Input:
    """Counts and hashes the documents that pass."""

    def __init__(self) -> None:
        self.documents = 0
        self._digest = hashlib.sha256()

    def read(self, documents: Iterator[str]) -> Generator[str, None, None]:
        """Pass the documents on; closing it closes them."""
        try:
            for document in documents:
                self.documents += 1
                self._digest.update(len(document).to_bytes(8, "little"))
                hash_text(self._digest.update, document)
                yield document
        finally:
            if isinstance(documents, Generator):
                documents.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _count(counts: PackCounts, tokens: Tokens, unknown: int | None) -> None:
    counts.documents += len(tokens.lengths) if tokens.is_end else 0
    counts.tokens += len(tokens.ids_n)
    counts.unknown += 0 if unknown is None else int(np.count_nonzero(tokens.ids_n == unknown))


class _Writer:
    """Writes a part under a temporary name; a context manager that removes what is not committed.

    What a killed run left is removed by the next one.
    """

    def __init__(self, output: Path, part: Part, *, overwrite: bool) -> None:
        self._part, self._output = part, output
        self._folder = output / part.folder_name
        self._partial = output / f"{PARTIAL}{part.folder_name}"
        if self._folder.exists() and not overwrite:
            raise DataError(
                f"{self._folder} exists already; name another folder, or use ",
                Field("overwrite", True),
            )
        self._files: list[_File] = []
        self._items: list[Tokens] = []
        self._num_ids = 0

    def __enter__(self) -> _Writer:
        self._made = [
            folder for folder in (self._output, *self._output.parents) if not folder.exists()
        ]
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self._partial)
        try:
            self._lock.__enter__()
        except ConfigError as error:
            raise DataError(
                f"another run is writing part {self._part} to {self._output}; wait for it or name "
                "another folder"
            ) from error
        for leftover in self._partial.iterdir():
            if leftover.name != ".lock":
                leftover.unlink()
        return self

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(None, None, None)
        if self._partial.exists():
            shutil.rmtree(self._partial)
            for folder in self._made:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()

    def add(self, tokens: Tokens) -> None:
        self._items.append(tokens)
        self._num_ids += len(tokens.ids_n)
        if self._num_ids >= min(IDS_PER_FILE, IDS_AT_ONCE // self._part.of):
            self._flush()

    def _flush(self) -> None:
        if not self._items:
            return
        from safetensors.numpy import save

        units, ids, lengths, keys, ends = zip(*self._items, strict=True)
        data = save(
            {
                "ids": np.concatenate(ids),
                "lengths": np.concatenate(lengths),
                "keys": np.concatenate(keys),
                "units": np.array(units, np.int64),
                "documents": np.array([len(each) for each in lengths], np.int64),
                "ends": np.array(ends, np.uint8),
            }
        )
        name = f"tokens-{len(self._files):06d}.safetensors"
        write_bytes(self._partial / name, data)
        self._files.append(
            _File(file=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        )
        self._items, self._num_ids = [], 0

    def commit(self, recipe: Recipe, source: _Input) -> None:
        """Write the description and give the folder its name."""
        self._flush()
        description = _Description(
            number=self._part.number,
            of=self._part.of,
            recipe=json.loads(json.dumps(asdict(recipe))),
            input_documents=source.documents,
            input_sha256=source.sha256,
            files=tuple(self._files),
        )
        write_bytes(self._partial / PART_FILE, description.dump())
        (self._partial / ".lock").unlink()
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._partial.rename(self._folder)
        sync(self._output)


def _open_parts(output: Path) -> list[_Description]:
    """Return the descriptions of all parts, checked to belong together and to have their files."""
    found = sorted(
        Part(int(name[1]), int(name[2]))
        for path in output.glob("part-*")
        if (name := _FOLDER.fullmatch(path.name)) and path.is_dir()
    )
    if not found:
        raise DataError(
            f"{output} has no parts; make them with scaledistill shards make --part I/N --output "
            f"{output}, and copy the folders part-I-of-N of all machines there"
        )
    if len(counts := sorted({part.of for part in found})) > 1:
        of_each = " and ".join(f"{sum(part.of == of for part in found)} of {of}" for of in counts)
        raise DataError(
            f"{output} has parts of different divisions ({of_each}); remove those of the wrong one"
        )
    wanted = [Part(number, counts[0]) for number in range(1, counts[0] + 1)]
    if missing := [part for part in wanted if part not in found]:
        names = ", ".join(map(str, missing))
        unfinished = [
            part for part in missing if (output / f"{PARTIAL}{part.folder_name}").exists()
        ]
        hint = f" ({', '.join(map(str, unfinished))} unfinished)" if unfinished else ""
        raise DataError(
            f"{output} lacks part {names}{hint}; make it with scaledistill shards make --part "
            f"{missing[0]}, or copy {missing[0].folder_name} there"
        )
    parts = [_load(output / part.folder_name, part) for part in wanted]
    for other in parts[1:]:
        _check_alike(parts[0], other)
    return parts


def _load(folder: Path, part: Part) -> _Description:
    path = folder / PART_FILE
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"part {part}: {path} can't be read: {error}; {AGAIN}") from error
    if stated != _sha256_of(content):
        raise DataError(f"part {part}: {path} was changed or damaged; {AGAIN}")
    try:
        description = _Description.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise DataError(
            f"part {part}: {path} was written by another version of scaledistill "
            f"({error.errors()[0]['msg']}); make all parts with one version"
        ) from error
    if description.part != part:
        raise DataError(f"part {part}: {folder} holds part {description.part}; {AGAIN}")
    for file in description.files:
        size = (folder / file.file).stat().st_size if (folder / file.file).exists() else None
        if size != file.bytes:
            state = "is missing" if size is None else f"has {size} bytes, expected {file.bytes}"
            raise DataError(f"part {part}: {folder / file.file} {state}; {AGAIN}")
    return description


def _check_alike(first: _Description, other: _Description) -> None:
    """Check that two parts had the same settings and the same text.

    Paths may differ from machine to machine.
    """
    for name, value in _compared(first).items():
        if (found := _compared(other)[name]) != value:
            raise ConfigError(
                f"parts {first.part} and {other.part} were made with different settings: ",
                Field(name),
                f" {json.dumps(value)} and {json.dumps(found)}; make one of them again",
            )
    if first.input_documents != other.input_documents:
        difference = f"{first.input_documents:,} and {other.input_documents:,} documents"
    elif first.input_sha256 != other.input_sha256:
        difference = f"{first.input_documents:,} documents each, with different text"
    else:
        return
    raise DataError(
        f"parts {first.part} and {other.part} read different input: {difference}; give all "
        "machines the same files, in the same order, and make the part with the wrong ones again"
    )


def _compared(description: _Description) -> Mapping[str, Any]:
    recipe: dict[str, Any] = {
        name: value for name, value in description.recipe.items() if name != "source"
    }
    return recipe | {"tokenizer": recipe["tokenizer"]["sha256"]}


def _merged(output: Path, parts: Sequence[_Description]) -> Generator[Tokens, None, None]:
    """Yield the tokens of all parts in the order of the input."""
    # The items of a unit are all in one part, and the merge keeps their order.
    yield from heapq.merge(
        *(_read(output / description.part.folder_name, description) for description in parts),
        key=lambda tokens: tokens.unit,
    )


def _read(folder: Path, description: _Description) -> Iterator[Tokens]:
    """Yield a part's tokens; every file is checked before it is used."""
    from safetensors.numpy import load

    for file in description.files:
        data = (folder / file.file).read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != file.sha256:
            raise DataError(
                f"part {description.part}: {folder / file.file} is damaged: sha256 {found[:12]}…, "
                f"expected {file.sha256[:12]}…; {AGAIN}"
            )
        columns = load(data)
        del data  # `columns` are copies
        ids_n, lengths, keys = (columns[name] for name in ("ids", "lengths", "keys"))
        starts = np.concatenate(([0], np.cumsum(lengths))).tolist()
        first = 0
        for unit, count, is_end in zip(
            *(columns[name].tolist() for name in ("units", "documents", "ends")), strict=True
        ):
            own, ids = slice(first, first + count), slice(starts[first], starts[first + count])
            yield Tokens(unit, ids_n[ids], lengths[own], keys[own], bool(is_end))
            first += count


def _sha256_of(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
