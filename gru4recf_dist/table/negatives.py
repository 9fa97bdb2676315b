"""Negative sampling: every rank draws the same negatives from (seed, step), so none of their ids travels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gru4recf_dist.config import LossConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Manifest, file_url
from gru4recf_dist.errors import UserError

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
    """

    def __init__(self, popularity: np.ndarray, config: LossConfig, seed: int) -> None:
        self.items = len(popularity) - 1
        self.count, self.kind, self.seed = config.negatives, config.sampler, seed
        self._cumulative: np.ndarray | None = None
        self._by_rank: np.ndarray | None = None
        if self.kind == "popularity":
            mass = np.maximum(popularity[1:], 1).astype(np.float64) ** config.alpha
            self._popularity, self._alpha = popularity, config.alpha
            self._cumulative = np.cumsum(mass)
        elif self.kind == "log_uniform":
            self._by_rank = np.argsort(-popularity[1:], kind="stable") + 1
            self._rank = np.empty(self.items, np.int64)
            self._rank[self._by_rank - 1] = np.arange(self.items)

    def log_q(self, ids: np.ndarray) -> np.ndarray:
        """log of the probability that one draw gives each of ``ids``; float64."""
        if self._cumulative is not None:
            # Not from differences of the running sum, which loses items of little mass.
            log_mass = self._alpha * np.log(np.maximum(self._popularity[ids], 1))
            return log_mass - np.log(self._cumulative[-1])
        if self._by_rank is not None:
            rank = self._rank[ids - 1]
            return np.log(np.log1p(1.0 / (rank + 1.0)) / np.log(self.items + 1.0))
        return np.full(len(ids), -np.log(self.items))

    def log_expected(self, ids: np.ndarray) -> np.ndarray:
        """log(K q) of each of ``ids``; float64."""
        return self.log_q(ids) + np.log(self.count)

    def draw(self, step: int) -> Negatives:
        """The negatives of a step: the same on every rank and for any number of ranks."""
        uniform = np.random.default_rng((self.seed, _STREAM, step)).random(self.count)
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
            return self._by_rank[np.clip(rank, 0, self.items - 1)]
        return np.minimum((uniform * self.items).astype(np.int64), self.items - 1) + 1


def read_popularity(data: str, manifest: Manifest) -> np.ndarray:
    """Training events of each item, int64 [N+1].

    Raises:
        UserError: the file is missing or does not fit the manifest.
    """
    url = file_url(data, manifest.popularity)
    popularity = storage.read_npy_rows(url)
    if popularity.dtype != np.int64 or popularity.shape != (manifest.items + 1,):
        raise UserError(f"{url}: must be int64 with {manifest.items + 1} rows")
    return popularity
