"""Ranking metrics from integer counts, so that they are equal to the last digit however the work was divided."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class RankHistogram:
    """How often each rank up to ``deepest`` occurred among ``total`` targets. Misses count in the total only."""

    deepest: int
    total: int = 0
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.deepest, np.int64)

    def add(self, ranks: np.ndarray, found: np.ndarray) -> None:
        """Count targets.

        Args:
            ranks: int64 [Q], 1 for the best item.
            found: bool [Q]; False for a miss, whatever its rank.
        """
        self.total += len(ranks)
        near = ranks[found & (ranks <= self.deepest)]
        self.counts += np.bincount(near - 1, minlength=self.deepest)

    def metrics(self, ks: list[int]) -> dict[str, float]:
        """hit@k, recall@k, ndcg@k and mrr@k. With one target a query, recall is hit and the ideal DCG is 1."""
        ranks = np.arange(1, self.deepest + 1, dtype=np.float64)
        return from_gains(
            {
                "hit": np.cumsum(self.counts.astype(np.float64)),
                "ndcg": np.cumsum(self.counts / np.log2(ranks + 1.0)),
                "mrr": np.cumsum(self.counts / ranks),
            },
            self.total,
            ks,
        )


def from_gains(gains: dict[str, np.ndarray], total: int, ks: list[int]) -> dict[str, float]:
    """Metrics by name from each metric's gain summed over queries up to each rank, float64 [deepest]."""
    result = {}
    for k in sorted(ks):
        values = {name: float(gain[k - 1] / total) if total else 0.0 for name, gain in gains.items()}
        result[f"hit@{k}"] = result[f"recall@{k}"] = values["hit"]
        result[f"ndcg@{k}"], result[f"mrr@{k}"] = values["ndcg"], values["mrr"]
    return result


class ExpectedOverTies:
    """Metrics expected when the order within every tie is drawn at random, summed up block by block.

    A target with ``above`` items above it and ``tied`` of its own score, itself included, has each of the ranks
    above+1 .. above+tied with the same probability. What is kept is a number a metric and k, whatever the number of
    targets; the result is the same to the last digit however these are divided into blocks.
    """

    # A target's gain is at most 1. It is rounded to a multiple of 2**-62, less than a float64 of 1/512 or more is, and
    # summed as an integer, since the sum of integers does not depend on their order.
    _BITS, _HALF = 62, 31

    def __init__(self, ks: list[int]) -> None:
        self._ks, self._total = sorted(set(ks)), 0
        ranks = np.arange(1, self._ks[-1] + 1, dtype=np.float64)
        gains = {"hit": np.ones(len(ranks)), "ndcg": 1.0 / np.log2(ranks + 1.0), "mrr": 1.0 / ranks}
        self._summed = {name: np.concatenate([[0.0], np.cumsum(gain)]) for name, gain in gains.items()}
        self._units = {name: dict.fromkeys(self._ks, 0) for name in gains}

    def add(self, above: np.ndarray, tied: np.ndarray, found: np.ndarray) -> None:
        """Count targets.

        Args:
            above, tied: int64 [Q].
            found: bool [Q]; False for a miss, whatever its numbers.
        """
        self._total += len(above)
        above, tied = above[found], tied[found]
        for k in self._ks:
            low, high = np.minimum(above, k), np.minimum(above + tied, k)
            for name, summed in self._summed.items():
                units = np.rint((summed[high] - summed[low]) / tied * 2.0**self._BITS).astype(np.int64)
                # Half of the digits at a time: the sum of whole ones would not fit 64 bits.
                upper, lower = units >> self._HALF, units & ((1 << self._HALF) - 1)
                self._units[name][k] += (int(upper.sum()) << self._HALF) + int(lower.sum())

    def metrics(self) -> dict[str, float]:
        """hit@k, recall@k, ndcg@k and mrr@k; 0 without a target."""
        gains = {}
        for name, by_k in self._units.items():
            gains[name] = np.zeros(self._ks[-1])
            for k, units in by_k.items():
                gains[name][k - 1] = units / (1 << self._BITS)
        return from_gains(gains, self._total, self._ks)
