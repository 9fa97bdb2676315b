"""The sessions of an evaluation split in batches whose composition does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from gru4recf_dist.data import assignment, columns
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.data.shards import read_blocks


def batch_count(manifest: Manifest, split: str, batch_sessions: int) -> int:
    return -(-manifest.splits[split].sessions // batch_sessions)


def read_batches(
    data: str,
    manifest: Manifest,
    split: str,
    batch_sessions: int,
    rank: int = 0,
    world: int = 1,
    on_bad_shard: str = "fail",
) -> Iterator[Block]:
    """A rank's batches: batch b holds the sessions b*batch_sessions.. of the split in the manifest's order.

    Ranks take contiguous shares, and open only the shards that theirs lie in.
    """
    mine = assignment.share(batch_count(manifest, split, batch_sessions), rank, world)
    skip, left = mine.start * batch_sessions, len(mine) * batch_sessions
    waiting: list[Block] = []
    held = 0
    for shard in manifest.splits[split].shards:
        if skip >= shard.sessions:
            skip -= shard.sessions
            continue
        if left <= 0:
            break
        for block in read_blocks(data, shard, manifest.items, on_bad_shard, manifest.event_features):
            if skip:
                passed = min(skip, len(block.lengths))
                skip -= passed
                block = columns.slice_sessions(block, passed, len(block.lengths))
            block = columns.slice_sessions(block, 0, max(left, 0))
            left -= len(block.lengths)
            waiting.append(block)
            held += len(block.lengths)
            while held >= batch_sessions:
                joined = columns.concatenate(waiting)
                yield columns.slice_sessions(joined, 0, batch_sessions)
                waiting = [columns.slice_sessions(joined, batch_sessions, held)]
                held -= batch_sessions
    if held:
        yield columns.concatenate(waiting)
