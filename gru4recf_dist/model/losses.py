"""Losses over one target and many candidates, in blocks of rows so that no [T, K] matrix is ever kept.

Shapes: T queries, U candidate rows, D embedding size. Logits are float32 or float64 like the queries.
"""

from __future__ import annotations

import math

import torch

NOTHING = -1

_LOG2_E = math.log2(math.e)


class _BlockwiseLogSumExp(torch.autograd.Function):
    """log sum_j exp(q_i . r_j + bias_j), without column ``exclude[i]``; logits are made again in backward.

    Within, everything is in powers of 2: torch's exp2 takes a third of the time of its exp on the CPU, where that is
    the most that is not a matrix product.
    """

    @staticmethod
    def forward(ctx, queries, rows, bias, exclude, block_rows):
        result = queries.new_empty(len(queries))
        scaled = queries.new_zeros(len(rows)) if bias is None else bias * _LOG2_E
        room = queries.new_empty(min(block_rows, len(queries)), len(rows))
        for start in range(0, len(queries), block_rows):
            block = slice(start, start + block_rows)
            logits = _logits(room, queries[block], rows, scaled, exclude, block)
            # Where all candidates are excluded the largest is -inf, which minus itself would be NaN.
            largest = logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)
            torch.sum(logits.sub_(largest[:, None]).exp2_(), dim=1, out=result[block])
            result[block].log2_().add_(largest)
        ctx.save_for_backward(queries, rows, scaled, exclude, result)
        ctx.block_rows = block_rows
        return result / _LOG2_E

    @staticmethod
    def backward(ctx, gradient):
        queries, rows, scaled, exclude, result = ctx.saved_tensors
        # The rows' gradient is transposed: so its product reads the shares in the order in which they lie.
        grad_queries, grad_rows = torch.empty_like(queries), queries.new_zeros(rows.T.shape)
        room = queries.new_empty(min(ctx.block_rows, len(queries)), len(rows))
        for start in range(0, len(queries), ctx.block_rows):
            block = slice(start, start + ctx.block_rows)
            logits = _logits(room, queries[block], rows, scaled, exclude, block)
            # A query whose candidates are all excluded has a sum of 0: its share of every row is 0, not NaN.
            finite = result[block].clamp(min=torch.finfo(result.dtype).min)
            share = logits.sub_(finite[:, None]).exp2_()
            # The gradient scales the narrow factors, not the shares: one pass less over the block.
            torch.mm(share, rows, out=grad_queries[block]).mul_(gradient[block, None])
            grad_rows.addmm_((queries[block] * gradient[block, None]).T, share)
        return grad_queries, grad_rows.T, None, None, None


def _logits(room, queries, rows, scaled_bias, exclude, block):
    """Logits times log2(e), in ``room``: memory that each block got anew would have to be mapped anew."""
    logits = torch.addmm(scaled_bias, queries * _LOG2_E, rows.T, out=room[: len(queries)])
    if exclude is not None:
        # Without asking which rows are masked: that would make the host wait for the device.
        column = exclude[block, None]
        place = column.clamp(min=0)
        kept = logits.gather(1, place)
        logits.scatter_(1, place, torch.where(column != NOTHING, -torch.inf, kept))
    return logits


def blockwise_logsumexp(
    queries: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
    block_rows: int = 256,
) -> torch.Tensor:
    """log of the sum over the candidates of exp(score), [T]; -inf where there is no candidate.

    Differentiable in ``queries`` and ``rows``. Memory: block_rows x U logits.

    Args:
        queries: [T, D].
        rows: [U, D].
        bias: [U], added to the scores of each candidate.
        exclude: int64 [T], a column to leave out for each query, or `NOTHING`.
    """
    if not len(rows):
        # Keeps both inputs in the graph, so that every rank's backward runs the same collectives.
        return (queries.sum(dim=1) + rows.sum()) * 0.0 - torch.inf
    return _BlockwiseLogSumExp.apply(queries, rows, bias, exclude, block_rows)


def sampled_softmax(
    queries: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    correction: torch.Tensor,
    exclude: torch.Tensor,
    positive_correction: torch.Tensor | None = None,
    block_rows: int = 256,
) -> torch.Tensor:
    """Cross-entropy of each target against sampled negatives, [T].

    Negatives drawn K times with replacement from q stand for all items: each distinct one has the logit
    s_j - log(K q_j) + log(count_j), so that the sum over them estimates the sum over all items (importance sampling;
    Bengio & Senécal, 2008). The target itself is the one exact term and takes no correction.

    Args:
        positives: [T, D], candidate row of each target.
        negatives: [U, D], candidate rows of the distinct negatives.
        correction: [U], log(count_j) - log(K q_j).
        exclude: int64 [T], the column of ``negatives`` that is the target itself, or `NOTHING`.
        positive_correction: [T], subtracted from the target's score (``logq: classic``).
    """
    positive = (queries * positives).sum(dim=-1)
    if positive_correction is not None:
        positive = positive - positive_correction
    rest = blockwise_logsumexp(queries, negatives, correction, exclude, block_rows)
    # -log(e^p / (e^p + e^rest)), stable for either sign of the difference
    # (beyond torch's default threshold of 20 softplus(x) = x would be off by 2e-9, too much in float64)
    return torch.nn.functional.softplus(rest - positive, threshold=40.0)


def columns_of(targets: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Where each target stands among the ascending distinct ``ids`` [U], or `NOTHING`; int64 [T].

    By binary search, not by a [T, U] comparison.
    """
    if not ids.numel():
        return torch.full_like(targets, NOTHING)
    places = torch.searchsorted(ids, targets).clamp(max=len(ids) - 1)
    return torch.where(ids[places] == targets, places, NOTHING)
