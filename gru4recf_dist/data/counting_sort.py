"""A counting sort in blocks: of all entries at once nothing is needed but the arrays that they end in."""

from __future__ import annotations

import numpy as np


def take_places(keys: np.ndarray, next_places: np.ndarray) -> np.ndarray:
    """The next free places of a block of entries, int64 [n]; they are then taken.

    Args:
        keys: [n], ascending integers.
        next_places: int64 [K], by key; moved on by how often each occurs.
    """
    met, first, number = np.unique(keys, return_index=True, return_counts=True)
    places = np.arange(len(keys)) + np.repeat(next_places[met] - first, number)
    next_places[met] += number
    return places
