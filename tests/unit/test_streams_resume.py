"""A loader's position: a few integers, from which any number of ranks goes on with the same global batches."""

from __future__ import annotations

import numpy as np
import pytest

from gru4recf_dist.data import streams
from gru4recf_dist.data.streams import Stream
from gru4recf_dist.errors import UserError
from tests.support.epochs import STREAMS, DataSet, flat, loader_of, merge, small_data_set, take


@pytest.fixture(scope="module")
def small() -> DataSet:
    return small_data_set()


@pytest.mark.parametrize("window", [3, 5, 1000])
@pytest.mark.parametrize("done", [0, 1, 3, 6, 7])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (8, 2), (3, 5)])
def test_resume_at_another_world_size_gives_the_same_remaining_batches(small, window, done, before, after):
    uninterrupted = loader_of(small, window=window)
    expected = take(uninterrupted) + take(uninterrupted)
    stopped = [loader_of(small, rank, before, window=window) for rank in range(before)]
    first = merge([take(loader, done) for loader in stopped]) if done else []
    states = [loader.state_dict() for loader in stopped]
    assert all(state == states[0] for state in states)
    resumed = [loader_of(small, rank, after, window=window) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(states[0])
    steps = len(expected) - done
    rest: list[list[int]] = []
    while len(rest) < steps:
        rest += merge([take(loader) for loader in resumed])
    assert first + rest == expected


def test_state_is_a_few_integers_and_no_view_of_the_loader(small):
    loader = loader_of(small)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 0, "positions": [2] * STREAMS}
    next(iterator)
    assert state == {"epoch": 0, "positions": [2] * STREAMS}


def test_state_after_the_last_batch_is_the_next_epochs_beginning(small):
    loader = loader_of(small)
    assert len(take(loader, loader.steps_left)) == 7
    assert loader.state_dict() == {"epoch": 1, "positions": [0] * STREAMS}


@pytest.mark.parametrize(("before", "after"), [(16, 24), (24, 8), (8, 104), (40, 16)])
def test_resume_with_another_batch_size_delivers_each_remaining_session_once(small, before, after):
    loader = loader_of(small, batch_size=before)
    first = take(loader, 2)
    resumed = loader_of(small, batch_size=after)
    resumed.load_state_dict(loader.state_dict())
    steps = resumed.steps_left
    rest = take(resumed)
    assert len(rest) == steps
    assert sorted(flat(first) + flat(rest)) == small.numbers
    assert resumed.state_dict() == {"epoch": 1, "positions": [0] * STREAMS}


def test_resume_opens_no_shard_that_lies_wholly_before_its_window(small, monkeypatch):
    opened: list[str] = []
    shard_class = streams.Shard

    def recording(data, info, items, event_features):
        opened.append(info.url)
        return shard_class(data, info, items)

    monkeypatch.setattr(streams, "Shard", recording)
    shards = [shard for shard in small.manifest.splits["train"].shards if shard.stream == 0]
    assert [shard.sessions for shard in shards] == [6, 6, 2]
    # All shards' sizes are even: some windows of two begin exactly where a shard ends.
    Stream(small.data, shards, (0, 0, 0), 0, 2, small.manifest.items).take(1000)
    order, opened[:] = list(opened), []
    sizes = {shard.url: shard.sessions for shard in shards}
    ends = np.cumsum([sizes[url] for url in order])
    for position in range(14):
        opened.clear()
        Stream(small.data, shards, (0, 0, 0), position, 2, small.manifest.items).take(1000)
        window_start = position // 2 * 2
        assert opened == [url for url, end in zip(order, ends, strict=True) if end > window_start], position


@pytest.mark.parametrize("count", [4, 16])
def test_state_of_another_number_of_streams_is_refused(small, count):
    with pytest.raises(UserError, match=f"{count} streams.* {STREAMS}"):
        loader_of(small).load_state_dict({"epoch": 0, "positions": [0] * count})


@pytest.mark.parametrize("position", [15, -1])
def test_state_beyond_the_streams_end_is_refused(small, position):
    # The data set was prepared anew under a checkpoint: going on would silently skip or never end an epoch.
    with pytest.raises(UserError, match="stream"):
        loader_of(small).load_state_dict({"epoch": 0, "positions": [position] * STREAMS})
