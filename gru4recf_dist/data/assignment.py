"""Who reads what: integer arithmetic on streams, ranks, workers and positions. No file is opened here."""

from __future__ import annotations

from gru4recf_dist.errors import UserError


def check_sizes(streams: int, batch_size: int, world: int) -> None:
    """Whether ``batch_size`` sessions a step from ``streams`` streams can be shared by ``world`` ranks.

    Raises:
        UserError: B is not a multiple of S, or W is greater than S.
    """
    if batch_size % streams:
        raise UserError(
            f"batch_size ({batch_size}) must be a multiple of the data set's {streams} streams, "
            "since every step takes equally many sessions of each"
        )
    if world > streams:
        raise UserError(
            f"{world} ranks cannot share the data set's {streams} streams: use at most {streams} ranks, "
            "or prepare the data with more `streams`"
        )


def share(count: int, part: int, parts: int) -> range:
    """The ``part``-th of ``parts`` contiguous, nearly equal shares of ``range(count)``."""
    return range(part * count // parts, (part + 1) * count // parts)


def streams_of(streams: int, rank: int, world: int, worker: int = 0, workers: int = 1) -> range:
    """The streams that a rank's loader worker serves.

    Both divisions are contiguous, so that joining workers, then ranks, in order gives the streams in order.
    """
    mine = share(streams, rank, world)
    part = share(len(mine), worker, workers)
    return range(mine.start + part.start, mine.start + part.stop)


def steps_left(sizes: list[int], positions: list[int], batch_size: int) -> int:
    """Global batches left in an epoch: every step takes B/S sessions of each stream that has any left."""
    per_stream = batch_size // len(sizes)
    return max(-(-(size - position) // per_stream) for size, position in zip(sizes, positions, strict=True))
