"""Ragged columns, windows and packed batches, against straightforward Python over one session at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from gru4recf_dist.data import columns
from gru4recf_dist.data.batches import (
    QueryBatch,
    cut_windows,
    pack_histories,
    pack_queries,
    pack_training,
    packed_positions,
)
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.shard_format import PADDING_ID
from tests.support.synthetic import random_sessions, to_block

SHAPES = [(1, 0), (2, 0), (2, 1), (3, 1), (7, 3), (10, 9), (50, 10), (200, 0), (300, 299)]


def _to_sessions(block: Block) -> list[list[int]]:
    ends = np.cumsum(block.lengths)
    return [block.items[end - length : end].tolist() for end, length in zip(ends, block.lengths, strict=True)]


def _unpack(values: torch.Tensor, batch_sizes: torch.Tensor) -> list[list]:
    """torch's own way back from the packed layout: the sequences, longest first."""
    return [sequence.tolist() for sequence in unpack_sequence(PackedSequence(values, batch_sizes))]


# Columns


def test_ragged_arange_and_indices():
    lengths = np.array([3, 0, 1, 2], np.int32)
    assert columns.ragged_arange(lengths).tolist() == [0, 1, 2, 0, 0, 1]
    assert columns.ragged_indices(np.array([10, 20, 30, 40]), lengths).tolist() == [10, 11, 12, 30, 40, 41]
    assert columns.ragged_arange(np.array([], np.int32)).tolist() == []


sessions_lists = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), max_size=8)


def _block(sessions: list[list[int]]) -> Block:
    return to_block([np.array(session, np.int32) for session in sessions])


@settings(max_examples=50, deadline=None)
@given(sessions_lists, st.data())
def test_select_takes_sessions_in_any_order(sessions, data):
    order = data.draw(st.lists(st.integers(0, len(sessions) - 1), max_size=10)) if sessions else []
    selected = columns.select(_block(sessions), np.array(order, np.int64))
    assert _to_sessions(selected) == [sessions[i] for i in order]
    assert selected.sessions.tolist() == order


@settings(max_examples=50, deadline=None)
@given(sessions_lists, st.integers(0, 8), st.integers(0, 12))
def test_slice_is_pythons_slice(sessions, start, stop):
    start = min(start, len(sessions))
    stop = max(start, stop)
    sliced = columns.slice_sessions(_block(sessions), start, stop)
    assert _to_sessions(sliced) == sessions[start:stop]
    assert sliced.sessions.tolist() == list(range(len(sessions)))[start:stop]


@settings(max_examples=50, deadline=None)
@given(st.lists(sessions_lists, max_size=4))
def test_concatenate_joins_in_order(parts):
    joined = columns.concatenate([_block(part) for part in parts])
    assert _to_sessions(joined) == [session for part in parts for session in part]
    assert joined.sessions.tolist() == [number for part in parts for number in range(len(part))]
    assert (joined.items.dtype, joined.lengths.dtype, joined.sessions.dtype) == (np.int32, np.int32, np.int64)


@settings(max_examples=50, deadline=None)
@given(st.lists(sessions_lists, min_size=1, max_size=4), st.integers(1, 3))
def test_interleave_deals_parts_of_every_block_in_turn(blocks, count):
    parts = max(1, max(-(-len(block) // count) for block in blocks)) + 1
    dealt = columns.interleave([_block(block) for block in blocks], count, parts)
    expected = [[s for block in blocks for s in block[p * count : (p + 1) * count]] for p in range(parts)]
    assert [_to_sessions(part) for part in dealt] == expected
    numbers = [[i for block in blocks for i in range(len(block))[p * count : (p + 1) * count]] for p in range(parts)]
    assert [part.sessions.tolist() for part in dealt] == numbers


# Windows


def _windows_by_hand(inputs: int, max_length: int, context: int) -> list[tuple[int, int, int]]:
    """(first input, inputs, context) of the windows of one session, one window after the other."""
    windows, covered = [], 0
    while covered < inputs:
        start = covered - context if windows else 0
        length = min(max_length, inputs - start)
        windows.append((start, length, covered - start))
        covered = start + length
    return windows


@pytest.mark.parametrize(("max_length", "context"), SHAPES)
def test_windows_of_every_length_up_to_200(max_length, context):
    lengths = np.arange(1, 201, dtype=np.int32)
    windows = cut_windows(lengths, max_length, context)
    expected = [
        (number, *window)
        for number, length in enumerate(lengths.tolist())
        for window in _windows_by_hand(length - 1, max_length, context)
    ]
    cut = zip(windows.session, windows.start, windows.length, windows.context, strict=True)
    assert [tuple(map(int, window)) for window in cut] == expected


@pytest.mark.parametrize(("max_length", "context"), SHAPES)
def test_every_event_but_the_first_is_a_target_exactly_once(max_length, context):
    lengths = np.arange(1, 201, dtype=np.int32)
    windows = cut_windows(lengths, max_length, context)
    counted = [np.zeros(length, int) for length in lengths]
    for session, start, length, skipped in zip(
        windows.session, windows.start, windows.length, windows.context, strict=True
    ):
        assert 1 <= length <= max_length
        counted[session][start + skipped + 1 : start + length + 1] += 1
    for counts in counted:
        assert counts.tolist() == [0] + [1] * (len(counts) - 1)


# The packed layout


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_layout_is_torchs(lengths):
    sequences = [torch.arange(length) + 100 * number for number, length in enumerate(lengths)]
    flat = torch.cat(sequences)
    position, batch_sizes = packed_positions(np.array(lengths))
    packed = torch.empty_like(flat)
    packed[torch.from_numpy(position)] = flat
    reference = pack_sequence(sequences, enforce_sorted=False)
    assert batch_sizes.tolist() == reference.batch_sizes.tolist()
    assert sorted(position.tolist()) == list(range(len(flat)))
    # Python's sort is stable, too, so the order of ties is the one that is promised.
    by_length = sorted(sequences, key=len, reverse=True)
    assert _unpack(packed, torch.from_numpy(batch_sizes)) == [sequence.tolist() for sequence in by_length]
    assert packed.tolist() == pack_sequence(by_length).data.tolist()


# Training


def _training_by_hand(sessions: list[list[int]], max_length: int, context: int) -> list[list[tuple[int, int, float]]]:
    """The windows as lists of (input, target, weight), longest first, ties in order."""
    sequences = []
    for session in sessions:
        for start, length, skipped in _windows_by_hand(len(session) - 1, max_length, context):
            sequences.append(
                [
                    (session[i], session[i + 1] if i >= start + skipped else PADDING_ID, float(i >= start + skipped))
                    for i in range(start, start + length)
                ]
            )
    return sorted(sequences, key=len, reverse=True)


@pytest.mark.parametrize(("max_length", "context"), SHAPES)
@pytest.mark.parametrize("longest", [1, 2, 12, 70])
def test_training_batch_is_every_window_packed(max_length, context, longest):
    sessions = random_sessions(longest, 25, 40, shortest=1, longest=longest)
    block = to_block([*sessions, np.arange(1, 4, dtype=np.int32)])
    batch = pack_training(block, max_length, context)
    expected = _training_by_hand(_to_sessions(block), max_length, context)
    assert _unpack(batch.items, batch.batch_sizes) == [[event[0] for event in window] for window in expected]
    assert _unpack(batch.targets, batch.batch_sizes) == [[event[1] for event in window] for window in expected]
    assert _unpack(batch.weights, batch.batch_sizes) == [[event[2] for event in window] for window in expected]
    assert batch.sessions == 26
    assert batch.events == len(block.items)
    assert batch.targets_count == len(block.items) - 26 == int(batch.weights.sum())
    assert (batch.items.dtype, batch.targets.dtype, batch.weights.dtype) == (torch.int64, torch.int64, torch.float32)
    assert (batch.batch_sizes.dtype, batch.batch_sizes.device.type) == (torch.int64, "cpu")


def test_counted_targets_are_the_sessions_events_but_the_first():
    sessions = random_sessions(3, 40, 30, shortest=1, longest=90)
    batch = pack_training(to_block(sessions), 20, 5)
    counted = batch.targets[batch.weights == 1].tolist()
    assert sorted(counted) == sorted(int(item) for session in sessions for item in session[1:])
    assert batch.targets[batch.weights == 0].eq(PADDING_ID).all()


@pytest.mark.parametrize("block", [_block([]), _block([[7], [8]])], ids=["no session", "sessions of one event"])
def test_block_without_a_target_is_one_dummy_event(block):
    batch = pack_training(block, 50, 10)
    assert batch.items.tolist() == batch.targets.tolist() == [PADDING_ID]
    assert batch.weights.tolist() == [0.0]
    assert batch.batch_sizes.tolist() == [1]
    assert (batch.sessions, batch.events, batch.targets_count) == (0, 0, 0)
    assert (batch.items.dtype, batch.weights.dtype) == (torch.int64, torch.float32)


def test_session_of_one_event_adds_no_input():
    with_single = pack_training(_block([[1, 2, 3], [9], [4, 5]]), 50, 10)
    without = pack_training(_block([[1, 2, 3], [4, 5]]), 50, 10)
    assert with_single.items.tolist() == without.items.tolist() == [1, 4, 2]
    assert with_single.targets.tolist() == [2, 5, 3]


def test_packing_does_not_change_the_block():
    block = _block([[1, 2, 3], [4, 5]])
    pack_training(block, 2, 1).items.fill_(0)
    pack_queries(block, 2, 1, every_position=True).items.fill_(0)
    pack_histories(block, 2).items.fill_(0)
    assert block.items.tolist() == [1, 2, 3, 4, 5]


# Queries


def _inputs_up_to(batch: QueryBatch, position: int) -> list[int]:
    """What an RNN has seen of its sequence when it is at ``position`` of the packed layout."""
    offsets = np.concatenate([[0], np.cumsum(batch.batch_sizes.numpy())])
    step = int(np.searchsorted(offsets, position, side="right")) - 1
    column = position - offsets[step]
    return [int(batch.items[offsets[earlier] + column]) for earlier in range(step + 1)]


def _queries_by_hand(
    sessions: list[list[int]], max_length: int, context: int, every_position: bool
) -> list[tuple[list[int], int, list[int]]]:
    """(events the RNN sees, target, distinct items of the whole session before the target) of every query."""
    queries = []
    for session in sessions:
        if every_position:
            for start, length, skipped in _windows_by_hand(len(session) - 1, max_length, context):
                for i in range(start + skipped, start + length):
                    queries.append((session[start : i + 1], session[i + 1], sorted(set(session[: i + 1]))))
        elif len(session) > 1:
            history = session[:-1]
            queries.append((history[-max_length:], session[-1], sorted(set(history))))
    return queries


def _seen_pairs(batch: QueryBatch) -> list[tuple[int, int]]:
    return [pair for some in batch.seen.pairs() for pair in zip(*map(torch.Tensor.tolist, some), strict=True)]


def _queries(batch: QueryBatch) -> list[tuple[list[int], int, list[int]]]:
    seen: list[list[int]] = [[] for _ in batch.targets]
    for query, item in _seen_pairs(batch):
        seen[query].append(item)
    inputs = [_inputs_up_to(batch, position) for position in batch.positions.tolist()]
    return list(zip(inputs, batch.targets.tolist(), map(sorted, seen), strict=True))


@pytest.mark.parametrize("every_position", [True, False])
@pytest.mark.parametrize(("max_length", "context"), SHAPES)
@pytest.mark.parametrize("longest", [2, 12, 70])
def test_queries_are_those_written_out_by_hand(every_position, max_length, context, longest):
    # Few items, so that sessions repeat them and seen items must be made distinct.
    block = to_block(random_sessions(longest, 15, 6, shortest=1, longest=longest))
    batch = pack_queries(block, max_length, context, every_position)
    assert _queries(batch) == _queries_by_hand(_to_sessions(block), max_length, context, every_position)
    for tensor in (batch.items, batch.batch_sizes, batch.positions, batch.targets, batch.seen.columns()):
        assert tensor.dtype == torch.int64


def test_every_position_asks_over_the_same_windows_as_training():
    block = to_block(random_sessions(5, 20, 30, shortest=1, longest=60))
    training, queries = pack_training(block, 20, 5), pack_queries(block, 20, 5, every_position=True)
    assert queries.items.tolist() == training.items.tolist()
    assert queries.batch_sizes.tolist() == training.batch_sizes.tolist()
    assert training.targets[queries.positions].tolist() == queries.targets.tolist()
    assert sorted(queries.positions.tolist()) == training.weights.nonzero().flatten().tolist()


def test_seen_items_reach_back_beyond_the_window():
    batch = pack_queries(_block([[9, 1, 2, 3, 4]]), 2, 0, every_position=False)
    assert _queries(batch) == [([2, 3], 4, [1, 2, 3, 9])]


def test_target_that_was_seen_before_is_among_the_seen():
    assert _queries(pack_queries(_block([[1, 2, 1]]), 9, 0, every_position=False)) == [([1, 2], 1, [1, 2])]


def test_large_ids_keep_their_value_in_the_pairs():
    largest = 2**31 - 1
    batch = pack_queries(_block([[1, 2], [largest, largest - 1, 5]]), 9, 0, every_position=True)
    assert sorted(_seen_pairs(batch)) == [(0, 1), (1, largest), (2, largest - 1), (2, largest)]


@pytest.mark.parametrize("every_position", [True, False])
@pytest.mark.parametrize("block", [_block([]), _block([[7], [8]])], ids=["no session", "sessions of one event"])
def test_block_without_a_query_is_one_dummy_event(block, every_position):
    batch = pack_queries(block, 50, 10, every_position)
    assert batch.items.tolist() == [PADDING_ID]
    assert batch.batch_sizes.tolist() == [1]
    for empty in (batch.positions, batch.targets, batch.seen.item):
        assert empty.dtype == torch.int64
        assert empty.tolist() == []


@pytest.mark.parametrize("max_length", [1, 3, 50])
def test_histories_end_in_one_query_a_session(max_length):
    sessions = _to_sessions(to_block(random_sessions(8, 20, 6, shortest=1, longest=12)))
    batch = pack_histories(_block(sessions), max_length)
    assert _queries(batch) == [(session[-max_length:], PADDING_ID, sorted(set(session))) for session in sessions]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 12), st.data())
def test_an_rnn_gives_each_query_what_it_gives_its_history_alone(lengths, max_length, data):
    context = data.draw(st.integers(0, max_length - 1))
    sessions = [np.random.default_rng(n).integers(1, 9, length).tolist() for n, length in enumerate(lengths)]
    batch = pack_queries(_block(sessions), max_length, context, every_position=True)
    torch.manual_seed(0)
    embedding, gru = torch.nn.Embedding(9, 3), torch.nn.GRU(3, 4)
    with torch.no_grad():
        outputs = gru(PackedSequence(embedding(batch.items), batch.batch_sizes))[0].data[batch.positions]
        for output, (history, _, _) in zip(outputs, _queries_by_hand(sessions, max_length, context, True), strict=True):
            alone = gru(embedding(torch.tensor(history)))[0][-1]
            torch.testing.assert_close(output, alone)
