"""Names a rank that is slower than the others for long: all wait for it, and from outside every rank looks alike."""

from __future__ import annotations

import numpy as np


class SlowRanks:
    """Compares the time that ranks worked, waiting for each other left out.

    Args:
        factor: how many times the median of the other ranks' time is slow.
        seconds: for how long a rank must have been slow, without a break, to be named; and then until it is again.
    """

    def __init__(self, factor: float, seconds: float) -> None:
        self._factor, self._seconds = factor, seconds
        self._slow_seconds: dict[int, float] = {}

    def look(self, busy: np.ndarray, seconds: float) -> list[str]:
        """Take note of a number of steps.

        Args:
            busy: float64 [W], seconds that each rank worked in them.
            seconds: how long they took.

        Returns:
            what is to be said, a line for each rank.
        """
        lines = []
        for rank, each in enumerate(ratios(busy).tolist()):
            if each < self._factor:
                self._slow_seconds.pop(rank, None)
                continue
            slow = self._slow_seconds.get(rank, 0.0) + seconds
            if slow >= self._seconds:
                lines.append(
                    f"warning: rank {rank} has been {each:.1f} times as slow as the median of the others for "
                    f"{slow:.0f} s: all wait for it"
                )
                slow = 0.0
            self._slow_seconds[rank] = slow
        return lines


def ratios(busy: np.ndarray) -> np.ndarray:
    """Each rank's time over the median of the others' [W]; 1 for a rank alone.

    Of the others: with two ranks, none could be twice the median of both.
    """
    if len(busy) == 1:
        return np.ones(1)
    others = np.array([np.median(np.delete(busy, rank)) for rank in range(len(busy))])
    return busy / np.maximum(others, 1e-9)
