"""Cuts sorted events into sessions, blocks and shards, without a Python loop over events or sessions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.event_columns import RESERVED_NAMES, EventFeature, gap_buckets, scaled
from gru4recf_dist.data.shard_format import ShardInfo, SplitInfo, write_shard

# The chosen number of streams gives a stream about this many sessions.
SESSIONS_PER_STREAM = 4096
FEWEST_STREAMS, MOST_STREAMS = 8, 1024


@dataclass(frozen=True)
class Sessions:
    """Whole sessions of one stream, as flat columns."""

    numbers: np.ndarray  # [n]
    lengths: np.ndarray  # [n]
    # Of events, [E] each: `items` and, where stored, `times` and the event features.
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, start: int, stop: int) -> Sessions:
        """Sessions ``start`` to ``stop`` (exclusive)."""
        events = slice(int(self.lengths[:start].sum()), int(self.lengths[:stop].sum()))
        columns = {name: column[events] for name, column in self.columns.items()}
        return Sessions(self.numbers[start:stop], self.lengths[start:stop], columns)


def choose_streams(sessions: int) -> int:
    """2^floor(log2(sessions / 4096)), at least 8 and at most 1024."""
    power = max(sessions // SESSIONS_PER_STREAM, 1).bit_length() - 1
    return min(max(1 << power, FEWEST_STREAMS), MOST_STREAMS)


def write_shards(
    batches: Iterator[pa.RecordBatch],
    *,
    data: str,
    split: str,
    streams: int,
    shard_sessions: int,
    block_sessions: int,
    last_event_only: bool,
    first_number: int = 0,
    earlier_shards: Sequence[int] | None = None,
    event_features: Sequence[EventFeature] = (),
    store_times: bool = True,
) -> Iterator[ShardInfo]:
    """Write shards of one split: all of them, or any whole ones.

    Args:
        data: the data set's folder.
        batches: columns `number` (of the session) and `item`, sorted by stream, number and place; `time`, to store it
            or for time gaps; `event_n` of the n-th event feature, a vocabulary id or a number.
        streams: that the split's sessions are dealt to.
        last_event_only: a session has one target, its last event; otherwise every event but its first is one.
        first_number: of the sessions; those before it are in the data set already.
        earlier_shards: how many shards of each stream are in the data set already; None: none.
        event_features: as the manifest describes them.
        store_times: whether times are stored, where there are any.
    """
    pieces = _whole_sessions(batches, event_features, store_times)
    # Which shard a session is in follows from its number, so that shards can be written anywhere, in any order.
    for (stream, shard), sessions in _shards(pieces, streams, shard_sessions, first_number):
        ordinal = shard + (earlier_shards[stream] if earlier_shards else 0)
        if split == "train":
            url, stream_number = f"train/s{stream:04d}-{ordinal:06d}.tar", stream
        else:
            url, stream_number = f"{split}/{ordinal:06d}.tar", ordinal
        targets = len(sessions) if last_event_only else len(sessions.columns["items"]) - len(sessions)
        yield write_shard(data, url, stream_number, list(_blocks(sessions, block_sessions)), targets)


def write_described(batches: Iterator[pa.RecordBatch], **settings: Any) -> Iterator[str]:
    """`write_shards` for a task of an engine: a `ShardInfo` as JSON a shard."""
    for shard in write_shards(batches, **settings):
        yield shard.model_dump_json()


def split_info(shards: list[ShardInfo]) -> SplitInfo:
    """A split from its shards, which are brought into their order: by stream, then by number in the stream."""
    assert len({shard.url for shard in shards}) == len(shards), "an engine wrote a shard twice, each time a part of it"
    # The names of a stream's shards are numbers that only grow longer.
    shards = sorted(shards, key=lambda shard: (shard.stream, len(shard.url), shard.url))
    return SplitInfo(
        sessions=sum(shard.sessions for shard in shards),
        events=sum(shard.events for shard in shards),
        targets=sum(shard.targets for shard in shards),
        shards=shards,
    )


def _whole_sessions(
    batches: Iterator[pa.RecordBatch], event_features: Sequence[EventFeature], store_times: bool
) -> Iterator[Sessions]:
    """Whole sessions in pieces; an unfinished session waits for more events."""
    waiting: dict[str, np.ndarray] = {}
    for batch in batches:
        arriving = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
        if waiting:
            arriving = {name: np.concatenate([waiting[name], column]) for name, column in arriving.items()}
        numbers = arriving["number"]
        if not len(numbers):
            continue
        last_start = _tail_start(numbers)
        whole = {name: column[:last_start] for name, column in arriving.items()}
        yield from _piece(whole, event_features, store_times)
        waiting = {name: column[last_start:] for name, column in arriving.items()}
    if waiting:
        yield from _piece(waiting, event_features, store_times)


def _tail_start(numbers: np.ndarray) -> int:
    """Where the run of the last value starts."""
    changes = np.flatnonzero(numbers[1:] != numbers[:-1])
    return int(changes[-1]) + 1 if len(changes) else 0


def _piece(
    events: dict[str, np.ndarray], event_features: Sequence[EventFeature], store_times: bool
) -> Iterator[Sessions]:
    numbers = events["number"]
    if not len(numbers):
        return
    starts = np.concatenate([[0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1])
    lengths = np.diff(np.append(starts, len(numbers)))
    columns = {"items": events["item"].astype(np.int32)}
    if store_times and "time" in events:
        columns["times"] = np.floor(events["time"]).astype(np.int64)
    for number, feature in enumerate(event_features):
        if feature.kind == "time_gap":
            columns[feature.name] = gap_buckets(feature, events["time"], lengths)
        elif feature.kind == "float":
            columns[feature.name] = scaled(feature, events[f"event_{number}"])
        else:
            columns[feature.name] = events[f"event_{number}"].astype(np.int32)
    yield Sessions(numbers[starts].astype(np.int64), lengths, columns)


def _shards(
    pieces: Iterator[Sessions], streams: int, shard_sessions: int, first: int
) -> Iterator[tuple[tuple[int, int], Sessions]]:
    """((stream, number of the shard in it), its sessions); only one shard's sessions are held at a time.

    Shards are counted from session number ``first`` on.
    """
    current, held = (-1, -1), []
    for piece in pieces:
        of_stream, of_shard = piece.numbers % streams, (piece.numbers - first) // (streams * shard_sessions)
        changes = np.flatnonzero((of_stream[1:] != of_stream[:-1]) | (of_shard[1:] != of_shard[:-1])) + 1
        for start, stop in itertools.pairwise([0, *changes.tolist(), len(piece)]):
            place = int(of_stream[start]), int(of_shard[start])
            if held and place != current:
                yield current, _joined(held)
                held = []
            current = place
            held.append(piece.part(start, stop))
    if held:
        yield current, _joined(held)


def _joined(pieces: list[Sessions]) -> Sessions:
    return Sessions(
        np.concatenate([piece.numbers for piece in pieces]),
        np.concatenate([piece.lengths for piece in pieces]),
        {name: np.concatenate([piece.columns[name] for piece in pieces]) for name in pieces[0].columns},
    )


def _blocks(sessions: Sessions, block_sessions: int) -> Iterator[Block]:
    for start in range(0, len(sessions), block_sessions):
        part = sessions.part(start, min(start + block_sessions, len(sessions)))
        features = {name: column for name, column in part.columns.items() if name not in RESERVED_NAMES}
        items, times = part.columns["items"], part.columns.get("times")
        yield Block(items, part.lengths.astype(np.int32), part.numbers, times, features)
