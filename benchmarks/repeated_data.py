"""A large data set out of a small one: its training sessions again and again, everything else as it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_prep import writer
from gru4recf_dist.data import storage
from gru4recf_dist.data.blocks import MAX_BLOCK_SESSIONS
from gru4recf_dist.data.columns import concatenate
from gru4recf_dist.data.shard_format import Manifest, read_manifest, write_manifest
from gru4recf_dist.data.shards import read_blocks

SHARD_SESSIONS = 65536


def write_repeated(source: str, data: str, events: int) -> Manifest:
    """Write the data set at ``source`` to ``data``, its training sessions repeated to at least ``events`` events."""
    manifest = read_manifest(source)
    train = manifest.splits["train"]
    shards = writer.write_shards(
        _events(source, manifest, max(1, -(-events // train.events))),
        data=data,
        split="train",
        streams=manifest.streams,
        shard_sessions=SHARD_SESSIONS,
        block_sessions=MAX_BLOCK_SESSIONS,
        last_event_only=False,
    )
    splits = {**manifest.splits, "train": writer.split_info(list(shards))}
    for file in sorted(set(manifest.files) - {shard.url for shard in train.shards}):
        storage.write_bytes(storage.join(data, file), storage.read_bytes(storage.join(source, file)))
    # Items only: what is measured with it has no event features.
    repeated = manifest.model_copy(update={"splits": splits, "event_features": []})
    write_manifest(data, repeated)
    return repeated


def _events(source: str, manifest: Manifest, times: int) -> Iterator[pa.RecordBatch]:
    """The events of every stream ``times`` times over, as the writer takes them; each copy has numbers of its own."""
    train = manifest.splits["train"]
    for stream in range(manifest.streams):
        infos = [shard for shard in train.shards if shard.stream == stream]
        shards = (read_blocks(source, info, manifest.items, event_features=manifest.event_features) for info in infos)
        sessions = concatenate([block for blocks in shards for block in blocks])
        count = len(sessions.lengths)
        for copy in range(times):
            # A number tells the stream, too: that of its remainder.
            numbers = stream + manifest.streams * np.arange(copy * count, (copy + 1) * count)
            yield pa.record_batch({"number": np.repeat(numbers, sessions.lengths), "item": sessions.items})
