"""The sharded item table: every rank holds a contiguous share of the rows and nothing else of the table's size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from gru4recf_dist.config import TableConfig
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel import collectives, traffic, transfers
from gru4recf_dist.parallel.gathering import Gathering
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.partition import Routing, RowPartition
from gru4recf_dist.table.row_optimizers import make_row_optimizer

# Rows are initialised in blocks of this many, each from its own generator. Part of what a seed means.
_INIT_BLOCK_ROWS = 1024
# No table has as many blocks: its number cannot be taken for one.
_STREAM = 0x6F7574707574


def initial_rows(
    seed: int,
    rows: range,
    dim: int,
    std: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    stream: int | None = None,
) -> torch.Tensor:
    """Normal(0, std) rows [len(rows), dim] that depend on (seed, global row) only, not on who asks for them.

    They are made block by block, in place: no second copy of them exists.

    Args:
        stream: keeps the rows of several tables of one seed apart.
    """
    key = (seed,) if stream is None else (seed, _STREAM + stream)
    result = torch.empty(len(rows), dim, dtype=dtype, device=device)
    for block in range(rows.start // _INIT_BLOCK_ROWS, -(-rows.stop // _INIT_BLOCK_ROWS)):
        first = block * _INIT_BLOCK_ROWS
        values = np.random.default_rng((*key, block)).standard_normal((_INIT_BLOCK_ROWS, dim), dtype=np.float32)
        start, stop = max(first, rows.start), min(first + _INIT_BLOCK_ROWS, rows.stop)
        part = torch.from_numpy(values[start - first : stop - first] * np.float32(std))
        result[start - rows.start : stop - rows.start] = part
    return result


def choose_table_device(name: str, encoder: torch.device) -> torch.device:
    """Where the table lives: `auto` is beside the encoder.

    Raises:
        UserError: `cuda` was asked for, and the encoder is not there.
    """
    if name == "cuda" and encoder.type != "cuda":
        raise UserError("table.device: cuda was asked for, but the encoder is on the CPU (device)")
    return torch.device("cpu") if name == "cpu" else encoder


def xavier_normal_std(rows: int, dim: int) -> float:
    """Standard deviation of `xavier_normal_` for a [rows, dim] matrix (Glorot & Bengio, AISTATS 2010)."""
    return (2.0 / (rows + dim)) ** 0.5


@dataclass(frozen=True)
class Exchange:
    """A step's routing after the ids have travelled, and how what is asked for travels back.

    Attributes:
        routing: what this rank asked for.
        send, receive: ids that go to, and come from, each rank.
        asked: int64 [sum(receive)], on the CPU: this rank's rows that were asked for, in rank order.
        device: the table's.
        group: over which tensors of that device travel.
    """

    routing: Routing
    send: list[int]
    receive: list[int]
    asked: torch.Tensor
    device: torch.device
    group: dist.ProcessGroup

    @cached_property
    def local(self) -> torch.Tensor:
        """``asked`` on the table's device."""
        return transfers.move(self.asked, self.device)


class ShardedItemTable:
    """``[rows, dim]`` over the ranks, with differentiable access and sparse updates.

    The rows that a step reads are leaves of its graph: after ``backward`` the owners hold the gradients of their rows,
    summed over the ranks, and `apply_gradients` updates just those rows. With ``config.device`` `cpu`, rows and
    optimizer state are in the host's memory; what is read arrives on the encoder's device all the same.

    Args:
        rows: N+1, padding row 0 included.
        seed: decides the initial rows, together with their global numbers.
        std: standard deviation of the initial rows; default: Xavier for the whole table.
        training: False for a table that is only read: it has no optimizer, and none of its state.
        stream: as in `initial_rows`.

    Attributes:
        frozen: rows are read without becoming leaves of a graph; nothing is sent back, and nothing updated.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        ranks: Ranks,
        config: TableConfig,
        seed: int,
        std: float | None = None,
        dtype: torch.dtype = torch.float32,
        training: bool = True,
        stream: int | None = None,
    ) -> None:
        self.rows, self.dim, self.ranks, self.config = rows, dim, ranks, config
        self.partition = RowPartition(rows, ranks.world)
        self.own = self.partition.range_of(ranks.rank)
        std = xavier_normal_std(rows, dim) if std is None else std
        self.device = choose_table_device(config.device, ranks.device)
        self.weight = initial_rows(seed, self.own, dim, std, dtype, self.device, stream)
        self.optimizer = make_row_optimizer(self.weight, config) if training else None
        self.frozen = False
        self._touched: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def group(self) -> dist.ProcessGroup:
        """Over which tensors of the table's device travel: NCCL takes none of the host's memory."""
        return self.ranks.table if self.device.type == self.ranks.device.type else self.ranks.host

    # -- reading -----------------------------------------------------------------------------------------------------

    def exchange(self, routing: Routing, host: dist.ProcessGroup | None = None) -> Exchange:
        """Send the distinct ids to their owners, on the CPU, so that no device is waited for.

        Args:
            host: the group to use; default: `Ranks.host`.
        """
        host = host or self.ranks.host
        receive, send = collectives.exchange_counts(routing.send, host), routing.send.tolist()
        asked = collectives.all_to_all(torch.from_numpy(routing.ids), receive, send, host, "ids")
        return Exchange(routing, send, receive, asked - self.own.start, self.device, self.group)

    def lookup(self, exchange: Exchange) -> torch.Tensor:
        """Rows of the routing's distinct ids, [U, D]; differentiable if gradients are enabled."""
        traffic.TOTAL.looked_up += len(exchange.local)
        owned = self._leaf(exchange.local)
        rows = collectives.differentiable_all_to_all(owned, exchange.send, exchange.receive, self.group, "rows")
        return transfers.differentiable_move(rows, self.ranks.device)

    def gather(self, ids: np.ndarray) -> Gathering:
        """Rows of the same distinct, ascending ``ids`` on every rank, [U, D] on the table's device, on their way.

        They are differentiable if gradients are enabled. No id travels: every rank contributes the rows it owns, and
        their order is that of the ranks.
        """
        counts = self.partition.split(ids)
        start = int(counts[: self.ranks.rank].sum())
        mine = ids[start : start + int(counts[self.ranks.rank])]
        owned = self._leaf(torch.from_numpy(mine - self.own.start).to(self.weight.device))
        return Gathering(owned, counts.tolist(), self.group, "negatives", balanced=True)

    def candidates(self) -> torch.Tensor:
        """This rank's item rows (padding row left out) as one leaf, [own items, D], for losses over every item."""
        first = 1 if self.own.start == 0 and len(self.own) else 0
        rows = self._leaf(torch.arange(first, len(self.own), device=self.weight.device))
        return transfers.differentiable_move(rows, self.ranks.device)

    def read(self, local: torch.Tensor) -> torch.Tensor:
        """This rank's rows ``local`` [n] as float32 [n, D] on the encoder's device; never differentiable."""
        return transfers.move(self.weight.index_select(0, local.to(self.device)), self.ranks.device).float()

    def tiles(self, tile_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """This rank's item rows, ``tile_rows`` at a time: (global id of the first, [n, D] on the encoder's device)."""
        for start in range(max(self.own.start, 1), self.own.stop, tile_rows):
            stop = min(start + tile_rows, self.own.stop)
            yield start, transfers.move(self.weight[start - self.own.start : stop - self.own.start], self.ranks.device)

    def has_broken_row(self) -> bool:
        """Whether a value of this rank's rows is not finite."""
        if not self.weight.numel():
            return False
        # Both are NaN if a value is; `isfinite` of all rows would make several tensors of the table's size.
        return not bool(torch.stack(self.weight.aminmax()).isfinite().all())

    def _leaf(self, local: torch.Tensor) -> torch.Tensor:
        rows = self.weight.index_select(0, local)
        if torch.is_grad_enabled() and not self.frozen:
            rows.requires_grad_()
            self._touched.append((local, rows))
        return rows

    # -- updating ----------------------------------------------------------------------------------------------------

    def has_broken_gradient(self) -> torch.Tensor:
        """Whether a gradient of this rank's rows is not finite, bool [] on the encoder's device."""
        broken = [(~rows.grad.isfinite()).any() for _, rows in self._touched if rows.grad is not None]
        found = torch.stack(broken).any() if broken else torch.zeros((), dtype=torch.bool, device=self.device)
        return found.to(self.ranks.device)

    def discard_gradients(self) -> None:
        """Forget the gradients of the rows read since the last update."""
        self._touched.clear()

    def apply_gradients(self, lr: float, scale: float = 1.0) -> torch.Tensor:
        """`apply_gradients` of this table alone."""
        return apply_gradients([self], lr, scale)

    def take_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct local rows read since the last call, int64 [U], and the sums of their gradients [U, D]."""
        touched = [(local, rows.grad) for local, rows in self._touched if rows.grad is not None]
        self._touched.clear()
        if not touched:
            return self.weight.new_empty(0, dtype=torch.int64), self.weight.new_empty(0, self.dim)
        rows, places = torch.unique(torch.cat([local for local, _ in touched]), return_inverse=True)
        gradient = self.weight.new_zeros(len(rows), self.dim)
        gradients = [grad for _, grad in touched]
        gradient.index_add_(0, places, gradients[0] if len(gradients) == 1 else torch.cat(gradients))
        return rows, gradient

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, DTensor]:
        """The rows and their optimizer state as DTensors that share memory with the table: loading fills it."""
        return {name: self._as_dtensor(tensor, self._mesh) for name, tensor in self._tensors().items()}

    def host_copy(self) -> dict[str, DTensor]:
        """`state_dict` as it is now, in the host's memory: what the next updates change is not in it."""
        mesh = DeviceMesh.from_group(self.ranks.host, "cpu")
        return {name: self._as_dtensor(tensor.to("cpu", copy=True), mesh) for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight, **(self.optimizer.state if self.optimizer else {})}

    @cached_property
    def _mesh(self) -> DeviceMesh:
        beside = self.device.type == self.ranks.device.type
        return DeviceMesh.from_group(self.ranks.dense if beside else self.ranks.host, self.device.type)

    def _as_dtensor(self, local: torch.Tensor, mesh: DeviceMesh) -> DTensor:
        shape = torch.Size([self.rows, *local.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def apply_gradients(tables: Sequence[ShardedItemTable], lr: float, scale: float = 1.0) -> torch.Tensor:
    """Update the rows read since the last call with the mean over the ranks of their gradients.

    Every rank's loss is scaled by W (see `training_step`), so the exchanged sums are divided by W here. A frozen table
    is left as it is, its optimizer's state and step count too.

    Args:
        tables: of one configuration. Clipping bounds the norm over all of them.
        scale: a further factor on the loss, which is divided out.

    Returns:
        the squared norm of this rank's share of the gradients, before clipping, on the encoder's device.
    """
    first = tables[0]
    squared = torch.zeros((), dtype=first.weight.dtype, device=first.device)
    updates = []
    for table in tables:
        if table.frozen:
            continue
        rows, gradient = table.take_gradients()
        gradient.div_(table.ranks.world * scale)
        squared += gradient.square().sum()
        updates.append((table, rows, gradient))
    if first.config.clip is not None:
        norm = collectives.sum_over_ranks(squared.clone(), first.group, "loss").sqrt()
        factor = first.config.clip / norm.clamp(min=first.config.clip)
        updates = [(table, rows, gradient * factor) for table, rows, gradient in updates]
    for table, rows, gradient in updates:
        table.optimizer.step(rows, gradient, lr)
    return squared.to(first.ranks.device)
