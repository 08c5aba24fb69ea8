"""Measure how fast one process reads shards.

The measured work: order, block reads, crc, gather, conversion to int64, prefetch thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from scaledistill.metrics.benchmark import Report, add_options

SEQUENCE_LENGTHS = (128, 512)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens",
        type=int,
        default=2**27,
        help="tokens of the synthetic shards (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=2**15,
        help="tokens of a micro-batch (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="measured epochs, each by a new reader (default: 5)"
    )
    parser.add_argument(
        "--folder", type=Path, help="create the temporary shards here, on the disk to measure"
    )
    parser.add_argument(
        "--warm", action="store_true", help="keep the files in the page cache between the repeats"
    )
    add_options(parser)
    return parser.parse_args()


def main() -> int:
    """Measure, publish the report and return the exit code."""
    options = parse_arguments()

    import numpy as np

    from scaledistill.data.shards import Manifest, ShardWriter
    from scaledistill.data.stream import ShardReader, ShardStream

    def write(folder: Path, T: int) -> Manifest:
        tokenizer = {"name": "synthetic", "sha256": "0" * 64}
        generator = np.random.default_rng(0)
        rows = 16_384
        spans = [
            (row, start, end) for row in range(rows) for start, end in ((0, T // 3), (T // 3, T))
        ]
        with ShardWriter(
            folder, sequence_length=T, vocab_size=30_522, tokenizer=tokenizer, pad_token_id=0
        ) as writer:
            for _ in range(max(1, options.tokens // T // rows)):
                writer.write(generator.integers(0, 30_522, (rows, T), np.uint16), np.array(spans))
        return writer.close()

    def forget(folder: Path) -> None:
        # Drop the files from the page cache, so that the next epoch reads from the disk.
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read_epoch(folder: Path, T: int) -> float:
        shards = ShardReader(folder)
        order = shards.order(seed=0)
        size = max(1, options.batch_tokens // T)
        num_batches = order.rows_per_epoch // size
        start = time.perf_counter()
        with ShardStream(shards, order, global_batch_size=size, micro_batch_size=size) as stream:
            for _ in range(num_batches):
                next(stream)
            return num_batches * size * T / (time.perf_counter() - start)

    report = Report()
    table = report.table(
        "Reading shards, one process, whole epochs",
        ("tokens per row", "tokens/s", "lowest", "highest"),
    )
    for T in SEQUENCE_LENGTHS:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            write(folder, T)
            rates = []
            for _ in range(options.repeats):
                if not options.warm:
                    forget(folder)
                rates.append(read_epoch(folder, T))
        median = report.add(f"data/{T}/tokens_per_second", rates, "tokens/s")
        table.rows.append(
            (str(T), *(f"{rate / 1e6:.1f} M" for rate in (median, min(rates), max(rates))))
        )
    report.publish(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
