"""The best items over the shards against a full sort on one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.config import TableConfig
from gru4recf_dist.evaluation import topk
from gru4recf_dist.evaluation.topk import top_k
from gru4recf_dist.table.candidates import CandidatePart, Candidates
from gru4recf_dist.table.item_table import ShardedItemTable
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist
DIM, QUERIES = 3, 9


def _values(seed: int, rows: int) -> np.ndarray:
    """Small integers: products and sums are exact, and ties are everywhere."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, DIM)).astype(np.float32)


def _excluded(rows: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.random.default_rng(3).random((QUERIES, rows)) < 0.3
    pairs[:, 0] = False
    query, item = np.nonzero(pairs)
    return query, item


def _search(ranks, rows: int, cases: list[tuple[int, int, bool]]) -> list[tuple[np.ndarray, np.ndarray]]:
    table = ShardedItemTable(rows, DIM, ranks, TableConfig(), seed=0, training=False)
    table.weight.copy_(torch.from_numpy(_values(1, rows)[table.own.start : table.own.stop]))
    queries = torch.from_numpy(_values(2, QUERIES))
    # Ties with every item.
    queries[4] = 0.0
    found = []
    for k, tile_rows, exclude in cases:
        pairs = [torch.from_numpy(column) for column in _excluded(rows)] if exclude else [None, None]
        ids, scores = top_k(queries, k, Candidates([CandidatePart(table, "dot")]), tile_rows, *pairs)
        found.append((ids.numpy(), scores.numpy()))
    return found


def _expected(rows: int, k: int, exclude: bool) -> tuple[np.ndarray, np.ndarray]:
    queries = _values(2, QUERIES).astype(np.float64)
    queries[4] = 0.0
    scores = queries @ _values(1, rows).astype(np.float64).T
    scores[:, 0] = -np.inf
    if exclude:
        scores[_excluded(rows)] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(rows), scores.shape), -scores))[:, :k]
    best = np.take_along_axis(scores, order, 1)
    ids = np.where(best > -np.inf, order, 0)
    short = k - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, max(0, short)))), np.pad(
        best, ((0, 0), (0, max(0, short))), constant_values=-np.inf
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("rows", [5, 60, 301, 4001])
def test_top_k_is_the_head_of_a_full_sort_with_ties_by_id(tmp_path, world, rows):
    cases = [(k, tile, exclude) for k, tile in ((1, 7), (4, 1000), (20, 7), (70, 16)) for exclude in (False, True)]
    for found in run_ranks(world, _search, tmp_path, rows, cases):
        for (k, _, exclude), (ids, scores) in zip(cases, found, strict=True):
            expected_ids, expected_scores = _expected(rows, k, exclude)
            np.testing.assert_array_equal(scores, expected_scores)
            np.testing.assert_array_equal(ids, expected_ids)


def _keep_widths(ranks, rows: int, k: int) -> tuple[set[int], int]:
    """Search a table whose items all tie with some queries; how many candidates a query kept at most."""
    table = ShardedItemTable(rows, DIM, ranks, TableConfig(), seed=0, training=False)
    queries = torch.from_numpy(_values(2, QUERIES))
    queries[::2] = 0.0
    widths, exactly = set(), 0
    approximate, exact = topk._Search._best_of_tiles, topk._Search._exact

    def watched(self, queries, chosen, kept):
        widths.add(kept)
        return approximate(self, queries, chosen, kept)

    def counted(self, queries, chosen):
        nonlocal exactly
        exactly += len(chosen)
        return exact(self, queries, chosen)

    topk._Search._best_of_tiles, topk._Search._exact = watched, counted
    ids, scores = top_k(queries, k, Candidates([CandidatePart(table, "dot")]), 64)
    assert (scores[::2] == 0).all() and (ids[::2] == torch.arange(1, k + 1)).all()
    return widths, exactly


def test_ties_without_end_take_no_more_memory_than_a_few_candidates(tmp_path):
    [(widths, exactly)] = run_ranks(1, _keep_widths, tmp_path, 20_000, 5)
    assert widths == {21, 84, 336} and exactly == len(range(0, QUERIES, 2))
