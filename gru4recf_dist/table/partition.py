"""Which rank owns which rows, and the routing of a step's ids to their owners."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class RowPartition:
    """Contiguous rows over the ranks, exactly as a DTensor with `Shard(0)` lays them out.

    Every rank has ceil(rows / world) rows, the last ones fewer or none. Any other split would make
    `torch.distributed.checkpoint` load rows into wrong places without an error.
    """

    rows: int
    world: int

    @property
    def rows_per_rank(self) -> int:
        return -(-self.rows // self.world)

    def range_of(self, rank: int) -> range:
        """Global rows of a rank."""
        start = min(rank * self.rows_per_rank, self.rows)
        return range(start, min(start + self.rows_per_rank, self.rows))

    @property
    def bounds(self) -> np.ndarray:
        """int64 [W+1]: rank r owns the rows from bounds[r] to bounds[r+1]."""
        return np.minimum(np.arange(self.world + 1, dtype=np.int64) * self.rows_per_rank, self.rows)

    def split(self, ids: np.ndarray) -> np.ndarray:
        """How many of the ascending ``ids`` each rank owns; int64 [W]. They lie in the order of the ranks."""
        return np.diff(np.searchsorted(ids, self.bounds))


@dataclass(frozen=True)
class Routing:
    """The distinct ids that a rank needs in a step and where each is used. Integers only, computed on the CPU.

    Attributes:
        ids: int64 [U], ascending.
        send: int64 [W], how many of them each rank owns.
        inverse: for every tensor of ids that went in, int64 of its shape: places in ``ids``.
    """

    ids: np.ndarray
    send: np.ndarray
    inverse: list[torch.Tensor]


def route(partition: RowPartition, *id_tensors: torch.Tensor) -> Routing:
    """Route several tensors of ids (inputs, targets, ..) in one exchange: every distinct id travels once."""
    flat = np.concatenate([ids.reshape(-1).numpy() for ids in id_tensors])
    ids, inverse = np.unique(flat, return_inverse=True)
    parts = np.split(inverse.astype(np.int64), np.cumsum([ids.numel() for ids in id_tensors])[:-1])
    return Routing(
        ids=ids,
        send=partition.split(ids),
        inverse=[torch.from_numpy(part).view(like.shape) for part, like in zip(parts, id_tensors, strict=True)],
    )
