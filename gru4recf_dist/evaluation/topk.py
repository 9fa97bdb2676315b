"""The k best items of each query over all ranks' rows, in an order that does not depend on how they are divided.

The order is by exact float64 score (`model.scoring.exact_scores`), then by id. Tiles are scored in float32 and a few
more than k candidates kept. Queries for which rounding could have hidden a better one are searched again with more, and
those that have more near ties than can be kept (a query of zeros ties with everything) by exact scores alone. So memory
is bounded by k, whatever the scores.

Shapes: Q queries, D their size, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gru4recf_dist.data.shard_format import PADDING_ID
from gru4recf_dist.evaluation.ranking import relative_error
from gru4recf_dist.evaluation.score_tiles import default_tile_rows, queries_at_once
from gru4recf_dist.parallel import collectives
from gru4recf_dist.table.candidates import Candidates

_SPARE = 16
# How often the kept candidates grow fourfold before exact scores decide.
_GROWTHS = 2
# Pairs that are scored in float64 at a time.
_PAIRS = 1 << 15


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
    search = _Search(k, candidates, tile_rows, exclude_query.contiguous(), exclude_item.contiguous())
    ids, scores = search.best(queries)
    group, world = candidates.ranks.table, candidates.ranks.world
    counts = [len(queries)] * world
    ids = collectives.all_gather_rows(ids, counts, group).view(world, -1, k).permute(1, 0, 2).flatten(1)
    scores = collectives.all_gather_rows(scores, counts, group).view(world, -1, k).permute(1, 0, 2).flatten(1)
    return _first_k(ids, scores, k)


@dataclass(frozen=True)
class _Search:
    """A search of this rank's rows; a pair of ``exclude_query`` and ``exclude_item`` is no candidate."""

    k: int
    candidates: Candidates
    tile_rows: int
    exclude_query: torch.Tensor
    exclude_item: torch.Tensor

    def best(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best ids [Q, k] and their exact scores [Q, k], best first."""
        ids = torch.full((len(queries), self.k), PADDING_ID, dtype=torch.int64, device=queries.device)
        scores = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=queries.device)
        if not len(self.candidates.own) or not len(queries):
            return ids, scores
        step = queries_at_once(min(self.tile_rows, len(self.candidates.own)), queries.device)
        for chosen in torch.arange(len(queries), device=queries.device).split(step):
            kept = self.k + _SPARE
            for _ in range(1 + _GROWTHS):
                ids[chosen], scores[chosen], certain = self._approximate(queries, chosen, kept)
                chosen = chosen[~certain]
                kept *= 4
                if not len(chosen):
                    break
            else:
                for some in chosen.split(max(1, _PAIRS // self.tile_rows)):
                    ids[some], scores[some] = self._exact(queries, some)
        return ids, scores

    def _approximate(
        self, queries: torch.Tensor, chosen: torch.Tensor, kept: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the ``kept`` best by float32 scores the k best by exact ones, and whether no other can be among them."""
        few = queries[chosen]
        ids, approximate, longest = self._best_of_tiles(few, chosen, kept)
        exact = torch.empty(ids.shape, dtype=torch.float64, device=ids.device)
        for part in torch.arange(len(few), device=ids.device).split(max(1, _PAIRS // ids.shape[1])):
            rows = self.candidates.read((ids[part].flatten() - self.candidates.own.start).clamp(min=0))
            pairs = few[part].repeat_interleave(ids.shape[1], dim=0)
            exact[part] = self.candidates.exact_scores(pairs, rows).view(len(part), -1)
        ids, scores = _first_k(ids, exact.masked_fill(ids == PADDING_ID, -torch.inf), self.k)
        if kept >= len(self.candidates.own):
            return ids, scores, torch.ones_like(chosen, dtype=torch.bool)
        # Whatever was not kept scores at most this much.
        error = longest * relative_error(queries.shape[1], self.candidates.score)
        bound = approximate[:, -1].double() + few.double().norm(dim=1) * error
        return ids, scores, bound < scores[:, -1]

    def _best_of_tiles(
        self, queries: torch.Tensor, chosen: torch.Tensor, kept: int
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The ``kept`` best of this rank by float32 scores: ids [q, kept], scores [q, kept], the longest row's norm."""
        best = queries.new_full((len(queries), kept), -torch.inf)
        best_ids = torch.full((len(queries), kept), PADDING_ID, dtype=torch.int64, device=queries.device)
        longest = 0.0
        excluded = self._excluded(chosen)
        for first, rows in self.candidates.tiles(self.tile_rows):
            longest = max(longest, float(rows.norm(dim=1).max()))
            scores = queries @ rows.T
            _leave_out(scores, first, *excluded)
            values, columns = scores.topk(min(kept, len(rows)), dim=1)
            ids = torch.where(values > -torch.inf, columns + first, PADDING_ID)
            best, places = torch.cat([best, values], dim=1).topk(kept, dim=1)
            best_ids = torch.cat([best_ids, ids], dim=1).gather(1, places)
        return best_ids, best, longest

    def _exact(self, queries: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best by exact scores of every item: ids [q, k], scores [q, k]."""
        few, excluded = queries[chosen], self._excluded(chosen)
        ids = torch.full((len(few), self.k), PADDING_ID, dtype=torch.int64, device=queries.device)
        best = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=queries.device)
        for items in self._own_items():
            rows = [part.repeat(len(few), 1) for part in self.candidates.read(items - self.candidates.own.start)]
            scores = self.candidates.exact_scores(few.repeat_interleave(len(items), dim=0), rows).view(len(few), -1)
            _leave_out(scores, int(items[0]), *excluded)
            found = items.expand(len(few), -1).masked_fill(scores == -torch.inf, PADDING_ID)
            ids, best = _first_k(torch.cat([ids, found], dim=1), torch.cat([best, scores], dim=1), self.k)
        return ids, best

    def _own_items(self) -> Iterator[torch.Tensor]:
        """Ids of this rank's items, a tile at a time; padding is none."""
        own = self.candidates.own
        device = self.exclude_item.device
        for first in range(max(own.start, PADDING_ID + 1), own.stop, self.tile_rows):
            yield torch.arange(first, min(first + self.tile_rows, own.stop), device=device)

    def _excluded(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The excluded pairs of the ``chosen`` queries, ascending ones, by their places among these."""
        place = torch.searchsorted(chosen, self.exclude_query).clamp(max=len(chosen) - 1)
        here = chosen[place] == self.exclude_query
        return place[here], self.exclude_item[here]


def _leave_out(scores: torch.Tensor, first: int, query: torch.Tensor, item: torch.Tensor) -> None:
    """Of the scores [q, n] of the items from ``first`` on, make those of the pairs the least."""
    here = (item >= first) & (item < first + scores.shape[1])
    scores[query[here], item[here] - first] = -torch.inf


def _first_k(ids: torch.Tensor, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k first of each row by falling score, then by rising id; missing ones at the end."""
    by_id = torch.argsort(ids, dim=1, stable=True)
    ids, scores = ids.gather(1, by_id), scores.gather(1, by_id)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, order), scores.gather(1, order)
