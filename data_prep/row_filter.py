"""Which rows of the event files are events at all: those whose columns hold one of the listed values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import Batch, Column


class RowFilter:
    """``keep`` of a recipe: column -> the values of the rows to keep, compared as text.

    Attributes:
        left_out: how many rows did not hold them, so far.
    """

    def __init__(self, keep: dict[str, list[str]]) -> None:
        self._values = {f"keep_{n}": pa.array(values, pa.string()) for n, values in enumerate(keep.values())}
        self.columns = {f"keep_{n}": Column(name, "text") for n, name in enumerate(keep)}
        self.left_out = 0

    def __call__(self, batch: Batch) -> Batch:
        """The rows to keep of a batch that was read with ``columns`` among its own."""
        if not self.columns:
            return batch
        kept = np.ones(len(batch.lines), dtype=bool)
        for result, values in self._values.items():
            kept &= pc.is_in(batch.columns[result], value_set=values).to_numpy(zero_copy_only=False)
        self.left_out += int(len(kept) - kept.sum())
        mask = pa.array(kept)
        rest = {result: column for result, column in batch.columns.items() if result not in self._values}
        return Batch({result: column.filter(mask) for result, column in rest.items()}, batch.lines[kept])
