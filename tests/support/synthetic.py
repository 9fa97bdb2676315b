"""Small data sets, written with the shard format itself: no preparation is run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gru4recf_dist.data import storage
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.columns import slice_sessions
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.shard_format import (
    POPULARITY,
    TOKENS,
    Feature,
    Manifest,
    ShardInfo,
    SplitInfo,
    write_manifest,
    write_shard,
)

EVENT_FEATURES = [
    EventFeature(name="type", kind="token", size=5, vocabulary="items/features/type.vocabulary.parquet"),
    EventFeature(name="price", kind="float", size=1, mean=3.0, deviation=2.0),
    EventFeature(name="gap", kind="time_gap", size=5, edges=[1.0, 10.0]),
]


def random_sessions(seed: int, count: int, items: int, shortest: int = 2, longest: int = 12) -> list[np.ndarray]:
    """Sessions of Zipf-like items, int32 each."""
    generator = np.random.default_rng(seed)
    mass = 1.0 / np.arange(1, items + 1)
    lengths = generator.integers(shortest, longest + 1, count)
    return [(generator.choice(items, n, p=mass / mass.sum()) + 1).astype(np.int32) for n in lengths]


def to_block(sessions: list[np.ndarray], first: int = 0) -> Block:
    """Sessions as one block, numbered from ``first``."""
    return Block(
        items=np.concatenate(sessions).astype(np.int32) if sessions else np.empty(0, np.int32),
        lengths=np.array([len(session) for session in sessions], np.int32),
        sessions=np.arange(first, first + len(sessions), dtype=np.int64),
    )


def write_dataset(
    data: str,
    train: list[np.ndarray],
    valid: list[np.ndarray] | None = None,
    test: list[np.ndarray] | None = None,
    items: int | None = None,
    streams: int = 8,
    shard_sessions: int = 16,
    block_sessions: int = 5,
    protocol: str = "every_position",
    features: bool = True,
    seed: int = 0,
    event_features: bool = False,
) -> Manifest:
    """Write a data set to ``data`` (path or URL): sessions dealt to streams by number, several shards a stream.

    With ``features``: `category` (token), `tags` (token_seq, some empty), `price` (float) and `image` (vector of 3).
    With ``event_features``: those of `EVENT_FEATURES`, of the events `event_values`.
    """
    valid, test = valid or [], test or []
    items = items or max(int(session.max()) for session in [*train, *valid, *test])
    splits = {}
    shards: list[ShardInfo] = []
    for stream in range(streams):
        numbers = list(range(stream, len(train), streams))
        for part, start in enumerate(range(0, len(numbers), shard_sessions)):
            chosen = numbers[start : start + shard_sessions]
            block = to_block([train[i] for i in chosen])
            block = Block(block.items, block.lengths, np.array(chosen, np.int64))
            block = _described(block) if event_features else block
            targets = int((block.lengths - 1).sum())
            shards.append(_write(data, f"train/s{stream:04d}-{part:06d}.tar", stream, block, block_sessions, targets))
    splits["train"] = _split(shards)
    for name, sessions in (("valid", valid), ("test", test)):
        shards = []
        for part, start in enumerate(range(0, len(sessions), shard_sessions)):
            block = to_block(sessions[start : start + shard_sessions], start)
            block = _described(block) if event_features else block
            targets = len(block.lengths) if protocol == "leave_one_out" else int((block.lengths - 1).sum())
            shards.append(_write(data, f"{name}/{part:06d}.tar", part, block, block_sessions, targets))
        splits[name] = _split(shards)
    popularity = np.bincount(np.concatenate(train), minlength=items + 1).astype(np.int64)
    storage.write_npy(storage.join(data, POPULARITY), popularity)
    with storage.open_atomic(storage.join(data, TOKENS)) as stream:
        tokens = [f"item-{i}" for i in range(1, items + 1)]
        pq.write_table(pa.table({"id": pa.array(range(1, items + 1), pa.int32()), "token": tokens}), stream)
    manifest = Manifest(
        name="synthetic",
        seed=seed,
        items=items,
        streams=streams,
        protocol=protocol,
        splits=splits,
        features=_write_features(data, items, seed) if features else [],
        event_features=EVENT_FEATURES if event_features else [],
    )
    for feature in manifest.event_features:
        if feature.vocabulary is not None:
            with storage.open_atomic(storage.join(data, feature.vocabulary)) as stream:
                values = [f"{feature.name}-{number}" for number in range(2, feature.size)]
                ids = pa.array(range(2, feature.size), pa.int32())
                pq.write_table(pa.table({"id": ids, "token": pa.array(values, pa.string())}), stream)
    write_manifest(data, manifest)
    return manifest


def event_values(session: int, items: np.ndarray) -> dict[str, np.ndarray]:
    """Event features of a session that has this number and these items: they tell the two apart."""
    generator = np.random.default_rng((session, *items.tolist()))
    price = generator.standard_normal(len(items)).astype(np.float32)
    price[generator.random(len(items)) < 0.3] = np.nan
    return {
        "type": generator.integers(0, 5, len(items)).astype(np.int32),
        "price": price,
        "gap": np.append(1, generator.integers(2, 5, len(items) - 1)).astype(np.int32),
    }


def _described(block: Block) -> Block:
    sessions = np.split(block.items, np.cumsum(block.lengths)[:-1])
    values = [event_values(int(number), items) for number, items in zip(block.sessions, sessions, strict=True)]
    columns = {name: np.concatenate([each[name] for each in values]) for name in ("type", "price", "gap")}
    return replace(block, event_features=columns)


def _write(data: str, url: str, stream: int, block: Block, block_sessions: int, targets: int) -> ShardInfo:
    count = len(block.lengths)
    blocks = [slice_sessions(block, start, start + block_sessions) for start in range(0, count, block_sessions)]
    return write_shard(data, url, stream, blocks, targets)


def _split(shards: list[ShardInfo]) -> SplitInfo:
    return SplitInfo(
        sessions=sum(shard.sessions for shard in shards),
        events=sum(shard.events for shard in shards),
        targets=sum(shard.targets for shard in shards),
        shards=shards,
    )


def _write_features(data: str, items: int, seed: int) -> list[Feature]:
    generator = np.random.default_rng((seed, 1))
    category = generator.integers(1, 6, items + 1).astype(np.int32)
    counts = generator.integers(0, 4, items + 1)
    counts[0] = category[0] = 0
    tags = generator.integers(1, 9, counts.sum()).astype(np.int32)
    price = generator.standard_normal(items + 1).astype(np.float32)
    image = generator.standard_normal((items + 1, 3)).astype(np.float32)
    files = {
        "category": category,
        "tags": tags,
        "tags.indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "price": price,
        "image": image,
    }
    for name, values in files.items():
        storage.write_npy(storage.join(data, f"items/features/{name}.npy"), values)
    path = "items/features/{}.npy".format
    return [
        Feature(name="category", kind="token", size=6, values=path("category")),
        Feature(
            name="tags",
            kind="token_seq",
            size=9,
            longest=int(counts.max()),
            values=path("tags"),
            indptr=path("tags.indptr"),
        ),
        Feature(name="price", kind="float", size=1, values=path("price")),
        Feature(name="image", kind="vector", size=3, values=path("image")),
    ]
