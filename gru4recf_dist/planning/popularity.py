"""How popular the items of a catalog are, and how many distinct ones a number of draws is expected to meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

# Ranks up to here stand for themselves; further ones share buckets that grow by half a percent.
_EXACT_RANKS = 10_000
_GROWTH = 1.005
# Items that are dealt out to ranks one by one, and how often, to see how unevenly.
_DEALT = 2_000
_DEALS = 200


@dataclass(frozen=True)
class Popularity:
    """Items grouped by popularity, so that a catalog of billions is a short array.

    Attributes:
        weight: float64 [G], events of one item of the group, or what they are proportional to.
        items: float64 [G], items of the group.
        events: of the whole log; None if it has no end, and draws are independent.
        balanced: whether ids are in preparation's balanced order, and not in one of chance.
    """

    weight: np.ndarray
    items: np.ndarray
    events: float | None = None
    balanced: bool = False

    def distinct(self, draws: float) -> float:
        """Expected distinct items among ``draws`` events: of a log with an end, drawn without replacement."""
        return float(-np.expm1(self._log_left_out(draws)) @ self.items)

    def _log_left_out(self, draws: float) -> np.ndarray:
        """log of the probability that an item of each group is not among ``draws`` events; float64 [G]."""
        if self.events is not None:
            return np.log1p(-min(draws / self.events, 1.0 - 1e-12)) * self.weight
        return draws * np.log1p(-np.minimum(self.weight / (self.weight @ self.items), 1.0 - 1e-12))

    def lookup_imbalance(self, draws: float, world: int) -> float:
        """Expected rows that the most asked rank is asked for, over the mean, where each of ``world`` ranks asks for
        the distinct items among its own ``draws`` events.

        Items that hardly any step does without weigh most: all ranks ask the same one for them. The most popular are
        dealt out one by one, over and over; of all others the spread is that of independent items. In the balanced
        order ranks have as many of each popularity, and only who asks for them is left to chance.
        """
        if world == 1:
            return 1.0
        share = np.minimum(self.weight / (self.weight @ self.items), 1.0 - 1e-12)
        asked = -np.expm1(draws * np.log1p(-share))
        falling = np.argsort(-asked, kind="stable")
        single = falling[: np.searchsorted(np.cumsum(self.items[falling]), _DEALT, side="right")]
        hot = np.repeat(asked[single], self.items[single].astype(np.int64))
        rest = np.setdiff1d(falling, single)
        mean = asked[rest] @ self.items[rest]
        by_chance = 1.0 - asked[rest] if self.balanced else 1.0 + (world - 1.0) * asked[rest]
        spread = math.sqrt((asked[rest] * by_chance) @ self.items[rest])
        generator, most, in_turn = np.random.default_rng(0), [], np.arange(len(hot)) % world
        for _ in range(_DEALS):
            # Where few are asked for at all, numbers that are normal would fall below 0.
            loads = np.maximum(mean + spread * generator.standard_normal(world), 0.0)
            owners = in_turn if self.balanced else generator.integers(world, size=len(hot))
            loads += np.bincount(owners, generator.binomial(world, hot), minlength=world)
            if loads.any():
                most.append(loads.max() / loads.mean())
        return float(np.mean(most)) if most else 1.0

    def distinct_negatives(self, draws: int, sampler: str, alpha: float) -> float:
        """Expected distinct items among ``draws`` negatives, which are drawn with replacement."""
        count = self.items.sum()
        if sampler == "uniform":
            proposal = Popularity(np.ones(1), np.array([count]))
        elif sampler == "log_uniform":
            edges = _rank_edges(int(count))
            # q(r) = log((r+1)/r) / log(N+1) sums over a bucket of ranks to the difference of logarithms.
            mass = np.diff(np.log(edges)) / np.log(count + 1.0)
            proposal = Popularity(mass / np.diff(edges), np.diff(edges))
        elif self.events is None:
            proposal = Popularity(self.weight**alpha, self.items)
        else:
            # As the sampler does it: an item without an event counts as one.
            proposal = Popularity(np.maximum(self.weight, 1.0) ** alpha, self.items)
        return proposal.distinct(draws)

    def distinct_beside(self, events: float, draws: int, sampler: str, alpha: float) -> float:
        """Expected distinct items among ``events`` that are not among ``draws`` negatives."""
        if sampler == "popularity":
            mass = (self.weight if self.events is None else np.maximum(self.weight, 1.0)) ** alpha
        elif sampler == "uniform":
            mass = np.ones_like(self.weight)
        else:
            falling = np.argsort(-self.weight, kind="stable")
            ends = 1.0 + np.cumsum(self.items[falling])
            mass = np.empty_like(self.weight)
            mass[falling] = np.log(ends / (ends - self.items[falling])) / self.items[falling]
        missed = np.exp(draws * np.log1p(-np.minimum(mass / (mass @ self.items), 1.0 - 1e-12)))
        return float((-np.expm1(self._log_left_out(events)) * missed) @ self.items)


def zipf(items: int, exponent: float, balanced: bool = False) -> Popularity:
    """Popularity of the r-th item in proportion to r ** -exponent."""
    edges = _rank_edges(items)
    counts = np.diff(edges)
    # Beyond the exact ranks, a bucket's mean is that of the curve between half a rank before it and after it.
    middle = np.sqrt((edges[:-1] - 0.5) * (edges[1:] - 0.5))
    weight = np.where(counts == 1, edges[:-1] ** -exponent, middle**-exponent)
    return Popularity(weight, counts, balanced=balanced)


def of_counts(counts: np.ndarray, balanced: bool = False) -> Popularity:
    """Popularity as the training events of each item, int64 [N]."""
    weight, items = np.unique(counts, return_counts=True)
    return Popularity(weight.astype(np.float64), items.astype(np.float64), float(counts.sum()), balanced)


def _rank_edges(items: int) -> np.ndarray:
    """First ranks, from 1, of buckets over all ranks, and ``items`` + 1; float64."""
    exact = np.arange(1, min(items, _EXACT_RANKS) + 1, dtype=np.float64)
    if items <= _EXACT_RANKS:
        return np.append(exact, items + 1.0)
    number = int(np.ceil(np.log((items + 1) / _EXACT_RANKS) / np.log(_GROWTH)))
    tail = np.geomspace(_EXACT_RANKS + 1, items + 1, number + 1).round()
    return np.concatenate([exact, tail])


def largest_of(world: int) -> float:
    """Expected largest of ``world`` independent standard normal numbers."""
    edges = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
    below = torch.special.ndtr(edges) ** world
    return float((below.diff() * (edges[1:] + edges[:-1]) / 2).sum())
