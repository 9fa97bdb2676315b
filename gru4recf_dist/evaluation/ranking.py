"""Exact ranks by counting: how many of this rank's items score above each query's target.

A rank is defined by float64 scores of the float32 vectors (`model.scoring.exact_scores`). Tiles are scored in float32,
which decides all but the items within the rounding error of the target's score; those few are scored again in
float64. So the count is exact, whatever the tile size and the number of ranks.

Shapes: Q queries of all ranks, D their size, n rows of a tile.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from gru4recf_dist.table.candidates import Candidates

# Pairs that are scored in float64, and float32 scores of a tile, at a time: both bound the memory.
_PAIRS = 1 << 17
_SCORES = 1 << 23
# Rows of a tile on a GPU, which hides their cost only if there are many; also float32's bound for counting in it.
_GPU_TILE_ROWS = 1 << 16
_L2_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_USUAL_QUERIES = 256


@cache
def default_tile_rows(device: torch.device, dim: int) -> int:
    """Table rows that are scored at a time, where none are set: on the CPU their scores and they stay in the cache."""
    if device.type == "cuda":
        return _GPU_TILE_ROWS
    text = _L2_SIZE.read_text().strip() if _L2_SIZE.exists() else "1024K"
    bytes_ = int(text.removesuffix("K")) * 1024 if text.removesuffix("K").isdigit() else 1 << 20
    # A tile's rows and the scores of a batch of queries, or half of them: smaller tiles cost more calls than they gain.
    return max(256, 2 * bytes_ // (4 * (dim + _USUAL_QUERIES)))


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
    # [tile, queries] scores exist at a time: as many queries as keep that within bounds.
    block = min(max(1, _SCORES // tile_rows), max(1, len(queries)))
    scores, flags = (queries.new_empty(tile_rows, block) for _ in range(2))
    norms = queries.double().norm(dim=1)
    error = relative_error(queries.shape[1], candidates.score)
    unsure = _UnsurePairs(queries, targets, target_scores, candidates, ties)
    for first, rows in candidates.tiles(tile_rows):
        margin = norms * (rows.norm(dim=1).max().double() * error)
        low, high = _round_down(target_scores - margin), _round_up(target_scores + margin)
        for start in range(0, len(queries), block):
            part = slice(start, start + block)
            used = (slice(0, len(rows)), slice(0, len(queries[part])))
            torch.mm(rows, queries[part].T, out=scores[used])
            sure, row, query = _sort_out(scores[used], flags[used], low[part], high[part])
            count[part] += sure
            unsure.add(query + start, row + first)
    return count + unsure.count()


def _sort_out(
    scores: torch.Tensor, flags: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per query, how many of the scores [n, Q] are above ``high`` [Q]; and the pairs (row, query) in between.

    ``flags`` is memory of the scores' shape and type: comparisons as floats are summed several times faster than
    as bools, and exactly, as tiles have fewer than 2^24 rows.
    """
    sure = torch.gt(scores, high, out=flags).sum(dim=0)
    possible = torch.ge(scores, low, out=flags).sum(dim=0)
    # Most queries have nothing near their target's score in most tiles.
    unsure = torch.nonzero(possible > sure).squeeze(1)
    near = scores.index_select(1, unsure)
    row, query = torch.nonzero((near >= low[unsure]) & (near <= high[unsure]), as_tuple=True)
    return sure.to(torch.int64), row, unsure[query]


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
    seen_query: torch.Tensor,
    seen_item: torch.Tensor,
    candidates: Candidates,
    ties: str,
) -> torch.Tensor:
    """Of the pairs (query, item already seen) whose item lies on this rank: how many are above the target; [Q].

    Subtracted from `count_above`, this leaves the seen items out of the candidates.
    """
    own = candidates.own
    here = (seen_item >= own.start) & (seen_item < own.stop) & (seen_item != targets[seen_query])
    query, local = seen_query[here], seen_item[here] - own.start
    above = _pairs_above(queries, target_scores, query, local, candidates, ties)
    return torch.bincount(query[above], minlength=len(queries))


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


def _round_up(values: torch.Tensor) -> torch.Tensor:
    """float64 -> a float32 that is not smaller."""
    return torch.nextafter(values.float(), torch.tensor(torch.inf, device=values.device))


def _round_down(values: torch.Tensor) -> torch.Tensor:
    """float64 -> a float32 that is not greater."""
    return torch.nextafter(values.float(), torch.tensor(-torch.inf, device=values.device))
