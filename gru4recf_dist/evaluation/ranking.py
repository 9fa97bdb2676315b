"""Exact ranks by counting: how many of this rank's items score above each query's target.

A rank is defined by float64 scores of the float32 vectors (`model.scoring.exact_scores`). Tiles are scored in float32,
which decides all but the items within the rounding error of the target's score; those few are scored again in
float64. So the count is exact, whatever the tile size and the number of ranks.

Shapes: Q queries of all ranks, D their size, n rows of a tile.
"""

from __future__ import annotations

import numpy as np
import torch

from gru4recf_dist.data.seen import SeenItems
from gru4recf_dist.evaluation.score_tiles import CPU_QUERIES, score_tile
from gru4recf_dist.table.candidates import Candidates

# Pairs that are scored in float64 at a time: bounds the memory.
_PAIRS = 1 << 15
# Queries that the evaluator collects before the table is gone through: a tile's rows are prepared for all of them.
QUERIES = 4 * CPU_QUERIES


def count_above(
    queries: torch.Tensor,
    targets: torch.Tensor,
    target_scores: torch.Tensor,
    candidates: Candidates,
    tile_rows: int,
    ties: str,
) -> torch.Tensor:
    """Items of this rank's rows above each target; int64 [Q]. Padding and the target itself never count.

    Args:
        queries: float32 [Q, D].
        targets: int64 [Q], item ids.
        target_scores: float64 [Q], exact scores of the targets.
        ties: ``against`` counts items of exactly the target's score, ``for`` does not.
    """
    count = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    tile_rows = min(tile_rows, max(1, len(candidates.own)))
    tile = score_tile(tile_rows, len(queries), queries.device)
    compared, farthest = _less_targets(queries, target_scores)
    slices = [slice(start, start + tile.queries) for start in range(0, len(queries), tile.queries)]
    parts = [(each.start, compared[each].T.contiguous(), count[each]) for each in slices]
    # A column of ones meets the targets' scores.
    extended = queries.new_ones(tile_rows, queries.shape[1] + 1)
    error = relative_error(queries.shape[1], candidates.score)
    unsure = _UnsurePairs(queries, targets, target_scores, candidates, ties)
    for first, rows in candidates.tiles(tile_rows):
        extended[: len(rows), :-1] = rows
        margin = np.float32(error * (float(rows.norm(dim=1).max()) + farthest))
        bound = np.nextafter(margin, np.float32(np.inf))
        for start, part, counted in parts:
            sure, row, query = tile.sort_out(extended[: len(rows)], part, bound)
            counted += sure
            unsure.add(query + start, row + first)
    return count + unsure.count()


def _less_targets(queries: torch.Tensor, target_scores: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Queries [Q, D + 1] whose product with a row and a 1 is (score - target's score) / |query|.

    So one number separates what is above from what is below, for all queries. Also: the largest last column.
    """
    norms = queries.double().norm(dim=1, keepdim=True)
    norms = norms.where(norms > 0, 1.0)
    compared = (torch.cat([queries, -target_scores[:, None]], dim=1) / norms).float()
    return compared, float(compared[:, -1].abs().max()) if len(compared) else 0.0


class _UnsurePairs:
    """Pairs (query, item of this rank) that float32 does not decide, collected over tiles and decided in float64."""

    def __init__(self, queries, targets, target_scores, candidates: Candidates, ties: str) -> None:
        self._targets, self._own_start = targets, candidates.own.start
        self._decide = (candidates, ties)
        self._compared = (queries, target_scores)
        self._count = torch.zeros_like(targets)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pairs = 0

    def add(self, query: torch.Tensor, item: torch.Tensor) -> None:
        """Pairs of a tile; those of a query and its own target are left out."""
        if not len(query):
            return
        self._waiting.append((query, item))
        self._pairs += len(query)
        if self._pairs >= _PAIRS:
            self._flush()

    def count(self) -> torch.Tensor:
        """How many of the pairs so far are above the target; int64 [Q]."""
        self._flush()
        return self._count

    def _flush(self) -> None:
        if not self._waiting:
            return
        query, item = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        other = self._targets[query] != item
        query, item = query[other], item[other]
        above = _pairs_above(*self._compared, query, item - self._own_start, *self._decide)
        self._count += torch.bincount(query[above], minlength=len(self._count))
        self._waiting, self._pairs = [], 0


def count_seen_above(
    queries: torch.Tensor,
    targets: torch.Tensor,
    target_scores: torch.Tensor,
    seen: SeenItems,
    candidates: Candidates,
    ties: str,
) -> torch.Tensor:
    """Of the items on this rank that a query's session has seen: how many are above the target; int64 [Q].

    Subtracted from `count_above`, this leaves the seen items out of the candidates.
    """
    count = torch.zeros_like(targets)
    for query, item in seen.within(candidates.own).pairs():
        other = item != targets[query]
        query, local = query[other], item[other] - candidates.own.start
        above = _pairs_above(queries, target_scores, query, local, candidates, ties)
        count += torch.bincount(query[above], minlength=len(queries))
    return count


def _pairs_above(queries, target_scores, query, local, candidates, ties) -> torch.Tensor:
    """Whether this rank's row ``local[i]`` is above the target of query ``query[i]``; bool, in float64."""
    above = torch.empty(len(query), dtype=torch.bool, device=queries.device)
    for start in range(0, len(query), _PAIRS):
        part = slice(start, start + _PAIRS)
        exact = candidates.exact_scores(queries[query[part]], candidates.read(local[part]))
        target = target_scores[query[part]]
        above[part] = exact >= target if ties == "against" else exact > target
    return above


def relative_error(dim: int, score: str) -> float:
    """Bound of |float32 score - exact score| / (|query| |row|) for a product of ``dim`` terms in any order.

    gamma_D = D u / (1 - D u) with u = 2^-24 (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1),
    with some to spare for the rounding of the norms, and as much again where rows, or parts of them, are normalised
    first.
    """
    terms = dim + 8 if score == "dot" else 2 * dim + 16
    return terms * 2.0**-24
