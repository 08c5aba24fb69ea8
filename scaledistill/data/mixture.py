"""Mix several data sets by weight, in an order that depends only on them, their weights and a seed.

Sample n is in lane l = n mod L, as for one data set (`data.order`), and comes from the source that
a fixed pattern gives to n. It is the row that its source's own order has next in lane l. So a rank
reads the same lanes of every source, and each source goes through epochs of its own.

The pattern has a period of Q samples, about ten thousand. Source k gets c_k of them (its share,
rounded to 1/Q): one in each of c_k equal stretches, at a place drawn from the seed. Q and L have no
common factor. So a lane meets every entry of the pattern once in Q of its samples, and the number
of earlier samples of a lane that are of one source is found in a table.

Inputs: the orders of the sources, weights, a seed. Outputs: (source, its sample number). Not
handled here: reading (`data.stream`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaledistill.data.manifest import Manifest
from scaledistill.data.order import SampleOrder
from scaledistill.data.reader import ShardReader
from scaledistill.errors import SettingError, counted

MIXTURE_VERSION = 1
PERIOD = 10_000
"""The pattern's period, at least; shares are rounded to its reciprocal."""
_PATTERN = 2  # part of the generator's key, beside those of `data.order`


@dataclass(frozen=True)
class Source:
    """One of the data sets that a run trains on."""

    name: str
    """In metrics and messages."""
    shards: ShardReader
    order: SampleOrder


class MixedOrder:
    """The order of the samples of several data sets.

    Any Q samples in a row have exactly c_k of source k. So over any 10,000 its share is that of its
    weight up to about 0.01 %, for the rounding, and as much for each sample that Q is longer.

    Raises: SettingError, with the parameter `weights.<number>`, for a weight that is too small.
    """

    def __init__(
        self, sources: Sequence[SampleOrder], weights: Sequence[float], *, seed: int
    ) -> None:
        self.sources = tuple(sources)
        self.seed, self.num_lanes = seed, sources[0].num_lanes
        self.period = PERIOD
        while math.gcd(self.period, self.num_lanes) > 1:
            self.period += 1
        self._tickets_K = _tickets(weights, self.period)
        Q, L, K = self.period, self.num_lanes, len(self.sources)
        # How many of the first n samples are of each source.
        pattern_Q = self._pattern()
        is_of_KQ = pattern_Q == np.arange(K)[:, None]
        self._before_KQ = np.cumsum(is_of_KQ, axis=1) - is_of_KQ
        # The pattern as a lane meets it: in strides of L, from a phase of its own.
        strides_Q = np.arange(Q) * L % Q
        self._source_Q = pattern_Q[strides_Q]
        is_of_KQ = is_of_KQ[:, strides_Q]
        before_KQ = np.cumsum(is_of_KQ, axis=1) - is_of_KQ
        self._rank_Q = before_KQ[self._source_Q, np.arange(Q)]
        self._phase_L = np.arange(L) * pow(L, -1, Q) % Q
        self._before_phase_KL = before_KQ[:, self._phase_L]

    @property
    def shares(self) -> list[float]:
        """The fraction of the samples that comes from each source."""
        return [count / self.period for count in self._tickets_K.tolist()]

    def fingerprint(self) -> dict[str, object]:
        """Return what determines the row of a sample number; a resume compares it."""
        first, sources = self.sources[0].fingerprint(), self._sources()
        return {
            "order_version": first["order_version"],
            "mixture_version": MIXTURE_VERSION,
            "data_sha256": hashlib.sha256(json.dumps(sources).encode()).hexdigest(),
            "seed": self.seed,
            "num_lanes": self.num_lanes,
            "window_rows": first["window_rows"],
            "sources": sources,
        }

    def _sources(self) -> list[dict[str, str]]:
        return [
            {"data_sha256": source.identity, "share": f"{count}/{self.period}"}
            for source, count in zip(self.sources, self._tickets_K.tolist(), strict=True)
        ]

    def divide(self, samples_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn sample numbers, int64 [N], into (source, sample number of the source), int64 [N].

        Within a lane, the sample numbers of a source ascend with those of the mixture.
        """
        group_N, lane_N = np.divmod(samples_N, self.num_lanes)
        turn_N, at_N = np.divmod(group_N + self._phase_L[lane_N], self.period)
        source_N = self._source_Q[at_N]
        position_N = (
            turn_N * self._tickets_K[source_N]
            + self._rank_Q[at_N]
            - self._before_phase_KL[source_N, lane_N]
        )
        return source_N, position_N * self.num_lanes + lane_N

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first samples are of each source."""
        turn, at = divmod(num_samples, self.period)
        return (turn * self._tickets_K + self._before_KQ[:, at]).tolist()

    def _pattern(self) -> np.ndarray:
        """Return the source of each sample of a period, int64 [Q].

        Raw draws and stable sorts do not change between numpy versions.
        """
        times, sources = [], []
        for source, count in enumerate(self._tickets_K.tolist()):
            generator = np.random.Philox(
                counter=np.array([0, 0, source, 0], np.uint64),
                key=np.array([self.seed, _PATTERN], np.uint64),
            )
            jitter = (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53
            times.append((np.arange(count) + jitter) / count)
            sources.append(np.full(count, source))
        return np.concatenate(sources)[np.argsort(np.concatenate(times), kind="stable")]


Order = SampleOrder | MixedOrder
"""The order of a run's samples: of one data set or of several."""


def mix(orders: Sequence[SampleOrder], weights: Sequence[float], *, seed: int) -> Order:
    """Return the order over the sources; for one source, its own.

    Raises: SettingError, see `MixedOrder`.
    """
    return orders[0] if len(orders) == 1 else MixedOrder(orders, weights, seed=seed)


def epochs(sources: Sequence[Source], order: Order, num_samples: int) -> dict[str, float]:
    """Return how often the first samples go through each source, by its name."""
    return {
        source.name: count / source.order.rows_per_epoch
        for source, count in zip(sources, order.counts(num_samples), strict=True)
    }


def data_identity(fingerprint: Mapping[str, object]) -> str:
    """Describe the data of a fingerprint: the manifest's sha256, or those of all with shares."""
    sources = fingerprint.get("sources")
    if not isinstance(sources, list):
        return str(fingerprint["data_sha256"])
    return ", ".join(f"{source['data_sha256']} (share {source['share']})" for source in sources)


def mixing_problem(manifests: Mapping[str, Manifest]) -> str | None:
    """Return why data sets, by name, can't be mixed, or None."""
    seen: dict[str, Manifest] = {}
    for name, manifest in manifests.items():
        first_name, first = next(iter(manifests.items()))
        facts = {
            "tokens per row": (first.sequence_length, manifest.sequence_length),
            "tokenizer": (first.tokenizer["sha256"], manifest.tokenizer["sha256"]),
        }
        for what, (expected, found) in facts.items():
            if found != expected:
                return (
                    f"{first_name} and {name} differ in {what}: {str(expected)[:12]} and "
                    f"{str(found)[:12]}"
                )
        for other, earlier in seen.items():
            if shared := shared_shards(earlier, manifest):
                return (
                    f"{other} and {name} hold the same data ({counted(shared, 'shard')}); leave "
                    "one out, and add up their weights"
                )
        seen[name] = manifest
    return None


def shared_shards(one: Manifest, other: Manifest) -> int:
    """Return how many shards two data sets have in common, whatever their names."""
    return len({shard.sha256 for shard in one.shards} & {shard.sha256 for shard in other.shards})


def _tickets(weights: Sequence[float], total: int) -> np.ndarray:
    """Share `total` out by weight, int64 [K], by largest remainders."""
    whole = math.fsum(weights)
    exact_K = np.array([weight / whole * total for weight in weights])
    tickets_K = np.floor(exact_K).astype(np.int64)
    rest_K = np.argsort(tickets_K - exact_K, kind="stable")
    tickets_K[rest_K[: total - int(tickets_K.sum())]] += 1
    for number, (weight, count) in enumerate(zip(weights, tickets_K.tolist(), strict=True)):
        if not count:
            raise SettingError(
                f"weights.{number}",
                weight,
                f"is {weight / whole:.1g} of the sum of all weights",
                f"expected at least {1 / PERIOD:g} of it; raise it, or leave the source out",
            )
    return tickets_K
