"""Packed batches: sessions cut into windows and laid out as a `PackedSequence`, without any padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.columns import ragged_arange, ragged_indices, slice_sessions
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.seen import SeenItems
from gru4recf_dist.data.shard_format import PADDING_ID


@dataclass(frozen=True)
class PackedBatch:
    """T events, ordered by time step and then by falling length, as `torch.nn.utils.rnn.PackedSequence` has them.

    Attributes:
        items: int64 [T], ids of the input events.
        targets: int64 [T], id of the event that follows; `PADDING_ID` where ``weights`` is 0.
        weights: float32 [T], 1 where the target counts, 0 for context and for a rank's dummy session.
        batch_sizes: int64 [L] on the CPU, sequences that reach each time step.
        sessions, events, targets_count: of the real sessions; 0 in a dummy batch.
        sessions_lost: sessions that a damaged shard should have held.
        event_features: of the input events, by name: token and time_gap int64 [T], float float32 [T].
    """

    items: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    batch_sizes: torch.Tensor
    sessions: int
    events: int
    targets_count: int
    sessions_lost: int = 0
    event_features: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class QueryBatch:
    """Packed histories of evaluation sessions and what is asked of them: Q queries.

    Attributes:
        items: int64 [T], packed input events; ``batch_sizes`` as in `PackedBatch`.
        positions: int64 [Q], place in the packed layout of each query's last event.
        targets: int64 [Q].
        seen: the items of the session before each target.
        event_features: as in `PackedBatch`.
    """

    items: torch.Tensor
    batch_sizes: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    seen: SeenItems
    event_features: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Windows:
    """Input windows of sessions. All [w]: index of the session, first event, inputs, how many of them are context."""

    session: np.ndarray
    start: np.ndarray
    length: np.ndarray
    context: np.ndarray


def cut_windows(lengths: np.ndarray, max_length: int, context: int) -> Windows:
    """Cut sessions into windows of at most ``max_length`` inputs in which every event but a session's first is a
    target exactly once.

    A session of n events has n-1 inputs. A window after the first begins with ``context`` inputs of the one before,
    which warm the RNN up and whose targets do not count again.
    """
    inputs = lengths.astype(np.int64) - 1
    step = max_length - context
    counts = np.where(inputs > 0, 1 + np.maximum(0, -(-(inputs - max_length) // step)), 0)
    session = np.repeat(np.arange(len(lengths)), counts)
    number = ragged_arange(counts)
    start = number * step
    return Windows(
        session=session,
        start=start,
        length=np.minimum(inputs[session] - start, max_length),
        context=np.where(number > 0, context, 0),
    )


def packed_positions(lengths: np.ndarray, within: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where each event of consecutive sequences goes in the packed layout.

    Args:
        lengths: int64 [n], at least 1 each.
        within: ``ragged_arange(lengths)``, where it is there already.

    Returns:
        position int64 [sum of lengths] and batch_sizes int64 [longest].
    """
    order = np.argsort(-lengths, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    batch_sizes = len(lengths) - np.cumsum(np.bincount(lengths))[:-1]
    offsets = np.cumsum(batch_sizes) - batch_sizes
    return offsets[ragged_arange(lengths) if within is None else within] + np.repeat(rank, lengths), batch_sizes


def _placed_features(
    block: Block, features: Sequence[EventFeature], source: np.ndarray, position: np.ndarray
) -> dict[str, torch.Tensor]:
    """The given event features of the events ``source``, each at its ``position`` in the packed layout.

    They are those of the input events: what is to be predicted of an event, it and its features, is not known.
    """
    placed = {}
    for feature in features:
        column = np.empty(len(source), np.float32 if feature.kind == "float" else np.int64)
        column[position] = block.event_features[feature.name][source]
        placed[feature.name] = torch.from_numpy(column)
    return placed


def _dummy_features(features: Sequence[EventFeature]) -> dict[str, torch.Tensor]:
    """Of the one event of a batch that stands for none."""
    of = {feature.name: torch.float32 if feature.kind == "float" else torch.int64 for feature in features}
    return {name: torch.zeros(1, dtype=dtype) for name, dtype in of.items()}


def pack_training(
    block: Block, max_length: int, context: int, event_features: Sequence[EventFeature] = ()
) -> PackedBatch:
    """Training sessions as a packed batch with a loss at every position.

    A block without any target becomes one dummy event of weight 0 on the padding row, so that a rank with nothing
    left still takes part in every collective and touches no item.

    Args:
        event_features: those to pack with the items; ``block`` has them where it has events.
    """
    windows = cut_windows(block.lengths, max_length, context)
    lost = int(np.count_nonzero(block.lengths == 0))
    if not len(windows.session):
        padding = torch.full((1,), PADDING_ID)
        one, dummy = torch.ones(1, dtype=torch.int64), _dummy_features(event_features)
        return PackedBatch(padding, padding, torch.zeros(1), one, 0, 0, 0, lost, dummy)
    first = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
    within = ragged_arange(windows.length)
    source = np.repeat(first[windows.session] + windows.start, windows.length) + within
    counted = within >= np.repeat(windows.context, windows.length)
    position, batch_sizes = packed_positions(windows.length, within)
    items = np.empty(len(source), np.int64)
    targets = np.empty(len(source), np.int64)
    weights = np.empty(len(source), np.float32)
    items[position] = block.items[source]
    targets[position] = np.where(counted, block.items[source + 1], PADDING_ID)
    weights[position] = counted
    return PackedBatch(
        items=torch.from_numpy(items),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        batch_sizes=torch.from_numpy(batch_sizes),
        sessions=len(block.lengths) - lost,
        events=len(block.items),
        targets_count=int(counted.sum()),
        sessions_lost=lost,
        event_features=_placed_features(block, event_features, source, position),
    )


def pack_micro_batches(
    block: Block, count: int, max_length: int, context: int, event_features: Sequence[EventFeature] = ()
) -> list[PackedBatch]:
    """A batch of training sessions as ``count`` packed ones of, but for one, equally many sessions."""
    bounds = np.arange(count + 1) * len(block.lengths) // count
    parts = (slice_sessions(block, start, stop) for start, stop in pairwise(bounds))
    return [pack_training(part, max_length, context, event_features) for part in parts]


def pack_queries(
    block: Block, max_length: int, context: int, every_position: bool, event_features: Sequence[EventFeature] = ()
) -> QueryBatch:
    """Evaluation sessions as packed histories with their targets.

    With ``every_position`` every event but a session's first is a target, over the same windows as in training;
    otherwise only the last event is, and the RNN sees the ``max_length`` events before it. A session of one event has
    no target and is left out; a block without any gives Q = 0 over one dummy event.
    """
    lengths = block.lengths.astype(np.int64)
    if every_position:
        windows = cut_windows(lengths, max_length, context)
    else:
        with_target = np.flatnonzero(lengths > 1)
        inputs = lengths[with_target] - 1
        length = np.minimum(inputs, max_length)
        windows = Windows(with_target, inputs - length, length, context=length - 1)
    if not len(windows.session):
        empty = torch.empty(0, dtype=torch.int64)
        padding, one = torch.full((1,), PADDING_ID), torch.ones(1, dtype=torch.int64)
        seen = SeenItems(empty, empty, empty)
        return QueryBatch(padding, one, empty, empty, seen, _dummy_features(event_features))
    first = np.cumsum(lengths) - lengths
    within = ragged_arange(windows.length)
    source = np.repeat(first[windows.session] + windows.start, windows.length) + within
    asked = within >= np.repeat(windows.context, windows.length)
    position, batch_sizes = packed_positions(windows.length, within)
    items = np.empty(len(source), np.int64)
    items[position] = block.items[source]
    last = source[asked]
    # A session's queries follow one another, in the order of its events.
    inputs = np.maximum(lengths - 1, 0)
    asked_of = inputs if every_position else np.minimum(inputs, 1)
    seen = SeenItems.of_sessions(block.items, first, inputs, np.cumsum(asked_of) - asked_of, each_event=every_position)
    return QueryBatch(
        items=torch.from_numpy(items),
        batch_sizes=torch.from_numpy(batch_sizes),
        positions=torch.from_numpy(position[asked]),
        targets=torch.from_numpy(block.items[last + 1].astype(np.int64)),
        seen=seen,
        event_features=_placed_features(block, event_features, source, position),
    )


def pack_histories(block: Block, max_length: int, event_features: Sequence[EventFeature] = ()) -> QueryBatch:
    """Sessions whose next event is unknown: one query a session, at its last event; targets are padding.

    Every session must have at least one event.
    """
    lengths = block.lengths.astype(np.int64)
    length = np.minimum(lengths, max_length)
    first = np.cumsum(lengths) - lengths
    source = ragged_indices(first + lengths - length, length)
    position, batch_sizes = packed_positions(length)
    items = np.empty(len(source), np.int64)
    items[position] = block.items[source]
    return QueryBatch(
        items=torch.from_numpy(items),
        batch_sizes=torch.from_numpy(batch_sizes),
        positions=torch.from_numpy(position[np.cumsum(length) - 1]),
        targets=torch.full((len(lengths),), PADDING_ID),
        seen=SeenItems.of_sessions(block.items, first, lengths, np.arange(len(lengths)), each_event=False),
        event_features=_placed_features(block, event_features, source, position),
    )
