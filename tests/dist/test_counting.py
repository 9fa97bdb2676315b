"""Items above a target, counted on a table's shards, against a float64 comparison with every item, ties included."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gru4recf_dist.config import TableConfig
from gru4recf_dist.data.seen import SeenItems
from gru4recf_dist.evaluation.ranking import count_above, count_seen_above
from gru4recf_dist.model.scoring import exact_scores
from gru4recf_dist.table.candidates import CandidatePart, Candidates
from gru4recf_dist.table.item_table import ShardedItemTable
from tests.support.exact_ranks import ATOM, ITEMS, D, make_queries, make_rows, reference_rank, reference_scores

pytestmark = pytest.mark.dist
TILES = [1, 7, 64, 10000]


def test_the_reference_is_exact_and_float32_is_not():
    rows, queries = make_rows(), make_queries(200, 1)
    integers = (queries.astype(np.float64) / ATOM).astype(np.int64) @ (rows.astype(np.float64) / ATOM).astype(
        np.int64
    ).T
    scores = reference_scores(queries, rows, "dot")
    np.testing.assert_array_equal(scores, integers * ATOM**2)
    single = torch.from_numpy(queries) @ torch.from_numpy(rows).T
    confused = (single[:, 20] == single[:, 21]).numpy()
    assert confused.mean() > 0.1 and not (scores[:, 20] == scores[:, 21]).any()


def _shards(rows: np.ndarray, world: int, dtype=torch.float32) -> list[ShardedItemTable]:
    """The table as ``world`` ranks hold it, without processes: counting sends nothing."""
    shards = []
    for rank in range(world):
        alone = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
        table = ShardedItemTable(len(rows), rows.shape[1], alone, TableConfig(optimizer="sgd"), seed=0, dtype=dtype)
        table.weight = torch.from_numpy(rows[table.own.start : table.own.stop]).to(dtype)
        shards.append(table)
    return shards


def seen_pairs(pairs: list[tuple[int, int]]) -> SeenItems:
    """Each (query, item) as a run of its own."""
    query, item = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return SeenItems(query, query + 1, item)


def _candidates(table: ShardedItemTable, score: str) -> Candidates:
    return Candidates([CandidatePart(table, score)])


def _counts(shards, queries, targets, pairs, score, tile_rows, ties) -> tuple[list[int], list[int]]:
    """(items above, seen items above) of each query, summed over the shards."""
    rows = torch.cat([shard.weight for shard in shards]).float()
    vectors, targets = torch.from_numpy(queries), torch.tensor(targets)
    common = (vectors, targets, exact_scores(vectors, rows[targets], score))
    history = seen_pairs(pairs)
    above = sum(count_above(*common, _candidates(shard, score), tile_rows, ties) for shard in shards)
    seen = sum(count_seen_above(*common, history, _candidates(shard, score), ties) for shard in shards)
    return above.tolist(), seen.tolist()


@pytest.mark.parametrize("ties", ["against", "for"])
@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 70])
def test_counts_equal_the_reference_at_every_number_of_shards_and_tile_size(world, score, ties):
    """Every item is a target, duplicates and one-bit twins among them; 70 shards leave some empty."""
    rows = make_rows()
    targets = list(range(1, ITEMS + 1))
    queries = make_queries(ITEMS, 2)
    queries[4] = 0  # ties with everything
    generator = np.random.default_rng(3)
    history = [set(generator.integers(1, ITEMS + 1, 9).tolist()) for _ in targets]
    pairs = [(query, item) for query, items in enumerate(history) for item in sorted(items)]
    scores = reference_scores(queries, rows, score)
    expected_above = [reference_rank(scores[q], t, ties, set()) - 1 for q, t in enumerate(targets)]
    expected_unseen = [reference_rank(scores[q], t, ties, history[q]) - 1 for q, t in enumerate(targets)]
    shards = _shards(rows, world)
    for tile_rows in TILES:
        above, seen = _counts(shards, queries, targets, pairs, score, tile_rows, ties)
        assert above == expected_above
        assert [a - s for a, s in zip(above, seen, strict=True)] == expected_unseen


@pytest.mark.parametrize("ties", ["against", "for"])
@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("world", [1, 3])
def test_counts_over_tables_side_by_side_equal_the_reference(world, score, ties):
    """Columns 0 to 2 in one table, 3 to 7 in another, and a bias: the scores of the parts are summed."""
    rows, targets = make_rows(), list(range(1, ITEMS + 1))
    bias = (np.random.default_rng(4).integers(-3, 4, (ITEMS + 1, 1)) / 8).astype(np.float32)
    bias[10:26] = bias[10]
    queries = np.concatenate([make_queries(ITEMS, 2), np.ones((ITEMS, 1), np.float32)], axis=1)
    scores = sum(reference_scores(queries[:, part], rows[:, part], score) for part in (slice(0, 3), slice(3, D)))
    scores = scores + bias.astype(np.float64).T
    expected = [reference_rank(scores[q], t, ties, set()) - 1 for q, t in enumerate(targets)]
    pairs = [(query, item) for query in range(ITEMS) for item in (10, 21, 58)]
    unseen = [reference_rank(scores[q], t, ties, {10, 21, 58}) - 1 for q, t in enumerate(targets)]
    tables = [_shards(np.ascontiguousarray(columns), world) for columns in (rows[:, :3], rows[:, 3:], bias)]
    shards = [
        Candidates([CandidatePart(first, score), CandidatePart(second, score), CandidatePart(last, "dot")])
        for first, second, last in zip(*tables, strict=True)
    ]
    vectors, wanted = torch.from_numpy(queries), torch.tensor(targets)
    of_targets = [torch.cat([shard.weight for shard in table])[wanted] for table in tables]
    common = (vectors, wanted, shards[0].exact_scores(vectors, of_targets))
    # torch's square root may differ from numpy's in the last bit, alike for all rows.
    np.testing.assert_allclose(common[2].numpy(), scores[np.arange(ITEMS), targets], rtol=1e-15, atol=1e-15)
    seen = sum(count_seen_above(*common, seen_pairs(pairs), shard, ties) for shard in shards)
    for tile_rows in TILES:
        above = sum(count_above(*common, shard, tile_rows, ties) for shard in shards)
        assert above.tolist() == expected
        assert (above - seen).tolist() == unseen


def test_ties_are_exact_and_both_policies_bound_them():
    rows, queries = make_rows(), make_queries(20, 5)
    shards, targets = _shards(rows, 3), [10] * 20
    against, _ = _counts(shards, queries, targets, [], "dot", 7, "against")
    lenient, _ = _counts(shards, queries, targets, [], "dot", 7, "for")
    # Items 11 to 15 and 40 are copies of item 10.
    assert [a - b for a, b in zip(against, lenient, strict=True)] == [6] * 20


def test_a_float64_table_is_ranked_by_its_float32_values():
    rows, queries = make_rows(), make_queries(ITEMS, 2)
    doubles = _shards(rows, 2, torch.float64)
    doubles[0].weight[5] += 1e-12
    targets = list(range(1, ITEMS + 1))
    singles = _counts(_shards(rows, 2), queries, targets, [(0, 5)], "cosine", 7, "against")
    assert _counts(doubles, queries, targets, [(0, 5)], "cosine", 7, "against") == singles


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_counts_hold_for_very_small_and_large_vectors(scale):
    """A power of two near ``scale`` on rows and queries changes no rank (float32 products would underflow)."""
    factor = np.float32(2.0 ** round(math.log2(scale)))
    rows, queries, targets = make_rows(), make_queries(ITEMS, 2), list(range(1, ITEMS + 1))
    plain = _counts(_shards(rows, 2), queries, targets, [], "dot", 64, "against")
    assert _counts(_shards(rows * factor, 2), queries * factor, targets, [], "dot", 64, "against") == plain


def test_without_queries_nothing_is_counted():
    assert _counts(_shards(make_rows(), 2), make_queries(0, 1), np.empty(0, np.int64), [], "dot", 7, "for") == ([], [])
