"""Products of table rows with queries, a tile at a time, and which of them are above a bound or too near it to tell.

A tile is scored, compared and counted while it is in the cache. Its flags are bytes, and are counted eight to a word:
the counts of a block of rows say which queries have anything near the bound there, and only those are looked at again.

Shapes: n rows and q queries of a tile, D + 1 their size.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

# Rows of a tile on a GPU, which hides their cost only if there are many.
_GPU_TILE_ROWS = 1 << 16
# float32 scores of a tile at most: bounds the memory.
_SCORES = 1 << 23
_L2_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
# Queries of a tile at most on the CPU. With fewer, reading and preparing a tile's rows weighs more.
CPU_QUERIES = 1024
# Rows whose flags are counted together: at most 255, as eight counts of a byte each are added in one int64.
_BLOCK = 64
_BYTES = 8


@cache
def default_tile_rows(device: torch.device) -> int:
    """Table rows that are scored at a time, where none are set.

    On the CPU as many as make the scores of `CPU_QUERIES` take four times the L2 cache: smaller tiles cost more calls
    than they gain by the cache (measured by `benchmarks.kernels`).
    """
    if device.type == "cuda":
        return _GPU_TILE_ROWS
    text = _L2_SIZE.read_text().strip() if _L2_SIZE.exists() else "1024K"
    bytes_ = int(text.removesuffix("K")) * 1024 if text.removesuffix("K").isdigit() else 1 << 20
    return min(max(4 * bytes_ // (4 * CPU_QUERIES), 8 * _BLOCK), 64 * _BLOCK)


def queries_at_once(tile_rows: int, device: torch.device) -> int:
    """Queries that are scored against a tile of so many rows together, at most."""
    most = max(_BYTES, _SCORES // tile_rows)
    return most if device.type == "cuda" else min(most, CPU_QUERIES)


def score_tile(rows: int, queries: int, device: torch.device) -> CpuTile | GpuTile:
    """For up to ``rows`` rows, and as many of ``queries`` queries at a time as suits the device."""
    most = max(_BYTES, min(queries, queries_at_once(rows, device)))
    return GpuTile(rows, most, device) if device.type == "cuda" else CpuTile(rows, most)


class _Tile:
    """What both devices have: room for scores, as whole blocks of rows and whole words of flags."""

    def __init__(self, rows: int, queries: int, device: torch.device) -> None:
        self.queries = _rounded_up(queries, _BYTES)
        self._blocks = -(-rows // _BLOCK)
        # What no product is written to is above nothing.
        self._scores = torch.full((self._blocks * _BLOCK, self.queries), -torch.inf, device=device)
        self._by_block = self._scores.view(self._blocks, _BLOCK, self.queries)

    def _multiply(self, rows: torch.Tensor, queries: torch.Tensor) -> None:
        count, width = len(rows), queries.shape[1]
        if count < len(self._scores):
            self._scores[count:] = -torch.inf
        if width < self.queries:
            self._scores[:, width:] = -torch.inf
        torch.mm(rows, queries, out=self._scores[:count, :width])


class CpuTile(_Tile):
    """Tiles on the CPU. numpy compares: torch's comparisons are not vectorised where they give bytes."""

    def __init__(self, rows: int, queries: int) -> None:
        super().__init__(rows, queries, torch.device("cpu"))
        shape = (self._blocks, _BLOCK, self.queries)
        self._array = self._by_block.numpy()
        self._flags = np.empty((2, *shape), dtype=bool)
        self._words = torch.from_numpy(self._flags.view(np.int64))
        self._sums = torch.empty((2, self._blocks, self.queries // _BYTES), dtype=torch.int64)
        # [2, blocks, queries]
        self._counts = self._sums.numpy().view(np.uint8)

    def sort_out(
        self, rows: torch.Tensor, queries: torch.Tensor, bound: np.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per query, how many of the products are above ``bound``; and the pairs (row, query) not farther from 0.

        Args:
            rows: float32 [n, D + 1].
            queries: float32 [D + 1, q].

        Returns:
            integers [q]; int64 [pairs] twice.
        """
        self._multiply(rows, queries)
        np.greater(self._array, bound, out=self._flags[0])
        np.greater_equal(self._array, -bound, out=self._flags[1])
        torch.sum(self._words, dim=2, out=self._sums)
        sure, possible = self._counts
        # Most queries have nothing near the bound in most blocks.
        block, query = np.divmod(np.flatnonzero(sure != possible), self.queries)
        near = np.abs(self._array[block, :, query]) <= bound
        pair, row = np.divmod(np.flatnonzero(near), _BLOCK)
        total = np.add.reduce(sure, axis=0, dtype=np.int64)[: queries.shape[1]]
        return tuple(map(torch.from_numpy, (total, block[pair] * _BLOCK + row, query[pair])))


class GpuTile(_Tile):
    """Tiles on any device, by torch alone."""

    def sort_out(
        self, rows: torch.Tensor, queries: torch.Tensor, bound: np.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `CpuTile.sort_out`."""
        self._multiply(rows, queries)
        bound = float(bound)
        sure = (self._by_block > bound).sum(dim=1)
        possible = (self._by_block >= -bound).sum(dim=1)
        block, query = torch.nonzero(possible != sure, as_tuple=True)
        pair, row = torch.nonzero(self._by_block[block, :, query].abs() <= bound, as_tuple=True)
        return sure.sum(dim=0)[: queries.shape[1]], block[pair] * _BLOCK + row, query[pair]


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
