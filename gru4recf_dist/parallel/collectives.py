"""Collectives on rows of tensors, differentiable where training needs it. With one rank nothing is sent.

Backward of an all-to-all gives the rows back; the all-gather that has a backward is in `gathering`. The functions are
written on `torch.distributed`'s public calls, since the functional ones change names between versions and abort on
uneven sizes. What a rank sends is counted in `traffic.counts`, under the ``purpose`` that the caller names.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from gru4recf_dist.parallel import traffic
from gru4recf_dist.parallel.whereabouts import HERE

# torch 2.13 renamed it and warns about the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_to_all(
    rows: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup, purpose: str = "other"
) -> torch.Tensor:
    """Send ``send[r]`` rows to every rank r, in order, and return what arrives.

    Args:
        rows: [sum(send), ...].
        receive: rows that each rank sends here.

    Returns:
        [sum(receive), ...], in the order of the ranks.
    """
    if group.size() == 1:
        return rows
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    traffic.counts().add(purpose, (sum(send) - send[group.rank()]) * row_bytes(rows))
    with HERE.waiting(purpose):
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, receive, send, group, purpose):
        ctx.receive, ctx.send, ctx.group, ctx.purpose = receive, send, group, purpose
        return all_to_all(rows, receive, send, group, purpose)

    @staticmethod
    def backward(ctx, gradient):
        purpose = traffic.GRADIENTS_OF.get(ctx.purpose, ctx.purpose)
        return all_to_all(gradient, ctx.send, ctx.receive, ctx.group, purpose), None, None, None, None


def differentiable_all_to_all(
    rows: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup, purpose: str = "other"
) -> torch.Tensor:
    """`all_to_all` whose backward sends the rows' gradients back to where the rows came from."""
    if group.size() == 1:
        return rows
    return _AllToAll.apply(rows, receive, send, group, purpose)


def row_bytes(rows: torch.Tensor) -> int:
    """Of one row."""
    return math.prod(rows.shape[1:]) * rows.element_size()


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    if rows.shape[0] == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def own_places(counts: list[int], device: torch.device) -> torch.Tensor:
    """Indices of the real rows among W padded shares of max(counts) rows."""
    longest = max(counts)
    return torch.cat([torch.arange(count, device=device) + rank * longest for rank, count in enumerate(counts)])


def begin_all_gather(
    rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup, purpose: str
) -> tuple[torch.Tensor, dist.Work]:
    """As `all_gather_rows`, on its way: where each rank's rows, padded to the longest, will be; for `unpadded` then."""
    longest = max(counts)
    gathered = rows.new_empty(longest * len(counts), *rows.shape[1:])
    traffic.counts().add(purpose, (len(counts) - 1) * longest * row_bytes(rows))
    return gathered, all_gather_single(gathered, _padded(rows, longest), group=group, async_op=True)


def unpadded(gathered: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows of `begin_all_gather` that are any rank's."""
    return gathered if min(counts) == max(counts) else gathered[own_places(counts, gathered.device)]


def all_gather_rows(
    rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup, purpose: str = "other"
) -> torch.Tensor:
    """Every rank's rows, one after the other.

    Args:
        rows: [counts[this rank], ...].
        counts: rows of each rank; every rank must know them all.

    Returns:
        [sum(counts), ...], the same on every rank.
    """
    if group.size() == 1:
        return rows
    with HERE.waiting(purpose):
        gathered, work = begin_all_gather(rows, counts, group, purpose)
        work.wait()
    return unpadded(gathered, counts)


def exchange_counts(counts: np.ndarray, group: dist.ProcessGroup) -> list[int]:
    """How many rows each rank will send here, given how many this rank sends to each. ``group`` must be on the CPU."""
    if group.size() == 1:
        return counts.tolist()
    received = torch.empty(len(counts), dtype=torch.int64)
    traffic.counts().add("counts", (len(counts) - 1) * received.element_size())
    with HERE.waiting("counts"):
        dist.all_to_all_single(received, torch.from_numpy(counts.astype(np.int64)), group=group)
    return received.tolist()


def gather_counts(count: int, group: dist.ProcessGroup) -> list[int]:
    """One integer of every rank. ``group`` must be on the CPU."""
    if group.size() == 1:
        return [count]
    gathered = torch.empty(group.size(), dtype=torch.int64)
    traffic.counts().add("counts", (group.size() - 1) * gathered.element_size())
    with HERE.waiting("counts"):
        all_gather_single(gathered, torch.tensor([count]), group=group)
    return gathered.tolist()


class PendingSum:
    """A sum over the ranks that is on its way. ``group`` must be on the CPU."""

    def __init__(self, values: torch.Tensor, group: dist.ProcessGroup, purpose: str = "loss") -> None:
        self._values, self._purpose = values, purpose
        traffic.counts().add_all_reduce(purpose, values.nbytes, group.size())
        self._work = dist.all_reduce(values, group=group, async_op=True) if group.size() > 1 else None

    def result(self) -> list[float]:
        """The sums; waits for them the first time."""
        if self._work is not None:
            with HERE.waiting(self._purpose):
                self._work.wait()
            self._work = None
        return self._values.tolist()


def max_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Largest in place over the ranks, and return it."""
    traffic.counts().add_all_reduce("other", values.nbytes, group.size())
    if group.size() > 1:
        with HERE.waiting("other"):
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def gather_vector(values: np.ndarray, group: dist.ProcessGroup) -> np.ndarray:
    """A float64 vector [n] of every rank, [W, n]. ``group`` must be on the CPU."""
    rows = torch.from_numpy(values)[None]
    return all_gather_rows(rows, [1] * group.size(), group).numpy()


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup, purpose: str = "other") -> torch.Tensor:
    """Sum in place over the ranks, and return it."""
    traffic.counts().add_all_reduce(purpose, values.nbytes, group.size())
    if group.size() > 1:
        with HERE.waiting(purpose):
            dist.all_reduce(values, group=group)
    return values
