"""Epochs as lists of session numbers, read by session loaders of any number of ranks."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import numpy as np

from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.data.streams import SessionLoader
from tests.support.synthetic import random_sessions, write_dataset

STREAMS = 8


@dataclass
class DataSet:
    data: str
    manifest: Manifest
    sessions: list[np.ndarray]

    @property
    def numbers(self) -> list[int]:
        return list(range(len(self.sessions)))


def write(data: str, count: int, **settings) -> DataSet:
    sessions = random_sessions(count, count, 30, longest=5)
    manifest = write_dataset(data, sessions, streams=STREAMS, features=False, items=30, **settings)
    return DataSet(data=data, manifest=manifest, sessions=sessions)


def small_data_set() -> DataSet:
    """107 sessions: streams of 13 and 14, in shards of 6 and blocks of 4."""
    return write(f"memory://{uuid.uuid4().hex}", 107, shard_sessions=6, block_sessions=4)


def loader_of(
    dataset: DataSet,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    window: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> SessionLoader:
    config = LoaderConfig(workers=workers, shuffle_window=window)
    return SessionLoader(dataset.data, dataset.manifest, config, batch_size, seed, rank, world)


def take(loader: SessionLoader, steps: int | None = None) -> list[list[int]]:
    """Session numbers of the next ``steps`` blocks (None: to the end of the epoch)."""
    numbers = []
    iterator = iter(loader)
    while steps is None or len(numbers) < steps:
        block = next(iterator, None)
        if block is None:
            break
        numbers.append(block.sessions.tolist())
    return numbers


def merge(parts: list[list[list[int]]]) -> list[list[int]]:
    """The global batches of an epoch from each rank's blocks, joined in the order of the ranks."""
    assert len({len(part) for part in parts}) == 1, "ranks differ in their number of steps"
    return [[number for block in step for number in block] for step in zip(*parts, strict=True)]


def epoch(dataset: DataSet, world: int = 1, workers: int = 0, **settings) -> list[list[int]]:
    return merge([take(loader_of(dataset, rank, world, workers, **settings)) for rank in range(world)])


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]
