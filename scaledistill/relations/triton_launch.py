"""Choose a kernel's tile size, warps and pipeline stages: the fastest of a table, measured once.

Inputs: what distinguishes launches (kernel, widths, dtypes, length) and a function that times one.
Outputs: a `Launch`. Not handled here: running kernels (`relations.triton`). Winners are kept in a
JSON file in the user's cache folder, by GPU and Triton version, so that later runs use the same
tiles and give the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scaledistill.storage.files import write_bytes

logger = logging.getLogger(__name__)


class Launch(NamedTuple):
    """Launch options: tokens on each side of a tile, and limits of a program.

    `num_warps` and `num_stages` (of the load pipeline) are per program, `max_registers` per thread.
    """

    block: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def candidates(kernel: str, width: int, in_float32: bool, length: int) -> list[Launch]:
    """List the launches worth trying, the default first.

    A tile's scores and exponentials stay in registers: 64 × 64 on 4 warps take 32 per thread and
    model. What the others spill depends on the GPU and on Triton's version; a default spills at
    most 256 bytes per thread on any.

    Args:
        kernel: "forward" or "backward".
        width: the wider model's head width.
        in_float32: a model is float32, so its products are sums of float32 multiply-adds without
            matrix units.
        length: tokens of a row; up to 32, tiles of 64 would be mostly empty.
    """
    if in_float32:
        launches = (
            [Launch(64, 8, 2), Launch(32, 4, 2)]
            if width <= 32
            else [Launch(32, 4, 1), Launch(16, 4, 1)]
        )
    elif width > 32:
        launches = [Launch(64, 8, 1), Launch(64, 4, 1), Launch(32, 4, 1)]
    elif kernel == "forward":
        launches = [
            Launch(64, 4, 2),
            Launch(64, 4, 3),
            Launch(64, 8, 2),
            Launch(128, 8, 2),
            Launch(32, 4, 2),
        ]
    else:
        launches = [
            Launch(64, 4, 2),
            # At most 168 registers: three programs fit a multiprocessor instead of two. That needs
            # no spilling on compute capability 9.0, up to 450 bytes on 8.0.
            Launch(64, 4, 2, 168),
            Launch(64, 8, 2),
            Launch(32, 4, 2),
            Launch(32, 2, 2, 128),
        ]
    return [launch for launch in launches if launch.block <= 32 or length > 32]


class Winners:
    """The launches chosen on one kind of GPU (`hardware`), in memory and in `file`."""

    def __init__(self, file: Path, hardware: str) -> None:
        self._file, self._hardware = file, hardware
        self._chosen: dict[str, Launch] = {}
        self._failed: set[str] = set()

    def choose(self, key: str, among: list[Launch], seconds: Callable[[Launch], float]) -> Launch:
        """Return the launch kept under `key`, or time all, keep the fastest and return it.

        A launch that cannot run takes infinite seconds.
        """
        if self._chosen.get(key) not in among:
            kept = self._read().get(self._hardware, {}).get(key)
            if kept is not None and Launch(*kept) in among:
                self._chosen[key] = Launch(*kept)
            else:
                times = {launch: seconds(launch) for launch in among}
                fastest = min(among, key=times.__getitem__)
                if not math.isfinite(times[fastest]):
                    if key in self._failed:  # measuring in each step would be slower
                        self._chosen[key] = among[0]
                        logger.warning(
                            "%s: no launch could be measured, often because memory is short; the "
                            "default is used",
                            key,
                        )
                    self._failed.add(key)
                    return among[0]  # perhaps too large a batch: a smaller one measures again
                self._chosen[key] = fastest
                logger.info("%s: fastest of %d launches is %s", key, len(among), fastest)
                self._keep(key)
        return self._chosen[key]

    def _read(self) -> dict[str, dict[str, list[Any]]]:
        try:
            return json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}  # launches are measured again

    def _keep(self, key: str) -> None:
        tree = self._read()
        tree.setdefault(self._hardware, {})[key] = list(self._chosen[key])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._file, json.dumps(tree, indent=1, sort_keys=True).encode())
        except OSError as error:
            logger.warning(
                "%s: %s; kernel launches are measured again in the next run", self._file, error
            )


def cache_file() -> Path:
    """Return the file of the winners: `scaledistill/launches.json` in the user's cache folder.

    Without a home it is in the folder for temporary files.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home in HOME or the passwd file: a container with an unknown user id
        folder = Path(tempfile.gettempdir())
    return folder / "scaledistill" / "launches.json"
