"""The canonical order of an epoch: the same for every number of ranks and loader workers, exact on resume."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import uuid
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from gru4recf_dist.data import columns, storage, streams
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.streams import Stream
from gru4recf_dist.errors import UserError

# Its import makes the process that loader workers are forked from import torch once, not each worker for itself.
from tests.support import ranks as _preload  # noqa: F401
from tests.support.epochs import STREAMS, DataSet, epoch, flat, loader_of, small_data_set, take, write


@pytest.fixture(scope="module")
def small() -> DataSet:
    return small_data_set()


@pytest.fixture(scope="module")
def movielens() -> DataSet:
    """943 sessions over 8 streams, as many as MovieLens-100k has users: streams of 117 and 118."""
    return write(f"memory://{uuid.uuid4().hex}", 943, shard_sessions=50, block_sessions=16)


@pytest.fixture
def workers_in_process(monkeypatch):
    """Loader workers without processes: each asked in turn for one block, as the DataLoader does."""

    def in_process(parts, workers):
        iterators = [start(parts, worker, workers) for worker in range(workers)]
        while True:
            for iterator in iterators:
                yield next(iterator)

    def start(parts, worker, workers):
        info = SimpleNamespace(id=worker, num_workers=workers)
        iterator = iter(parts)
        with monkeypatch.context() as patch:
            # A generator looks at its worker when it first runs.
            patch.setattr(streams, "get_worker_info", lambda: info)
            first = next(iterator)
        yield first
        yield from iterator

    monkeypatch.setattr(streams, "in_workers", in_process)


# Once an epoch, the same at every W


@pytest.mark.parametrize("name", ["small", "movielens"])
def test_every_session_comes_exactly_once_an_epoch(request, name):
    dataset = request.getfixturevalue(name)
    sizes = Counter(number % STREAMS for number in dataset.numbers)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for window in (1, 7, 1000):
        assert sorted(flat(epoch(dataset, window=window))) == dataset.numbers


@pytest.mark.parametrize("world", range(2, STREAMS + 1))
@pytest.mark.parametrize("window", [5, 1000])
def test_global_batches_are_the_same_at_every_world_size(small, world, window):
    assert epoch(small, world, window=window) == epoch(small, window=window)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_global_batches_are_the_same_for_any_number_of_workers(small, workers_in_process, world, workers):
    assert epoch(small, world, workers) == epoch(small)


def test_943_sessions_over_8_streams_at_three_ranks_with_workers(movielens, workers_in_process):
    batches = epoch(movielens, world=3, workers=2, window=20)
    assert batches == epoch(movielens, window=20)
    assert sorted(flat(batches)) == movielens.numbers
    # ceil(118 / 2): the longest stream decides.
    assert len(batches) == 59


def test_a_batch_takes_its_share_of_every_stream_in_stream_order(small):
    batches = epoch(small, batch_size=24)
    for batch in batches[:-1]:
        assert [number % STREAMS for number in batch] == [stream for stream in range(STREAMS) for _ in range(3)]
    last = [number % STREAMS for number in batches[-1]]
    assert last == sorted(last)


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 14), (16, 7), (40, 3), (112, 1), (800, 1)])
def test_steps_are_known_from_the_manifest_and_equal_on_every_rank(small, batch_size, steps):
    for world in (1, 3, 8):
        for rank in range(world):
            loader = loader_of(small, rank, world, batch_size=batch_size)
            assert loader.steps_per_epoch == loader.steps_left == steps
            assert len(take(loader)) == steps


def test_rank_with_nothing_left_yields_empty_blocks():
    # Nine sessions over 8 streams: in the second step only stream 0 has one.
    dataset = write(f"memory://{uuid.uuid4().hex}", 9)
    assert [len(numbers) for numbers in take(loader_of(dataset, 0, 8, batch_size=8))] == [1, 1]
    assert [len(numbers) for numbers in take(loader_of(dataset, 7, 8, batch_size=8))] == [1, 0]


def test_streams_without_any_session_are_served():
    dataset = write(f"memory://{uuid.uuid4().hex}", 3)
    assert [sorted(batch) for batch in epoch(dataset, world=8)] == [[0, 1, 2]]


def test_sessions_keep_their_events(small):
    for block in loader_of(small, window=3):
        sequences = np.split(block.items, np.cumsum(block.lengths)[:-1])
        for number, sequence in zip(block.sessions, sequences, strict=True):
            np.testing.assert_array_equal(sequence, small.sessions[number])


# Real worker processes


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> DataSet:
    return write(str(tmp_path_factory.mktemp("data")), 107, shard_sessions=6, block_sessions=4)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("rank", "world", "workers"), [(0, 1, 3), (1, 3, 2)])
def test_worker_processes_deliver_what_this_process_would(on_disk, rank, world, workers):
    with_workers = loader_of(on_disk, rank, world, workers)
    without = loader_of(on_disk, rank, world)
    for loader in (with_workers, without):
        loader.load_state_dict({"epoch": 2, "positions": [4] * STREAMS})
    assert take(with_workers) == take(without)
    assert with_workers.state_dict() == without.state_dict() == {"epoch": 3, "positions": [0] * STREAMS}


def test_worker_processes_end_with_the_epoch(on_disk):
    before = set(multiprocessing.active_children())
    take(loader_of(on_disk, workers=1))
    assert set(multiprocessing.active_children()) == before


def test_program_ends_though_its_workers_are_not_through(on_disk):
    """Python waits at its end for worker processes, which do not hear its SIGTERM."""
    program = (
        "import sys, tests.unit.test_streams as t\n"
        "from gru4recf_dist.data.shard_format import read_manifest\n"
        "iterator = iter(t.loader_of(t.DataSet(sys.argv[1], read_manifest(sys.argv[1]), {}), workers=2))\n"
        "next(iterator)\n"
    )
    subprocess.run([sys.executable, "-c", program, on_disk.data], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_a_worker_process_that_is_killed_is_one_line(on_disk):
    others = set(multiprocessing.active_children())
    iterator = iter(loader_of(on_disk, workers=1, batch_size=8))
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(UserError) as caught:
        list(iterator)
    assert str(caught.value).startswith(f"loader.workers: DataLoader worker (pid(s) {worker.pid})")
    assert "\n" not in str(caught.value)


def test_damaged_shard_in_a_worker_process_is_one_line_too(tmp_path):
    dataset = write(str(tmp_path), 16)
    shard = dataset.manifest.splits["train"].shards[3].url
    (tmp_path / shard).write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        take(loader_of(dataset, workers=1))
    assert shard in str(caught.value)
    assert "\n" not in str(caught.value)


# Order


def test_same_seed_repeats_the_order_and_another_does_not(small):
    assert epoch(small, seed=3) == epoch(small, seed=3)
    assert epoch(small, seed=3) != epoch(small, seed=4)


def test_epochs_differ_and_repeat_with_the_seed(small):
    def three_epochs(seed: int) -> list[list[list[int]]]:
        loader = loader_of(small, seed=seed)
        return [take(loader) for _ in range(3)]

    epochs = three_epochs(0)
    assert epochs == three_epochs(0)
    assert len({tuple(flat(epoch)) for epoch in epochs}) == 3
    assert all(sorted(flat(epoch)) == small.numbers for epoch in epochs)


def _stream_order(dataset: DataSet, stream: int, window: int, epoch: int = 0, seed: int = 0) -> list[int]:
    shards = [shard for shard in dataset.manifest.splits["train"].shards if shard.stream == stream]
    taken = Stream(dataset.data, shards, (seed, epoch, stream), 0, window, dataset.manifest.items).take(10**6)
    return flat([block.sessions.tolist() for block in taken])


def test_streams_are_shuffled_differently(small):
    places = {tuple(number // STREAMS for number in _stream_order(small, stream, 1000)) for stream in range(5)}
    assert len(places) == 5


def test_order_within_a_window_is_uniformly_random(small):
    # Where the first session of stream 0 (of 14, all in one window) comes over many epochs.
    places = [_stream_order(small, 0, 1000, epoch).index(0) for epoch in range(280)]
    counts = np.bincount(places, minlength=14)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_neighbours_in_a_shard_are_not_neighbours_in_the_epoch(movielens):
    order = _stream_order(movielens, 0, 10**6)
    # Of 117 neighbouring pairs a random order keeps two together on average.
    adjacent = sum(abs(one - other) == STREAMS for one, other in pairwise(order))
    assert adjacent < 12
    assert order != sorted(order)


def test_window_of_one_shuffles_shards_and_nothing_within(small):
    def shards(epoch: int) -> list[list[int]]:
        order = _stream_order(small, 0, 1, epoch)
        stored = [[number for number in small.numbers if number % STREAMS == 0][at : at + 6] for at in (0, 6, 12)]
        first = [order.index(shard[0]) for shard in stored]
        for shard, at in zip(stored, first, strict=True):
            assert order[at : at + len(shard)] == shard
        return [stored[i] for i in np.argsort(first)]

    assert len({str(shards(epoch)) for epoch in range(30)}) == 6, "30 epochs should show all 3! orders of the shards"


@pytest.mark.parametrize("window", [1, 4, 5, 6, 9, 14, 15])
def test_sessions_leave_in_the_window_they_are_read_in(small, window):
    unshuffled = _stream_order(small, 2, 1, epoch=1)
    order = _stream_order(small, 2, window, epoch=1)
    for start in range(0, len(order), window):
        assert sorted(order[start : start + window]) == sorted(unshuffled[start : start + window])


def test_every_window_has_a_permutation_of_its_own(movielens):
    read, order = _stream_order(movielens, 0, 1), _stream_order(movielens, 0, 10)
    permutations = {
        tuple(order[start : start + 10].index(number) for number in read[start : start + 10])
        for start in range(0, 110, 10)
    }
    assert len(permutations) == 11


@pytest.mark.parametrize("counts", [[1] * 14, [3] * 5, [5, 1, 7, 1], [14], [100]])
@pytest.mark.parametrize("window", [3, 5, 1000])
def test_order_does_not_depend_on_how_much_is_taken_at_once(small, counts, window):
    shards = [shard for shard in small.manifest.splits["train"].shards if shard.stream == 0]
    stream = Stream(small.data, shards, (0, 0, 0), 0, window, small.manifest.items)
    taken = [columns.concatenate(stream.take(count)).sessions.tolist() for count in counts]
    assert flat(taken) == _stream_order(small, 0, window)
    assert [len(part) for part in taken[:-1]] == counts[:-1]
    assert stream.take(5) == []


@pytest.mark.parametrize("window", [1, 3, 5, 6, 7, 14, 1000])
def test_stream_starts_at_any_position(small, window):
    shards = [shard for shard in small.manifest.splits["train"].shards if shard.stream == 0]
    whole = _stream_order(small, 0, window)
    for position in range(len(whole) + 1):
        taken = Stream(small.data, shards, (0, 0, 0), position, window, small.manifest.items).take(1000)
        assert flat([block.sessions.tolist() for block in taken]) == whole[position:], position


def test_sizes_that_do_not_fit_are_refused_when_the_loader_is_built(small):
    with pytest.raises(UserError, match="batch_size"):
        loader_of(small, batch_size=12)
    with pytest.raises(UserError, match="9 ranks"):
        loader_of(small, world=9)


def test_loading_draws_nothing_from_torchs_global_generator(small):
    before = torch.get_rng_state()
    take(loader_of(small))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_block_is_what_the_packing_takes(small):
    block = next(iter(loader_of(small)))
    assert isinstance(block, Block)
    assert (block.items.dtype, block.lengths.dtype, block.sessions.dtype) == (np.int32, np.int32, np.int64)


def test_missing_shard_ends_the_epoch_with_its_name():
    dataset = write(f"memory://{uuid.uuid4().hex}", 32)
    shard = dataset.manifest.splits["train"].shards[-1].url
    storage.remove_tree(storage.join(dataset.data, shard))
    with pytest.raises(UserError) as caught:
        take(loader_of(dataset))
    assert shard in str(caught.value)
