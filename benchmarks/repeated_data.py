"""A large data set out of a small one: its training sessions again and again, everything else as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gru4recf_dist.data import storage
from gru4recf_dist.data.columns import concatenate, slice_sessions
from gru4recf_dist.data.shard_format import (
    MAX_BLOCK_SESSIONS,
    POPULARITY,
    TOKENS,
    Block,
    Manifest,
    ShardInfo,
    SplitInfo,
    read_manifest,
    write_manifest,
    write_shard,
)
from gru4recf_dist.data.shards import read_blocks

SHARD_SESSIONS = 65536


def write_repeated(source: str, data: str, events: int) -> Manifest:
    """Write the data set at ``source`` to ``data``, its training sessions repeated to at least ``events`` events."""
    manifest = read_manifest(source)
    train = manifest.splits["train"]
    times = max(1, -(-events // train.events))
    shards: list[ShardInfo] = []
    for stream in range(manifest.streams):
        infos = [shard for shard in train.shards if shard.stream == stream]
        blocks = [block for info in infos for block in read_blocks(source, info)]
        for ordinal, sessions in enumerate(_shards(concatenate(blocks), times, train.sessions)):
            count = len(sessions.lengths)
            parts = [slice_sessions(sessions, i, i + MAX_BLOCK_SESSIONS) for i in range(0, count, MAX_BLOCK_SESSIONS)]
            url, targets = f"train/s{stream:04d}-{ordinal:06d}.tar", len(sessions.items) - count
            shards.append(write_shard(data, url, stream, parts, targets))
    totals = {name: sum(getattr(shard, name) for shard in shards) for name in ("sessions", "events", "targets")}
    splits = {**manifest.splits, "train": SplitInfo(shards=shards, **totals)}
    files = [shard.url for name in ("valid", "test") for shard in manifest.splits[name].shards]
    for feature in manifest.features:
        files += filter(None, [feature.values, feature.indptr, feature.vocabulary])
    for file in [TOKENS, POPULARITY, *files]:
        storage.write_bytes(storage.join(data, file), storage.read_bytes(storage.join(source, file)))
    repeated = manifest.model_copy(update={"splits": splits})
    write_manifest(data, repeated)
    return repeated


def _shards(stream: Block, times: int, sessions: int) -> Iterator[Block]:
    """The sessions of a stream ``times`` times over, cut into shards; ``sessions`` is how many numbers a copy takes."""
    count = len(stream.lengths)
    held: list[Block] = []
    held_sessions = 0
    for copy in range(times):
        held.append(dataclasses.replace(stream, sessions=stream.sessions + np.int64(copy * sessions)))
        held_sessions += count
        while held_sessions >= SHARD_SESSIONS or (copy == times - 1 and held_sessions):
            joined = concatenate(held)
            yield slice_sessions(joined, 0, SHARD_SESSIONS)
            held_sessions = max(0, held_sessions - SHARD_SESSIONS)
            held = [slice_sessions(joined, SHARD_SESSIONS, len(joined.lengths))] if held_sessions else []
