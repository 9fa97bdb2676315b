"""Tiles of scores, on either device's code, against a comparison of every product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.evaluation.score_tiles import CpuTile, GpuTile, score_tile

ROWS, QUERIES, DIM = 150, 21, 4
BOUND = np.float32(0.75)


def _tiles() -> list:
    return [CpuTile(ROWS, QUERIES), GpuTile(ROWS, QUERIES, torch.device("cpu"))]


def _integers(seed: int, *shape: int) -> torch.Tensor:
    """Quarters of small integers: their products are exact, many of them equal to the bound or to 0."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, shape)).float() / 4


@pytest.mark.parametrize("number", [0, 1])
def test_counts_and_near_pairs_are_those_of_every_product(number):
    tile = _tiles()[number]
    # Full tiles, then such as leave rows or queries over, which must not be taken for those of the tile before.
    for seed, (rows, queries) in enumerate([(ROWS, QUERIES), (ROWS, 5), (70, QUERIES), (1, 1), (ROWS, QUERIES)]):
        left, right = _integers(seed, rows, DIM), _integers(seed + 9, DIM, queries)
        products = left.numpy().astype(np.float64) @ right.numpy().astype(np.float64)
        above, row, query = tile.sort_out(left, right, BOUND)
        assert above.tolist() == (products > BOUND).sum(axis=0).tolist()
        expected = np.argwhere(np.abs(products) <= BOUND).tolist()
        assert sorted(zip(row.tolist(), query.tolist(), strict=True)) == sorted(map(tuple, expected))
        assert len(expected) > 0


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_a_tile_takes_no_more_queries_than_there_are_or_than_suits(rows):
    assert score_tile(rows, 3, torch.device("cpu")).queries == 8
    assert score_tile(rows, 10**6, torch.device("cpu")).queries == 1024


def test_scores_are_bounded_whatever_the_rows_of_a_tile():
    tile = score_tile(1 << 20, 10**6, torch.device("cpu"))
    assert tile.queries * (1 << 20) <= 1 << 23
