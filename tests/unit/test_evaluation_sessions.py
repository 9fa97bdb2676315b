"""Batches of evaluation sessions: the same for every number of ranks."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.evaluation import sessions as evaluation_sessions
from gru4recf_dist.evaluation.sessions import batch_count, read_batches
from tests.support.synthetic import random_sessions, write_dataset

VALID, TEST = 53, 1


@pytest.fixture(scope="module")
def dataset() -> tuple[str, Manifest, list[np.ndarray]]:
    """53 valid sessions in shards of 16 and blocks of 5: nothing divides anything."""
    data = f"memory://{uuid.uuid4().hex}"
    valid = random_sessions(1, VALID, 30, shortest=1)
    manifest = write_dataset(data, random_sessions(0, 20, 30), valid, random_sessions(2, TEST, 30), features=False)
    return data, manifest, valid


def _numbers(blocks: list[Block]) -> list[list[int]]:
    return [block.sessions.tolist() for block in blocks]


def _chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


@pytest.mark.parametrize("size", [1, 3, 5, 7, 16, 20, 52, 53, 54, 1000])
def test_batches_are_consecutive_sessions_at_every_world_size(dataset, size):
    data, manifest, _ = dataset
    assert batch_count(manifest, "valid", size) == len(_chunks(VALID, size))
    for world in (1, 2, 3, 4, 7, 60):
        joined = [
            numbers
            for rank in range(world)
            for numbers in _numbers(list(read_batches(data, manifest, "valid", size, rank, world)))
        ]
        assert joined == _chunks(VALID, size), world


def test_ranks_differ_by_at_most_one_batch(dataset):
    data, manifest, _ = dataset
    counts = [len(list(read_batches(data, manifest, "valid", 4, rank, 4))) for rank in range(4)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("size", [3, 16, 100])
def test_events_stay_with_their_sessions(dataset, size):
    data, manifest, valid = dataset
    for rank in range(3):
        for block in read_batches(data, manifest, "valid", size, rank, 3):
            sequences = np.split(block.items, np.cumsum(block.lengths)[:-1])
            for number, sequence in zip(block.sessions, sequences, strict=True):
                np.testing.assert_array_equal(sequence, valid[number])


def test_split_of_one_session_leaves_other_ranks_without_any(dataset):
    data, manifest, _ = dataset
    served = [_numbers(list(read_batches(data, manifest, "test", 8, rank, 3))) for rank in range(3)]
    assert sorted(served) == [[], [], [[0]]]


def test_empty_split_has_no_batches():
    data = f"memory://{uuid.uuid4().hex}"
    manifest = write_dataset(data, random_sessions(0, 20, 30), features=False)
    assert batch_count(manifest, "test", 8) == 0
    assert list(read_batches(data, manifest, "test", 8)) == []


def test_rank_opens_only_the_shards_of_its_share(dataset, monkeypatch):
    data, manifest, _ = dataset
    opened: list[str] = []
    read_blocks = evaluation_sessions.read_blocks

    def recording(data, info, items, on_bad_shard, event_features):
        opened.append(info.url)
        return read_blocks(data, info, items, on_bad_shard, event_features)

    monkeypatch.setattr(evaluation_sessions, "read_blocks", recording)
    # Batches of 4 over 4 ranks: 14 batches, shares of 3, 4, 3, 4: sessions 0-11, 12-27, 28-39, 40-52.
    shards = [shard.url for shard in manifest.splits["valid"].shards]
    for rank, (first, last) in enumerate([(0, 0), (0, 1), (1, 2), (2, 3)]):
        opened.clear()
        list(read_batches(data, manifest, "valid", 4, rank, 4))
        assert opened == shards[first : last + 1], rank
