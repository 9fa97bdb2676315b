"""Item features, sharded by rows like the item table and fetched over the same exchange."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import PADDING_ID, Feature, Manifest, file_url
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel import collectives, transfers
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.item_table import Exchange
from gru4recf_dist.table.partition import RowPartition

# Rows of a column that are looked through at a time.
_LOOK_ROWS = 1 << 17


@dataclass
class FeatureColumn:
    """One feature of some rows, as they lie on disk; ``indptr`` only for multi-valued ones."""

    feature: Feature
    values: torch.Tensor
    indptr: torch.Tensor | None = None

    @property
    def width(self) -> int:
        return {"token": 1, "float": 1, "token_seq": self.feature.longest, "vector": self.feature.size}[
            self.feature.kind
        ]

    def rows(self, local: torch.Tensor) -> torch.Tensor:
        """The feature of local rows as int32 [n, width]; floats travel as their bits."""
        if self.indptr is None:
            return self.values.index_select(0, local).reshape(len(local), self.width).view(torch.int32)
        start, stop = self.indptr[local], self.indptr[local + 1]
        places = start[:, None] + torch.arange(self.width, device=local.device)
        inside = places < stop[:, None]
        if not self.values.numel():
            return torch.full(places.shape, PADDING_ID, dtype=torch.int32, device=local.device)
        return torch.where(inside, self.values[places.clamp(max=self.values.numel() - 1)], PADDING_ID)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """What travelled, in the form that the encoder takes."""
        if self.feature.kind == "token":
            return rows[:, 0].long()
        if self.feature.kind == "token_seq":
            return rows.long()
        floats = rows.contiguous().view(torch.float32)
        return floats[:, 0] if self.feature.kind == "float" else floats


class FeatureStore:
    """Features of this rank's rows; every rank reads its own row range of each file and nothing else.

    Args:
        names: the features to hold, in the order in which the encoder takes them.
        device: of the item table, whose exchanges serve the features too; default: the encoder's.

    Raises:
        UserError: the data set lacks a feature, or a file does not fit the manifest.
    """

    def __init__(
        self, data: str, manifest: Manifest, names: list[str], ranks: Ranks, device: torch.device | None = None
    ) -> None:
        self.ranks = ranks
        rows = RowPartition(manifest.items + 1, ranks.world).range_of(ranks.rank)
        self._columns = [
            read_column(data, manifest.feature(name), manifest.items, rows, device or ranks.device) for name in names
        ]

    def lookup(self, exchange: Exchange) -> dict[str, torch.Tensor]:
        """Features of the routing's distinct ids.

        Returns:
            by name, on the encoder's device: token int64 [U], token_seq int64 [U, longest] (0: padding), float [U],
            vector [U, size].
        """
        if not self._columns:
            return {}
        owned = torch.cat([column.rows(exchange.local) for column in self._columns], dim=1)
        rows = collectives.all_to_all(owned, exchange.send, exchange.receive, exchange.group, "features")
        rows = transfers.move(rows, self.ranks.device)
        parts = rows.split([column.width for column in self._columns], dim=1)
        return {column.feature.name: column.decode(part) for column, part in zip(self._columns, parts, strict=True)}


def read_column(data: str, feature: Feature, items: int, rows: range, device: torch.device) -> FeatureColumn:
    """A feature of the global ``rows``.

    Raises:
        UserError: a file does not fit the manifest.
    """
    url = file_url(data, feature.values)
    if feature.kind != "token_seq":
        dtype = np.int32 if feature.kind == "token" else np.float32
        row_shape = (feature.size,) if feature.kind == "vector" else ()
        _check_header(url, dtype, (items + 1, *row_shape))
        values = storage.read_npy_rows(url, rows.start, rows.stop)
        if feature.kind == "token":
            _check_tokens(url, values, feature)
        else:
            _check_numbers(url, values, feature)
        return FeatureColumn(feature, torch.from_numpy(values).to(device))
    indptr_url = file_url(data, feature.indptr)
    _check_header(indptr_url, np.int64, (items + 2,))
    # A rank without rows still reads one bound.
    indptr = storage.read_npy_rows(indptr_url, rows.start, rows.stop + 1)
    if indptr[0] < 0 or not all(
        # Block by block: the differences would take as much memory as the column itself.
        _ascends(indptr[start : start + _LOOK_ROWS + 1], feature.longest)
        for start in range(0, len(indptr), _LOOK_ROWS)
    ):
        raise UserError(f"{indptr_url}: row bounds do not ascend, or exceed the manifest's longest ({feature.longest})")
    values = storage.read_npy_rows(url, int(indptr[0]), int(indptr[-1]))
    _check(url, values, np.int32, int(indptr[-1] - indptr[0]))
    _check_tokens(url, values, feature)
    indptr -= int(indptr[0])
    return FeatureColumn(feature, torch.from_numpy(values).to(device), torch.from_numpy(indptr).to(device))


def _ascends(bounds: np.ndarray, longest: int) -> bool:
    steps = np.diff(bounds)
    return not len(steps) or 0 <= int(steps.min()) <= int(steps.max()) <= longest


def _check_header(url: str, dtype: type, shape: tuple[int, ...]) -> None:
    found = storage.read_npy_header(url)
    if found != (np.dtype(dtype), shape):
        raise UserError(
            f"{url}: holds {found[0]} of shape {list(found[1])} where {np.dtype(dtype)} of {list(shape)} belongs"
        )


def _check_tokens(url: str, values: np.ndarray, feature: Feature) -> None:
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < feature.size:
        raise UserError(f"{url}: holds values outside 0..{feature.size - 1}, the manifest's vocabulary")


def _check_numbers(url: str, values: np.ndarray, feature: Feature) -> None:
    # Block by block: what is made of the column would take as much memory as itself.
    for start in range(0, len(values), _LOOK_ROWS):
        part = values[start : start + _LOOK_ROWS]
        if np.isinf(part).any() or (np.isnan(part).any() and not feature.missing):
            raise UserError(f"{url}: holds values that are not finite")


def _check(url: str, array: np.ndarray, dtype: type, rows: int) -> None:
    if array.dtype != dtype or len(array) != rows:
        raise UserError(f"{url}: holds {len(array)} {array.dtype} rows where {rows} {np.dtype(dtype)} ones belong")
