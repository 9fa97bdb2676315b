"""A large data set out of a small one: its training sessions again and again, everything else as it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_prep.writer import write_split
from gru4recf_dist.data import storage
from gru4recf_dist.data.columns import concatenate
from gru4recf_dist.data.shard_format import (
    MAX_BLOCK_SESSIONS,
    Manifest,
    read_manifest,
    write_manifest,
)
from gru4recf_dist.data.shards import read_blocks

SHARD_SESSIONS = 65536


def write_repeated(source: str, data: str, events: int) -> Manifest:
    """Write the data set at ``source`` to ``data``, its training sessions repeated to at least ``events`` events."""
    manifest = read_manifest(source)
    train = manifest.splits["train"]
    repeated_train = write_split(
        data,
        "train",
        _events(source, manifest, max(1, -(-events // train.events))),
        shard_sessions=SHARD_SESSIONS,
        block_sessions=MAX_BLOCK_SESSIONS,
        last_event_only=False,
    )
    splits = {**manifest.splits, "train": repeated_train}
    for file in sorted(set(manifest.files) - {shard.url for shard in train.shards}):
        storage.write_bytes(storage.join(data, file), storage.read_bytes(storage.join(source, file)))
    repeated = manifest.model_copy(update={"splits": splits})
    write_manifest(data, repeated)
    return repeated


def _events(source: str, manifest: Manifest, times: int) -> Iterator[pa.RecordBatch]:
    """The events of every stream ``times`` times over, as the writer takes them; each copy has numbers of its own."""
    train = manifest.splits["train"]
    for stream in range(manifest.streams):
        infos = [shard for shard in train.shards if shard.stream == stream]
        sessions = concatenate([block for info in infos for block in read_blocks(source, info, manifest.items)])
        numbers = np.repeat(sessions.sessions, sessions.lengths)
        for copy in range(times):
            columns = [np.full(len(numbers), stream), numbers + copy * train.sessions, sessions.items]
            yield pa.record_batch([pa.array(column) for column in columns], ["stream", "number", "item"])
