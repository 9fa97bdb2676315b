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


def expected_over_ties(above: np.ndarray, tied: np.ndarray, found: np.ndarray, ks: list[int]) -> dict[str, float]:
    """Metrics expected when the order within every tie is drawn at random.

    A target with ``above`` items above it and ``tied`` of its own score, itself included, has each of the ranks
    above+1 .. above+tied with the same probability.

    Args:
        above, tied: int64 [Q].
        found: bool [Q]; False for a miss.
    """
    deepest = max(ks)
    ranks = np.arange(1, deepest + 1, dtype=np.float64)
    gains = {}
    for name, gain in {"hit": np.ones(deepest), "ndcg": 1.0 / np.log2(ranks + 1.0), "mrr": 1.0 / ranks}.items():
        summed = np.concatenate([[0.0], np.cumsum(gain)])
        by_k = np.zeros(deepest)
        for k in set(ks):
            low, high = np.minimum(above, k), np.minimum(above + tied, k)
            by_k[k - 1] = ((summed[high] - summed[low]) / tied)[found].sum()
        gains[name] = by_k
    return from_gains(gains, len(above), ks)
