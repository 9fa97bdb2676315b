"""What sessions held before each of their targets: an item is seen by a run of queries, from its first event on.

As pairs (query, item) that would be the square of a session's length where every position is asked; runs are at most
as many as its events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gru4recf_dist.data.columns import ragged_arange

# Pairs that are in memory at a time.
PAIRS = 1 << 20


@dataclass(frozen=True)
class SeenItems:
    """S runs: the queries from ``first`` to ``stop`` (exclusive) have seen ``item``. Runs of one item do not overlap.

    Attributes:
        first, stop, item: int64 [S].
    """

    first: torch.Tensor
    stop: torch.Tensor
    item: torch.Tensor

    @classmethod
    def of_sessions(
        cls, items: np.ndarray, starts: np.ndarray, lengths: np.ndarray, first_query: np.ndarray, each_event: bool
    ) -> SeenItems:
        """Of ragged sessions ``items[start : start + length]``.

        Args:
            first_query: int64 [n], a session's first query.
            each_event: whether a query follows each of these events, or one follows all of them.
        """
        lengths = lengths.astype(np.int64)
        session = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        within = ragged_arange(lengths)
        values = items[np.repeat(starts, lengths) + within].astype(np.int64)
        # 2^31 items and 2^32 sessions fit one int64 key.
        _, events = np.unique((session << 31) | values, return_index=True)
        of = session[events]
        first = first_query[of] + (within[events] if each_event else 0)
        stop = first_query[of] + (lengths[of] if each_event else 1)
        return cls(*map(torch.from_numpy, (first, stop, values[events])))

    @classmethod
    def from_columns(cls, columns: torch.Tensor) -> SeenItems:
        """Of what `columns` gave."""
        return cls(*columns.unbind(dim=1))

    def columns(self) -> torch.Tensor:
        """int64 [S, 3], to send."""
        return torch.stack([self.first, self.stop, self.item], dim=1)

    def later(self, queries: int) -> SeenItems:
        """The same, where so many ``queries`` have been put before."""
        return SeenItems(self.first + queries, self.stop + queries, self.item)

    def to(self, device: torch.device) -> SeenItems:
        return self._each(lambda column: column.to(device))

    def within(self, items: range) -> SeenItems:
        """Only the runs of these items."""
        chosen = (self.item >= items.start) & (self.item < items.stop)
        return self._each(lambda column: column[chosen])

    def contain(self, wanted: torch.Tensor) -> torch.Tensor:
        """Whether query q has seen ``wanted[q]``, bool [Q]."""
        query = torch.arange(len(wanted), device=wanted.device)
        if not len(self.item):
            return torch.zeros(len(wanted), dtype=torch.bool, device=wanted.device)
        # By item, then by query: the run that could hold a query is the last to begin by then.
        keys, order = ((self.item << 32) | self.first).sort()
        place = torch.searchsorted(keys, (wanted << 32) | query, right=True) - 1
        run = order[place.clamp(min=0)]
        return (place >= 0) & (self.item[run] == wanted) & (query < self.stop[run])

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every pair (query, item), each once; int64 [at most `PAIRS`] twice at a time."""
        lengths = self.stop - self.first
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        for start in range(0, total, PAIRS):
            number = torch.arange(start, min(start + PAIRS, total), device=ends.device)
            run = torch.searchsorted(ends, number, right=True)
            yield self.stop[run] - (ends[run] - number), self.item[run]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SeenItems:
        return SeenItems(*map(change, (self.first, self.stop, self.item)))
