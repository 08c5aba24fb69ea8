"""Damaged shards: bit flips, cuts at tar blocks, zeroed headers, damage at rates from 0.1 % to 10
%.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from faults.common import Place
from faults.tally import Tally

CASES, SHORT_CASES = 300, 40
T, ROWS, TAR_BLOCK = 16, 160, 512


def flip_a_bit(data: bytearray, draw: Random) -> bytearray:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def cut_at_a_block(data: bytearray, draw: Random) -> bytearray:
    return data[: TAR_BLOCK * draw.randrange(len(data) // TAR_BLOCK)]


def lose_the_end(data: bytearray, draw: Random) -> bytearray:
    """Zeros from a block on, at full size: what a disk leaves of a file that it had only made room
    for.
    """
    start = TAR_BLOCK * draw.randrange(len(data) // TAR_BLOCK)
    data[start:] = bytes(len(data) - start)
    return data


def zero_a_header(data: bytearray, draw: Random) -> bytearray:
    headers = [at for at in range(0, len(data), TAR_BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(headers)
    data[at : at + TAR_BLOCK] = bytes(TAR_BLOCK)
    return data


def repeat_a_block(data: bytearray, draw: Random) -> bytearray:
    blocks = len(data) // TAR_BLOCK
    source, target = (TAR_BLOCK * draw.randrange(blocks) for _ in range(2))
    data[target : target + TAR_BLOCK] = data[source : source + TAR_BLOCK]
    return data


def damage_at_a_rate(data: bytearray, draw: Random) -> bytearray:
    rate = 10 ** draw.uniform(-3, -1)
    for at in draw.sample(range(len(data)), max(1, round(rate * len(data)))):
        data[at] ^= draw.randrange(1, 256)
    return data


DAMAGES: tuple[Callable[[bytearray, Random], bytearray], ...] = (
    flip_a_bit,
    cut_at_a_block,
    lose_the_end,
    zero_a_header,
    repeat_a_block,
    damage_at_a_rate,
)


def run(place: Place) -> Tally:
    """Damage one shard at a time, and read a whole epoch of it."""
    cases = place.cases(CASES, SHORT_CASES)
    tally, found = Tally("shard", len(cases), place.say), Counter[str]()
    sound = place.folder / "shard-sound"
    ids_NT, real_NT = write_rows(sound)
    served, error = read_epoch(str(sound), place, ids_NT, real_NT)
    tally.need(
        served == (ROWS, 0) and error is None, f"read its own sound shards: {served} {error}"
    )
    for case in cases:
        draw, folder = place.draw("shard", case), place.folder / f"shard-{case}"
        shutil.copytree(sound, folder)
        damage = DAMAGES[case % len(DAMAGES)]
        shard = draw.choice(sorted(folder.glob("*.tar")))
        before = shard.read_bytes()
        while (after := damage(bytearray(before), draw)) == before:
            pass  # zeros for zeros
        shard.write_bytes(after)
        problems, wrong = judge(folder, shard.name, case % 5 == 0, place, (ids_NT, real_NT), found)
        tally.case(
            f"case {case} ({damage.__name__} in {shard.name}, seed {place.seed})",
            problems,
            lost=wrong,
        )
        shutil.rmtree(folder)
    tally.notes += [
        f"found by check_shards: {found['check_shards']}",
        f"ended by the reader at the damaged block or before: {found['reader']}",
        f"only tar headers or filling damaged, which no row comes from: {found['harmless']}",
        f"refused whole by the cache of a URL: {found['cache']}",
    ]
    return tally


def judge(
    folder: Path,
    shard: str,
    by_url: bool,
    place: Place,
    rows: tuple[np.ndarray, np.ndarray],
    found: Counter[str],
) -> tuple[list[str], int]:
    """Return what is wrong, and how many rows were served that are not as they were written."""
    from scaledistill.data.shards import verify

    problems = []
    said = list(verify(folder))
    found["check_shards"] += bool(said)
    if not said or not all(shard in line for line in said):
        problems.append(f"check_shards does not name it: {said}")
    (served, wrong), error = read_epoch(str(folder), place, *rows)
    if error and shard in error:
        found["reader"] += 1
    elif error is None and served == ROWS:
        found["harmless"] += 1
    else:
        problems.append(f"{served} rows read, then {error}")
    if by_url:
        (_, more), error = read_epoch(upload(folder), place, *rows)
        wrong += more
        found["cache"] += error is not None
        if error is None or shard not in error:
            problems.append(f"read by URL, it is not found: {error}")
    if wrong:
        problems.append(f"{wrong} damaged rows were served")
    return problems, wrong


def write_rows(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write shards; return the ids [N, T] and which positions are real [N, T]."""
    from scaledistill.data.shards import ShardWriter

    generator = np.random.default_rng(0)
    ids_NT = generator.integers(1, 3000, (ROWS, T))
    end_N = np.where(generator.random(ROWS) < 0.2, generator.integers(6, T, ROWS), T)
    real_NT = np.arange(T) < end_N[:, None]
    ids_NT *= real_NT
    documents = np.array(
        [(row, *span) for row in range(ROWS) for span in ((0, 5), (5, end_N[row]))]
    )
    tokenizer = {"name": "tiny", "sha256": "0" * 64}
    sizes = {"rows_per_block": 8, "rows_per_shard": 40}
    with ShardWriter(
        folder, sequence_length=T, vocab_size=3000, tokenizer=tokenizer, pad_token_id=0, **sizes
    ) as file:
        file.write(ids_NT, documents)
    return ids_NT, real_NT


def read_epoch(
    location: str, place: Place, ids_NT: np.ndarray, real_NT: np.ndarray
) -> tuple[tuple[int, int], str | None]:
    """Stream an epoch; return (rows served, those not as written) and the error that ended it."""
    from scaledistill.data.reader import ShardReader
    from scaledistill.data.stream import ShardStream
    from scaledistill.errors import DataError
    from scaledistill.storage.remote import ShardCache

    served = wrong = 0
    try:
        cache = (
            ShardCache(place.folder / f"cache-{Path(location).name}") if "://" in location else None
        )
        reader = ShardReader(location, cache=cache)
        order = reader.order(seed=place.seed, num_lanes=4, window_rows=16)
        first_row = np.cumsum([0, *(shard.rows for shard in reader.manifest.shards)])
        with ShardStream(reader, order, global_batch_size=8, micro_batch_size=8) as stream:
            for _ in range(ROWS // 8):
                batch = next(stream)
                shard, row = order.locate(batch.samples_B)
                number = first_row[shard] + row
                mask = np.ones((8, T), bool) if batch.mask_BT is None else batch.mask_BT.numpy()
                same = (batch.input_ids_BT.numpy() == ids_NT[number]) & (mask == real_NT[number])
                served += 8
                wrong += int((~same.all(axis=1)).sum())
    except DataError as error:
        return (served, wrong), str(error)
    return (served, wrong), None


def upload(folder: Path) -> str:
    """Copy a folder to fsspec's memory."""
    import fsspec

    from scaledistill.storage import remote

    remote.BACKOFF_SECONDS = 0.0
    url = f"memory://faults/{folder.name}"
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe(f"{url}/{path.name}", path.read_bytes())
    return url
