"""The k best items of each query over all ranks' rows, in an order that does not depend on how they are divided.

The order is by exact float64 score (`model.scoring.exact_scores`), then by id. Tiles are scored in float32 and a few
more than k candidates kept; if rounding could have hidden a better one, the search is repeated with more.

Shapes: Q queries, D their size, W ranks.
"""

from __future__ import annotations

import torch

from gru4recf_dist.data.shard_format import PADDING_ID
from gru4recf_dist.evaluation.ranking import relative_error
from gru4recf_dist.evaluation.score_tiles import default_tile_rows
from gru4recf_dist.parallel import collectives
from gru4recf_dist.table.candidates import Candidates

_SPARE = 16


def top_k(
    queries: torch.Tensor,
    k: int,
    candidates: Candidates,
    tile_rows: int | None,
    exclude_query: torch.Tensor | None = None,
    exclude_item: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best items, the same on every rank.

    Args:
        queries: float32 [Q, D], the same on every rank.
        tile_rows: table rows that are scored at a time; None: `default_tile_rows`.
        exclude_query, exclude_item: int64 [P], pairs that are no candidates.

    Returns:
        ids int64 [Q, k] and float64 scores [Q, k]; where there are fewer than k candidates, `PADDING_ID` and -inf.
    """
    if exclude_query is None or exclude_item is None:
        exclude_query = exclude_item = torch.empty(0, dtype=torch.int64, device=queries.device)
    tile_rows = tile_rows or default_tile_rows(queries.device)
    ids, scores = _local_top_k(queries, k, candidates, tile_rows, exclude_query, exclude_item)
    group, world = candidates.ranks.table, candidates.ranks.world
    counts = [len(queries)] * world
    ids = collectives.all_gather_rows(ids, counts, group).view(world, -1, k).permute(1, 0, 2).flatten(1)
    scores = collectives.all_gather_rows(scores, counts, group).view(world, -1, k).permute(1, 0, 2).flatten(1)
    return _first_k(ids, scores, k)


def _local_top_k(queries, k, candidates, tile_rows, exclude_query, exclude_item):
    if not len(candidates.own):
        ids = torch.full((len(queries), k), PADDING_ID, dtype=torch.int64, device=queries.device)
        return ids, torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=queries.device)
    kept = k + _SPARE
    norms = queries.double().norm(dim=1)
    while True:
        ids, approximate, longest = _best_of_tiles(queries, kept, candidates, tile_rows, exclude_query, exclude_item)
        rows = candidates.read((ids.flatten() - candidates.own.start).clamp(min=0))
        query = torch.arange(len(queries), device=queries.device).repeat_interleave(ids.shape[1])
        exact = candidates.exact_scores(queries[query], rows).view(ids.shape)
        exact = exact.masked_fill(ids == PADDING_ID, -torch.inf)
        ids, scores = _first_k(ids, exact, k)
        if kept >= len(candidates.own) or not len(queries):
            return ids, scores
        # Whatever was not kept scores at most this much.
        bound = approximate[:, -1].double() + norms * (longest * relative_error(queries.shape[1], candidates.score))
        if bool((bound < scores[:, -1]).all()):
            return ids, scores
        kept *= 4


def _best_of_tiles(queries, kept, candidates, tile_rows, exclude_query, exclude_item):
    """The ``kept`` best of this rank by float32 scores: ids [Q, kept], scores [Q, kept], and the longest row's norm."""
    best = queries.new_full((len(queries), kept), -torch.inf)
    best_ids = torch.full((len(queries), kept), PADDING_ID, dtype=torch.int64, device=queries.device)
    longest = 0.0
    for first, rows in candidates.tiles(tile_rows):
        longest = max(longest, float(rows.norm(dim=1).max()))
        scores = queries @ rows.T
        here = (exclude_item >= first) & (exclude_item < first + len(rows))
        scores[exclude_query[here], exclude_item[here] - first] = -torch.inf
        values, columns = scores.topk(min(kept, len(rows)), dim=1)
        ids = torch.where(values > -torch.inf, columns + first, PADDING_ID)
        best, places = torch.cat([best, values], dim=1).topk(kept, dim=1)
        best_ids = torch.cat([best_ids, ids], dim=1).gather(1, places)
    return best_ids, best, longest


def _first_k(ids: torch.Tensor, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k first of each row by falling score, then by rising id; missing ones at the end."""
    by_id = torch.argsort(ids, dim=1, stable=True)
    ids, scores = ids.gather(1, by_id), scores.gather(1, by_id)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, order), scores.gather(1, order)
