"""Seen items as runs of queries, against sets written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.data import seen
from gru4recf_dist.data.batches import pack_queries
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.seen import SeenItems


def _block(sessions: list[list[int]]) -> Block:
    lengths = np.array([len(session) for session in sessions], np.int32)
    return Block(np.concatenate(sessions).astype(np.int32), lengths, np.arange(len(sessions)))


def _random(seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 9, generator.integers(1, 30)).tolist() for _ in range(20)]


def _histories(sessions: list[list[int]]) -> list[set[int]]:
    """Of each query, where every event but a session's first is asked for."""
    return [set(session[:end]) for session in sessions for end in range(1, len(session))]


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_pairs_are_every_querys_earlier_items_each_once(monkeypatch, at_once):
    monkeypatch.setattr(seen, "PAIRS", at_once)
    sessions = _random(1)
    runs = pack_queries(_block(sessions), 5, 2, every_position=True).seen
    parts = [tuple(map(torch.Tensor.tolist, some)) for some in runs.later(3).pairs()]
    assert all(0 < len(query) <= at_once for query, _ in parts)
    pairs = [pair for part in parts for pair in zip(*part, strict=True)]
    assert sorted(pairs) == [(q + 3, item) for q, items in enumerate(_histories(sessions)) for item in sorted(items)]


def test_contain_tells_whether_a_querys_item_is_among_them():
    sessions = _random(2)
    runs, histories = pack_queries(_block(sessions), 30, 0, every_position=True).seen, _histories(sessions)
    for item in range(11):
        found = runs.contain(torch.full((len(histories),), item)).tolist()
        assert found == [item in history for history in histories]


def test_nothing_seen():
    empty = torch.empty(0, dtype=torch.int64)
    runs = SeenItems(empty, empty, empty)
    assert list(runs.pairs()) == [] and runs.contain(torch.tensor([1, 2])).tolist() == [False, False]


def test_a_long_session_takes_as_many_runs_as_it_has_items():
    length = 20_000
    batch = pack_queries(_block([list(range(1, length + 1))]), 50, 10, every_position=True)
    assert len(batch.targets) == len(batch.seen.item) == length - 1
    assert sum(len(query) for query, _ in batch.seen.within(range(1, 101)).pairs()) == sum(
        length - item for item in range(1, 101)
    )
