"""Canonical streams: the order of an epoch's sessions, the same for every number of ranks and workers.

The training sessions lie in S streams. Given (seed, epoch), a stream is a fixed sequence: its shards in a shuffled
order, then the sessions shuffled within consecutive windows. Global batch g takes the next B/S sessions of every
stream. Ranks and loader workers only divide the streams among themselves.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data import assignment, columns, filesystems
from gru4recf_dist.data.ahead import one_ahead
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.shard_format import Manifest, ShardInfo
from gru4recf_dist.data.shards import Shard
from gru4recf_dist.data.worker_processes import in_workers
from gru4recf_dist.errors import UserError

# Sessions that are taken from the streams at a time: taken one by one, Python calls would cost more than the events.
SESSIONS_AT_A_TIME = 16384

T = TypeVar("T")


class Stream:
    """One stream's sessions of one epoch, from a position on.

    Args:
        data: the data set's folder or URL.
        shards: the stream's shards, in the manifest's order.
        key: (seed, epoch, stream); decides the order and nothing else does.
        position: sessions already taken. Whole shards before it are not opened.
        window: sessions that are shuffled together.
        items: N, the largest item id there may be.
        on_bad_shard: ``fail`` or ``skip``, as in `Shard.blocks`.
        event_features: of the data set.
    """

    def __init__(
        self,
        data: str,
        shards: list[ShardInfo],
        key: tuple[int, int, int],
        position: int,
        window: int,
        items: int,
        on_bad_shard: str = "fail",
        event_features: Sequence[EventFeature] = (),
    ):
        self._event_features = event_features
        self._data, self._items, self._on_bad_shard = data, items, on_bad_shard
        self._key = key
        self._window = window
        # `take` serves from a shuffled window; a position inside a window starts in the middle of it.
        self._window_number, self._served = divmod(position, window)
        order = np.random.default_rng(key).permutation(len(shards))
        skip = self._window_number * window
        unopened = [shards[i] for i in order]
        while unopened and skip >= unopened[0].sessions:
            skip -= unopened.pop(0).sessions
        self._unopened, self._opened = iter(unopened), deque[Shard]()
        # The first ranges of all streams are fetched together, before any of them is waited for.
        self._open_ahead(filesystems.settings().ahead_shards)
        self._blocks = self._read(skip)
        self._unread: list[Block] = []
        self._current: Block | None = None

    def _open_ahead(self, count: int) -> None:
        while len(self._opened) < count and (info := next(self._unopened, None)) is not None:
            self._opened.append(Shard(self._data, info, self._items, self._event_features))

    def _read(self, skip: int) -> Iterator[Block]:
        """The blocks of the shards that are left, without the first ``skip`` sessions."""
        ahead = filesystems.settings().ahead_shards
        while True:
            self._open_ahead(1)
            if not self._opened:
                return
            shard = self._opened.popleft()
            self._open_ahead(ahead)
            for block in shard.blocks(self._on_bad_shard):
                if skip >= len(block.lengths):
                    skip -= len(block.lengths)
                    continue
                yield columns.slice_sessions(block, skip, len(block.lengths)) if skip else block
                skip = 0

    def _next_window(self) -> Block | None:
        """The next window, shuffled; None at the end of the stream."""
        count = sum(len(block.lengths) for block in self._unread)
        while count < self._window and (block := next(self._blocks, None)) is not None:
            self._unread.append(block)
            count += len(block.lengths)
        if not count:
            return None
        joined = columns.concatenate(self._unread)
        window = columns.slice_sessions(joined, 0, self._window)
        rest = columns.slice_sessions(joined, self._window, count) if count > self._window else None
        self._unread = [rest] if rest else []
        order = np.random.default_rng((*self._key, self._window_number)).permutation(len(window.lengths))
        self._window_number += 1
        return columns.select(window, order)

    def take(self, count: int) -> list[Block]:
        """The next ``count`` sessions, fewer at the end of the stream."""
        taken = []
        while count:
            if self._current is None:
                self._current = self._next_window()
                if self._current is None:
                    break
            part = columns.slice_sessions(self._current, self._served, self._served + count)
            self._served += len(part.lengths)
            count -= len(part.lengths)
            taken.append(part)
            if self._served >= len(self._current.lengths):
                self._current, self._served = None, 0
        return taken


@dataclass(frozen=True)
class _Failure:
    """In place of a block: the UserError that a worker process met."""

    text: str


def _unwrap(part: Block | _Failure) -> Block:
    if isinstance(part, _Failure):
        raise UserError(part.text)
    return part


class _StreamParts(IterableDataset):
    """What one loader worker yields: for every remaining global batch, its streams' sessions as one block."""

    def __init__(self, loader: SessionLoader) -> None:
        self.data, self.shards, self.config = loader.data, loader.shards, loader.config
        self.seed, self.epoch, self.positions = loader.seed, loader.epoch, loader.positions
        self.rank, self.world = loader.rank, loader.world
        self.per_stream = loader.batch_size // len(self.shards)
        self.steps = loader.steps_left
        self.items, self.event_features = loader.items, loader.event_features
        self.storage = filesystems.settings()

    def __iter__(self) -> Iterator[Block]:
        info = get_worker_info()
        if info:
            filesystems.hide_environment()
            filesystems.configure(self.storage)
        try:
            yield from self._parts(*((info.id, info.num_workers) if info else (0, 1)))
        except UserError as error:
            # An exception that leaves a worker process comes back with that process's traceback as its text.
            if info is None:
                raise
            yield _Failure(str(error))

    def _parts(self, worker: int, workers: int) -> Iterator[Block]:
        mine = assignment.streams_of(len(self.shards), self.rank, self.world, worker, workers)
        streams = [
            Stream(
                self.data,
                self.shards[stream],
                (self.seed, self.epoch, stream),
                self.positions[stream],
                self.config.shuffle_window,
                self.items,
                self.config.on_bad_shard,
                self.event_features,
            )
            for stream in mine
        ]
        at_a_time = max(1, SESSIONS_AT_A_TIME // (self.per_stream * len(mine)))
        for done in range(0, self.steps, at_a_time):
            steps = min(at_a_time, self.steps - done)
            taken = [columns.concatenate(stream.take(self.per_stream * steps)) for stream in streams]
            yield from columns.interleave(taken, self.per_stream, steps)


class SessionLoader:
    """A rank's part of the global batches of training sessions, epoch after epoch.

    Its state is (epoch, sessions taken of each stream): small, and the same on every rank, so that training goes on
    exactly where it stopped at another number of ranks, and with another batch size too.

    Raises:
        UserError: batch size, streams and ranks do not fit together.
    """

    def __init__(
        self, data: str, manifest: Manifest, config: LoaderConfig, batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        assignment.check_sizes(manifest.streams, batch_size, world)
        self.data, self.config, self.batch_size, self.seed = data, config, batch_size, seed
        self.rank, self.world, self.items = rank, world, manifest.items
        self.event_features = manifest.event_features
        self.shards: list[list[ShardInfo]] = [[] for _ in range(manifest.streams)]
        for shard in manifest.splits["train"].shards:
            self.shards[shard.stream].append(shard)
        self.sizes = [sum(shard.sessions for shard in shards) for shards in self.shards]
        if not any(self.sizes):
            raise UserError(f"{data}: the data set has no training session")
        self.epoch = 0
        # Sessions taken of each stream, and how many each has: as arrays, since every step counts them all.
        self._taken, self._sizes = np.zeros(manifest.streams, np.int64), np.array(self.sizes, np.int64)

    @property
    def positions(self) -> list[int]:
        """Sessions of each stream that were handed over in the current epoch."""
        return self._taken.tolist()

    @property
    def steps_per_epoch(self) -> int:
        return assignment.steps_left(self.sizes, [0] * len(self.sizes), self.batch_size)

    @property
    def steps_left(self) -> int:
        """Global batches left in the current epoch, the same number on every rank."""
        return assignment.steps_left(self.sizes, self.positions, self.batch_size)

    @property
    def epochs_done(self) -> float:
        """Epochs trained, with the fraction of the current one."""
        return self.epoch + 1 - self.steps_left / self.steps_per_epoch

    def steps_until(self, epochs: int) -> int:
        """Global batches left until ``epochs`` epochs are done; 0 if they are."""
        return max(0, (epochs - self.epoch - 1) * self.steps_per_epoch + self.steps_left)

    def __iter__(self) -> Iterator[Block]:
        """The rest of the current epoch: one block a step, possibly of no session; then the next epoch is current."""
        for block in self._parts():
            self._advance()
            yield block

    def prepared(self, prepare: Callable[[Block], T]) -> Generator[T]:
        """As iteration, with what ``prepare`` makes of each block: a step ahead, in a thread.

        The position is that of what has been handed over, not of what has been read. Close the generator if it is left
        early.
        """
        with contextlib.closing(one_ahead(self._prepared(prepare))) as batches:
            for batch in batches:
                self._advance()
                yield batch

    def _prepared(self, prepare: Callable[[Block], T]) -> Generator[T]:
        with contextlib.closing(self._parts()) as parts:
            for part in parts:
                yield prepare(part)

    def _advance(self) -> None:
        """One batch was handed over; after an epoch's last the next epoch is current."""
        per_stream = self.batch_size // len(self.sizes)
        self._taken = np.minimum(self._taken + per_stream, self._sizes)
        if np.array_equal(self._taken, self._sizes):
            self.epoch, self._taken = self.epoch + 1, np.zeros_like(self._sizes)

    def _parts(self) -> Generator[Block]:
        parts, steps = _StreamParts(self), self.steps_left
        # A worker without a stream would only yield empty blocks.
        workers = min(self.config.workers, len(assignment.streams_of(len(self.sizes), self.rank, self.world)))
        if not workers:
            yield from parts
            return
        # Each worker yields one block a step: `workers` blocks, asked for in turn, are one step.
        with contextlib.closing(in_workers(parts, workers)) as loaded:
            for _ in range(steps):
                yield columns.concatenate([_unwrap(next(loaded)) for _ in range(workers)])

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "positions": self.positions}

    def load_state_dict(self, state: dict) -> None:
        if len(state["positions"]) != len(self.sizes):
            raise UserError(
                f"the checkpoint was made with {len(state['positions'])} streams, the data set has {len(self.sizes)}"
            )
        for stream, (position, size) in enumerate(zip(state["positions"], self.sizes, strict=True)):
            if not 0 <= position <= size:
                raise UserError(
                    f"the checkpoint is at session {position} of stream {stream}, which has {size}: "
                    "the data set is not the one it was made with"
                )
        self.epoch, self._taken = state["epoch"], np.array(state["positions"], np.int64)
