"""Rows of all ranks put together while other work goes on, in the forward and in backward.

Between the two ends of a gathering lies what may go on meanwhile. The forward begins at one end and waits at the other.
Backward comes from there: it begins to send the gradients, goes through what was computed in between, as autograd takes
the newest operations first, and waits where the gathering began.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from gru4recf_dist.parallel import traffic
from gru4recf_dist.parallel.collectives import (
    begin_all_gather,
    differentiable_all_to_all,
    own_places,
    row_bytes,
    unpadded,
)
from gru4recf_dist.parallel.whereabouts import HERE

# Share of the rows that may be sent as padding; see `Gathering`.
PADDING = 0.1

# torch 2.13 renamed it and warns about the old name.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gathering:
    """Every rank's rows, one after the other; differentiable: the gradients of a rank's rows are summed over the ranks.

    It is under way from its making to `rows`. Every rank makes its gatherings, and asks for their rows, in one order.

    Args:
        rows: [counts[this rank], ...].
        counts: rows of each rank; every rank must know them all.
        balanced: where padding uneven counts to the longest would add more than `PADDING` to what is sent, ranks first
            hand over rows until all have as many. That costs one more exchange, but a row of it goes to one rank only.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        counts: list[int],
        group: dist.ProcessGroup,
        purpose: str = "other",
        balanced: bool = False,
    ) -> None:
        self._transfer = None
        if group.size() > 1:
            if balanced:
                counts, moves = gather_shares(counts)
                if moves is not None:
                    mine = group.rank()
                    send, receive = moves[mine].tolist(), moves[:, mine].tolist()
                    rows = differentiable_all_to_all(rows, receive, send, group, purpose)
            self._transfer = _Transfer(counts, group, purpose)
            rows = _Begin.apply(rows, self._transfer)
        self._rows = rows

    def rows(self) -> torch.Tensor:
        """[sum(counts), ...], the same on every rank; waits for those that have not arrived."""
        return self._rows if self._transfer is None else _Wait.apply(self._rows, self._transfer)


def gather_shares(counts: list[int]) -> tuple[list[int], np.ndarray | None]:
    """How a balanced `Gathering` deals with ``counts``.

    Returns:
        rows of each rank in the gathering; and int64 [W, W], how many each rank hands to each before it, None if none.
    """
    world, total = len(counts), sum(counts)
    if world * max(counts) <= (1.0 + PADDING) * total:
        return counts, None
    # Contiguous parts of the same order, so that what is gathered stays in it.
    before = np.concatenate([[0], np.cumsum(counts)])
    after = np.minimum(np.arange(world + 1) * -(-total // world), total)
    starts, ends = np.maximum.outer(before[:-1], after[:-1]), np.minimum.outer(before[1:], after[1:])
    return np.diff(after).tolist(), np.maximum(ends - starts, 0)


class _Transfer:
    """What is under way: rows, and later their gradients."""

    def __init__(self, counts: list[int], group: dist.ProcessGroup, purpose: str) -> None:
        self.counts, self.group, self.purpose = counts, group, purpose
        self._mine, self._longest = counts[group.rank()], max(counts)
        self._work: dist.Work | None = None
        # Where this rank's gradients will be.
        self._share: torch.Tensor | None = None

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns where the rows will be: each rank's, padded to the longest."""
        gathered, self._work = begin_all_gather(rows, self.counts, self.group, self.purpose)
        return gathered

    def receive(self, gathered: torch.Tensor) -> torch.Tensor:
        self._finish(self.purpose)
        rows = unpadded(gathered, self.counts)
        # Not the very tensor that came in, which autograd would take for one that was changed.
        return rows.view_as(rows)

    def send_gradients(self, gradient: torch.Tensor) -> None:
        world = len(self.counts)
        if gradient.is_cuda:
            if min(self.counts) != self._longest:
                spread = gradient.new_zeros(self._longest * world, *gradient.shape[1:])
                spread[own_places(self.counts, gradient.device)] = gradient
                gradient = spread
            self._share = gradient.new_empty(self._longest, *gradient.shape[1:])
            traffic.counts().add(self._back, (world - 1) * self._longest * row_bytes(gradient))
            self._work = _reduce_scatter_single(self._share, gradient.contiguous(), group=self.group, async_op=True)
            return
        # gloo makes an all-reduce of a reduce-scatter: twice the bytes.
        self._share = gradient.new_empty(self._mine * world, *gradient.shape[1:])
        traffic.counts().add(self._back, (sum(self.counts) - self._mine) * row_bytes(gradient))
        self._work = dist.all_to_all_single(
            self._share, gradient.contiguous(), [self._mine] * world, self.counts, group=self.group, async_op=True
        )

    def receive_gradients(self) -> torch.Tensor:
        self._finish(self._back)
        share, self._share = self._share, None
        if share.is_cuda:
            return share[: self._mine]
        return share.view(len(self.counts), self._mine, *share.shape[1:]).sum(dim=0)

    @property
    def _back(self) -> str:
        return traffic.GRADIENTS_OF.get(self.purpose, self.purpose)

    def _finish(self, purpose: str) -> None:
        with HERE.waiting(purpose):
            self._work.wait()
        self._work = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, transfer):
        ctx.transfer = transfer
        return transfer.send(rows)

    @staticmethod
    def backward(ctx, _):
        return ctx.transfer.receive_gradients(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gathered, transfer):
        ctx.transfer, ctx.shape = transfer, gathered.shape
        return transfer.receive(gathered)

    @staticmethod
    def backward(ctx, gradient):
        ctx.transfer.send_gradients(gradient)
        # Only leads autograd to where they are waited for.
        return gradient.new_zeros(()).expand(ctx.shape), None
