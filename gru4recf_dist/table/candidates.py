"""The rows that queries are compared with, be they in one table or in several side by side.

Each part is a table with its own score: the score of an item is the sum over the parts of the dot products, or
cosines, of the query's columns of that part with the item's row there. So a candidate's row is the parts' rows, each
transformed by its score, one after the other, and everything that compares knows one row [Q] only.

Shapes: Q size of a query, D_p width of part p, U distinct items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gru4recf_dist.model.scoring import exact_scores, transform_rows
from gru4recf_dist.parallel import transfers
from gru4recf_dist.parallel.gathering import Gathering
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.item_table import Exchange, ShardedItemTable


@dataclass(frozen=True)
class CandidatePart:
    """``table``'s rows, compared by ``score``, `dot` or `cosine`."""

    table: ShardedItemTable
    score: str


class Candidates:
    """What `parts` give together. All tables have the same rows, over the same ranks."""

    def __init__(self, parts: list[CandidatePart]) -> None:
        self.parts = parts

    @property
    def _first(self) -> ShardedItemTable:
        return self.parts[0].table

    @property
    def dim(self) -> int:
        """Q."""
        return sum(part.table.dim for part in self.parts)

    @property
    def score(self) -> str:
        """`cosine` if any part's rows are brought to unit length, which costs float32 some precision."""
        return "cosine" if any(part.score == "cosine" for part in self.parts) else "dot"

    @property
    def own(self) -> range:
        """Global rows of this rank."""
        return self._first.own

    @property
    def ranks(self) -> Ranks:
        return self._first.ranks

    # -- rows as queries meet them -----------------------------------------------------------------------------------

    def join(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """The rows [n, D_p] of each part as candidates, [n, Q]."""
        transformed = [transform_rows(each, part.score) for each, part in zip(rows, self.parts, strict=True)]
        # The usual one part is not copied.
        return transformed[0] if len(transformed) == 1 else torch.cat(transformed, dim=-1)

    def gather(self, ids: np.ndarray) -> list[Gathering]:
        """Begin to fetch the same distinct, ascending ``ids`` on every rank; for `gathered`, later."""
        return [part.table.gather(ids) for part in self.parts]

    def gathered(self, gatherings: list[Gathering]) -> torch.Tensor:
        """The candidates that `gather` was asked for, [U, Q]; differentiable."""
        return self.join([transfers.differentiable_move(each.rows(), self.ranks.device) for each in gatherings])

    def own_items(self) -> torch.Tensor:
        """All of this rank's items as candidates, [own items, Q]; differentiable, for losses over every item."""
        return self.join([part.table.candidates() for part in self.parts])

    def tiles(self, tile_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """This rank's items, ``tile_rows`` at a time: (id of the first, float32 candidates [n, Q])."""
        for tiles in zip(*(part.table.tiles(tile_rows) for part in self.parts), strict=True):
            yield tiles[0][0], self.join([rows.float() for _, rows in tiles])

    # -- rows as they are stored, for exact scores -------------------------------------------------------------------

    def lookup(self, exchange: Exchange) -> list[torch.Tensor]:
        """Rows [U, D_p] of each part, of the exchange's distinct ids."""
        return [part.table.lookup(exchange) for part in self.parts]

    def read(self, local: torch.Tensor) -> list[torch.Tensor]:
        """This rank's rows ``local`` [n] of each part as float32 [n, D_p]; never differentiable."""
        return [part.table.read(local) for part in self.parts]

    def exact_scores(self, queries: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
        """Score of each pair (queries[i], row i of each part) in float64, [n]; as `model.scoring.exact_scores`."""
        columns = queries.split([part.table.dim for part in self.parts], dim=1)
        pairs = zip(columns, rows, self.parts, strict=True)
        first, *others = (exact_scores(query, row, part.score) for query, row, part in pairs)
        return sum(others, start=first)
