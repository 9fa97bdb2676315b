"""Negative sampling: every rank draws the same negatives from (seed, step), so none of their ids travels."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from gru4recf_dist.config import LossConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.counting_sort import take_places
from gru4recf_dist.data.shard_format import Manifest, file_url
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.node_arrays import Allocate, in_memory

# Items that are worked through at a time: the temporary memory does not grow with the catalog.
_BLOCK_ITEMS = 1 << 18
# Counts that are read at a time, with a request each on object storage: 8 MiB.
_READ_ITEMS = 1 << 20
# Keeps the sampler's generator apart from others that are seeded by the run's seed and a step.
_STREAM = 0x6E6567


@dataclass(frozen=True)
class Negatives:
    """K draws with replacement, as U distinct items.

    Attributes:
        ids: int64 [U], ascending.
        counts: int64 [U], how often each was drawn; they sum to K.
        log_expected: float64 [U], log(K q) of each: the log of its expected count.
    """

    ids: np.ndarray
    counts: np.ndarray
    log_expected: np.ndarray


class NegativeSampler:
    """A proposal distribution q over the items 1..N, normalised.

    Items are ranked by popularity for `log_uniform`: q(rank r) = log((r+2)/(r+1)) / log(N+1), r from 0. `popularity`
    is count ** alpha, an item without a training event counting as one, so that every item can be drawn and the
    sampled loss tends to the full one.

    Args:
        popularity: int64 [N+1], training events of each item; entry 0 is ignored.
        allocate: where what is kept of every item lies: `NodeArrays` shares it among the ranks of a node.
    """

    def __init__(self, popularity: np.ndarray, config: LossConfig, seed: int, allocate: Allocate = in_memory) -> None:
        self.items = len(popularity) - 1
        self.count, self.kind, self.seed = config.negatives, config.sampler, seed
        self._cumulative: np.ndarray | None = None
        self._by_rank: np.ndarray | None = None
        if not self.count:
            # Nothing of the catalog's size is kept for what is never asked.
            self.kind = "uniform"
        if self.kind == "popularity":
            self._popularity, self._alpha = popularity, config.alpha
            (self._cumulative,) = allocate([(self.items, np.float64)], self._sum_up)
        elif self.kind == "log_uniform":
            sizes = [(self.items, np.int32), (self.items, np.int32)]
            self._by_rank, self._rank = allocate(sizes, partial(_fill_order, popularity[1:]))

    def log_q(self, ids: np.ndarray) -> np.ndarray:
        """log of the probability that one draw gives each of ``ids``; float64."""
        if self._cumulative is not None:
            # Not from differences of the running sum, which loses items of little mass.
            log_mass = self._alpha * np.log(np.maximum(self._popularity[ids], 1))
            return log_mass - np.log(self._cumulative[-1])
        if self._by_rank is not None:
            rank = self._rank[ids - 1].astype(np.int64)
            return np.log(np.log1p(1.0 / (rank + 1.0)) / np.log(self.items + 1.0))
        return np.full(len(ids), -np.log(self.items))

    def log_expected(self, ids: np.ndarray) -> np.ndarray:
        """log(K q) of each of ``ids``; float64, -inf if nothing is drawn."""
        return self.log_q(ids) + (np.log(self.count) if self.count else -np.inf)

    def draw(self, step: int) -> Negatives:
        """The negatives of a step: the same on every rank and for any number of ranks."""
        # Ascending, so that neighbours look into the same memory of a long running sum.
        uniform = np.sort(np.random.default_rng((self.seed, _STREAM, step)).random(self.count))
        ids, counts = np.unique(self._invert(uniform), return_counts=True)
        return Negatives(ids, counts, self.log_expected(ids))

    def _invert(self, uniform: np.ndarray) -> np.ndarray:
        """Item ids for uniform numbers in [0, 1), by the inverse of q's distribution function."""
        if self._cumulative is not None:
            places = np.searchsorted(self._cumulative, uniform * self._cumulative[-1], side="right")
            return np.minimum(places, self.items - 1) + 1
        if self._by_rank is not None:
            # sum of q up to rank r is log(r+2) / log(N+1)
            rank = np.floor(np.exp(uniform * np.log(self.items + 1.0))).astype(np.int64) - 1
            return self._by_rank[np.clip(rank, 0, self.items - 1)].astype(np.int64)
        return np.minimum((uniform * self.items).astype(np.int64), self.items - 1) + 1

    def _sum_up(self, cumulative: np.ndarray) -> None:
        total = 0.0
        for start in range(0, self.items, _BLOCK_ITEMS):
            counts = self._popularity[start + 1 : start + 1 + _BLOCK_ITEMS]
            mass = np.maximum(counts, 1).astype(np.float64) ** self._alpha
            # Into the first summand: the running sum has the bits that it would have in one piece.
            mass[0] += total
            cumulative[start : start + len(mass)] = np.cumsum(mass)
            total = cumulative[start + len(mass) - 1]


class AheadSampler(NegativeSampler):
    """A sampler that draws the next step's negatives in a thread while the present step is made.

    At 10^7 items a step's draws miss the processor's caches for a millisecond or two, for which no step then waits.
    """

    _ahead: tuple[int, Future[Negatives]] | None = None

    def draw(self, step: int) -> Negatives:
        drawn = self._ahead[1].result() if self._ahead and self._ahead[0] == step else super().draw(step)
        self._ahead = step + 1, self._thread.submit(super().draw, step + 1)
        return drawn

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="negatives")


def distinct_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that occur in ``counts``, ascending, and how often each does; int64 both.

    E events have at most about sqrt(2 E) different counts, so this is small however many items there are.
    """
    values, numbers = np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, len(counts), _BLOCK_ITEMS):
        new_values, new_numbers = np.unique(counts[start : start + _BLOCK_ITEMS], return_counts=True)
        values, places = np.unique(np.concatenate([values, new_values]), return_inverse=True)
        numbers = np.bincount(places, np.concatenate([numbers, new_numbers]), len(values)).astype(np.int64)
    return values, numbers


def _fill_order(counts: np.ndarray, by_rank: np.ndarray, rank: np.ndarray) -> None:
    """Items by falling count, then by id (a counting sort): ``by_rank`` gets their ids, ``rank`` their places."""
    values, numbers = distinct_counts(counts)
    # The next free place of every count.
    places_of = len(counts) - np.cumsum(numbers)
    for start in range(0, len(counts), _BLOCK_ITEMS):
        value = np.searchsorted(values, counts[start : start + _BLOCK_ITEMS])
        order = np.argsort(value, kind="stable")
        places = take_places(value[order], places_of)
        by_rank[places] = order + (start + 1)
        rank[order + start] = places


def read_popularity(data: str, manifest: Manifest, allocate: Allocate = in_memory) -> np.ndarray:
    """Training events of each item, int64 [N+1].

    Args:
        allocate: where they lie: `NodeArrays` shares them among the ranks of a node.

    Raises:
        UserError: the file is missing or does not fit the manifest.
    """
    url, rows = file_url(data, manifest.popularity), manifest.items + 1

    def fill(popularity: np.ndarray) -> None:
        if storage.read_npy_header(url) != (np.dtype(np.int64), (rows,)):
            raise UserError(f"{url}: must be int64 with {rows} rows")
        for start in range(0, rows, _READ_ITEMS):
            popularity[start : start + _READ_ITEMS] = storage.read_npy_rows(url, start, start + _READ_ITEMS)

    return allocate([(rows, np.int64)], fill)[0]
