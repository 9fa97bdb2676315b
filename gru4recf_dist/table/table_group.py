"""All sharded tables of a model: that of the item rows, and those that only outputs have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch.distributed.tensor import DTensor

from gru4recf_dist.table.item_table import ShardedItemTable, apply_gradients


class TableGroup:
    """Tables by name, of the same rows over the same ranks, trained and saved together.

    Args:
        tables: by name, which is the first part of their tensors' names in a checkpoint.
    """

    def __init__(self, tables: dict[str, ShardedItemTable]) -> None:
        self._tables = tables

    def __getitem__(self, name: str) -> ShardedItemTable:
        return self._tables[name]

    def __iter__(self) -> Iterator[ShardedItemTable]:
        return iter(self._tables.values())

    @property
    def names(self) -> list[str]:
        return list(self._tables)

    @property
    def own(self) -> range:
        """Global rows of this rank."""
        return next(iter(self)).own

    # -- training ----------------------------------------------------------------------------------------------------

    def freeze(self, names: Collection[str]) -> None:
        """Freeze the tables of ``names`` and no others."""
        for name, table in self._tables.items():
            table.frozen = name in names

    def apply_gradients(self, lr: float, scale: float = 1.0) -> torch.Tensor:
        """As `item_table.apply_gradients`, of all."""
        return apply_gradients(list(self), lr, scale)

    def discard_gradients(self) -> None:
        """Forget the gradients of the rows read since the last update."""
        for table in self:
            table.discard_gradients()

    def has_broken_gradient(self) -> torch.Tensor:
        """Whether a gradient of this rank's rows is not finite, bool [] on the encoder's device."""
        return torch.stack([table.has_broken_gradient() for table in self]).any()

    def broken_gradients(self) -> list[str]:
        """Names of the tables with such a gradient."""
        return [name for name, table in self._tables.items() if bool(table.has_broken_gradient())]

    def has_broken_row(self) -> bool:
        """Whether a value of this rank's rows is not finite."""
        return any(table.has_broken_row() for table in self)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, DTensor]:
        """Rows and their optimizers' state, `TABLE.TENSOR`, sharing memory with the tables: loading fills them."""
        return self._named(table.state_dict() for table in self)

    def weights(self) -> dict[str, DTensor]:
        """The rows alone, of `state_dict`."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.endswith(".weight")}

    def host_copy(self) -> dict[str, DTensor]:
        """`state_dict` as it is now, in the host's memory: what the next updates change is not in it."""
        return self._named(table.host_copy() for table in self)

    def _named(self, states: Iterable[dict[str, DTensor]]) -> dict[str, DTensor]:
        pairs = zip(self._tables, states, strict=True)
        return {f"{name}.{key}": tensor for name, state in pairs for key, tensor in state.items()}

    @property
    def steps(self) -> dict[str, int]:
        """Updates made of each table, by name."""
        return {name: table.optimizer.steps for name, table in self._tables.items()}

    def set_steps(self, steps: dict[str, int]) -> None:
        """Take over what `steps` gave."""
        for name, table in self._tables.items():
            table.optimizer.steps = steps[name]
