"""Who reads what: pure arithmetic, against brute force over hundreds of shapes."""

from __future__ import annotations

import numpy as np
import pytest

from gru4recf_dist.data import assignment
from gru4recf_dist.errors import UserError

STREAMS = [1, 2, 4, 8, 16, 32, 64]
SHAPES = [
    (streams, world, workers)
    for streams in STREAMS
    for world in sorted({1, 2, 3, 5, 7, 8, streams - 1, streams} & set(range(1, streams + 1)))
    for workers in (1, 2, 3, 5, 70)
]


def test_there_are_over_a_hundred_shapes():
    assert len(SHAPES) > 100


def test_every_stream_is_served_exactly_once_and_in_order():
    for streams, world, workers in SHAPES:
        served = [
            stream
            for rank in range(world)
            for worker in range(workers)
            for stream in assignment.streams_of(streams, rank, world, worker, workers)
        ]
        assert served == list(range(streams)), (streams, world, workers)


def test_ranks_and_workers_differ_by_at_most_one_stream():
    for streams, world, workers in SHAPES:
        ranks = [len(assignment.streams_of(streams, rank, world)) for rank in range(world)]
        assert max(ranks) - min(ranks) <= 1, (streams, world)
        assert min(ranks) >= 1, (streams, world)
        parts = [len(assignment.streams_of(streams, 0, world, worker, workers)) for worker in range(workers)]
        assert max(parts) - min(parts) <= 1, (streams, world, workers)


@pytest.mark.parametrize(("count", "parts"), [(0, 3), (1, 4), (10, 3), (7, 7), (100, 8)])
def test_shares_join_to_the_whole(count, parts):
    shares = [assignment.share(count, part, parts) for part in range(parts)]
    assert [index for share in shares for index in share] == list(range(count))


def _steps_by_simulation(sizes: list[int], positions: list[int], batch_size: int) -> int:
    """Takes sessions one global batch at a time until every stream is empty."""
    left = [size - position for size, position in zip(sizes, positions, strict=True)]
    steps = 0
    while any(left):
        left = [max(0, count - batch_size // len(sizes)) for count in left]
        steps += 1
    return steps


def test_steps_left_is_what_taking_sessions_gives():
    generator = np.random.default_rng(0)
    for _ in range(500):
        streams = int(generator.choice([1, 2, 4, 8]))
        sizes = generator.integers(0, 40, streams).tolist()
        positions = [int(generator.integers(0, size + 1)) for size in sizes]
        batch_size = streams * int(generator.integers(1, 12))
        expected = _steps_by_simulation(sizes, positions, batch_size)
        assert assignment.steps_left(sizes, positions, batch_size) == expected, (sizes, positions, batch_size)


def test_steps_left_refuses_positions_of_another_number_of_streams():
    with pytest.raises(ValueError, match="zip"):
        assignment.steps_left([3, 3], [0], 2)


@pytest.mark.parametrize(("streams", "batch_size", "world"), [(8, 8, 8), (8, 24, 1), (1, 1, 1), (64, 128, 3)])
def test_sizes_that_fit_are_accepted(streams, batch_size, world):
    assignment.check_sizes(streams, batch_size, world)


@pytest.mark.parametrize("batch_size", [1, 4, 12, 33])
def test_batch_size_that_streams_do_not_divide_names_key_and_values(batch_size):
    with pytest.raises(UserError, match=rf"batch_size \({batch_size}\).* 8 streams"):
        assignment.check_sizes(8, batch_size, 1)


def test_more_ranks_than_streams_names_both():
    with pytest.raises(UserError, match=r"9 ranks.* 8 streams"):
        assignment.check_sizes(8, 16, 9)
