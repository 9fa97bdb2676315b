"""The ranking losses of GRU4Rec: pairwise, and the listwise ones that the strongest negatives decide.

BPR and TOP1 are those of Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks" (ICLR 2016);
BPR-max and TOP1-max those of Hidasi & Karatzoglou, "Recurrent Neural Networks with Top-k Gains for Session-based
Recommendations" (CIKM 2018), section 3. With r the target's score, r_j those of the N negatives, s_j the softmax of the
r_j over the negatives and S the logistic function, the loss of a position is

    bpr       -1/N sum_j log S(r - r_j)
    bpr_max   -log sum_j s_j S(r - r_j) + regularization * sum_j s_j r_j^2
    top1      1/N sum_j [S(r_j - r) + S(r_j^2)]
    top1_max  sum_j s_j [S(r_j - r) + S(r_j^2)]

The authors' code passes the scores through an activation first, and their published settings of BPR-max all have an
ELU there (https://github.com/hidasib/GRU4Rec, `final_act`; in its PyTorch port `elu_param`): with alpha > 0, r and r_j
above stand for ELU_alpha(r) and ELU_alpha(r_j). It grows with the score, so rankings do not need it.

A negative that was drawn c times counts as c negatives. One that is the target itself is left out, however often and by
whom it was drawn. The authors' code masks only the position's own place in the batch, and that in s_j alone: in the
means it adds a constant and is counted, and further copies of the target (of another session, or sampled) stay
negatives. Where no negative is left the loss is 0.

Shapes: T queries, U distinct negatives, D size of a query; b rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import elu, logsigmoid

from gru4recf_dist.model.losses import NOTHING

# Of a block: target scores [b, 1], negative scores [b, U], log of the negatives' weights [b, U] (-inf: left out), each
# row's summing to 1 but where all are left out -> losses [b].
_Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ranking_loss(
    name: str,
    queries: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    counts: torch.Tensor,
    exclude: torch.Tensor,
    regularization: float = 0.0,
    elu_alpha: float = 0.0,
    block_rows: int = 256,
) -> torch.Tensor:
    """The loss ``name`` of each query, [T]; differentiable in queries, positives and negatives.

    Scores exist for ``block_rows`` queries at a time, and are made again in backward.

    Args:
        name: `bpr`, `bpr_max`, `top1` or `top1_max`.
        positives: [T, D], candidate row of each target.
        negatives: [U, D], candidate rows of the distinct negatives.
        counts: [U], how often each was drawn.
        exclude: int64 [T], the column of ``negatives`` that is the target itself, or `NOTHING`.
        regularization: of `bpr_max`.
        elu_alpha: of the ELU that scores pass first; 0: they stay as they are.
    """
    formulas: dict[str, _Formula] = {
        "bpr": _bpr,
        "bpr_max": lambda *scores: _bpr_max(*scores, regularization),
        "top1": _top1,
        "top1_max": _top1_max,
    }
    if not len(negatives):
        # Keeps every input in the graph, so that every rank's backward runs the same collectives.
        return ((queries * positives).sum(dim=1) + negatives.sum()) * 0.0
    log_counts = counts.to(queries).log()
    return _Blockwise.apply(formulas[name], queries, positives, negatives, log_counts, exclude, elu_alpha, block_rows)


def _bpr(target: torch.Tensor, scores: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    return -(log_weights.exp() * logsigmoid(target - scores)).sum(dim=1)


def _bpr_max(
    target: torch.Tensor, scores: torch.Tensor, log_weights: torch.Tensor, regularization: float
) -> torch.Tensor:
    log_shares = _log_shares(scores, log_weights)
    # In logarithms: where the target is far below, every S is 0 in float32.
    gain = torch.logsumexp(log_shares + logsigmoid(target - scores), dim=1)
    return regularization * (log_shares.exp() * scores.square()).sum(dim=1) - gain


def _top1(target: torch.Tensor, scores: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    return (log_weights.exp() * _top1_terms(target, scores)).sum(dim=1)


def _top1_max(target: torch.Tensor, scores: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    return (_log_shares(scores, log_weights).exp() * _top1_terms(target, scores)).sum(dim=1)


def _top1_terms(target: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(scores - target) + torch.sigmoid(scores.square())


def _log_shares(scores: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """log s_j, [b, U]."""
    return torch.log_softmax(scores + log_weights, dim=1)


class _Blockwise(torch.autograd.Function):
    """A formula applied to blocks of queries; backward makes each block's scores again."""

    @staticmethod
    def forward(ctx, formula, queries, positives, negatives, log_counts, exclude, elu_alpha, block_rows):
        ctx.save_for_backward(queries, positives, negatives, log_counts, exclude)
        ctx.formula, ctx.elu_alpha, ctx.block_rows = formula, elu_alpha, block_rows
        result = queries.new_empty(len(queries))
        for start in range(0, len(queries), block_rows):
            block = slice(start, start + block_rows)
            each = _apply(formula, queries[block], positives[block], negatives, log_counts, exclude[block], elu_alpha)
            result[block] = each
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        queries, positives, negatives, log_counts, exclude = ctx.saved_tensors
        grad_queries, grad_positives = torch.empty_like(queries), torch.empty_like(positives)
        grad_negatives = torch.zeros_like(negatives)
        for start in range(0, len(queries), ctx.block_rows):
            block = slice(start, start + ctx.block_rows)
            inputs = [each.detach().requires_grad_() for each in (queries[block], positives[block], negatives)]
            with torch.enable_grad():
                each = _apply(ctx.formula, *inputs, log_counts, exclude[block], ctx.elu_alpha)
            grad_queries[block], grad_positives[block], rows = torch.autograd.grad(each, inputs, gradient[block])
            grad_negatives += rows
        return None, grad_queries, grad_positives, grad_negatives, None, None, None, None


def _apply(formula: _Formula, queries, positives, negatives, log_counts, exclude, elu_alpha: float) -> torch.Tensor:
    """Losses [b] of a block."""
    target = (queries * positives).sum(dim=1, keepdim=True)
    scores = queries @ negatives.T
    if elu_alpha:
        target, scores = elu(target, elu_alpha), elu(scores, elu_alpha)
    column = exclude[:, None]
    place = column.clamp(min=0)
    # Without asking which are masked: that would make the host wait for the device.
    kept = log_counts[place]
    log_weights = log_counts.expand(len(queries), -1).scatter(
        1, place, torch.where(column != NOTHING, -torch.inf, kept)
    )
    total = log_weights.logsumexp(dim=1, keepdim=True)
    any_left = total > -torch.inf
    # A row without any negative is computed with all of them, for finite gradients, and then taken as 0.
    log_weights = torch.where(any_left, log_weights - total, 0.0)
    return formula(target, scores, log_weights) * any_left[:, 0]
