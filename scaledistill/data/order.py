"""Compute the order of samples from the shards' row counts, a seed and a sample number only.

Epoch e: the shards, shuffled by (seed, e), are concatenated and cut into L equal lanes of
consecutive rows; the few rows left over are dropped in this epoch (the same ones in each epoch if
there is a single shard). A lane is shuffled within fixed windows, so that a reader needs only one
window of each lane in memory. Sample n is position n div L of lane n mod L. Step s with global
batch size B uses samples [sB, (s+1)B), so one integer is the whole state, whatever the number of
ranks.

Inputs: rows per shard, sample numbers. Outputs: (shard, row). Not handled here: reading
(`data.stream`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from scaledistill.config.schema import NUM_LANES, WINDOW_ROWS
from scaledistill.errors import Field, SettingError

ORDER_VERSION = 1
_ROWS, _SHARDS = 0, 1  # what is shuffled; part of the generator's key


class SampleOrder:
    """The order of the samples of one data set.

    Each lane's windows begin at another offset (the first one of lane l has (l+1)/L of the usual
    rows), so that the reads at window changes spread over the steps; a lane that fits in one window
    has one. `identity`: the manifest's sha256; by default a hash of `shard_rows`.

    Raises: ConfigError for a seed, lane count or window out of range, or more lanes than rows.
    """

    def __init__(
        self,
        shard_rows: Sequence[int],
        *,
        seed: int,
        num_lanes: int = NUM_LANES,
        window_rows: int = WINDOW_ROWS,
        identity: str | None = None,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise SettingError("seed", seed, remedy="expected 0 to 2^63 - 1")
        if num_lanes < 1 or window_rows < 1:
            raise SettingError(
                "num_lanes",
                num_lanes,
                (", ", Field("window_rows", window_rows)),
                "expected at least 1",
            )
        self.num_rows = sum(shard_rows)
        if self.num_rows < num_lanes:
            raise SettingError(
                "num_lanes",
                num_lanes,
                f"is more than the {self.num_rows} rows of the data",
                f"use at most {self.num_rows}, or add data",
            )
        self.seed = seed
        self.num_lanes = num_lanes
        self.window_rows = window_rows
        self.rows_per_lane = self.num_rows // num_lanes
        self.rows_per_epoch = self.rows_per_lane * num_lanes
        self.dropped_rows_per_epoch = self.num_rows - self.rows_per_epoch
        self.identity = (
            identity or hashlib.sha256(repr(list(map(int, shard_rows))).encode()).hexdigest()
        )
        self._shard_rows = np.asarray(shard_rows, np.int64)
        # An upper bound: the first and the last window are short.
        self.windows_per_lane = 1 + -(-self.rows_per_lane // window_rows)
        steps_L = (
            np.arange(1, num_lanes + 1)
            if self.rows_per_lane > window_rows
            else np.full(num_lanes, num_lanes)
        )
        # Rounded up, so that no window is empty.
        self._first_window_L = -(-steps_L * window_rows // num_lanes)
        self._shards_of = lru_cache(maxsize=4)(self._shuffle_shards)

    @property
    def sources(self) -> tuple[SampleOrder, ...]:
        """The orders of the data sets that the samples come from: this one alone."""
        return (self,)

    def divide(self, samples_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn sample numbers into (source, sample number of the source), see `MixedOrder`."""
        return np.zeros_like(samples_N), samples_N

    @property
    def shares(self) -> list[float]:
        """The fraction of the samples that comes from each source."""
        return [1.0]

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first samples are of each source."""
        return [num_samples]

    def fingerprint(self) -> dict[str, int | str]:
        """Return what determines the row of a sample number; a resume compares it."""
        return {
            "order_version": ORDER_VERSION,
            "data_sha256": self.identity,
            "seed": self.seed,
            "num_lanes": self.num_lanes,
            "window_rows": self.window_rows,
        }

    def split(self, samples_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Turn sample numbers, int64 [N], into (lane, window, offset in the window), int64 [N]
        each.

        Windows are numbered over epochs: window w is window w mod `windows_per_lane` of epoch w div
        `windows_per_lane`.
        """
        position, lane = np.divmod(samples_N, self.num_lanes)
        epoch, position = np.divmod(position, self.rows_per_lane)
        shifted = position + self.window_rows - self._first_window_L[lane]
        window, offset = np.divmod(shifted, self.window_rows)
        return lane, epoch * self.windows_per_lane + window, np.where(window == 0, position, offset)

    def window(self, lane: int, window: int) -> tuple[int, int, np.ndarray]:
        """Return a window's (epoch, first place in the epoch's concatenation, shuffled offsets).

        The offsets, int64, count from that first place.
        """
        epoch, number = divmod(window, self.windows_per_lane)
        end = int(self._first_window_L[lane]) + number * self.window_rows
        start, end = max(0, end - self.window_rows), min(end, self.rows_per_lane)
        return (
            epoch,
            lane * self.rows_per_lane + start,
            self._shuffle(_ROWS, end - start, epoch, lane, number),
        )

    def shards_around(self, lane: int, epoch: int, first: int, count: int) -> tuple[list[int], int]:
        """Return the shards of a lane's places [first, first + count) and the lane's next shard."""
        shards, starts = self._shards_of(epoch)
        low, high = np.searchsorted(starts, [first, first + count - 1], side="right").tolist()
        if high < len(starts) and starts[high] < (lane + 1) * self.rows_per_lane:
            following = shards[high]
        else:  # the lane ends here: it goes on at its first place in the next epoch
            later, later_starts = self._shards_of(epoch + 1)
            following = later[
                np.searchsorted(later_starts, lane * self.rows_per_lane, side="right") - 1
            ]
        return shards[low - 1 : high].tolist(), int(following)

    def place(self, epoch: int, places_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn places of an epoch's concatenation into (shard, row in it), all int64 [N]."""
        shards, starts = self._shards_of(epoch)
        at = np.searchsorted(starts, places_N, side="right") - 1
        return shards[at], places_N - starts[at]

    def locate(self, samples_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn sample numbers, int64 [N], into (shard, row in it), int64 [N] each.

        It shuffles every window that it meets, so use it for reports and tests; the stream caches
        windows.
        """
        samples_N = np.asarray(samples_N, np.int64)
        lane_N, window_N, offset_N = self.split(samples_N)
        shard_N, row_N = np.empty_like(samples_N), np.empty_like(samples_N)
        windows, which_N = np.unique(np.stack([lane_N, window_N]), axis=1, return_inverse=True)
        for number, (lane, window) in enumerate(windows.T.tolist()):
            epoch, first, offsets = self.window(lane, window)
            here = which_N.reshape(-1) == number
            shard_N[here], row_N[here] = self.place(epoch, first + offsets[offset_N[here]])
        return shard_N, row_N

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._shuffle(_SHARDS, len(self._shard_rows), epoch, 0, 0)
        rows = self._shard_rows[shards]
        return shards, np.cumsum(rows) - rows

    def _shuffle(self, purpose: int, count: int, epoch: int, lane: int, window: int) -> np.ndarray:
        """Permute range(count), int64, by a stable sort of raw draws.

        Raw draws and stable sorts do not change between numpy versions. Each (seed, purpose) is a
        key and each (epoch, lane, window) a counter of its own. No two shuffles share draws,
        because a shuffle only advances the counter's lowest word.
        """
        key, counter = (
            np.array([self.seed, purpose], np.uint64),
            np.array([0, epoch, lane, window], np.uint64),
        )
        return np.argsort(
            np.random.Philox(counter=counter, key=key).random_raw(count), kind="stable"
        )
