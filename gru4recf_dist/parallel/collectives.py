"""Collectives on rows of tensors, differentiable where training needs it. With one rank nothing is sent.

Backward of every function is the transposed exchange: all-to-all gives the rows back, all-gather reduce-scatters. The
functions are written on `torch.distributed`'s public calls, since the functional ones change names between versions
and abort on uneven sizes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

# torch 2.13 renamed both and warns about the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_to_all(rows: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> torch.Tensor:
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
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, receive, send, group):
        ctx.receive, ctx.send, ctx.group = receive, send, group
        return all_to_all(rows, receive, send, group)

    @staticmethod
    def backward(ctx, gradient):
        return all_to_all(gradient, ctx.send, ctx.receive, ctx.group), None, None, None


def differentiable_all_to_all(
    rows: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """`all_to_all` whose backward sends the rows' gradients back to where the rows came from."""
    if group.size() == 1:
        return rows
    return _AllToAll.apply(rows, receive, send, group)


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    if rows.shape[0] == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def _own_places(counts: list[int], device: torch.device) -> torch.Tensor:
    """Indices of the real rows among W padded shares of max(counts) rows."""
    longest = max(counts)
    return torch.cat([torch.arange(count, device=device) + rank * longest for rank, count in enumerate(counts)])


def all_gather_rows(rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's rows, one after the other.

    Args:
        rows: [counts[this rank], ...].
        counts: rows of each rank; every rank must know them all.

    Returns:
        [sum(counts), ...], the same on every rank.
    """
    if group.size() == 1:
        return rows
    longest = max(counts)
    gathered = rows.new_empty(longest * len(counts), *rows.shape[1:])
    _all_gather_single(gathered, _padded(rows, longest), group=group)
    if min(counts) == longest:
        return gathered
    return gathered[_own_places(counts, rows.device)]


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts, group):
        ctx.counts, ctx.group = counts, group
        return all_gather_rows(rows, counts, group)

    @staticmethod
    def backward(ctx, gradient):
        counts, longest = ctx.counts, max(ctx.counts)
        if min(counts) != longest:
            padded = gradient.new_zeros(longest * len(counts), *gradient.shape[1:])
            padded[_own_places(counts, gradient.device)] = gradient
            gradient = padded
        share = gradient.new_empty(longest, *gradient.shape[1:])
        _reduce_scatter_single(share, gradient.contiguous(), group=ctx.group)
        return share[: counts[ctx.group.rank()]], None, None


def differentiable_all_gather_rows(rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """`all_gather_rows` whose backward sums over the ranks the gradients of this rank's rows."""
    if group.size() == 1:
        return rows
    return _AllGatherRows.apply(rows, counts, group)


def exchange_counts(counts: np.ndarray, group: dist.ProcessGroup) -> list[int]:
    """How many rows each rank will send here, given how many this rank sends to each. ``group`` must be on the CPU."""
    if group.size() == 1:
        return counts.tolist()
    received = torch.empty(len(counts), dtype=torch.int64)
    dist.all_to_all_single(received, torch.from_numpy(counts.astype(np.int64)), group=group)
    return received.tolist()


def gather_counts(count: int, group: dist.ProcessGroup) -> list[int]:
    """One integer of every rank. ``group`` must be on the CPU."""
    if group.size() == 1:
        return [count]
    gathered = torch.empty(group.size(), dtype=torch.int64)
    _all_gather_single(gathered, torch.tensor([count]), group=group)
    return gathered.tolist()


class PendingSum:
    """A sum over the ranks that is on its way. ``group`` must be on the CPU."""

    def __init__(self, values: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._values = values
        self._work = dist.all_reduce(values, group=group, async_op=True) if group.size() > 1 else None

    def result(self) -> list[float]:
        """The sums; waits for them the first time."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._values.tolist()


def max_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Largest in place over the ranks, and return it."""
    if group.size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum in place over the ranks, and return it."""
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values
