"""Ranks beyond doubt: vectors whose scores are exact in float64, and a plain comparison with every item.

Vectors are multiples of 2^-24 below 1 in size, of 8 elements: every product and sum is exact in float64, so the order
of summation cannot matter and the reference is beyond doubt (it is checked against integers). float32 is not exact.
"""

from __future__ import annotations

import numpy as np

ITEMS, D = 60, 8
ATOM = 2.0**-24


def make_rows() -> np.ndarray:
    """float32 [N+1, D] with exact duplicates, twins that differ in one last bit, multiples, and zero rows."""
    generator = np.random.default_rng(7)
    rows = (generator.integers(-(2**22), 2**22, (ITEMS + 1, D)) * 2 * ATOM).astype(np.float32)
    rows[11:16] = rows[10]
    rows[40] = rows[10]
    # Elements from 0.5 to 1 have their last bit at 2^-24. Twins of each other, one a single bit away.
    rows[20:26, 3] = 0.75
    rows[21:26] = rows[20]
    rows[21, 3], rows[22, 3] = np.nextafter(np.float32(0.75), [np.float32(2), np.float32(0)])
    rows[58] = rows[21]
    # Of the same direction: tied under cosine, not under the dot product.
    rows[31], rows[32] = rows[30] / 2, rows[30]
    rows[50] = rows[51] = 0
    return rows


def make_queries(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.integers(-(2**24) + 1, 2**24, (count, D)) * ATOM).astype(np.float32)


def reference_scores(queries: np.ndarray, rows: np.ndarray, score: str) -> np.ndarray:
    """float64 [Q, N+1] of the whole table."""
    queries, rows = queries.astype(np.float64), rows.astype(np.float64)
    scores = queries @ rows.T
    if score == "dot":
        return scores
    return scores / np.maximum(np.sqrt((rows * rows).sum(axis=1)), 1e-12)


def reference_rank(scores: np.ndarray, target: int, ties: str, excluded: set[int]) -> int:
    """1 + the items above the target, one comparison after the other. ``scores``: [N+1] of one query."""
    rank = 1
    for item in range(1, len(scores)):
        if item == target or item in excluded:
            continue
        if scores[item] > scores[target] or (ties == "against" and scores[item] == scores[target]):
            rank += 1
    return rank
