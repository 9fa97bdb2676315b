"""GRU4Rec's ranking losses against their definitions, written out negative by negative."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.model.losses import NOTHING
from gru4recf_dist.model.ranking_losses import ranking_loss
from gru4recf_dist.table.negatives import NegativeSampler
from tests.unit.test_losses import (
    _batch,
    _loss_and_gradients,
    _objective,
    _popularity,
    alone,  # noqa: F401 (a fixture)
    propose,
)

NAMES = ["bpr", "bpr_max", "top1", "top1_max"]
T, U, D = 7, 5, 4


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((seed, *shape)).normal(0.0, scale, shape))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _defined(name: str, target: float, negatives: list[float], regularization: float) -> float:
    """The papers' sums over a list of negatives' scores, in which a repeated negative stands repeatedly."""
    if not negatives:
        return 0.0
    total = sum(math.exp(score) for score in negatives)
    softmax = [math.exp(score) / total for score in negatives]
    mean = [1.0 / len(negatives)] * len(negatives)
    pairs = [_sigmoid(target - score) for score in negatives]
    top1 = [_sigmoid(score - target) + _sigmoid(score**2) for score in negatives]
    if name == "bpr":
        return -sum(weight * math.log(pair) for weight, pair in zip(mean, pairs, strict=True))
    if name == "top1":
        return sum(weight * each for weight, each in zip(mean, top1, strict=True))
    if name == "top1_max":
        return sum(weight * each for weight, each in zip(softmax, top1, strict=True))
    penalty = sum(weight * score**2 for weight, score in zip(softmax, negatives, strict=True))
    return -math.log(sum(w * pair for w, pair in zip(softmax, pairs, strict=True))) + regularization * penalty


def _elu(score: float, alpha: float) -> float:
    return score if score > 0 or not alpha else alpha * (math.exp(score) - 1.0)


@pytest.mark.parametrize("elu_alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block_rows", [1, 3, 256])
@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_its_definition_negative_by_negative(name, block_rows, elu_alpha):
    queries, positives, negatives = _normal(T, D), _normal(T, D, seed=1), _normal(U, D, seed=2)
    counts, exclude = torch.tensor([1, 3, 1, 2, 1]), torch.tensor([NOTHING, 1, 0, NOTHING, 4, 1, 3])
    found = ranking_loss(name, queries, positives, negatives, counts, exclude, 0.7, elu_alpha, block_rows)
    for row in range(T):
        target = _elu(float(queries[row] @ positives[row]), elu_alpha)
        scores = [
            _elu(float(queries[row] @ negatives[column]), elu_alpha)
            for column in range(U)
            for _ in range(int(counts[column]))
            if column != exclude[row]
        ]
        assert float(found[row]) == pytest.approx(_defined(name, target, scores, 0.7), rel=1e-12)


def _published_matrix_form(name: str, scores: torch.Tensor, regularization: float) -> torch.Tensor:
    """The losses as GRU4Rec computes them for a mini-batch whose targets are each other's negatives.

    Args:
        scores: [B, B], of each session (row) for the target of each session (column).
    """
    others = 1.0 - torch.eye(len(scores), dtype=scores.dtype)
    target = scores.diagonal()[:, None]
    # The softmax over the negatives only: the target's share is struck out before it is normalised.
    exponentials = torch.exp(scores - scores.amax(dim=1, keepdim=True)) * others
    softmax = exponentials / exponentials.sum(dim=1, keepdim=True)
    mean = others / others.sum(dim=1, keepdim=True)
    if name == "bpr":
        return -(mean * torch.log(torch.sigmoid(target - scores))).sum(dim=1)
    if name == "bpr_max":
        gain = torch.log((softmax * torch.sigmoid(target - scores)).sum(dim=1) + 1e-24)
        return regularization * (softmax * scores**2).sum(dim=1) - gain
    weights = mean if name == "top1" else softmax
    return (weights * (torch.sigmoid(scores - target) + torch.sigmoid(scores**2))).sum(dim=1)


@pytest.mark.parametrize("elu_alpha", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_mini_batch_form(name, elu_alpha):
    queries, rows = _normal(U, D).requires_grad_(), _normal(U, D, seed=2).requires_grad_()
    scores = queries @ rows.T
    activated = torch.where(scores > 0, scores, elu_alpha * scores.expm1()) if elu_alpha else scores
    expected = _published_matrix_form(name, activated, 0.5)
    weights = torch.linspace(0.5, 2.0, U, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), (queries, rows))
    found = ranking_loss(name, queries, rows, rows, torch.ones(U), torch.arange(U), 0.5, elu_alpha, block_rows=2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), (queries, rows)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("elu_alpha", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_it_passes_gradcheck(name, elu_alpha):
    inputs = [each.requires_grad_() for each in (_normal(T, D), _normal(T, D, seed=1), _normal(U, D, seed=2))]
    # Excluded ones too, and a row all of whose negatives are.
    exclude = torch.tensor([NOTHING, 1, 0, NOTHING, 4, 1, 3])
    counts = torch.tensor([1, 3, 1, 2, 1])
    assert torch.autograd.gradcheck(
        lambda q, p, r: ranking_loss(name, q, p, r, counts, exclude, 0.7, elu_alpha, block_rows=3), inputs
    )


@pytest.mark.parametrize("name", NAMES)
def test_without_a_negative_there_is_no_loss_and_no_gradient(name):
    queries, positives = _normal(3, D).requires_grad_(), _normal(3, D, seed=1).requires_grad_()
    none = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    one = _normal(1, D, seed=2).requires_grad_()
    for rows, counts, exclude in ((none, torch.empty(0), [NOTHING] * 3), (one, torch.tensor([2]), [0, NOTHING, 0])):
        loss = ranking_loss(name, queries, positives, rows, counts, torch.tensor(exclude))
        loss.sum().backward()
        left_out = torch.tensor([column != NOTHING or not len(rows) for column in exclude])
        assert not loss[left_out].any() and not queries.grad[left_out].any() and not positives.grad[left_out].any()
        assert len(rows) == 0 or (loss[~left_out].isfinite().all() and queries.grad[~left_out].any())
        queries.grad = positives.grad = None


@pytest.mark.parametrize("name", NAMES)
def test_hopeless_and_perfect_targets_are_finite_in_float32(name):
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).mul(300.0).requires_grad_()
    rows = torch.tensor([[1.0, 0.5], [0.9, 0.1]], requires_grad=True)
    positives = torch.tensor([[-1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = ranking_loss(name, queries, positives, rows, torch.ones(2), torch.full((2,), NOTHING))
    loss.sum().backward()
    assert loss.isfinite().all() and queries.grad.isfinite().all() and rows.grad.isfinite().all()
    if name in ("bpr", "bpr_max"):
        # Where it is hopeless the gradient must not vanish, as that of the logarithm of a rounded 0 would.
        assert float(positives.grad[0].norm()) > 100.0


def test_it_keeps_no_scores_for_backward():
    queries, rows = _normal(64, D).requires_grad_(), _normal(50, D, seed=2).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        ranking_loss("bpr_max", queries, queries, rows, torch.ones(50), torch.full((64,), NOTHING), block_rows=8)
    assert (64, 50) not in kept and (8, 50) not in kept


# -- within the objective ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("negatives", "in_batch", "elu_alpha"), [(64, 0, 0.0), (64, 6, 0.5), (64, "all", 0.0), (0, "all", 0.0), (0, 5, 0.5)]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_objective_sums_the_definition_over_the_draws(alone, name, negatives, in_batch, elu_alpha):  # noqa: F811
    targets = torch.tensor([1, 1, 2, 5, 8, 31, 40, 3, 1])
    settings = {"name": name, "negatives": negatives, "in_batch": in_batch, "elu": elu_alpha, "block_rows": 4}
    if name == "bpr_max":
        settings["regularization"] = 0.3
    config = Config(data="-", run_dir="-", loss=settings)
    objective, table = _objective(alone, NegativeSampler(_popularity(), config.loss, seed=11), **settings)
    queries = _normal(len(targets), table.shape[1])
    drawn = propose(objective, _batch(targets, torch.ones(len(targets))), step=5).negatives
    assert drawn.counts.sum() == negatives + (len(targets) if in_batch == "all" else in_batch)
    if in_batch == "all":
        # GRU4Rec's negatives: the targets of the batch, each as often as it is one, beside those of the sampler.
        of_sampler = NegativeSampler(_popularity(), config.loss, seed=11).draw(5)
        sampled = dict(zip(of_sampler.ids.tolist(), of_sampler.counts.tolist(), strict=True))
        for item, count in zip(drawn.ids.tolist(), drawn.counts.tolist(), strict=True):
            assert count == sampled.get(item, 0) + targets.tolist().count(item)
    total = 0.0
    for query, target in zip(queries, targets.tolist(), strict=True):
        scores = [_elu(score, elu_alpha) for score in (table @ query).tolist()]
        drawn_scores = [
            scores[item]
            for item, count in zip(drawn.ids.tolist(), drawn.counts.tolist(), strict=True)
            for _ in range(count)
            if item != target
        ]
        total += _defined(name, scores[target], drawn_scores, 0.3)
    value, _, _ = _loss_and_gradients(objective, queries, targets, torch.ones(len(targets)), step=5)
    assert value == pytest.approx(total, rel=1e-11)
