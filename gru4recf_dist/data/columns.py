"""Ragged columns: many sessions as one flat array and their lengths, moved about without Python loops."""

from __future__ import annotations

import numpy as np

from gru4recf_dist.data.blocks import Block


def ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .., lengths[0]-1, 0, 1, .., lengths[1]-1, and so on; int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0]+1, .. (lengths[0] of them), then those of starts[1], and so on; int64."""
    return np.repeat(starts, lengths) + ragged_arange(lengths)


def concatenate(blocks: list[Block]) -> Block:
    """One block with the sessions of all, in order. Times are dropped: training does not read them."""
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        items=np.concatenate([block.items for block in blocks]) if blocks else np.empty(0, np.int32),
        lengths=np.concatenate([block.lengths for block in blocks]) if blocks else np.empty(0, np.int32),
        sessions=np.concatenate([block.sessions for block in blocks]) if blocks else np.empty(0, np.int64),
        event_features=_concatenated_features([block for block in blocks if len(block.items)]),
    )


def _concatenated_features(blocks: list[Block]) -> dict[str, np.ndarray]:
    """Of blocks with events: only these have all event features of the data set."""
    names = blocks[0].event_features if blocks else ()
    return {name: np.concatenate([block.event_features[name] for block in blocks]) for name in names}


def _features_at(block: Block, events: np.ndarray | slice) -> dict[str, np.ndarray]:
    return {name: column[events] for name, column in block.event_features.items()}


def select(block: Block, order: np.ndarray) -> Block:
    """The block's sessions at positions ``order``."""
    ends = np.cumsum(block.lengths, dtype=np.int64)
    lengths = block.lengths[order]
    events = ragged_indices((ends - block.lengths)[order], lengths)
    return Block(
        items=block.items[events],
        lengths=lengths,
        sessions=block.sessions[order],
        event_features=_features_at(block, events),
    )


def slice_sessions(block: Block, start: int, stop: int) -> Block:
    """The block's sessions from ``start`` to ``stop`` (exclusive)."""
    first = int(block.lengths[:start].sum(dtype=np.int64))
    last = first + int(block.lengths[start:stop].sum(dtype=np.int64))
    return Block(
        items=block.items[first:last],
        lengths=block.lengths[start:stop],
        sessions=block.sessions[start:stop],
        event_features=_features_at(block, slice(first, last)),
    )


def interleave(blocks: list[Block], count: int, parts: int) -> list[Block]:
    """``parts`` blocks, each with the next ``count`` sessions of every given block in turn (fewer where one ends)."""
    sizes = np.array([len(block.lengths) for block in blocks], np.int64)
    part = ragged_arange(sizes) // count
    # Stable: within a part, sessions stay in the order of the given blocks.
    joined = select(concatenate(blocks), np.argsort(part, kind="stable"))
    bounds = np.cumsum(np.bincount(part, minlength=parts))
    ends = np.concatenate([[0], np.cumsum(joined.lengths, dtype=np.int64)])[np.concatenate([[0], bounds])]
    return [
        Block(
            joined.items[events:next_events],
            joined.lengths[start:stop],
            joined.sessions[start:stop],
            event_features=_features_at(joined, slice(events, next_events)),
        )
        for start, stop, events, next_events in zip(
            [0, *bounds[:-1].tolist()], bounds.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True
        )
    ]
