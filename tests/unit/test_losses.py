"""The losses against the formulas written out, term by term, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import PackedBatch
from gru4recf_dist.model.losses import NOTHING, blockwise_logsumexp, columns_of, sampled_softmax
from gru4recf_dist.objective import Objective
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.table.batch_negatives import StepProposal
from gru4recf_dist.table.candidates import CandidatePart, Candidates
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.negatives import Negatives, NegativeSampler

T, U, D = 9, 6, 4
BLOCKS = [1, 2, 7, 100]


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((seed, *shape)).standard_normal(shape))


def _excluded() -> torch.Tensor:
    """A column for some queries, `NOTHING` for the others."""
    return torch.tensor([0, NOTHING, 5, 5, NOTHING, 2, 0, NOTHING, 3])


def _direct_logsumexp(queries, rows, bias, exclude):
    """One query after the other, over a Python list of the columns that are left."""
    result = []
    for i, query in enumerate(queries):
        columns = [j for j in range(len(rows)) if exclude is None or j != exclude[i]]
        scores = [query @ rows[j] + (0.0 if bias is None else bias[j]) for j in columns]
        result.append(torch.logsumexp(torch.stack(scores), dim=0))
    return torch.stack(result)


# -- blockwise_logsumexp ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", BLOCKS)
@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_blockwise_logsumexp_and_its_gradients_equal_the_direct_form(block_rows, with_bias, with_exclude):
    bias = _normal(U, seed=1) if with_bias else None
    exclude = _excluded() if with_exclude else None
    upstream = _normal(T, seed=2)
    results = []
    for function in (
        lambda q, r: blockwise_logsumexp(q, r, bias, exclude, block_rows),
        lambda q, r: _direct_logsumexp(q, r, bias, exclude),
    ):
        queries, rows = _normal(T, D).requires_grad_(), _normal(U, D, seed=3).requires_grad_()
        value = function(queries, rows)
        (value * upstream).sum().backward()
        results.append((value.detach(), queries.grad, rows.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("exclude", [None, _excluded()], ids=["all", "exclude"])
def test_blockwise_logsumexp_passes_gradcheck(exclude):
    queries, rows = _normal(T, D).requires_grad_(), _normal(U, D, seed=3).requires_grad_()
    bias = _normal(U, seed=1)
    assert torch.autograd.gradcheck(lambda q, r: blockwise_logsumexp(q, r, bias, exclude, 4), (queries, rows))


def test_blockwise_logsumexp_is_stable_for_large_scores():
    queries, rows = (_normal(T, D) * 300).requires_grad_(), (_normal(U, D, seed=3) * 300).requires_grad_()
    value = blockwise_logsumexp(queries, rows, block_rows=2)
    torch.testing.assert_close(value, _direct_logsumexp(queries, rows, None, None))
    value.sum().backward()
    assert queries.grad.isfinite().all() and rows.grad.isfinite().all()


def test_blockwise_logsumexp_does_not_change_its_inputs():
    inputs = [_normal(T, D), _normal(U, D, seed=3), _normal(U, seed=1), _excluded()]
    copies = [value.clone() for value in inputs]
    queries = inputs[0].requires_grad_()
    blockwise_logsumexp(*inputs, block_rows=4).sum().backward()
    assert queries.grad is not None
    assert all(torch.equal(value, copy) for value, copy in zip(inputs, copies, strict=True))


def test_blockwise_logsumexp_keeps_no_logits_for_backward():
    events, candidates = 300, 200
    kept = []
    queries, rows = _normal(events, D).requires_grad_(), _normal(candidates, D).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        blockwise_logsumexp(queries, rows, _normal(candidates), torch.full((events,), 3), block_rows=16)
    assert 0 < sum(kept) <= events * (D + 2) + candidates * (D + 1)


def test_without_candidates_the_sum_is_empty_and_both_inputs_stay_in_the_graph():
    queries, rows = _normal(T, D).requires_grad_(), torch.empty(0, D, dtype=torch.float64).requires_grad_()
    value = blockwise_logsumexp(queries, rows)
    assert value.tolist() == [-math.inf] * T
    # As the full softmax of a rank without rows uses it: beside the sums of other ranks.
    torch.logsumexp(torch.stack([value, _normal(T)]), dim=0).sum().backward()
    assert torch.equal(queries.grad, torch.zeros_like(queries)) and rows.grad.shape == (0, D)


def test_without_queries_the_result_is_empty():
    queries, rows = torch.empty(0, D, dtype=torch.float64).requires_grad_(), _normal(U, D).requires_grad_()
    value = blockwise_logsumexp(queries, rows)
    value.sum().backward()
    assert value.shape == (0,) and torch.equal(rows.grad, torch.zeros_like(rows))


@pytest.mark.parametrize("block_rows", BLOCKS)
def test_a_query_whose_only_candidate_is_excluded_gets_no_loss_and_gives_no_gradient(block_rows):
    queries, rows = _normal(3, D).requires_grad_(), _normal(1, D, seed=3).requires_grad_()
    positives = _normal(3, D, seed=4).requires_grad_()
    exclude = torch.tensor([0, NOTHING, 0])
    loss = sampled_softmax(queries, positives, rows, _normal(1, seed=5), exclude, block_rows=block_rows)
    assert loss[0] == 0 and loss[2] == 0 and loss[1] > 0
    loss.sum().backward()
    for gradient in (queries.grad, positives.grad):
        assert torch.equal(gradient[[0, 2]], torch.zeros(2, D, dtype=torch.float64))
        assert gradient[1].abs().min() > 0
    expected = queries.detach()[1] * (1 - torch.exp(-loss[1].detach()))
    torch.testing.assert_close(rows.grad[0], expected)


def test_sampled_softmax_without_negatives_is_zero_with_zero_gradient():
    queries, positives = _normal(T, D).requires_grad_(), _normal(T, D, seed=4).requires_grad_()
    nothing = torch.empty(0, D, dtype=torch.float64).requires_grad_()
    loss = sampled_softmax(queries, positives, nothing, nothing.detach()[:, 0], torch.full((T,), NOTHING))
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.zeros(T, dtype=torch.float64))
    assert torch.equal(queries.grad, torch.zeros_like(queries)) and nothing.grad.shape == (0, D)


# -- the objective over a table of one rank ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    yield process_ranks.start("cpu", timeout_seconds=20)
    process_ranks.stop()


ITEMS = 40


class EveryItemOnce:
    """A sampler that draws each item once, with uniform q and K = N: it is the full sum."""

    def draw(self, step: int) -> Negatives:
        return Negatives(np.arange(1, ITEMS + 1), np.ones(ITEMS, np.int64), np.zeros(ITEMS))

    def log_expected(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros(len(ids))


def _popularity() -> np.ndarray:
    counts = (2000 / np.arange(1, ITEMS + 2)).astype(np.int64)
    counts[[0, 7, 30]] = 0
    return counts


def _objective(alone, proposal, scale: float = 1.0, score: str = "dot", **loss) -> tuple[Objective, torch.Tensor]:
    config = Config(data="-", run_dir="-", model={"score": score}, loss=loss, table={"optimizer": "sgd"})
    table = ShardedItemTable(ITEMS + 1, D, alone, config.table, seed=3, std=scale, dtype=torch.float64)
    return Objective(config, Candidates([CandidatePart(table, score)]), proposal), table.weight.clone()


def _targets() -> torch.Tensor:
    return torch.tensor([1, 1, 2, 5, 8, 31, 40, 3, 1])


def _batch(targets: torch.Tensor, weights: torch.Tensor) -> PackedBatch:
    return PackedBatch(targets, targets, weights, torch.ones(1), 0, 0, 0)


def propose(objective: Objective, batch: PackedBatch, step: int) -> StepProposal | None:
    return objective.propose(objective.batch_targets([batch], objective.candidates.ranks), step)


def _loss_and_gradients(objective: Objective, queries, targets, weights, step):
    """The objective's sum, and its gradients for queries and the whole table."""
    candidates = objective.candidates
    table = candidates.parts[0].table
    before = table.weight.clone()
    queries = queries.clone().requires_grad_()
    positives = table.weight[targets].requires_grad_()
    batch = _batch(targets, weights)
    proposal = propose(objective, batch, step)
    loss = objective(queries, candidates.join([positives]), batch, proposal, objective.fetch(proposal))
    loss.backward()
    table.apply_gradients(lr=1.0)
    gradient = before - table.weight
    gradient.index_add_(0, targets, positives.grad)
    table.weight.copy_(before)
    return float(loss.detach()), queries.grad, gradient


def _full_softmax(queries, table, targets, weights, score: str = "dot"):
    """Cross-entropy over the items 1..N by torch, on the whole table."""
    queries, table = queries.clone().requires_grad_(), table.clone().requires_grad_()
    rows = torch.nn.functional.normalize(table) if score == "cosine" else table
    each = torch.nn.functional.cross_entropy(queries @ rows[1:].T, targets - 1, reduction="none")
    loss = (each * weights).sum()
    loss.backward()
    return float(loss.detach()), queries.grad, table.grad


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("scale", [0.5, 15.0], ids=["close scores", "hopeless targets"])
@pytest.mark.parametrize("sampler", [None, EveryItemOnce()], ids=["full", "every item once"])
def test_full_softmax_and_a_sampler_of_every_item_once_equal_cross_entropy(alone, sampler, scale, score):
    objective, table = _objective(alone, sampler, scale, score)
    targets, weights = _targets(), torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1, 0]).double()
    queries = _normal(T, D) * (scale if score == "cosine" else 1.0)
    value, *gradients = _loss_and_gradients(objective, queries, targets, weights, step=1)
    expected, *expected_gradients = _full_softmax(queries, table, targets, weights, score)
    assert value == pytest.approx(expected, rel=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_negatives_of_the_batch_alone_give_cross_entropy_over_its_other_targets(alone):
    settings = {"negatives": 0, "in_batch": "all", "logq": "off", "block_rows": 4}
    config = Config(data="-", run_dir="-", loss=settings)
    # Nothing of a sampler is made, and none of it is asked.
    sampler = NegativeSampler(_popularity(), config.loss, seed=11, allocate=None)
    objective, table = _objective(alone, sampler, **settings)
    queries, targets = _normal(T, D), _targets()
    value, *gradients = _loss_and_gradients(objective, queries, targets, torch.ones(T), step=5)
    queries, table = queries.clone().requires_grad_(), table.clone().requires_grad_()
    total = 0.0
    for query, target in zip(queries, targets.tolist(), strict=True):
        others = [table[other] for other in targets.tolist() if other != target]
        total = total + torch.logsumexp(torch.stack([table[target], *others]) @ query, dim=0) - table[target] @ query
    total.backward()
    assert value == pytest.approx(float(total.detach()), rel=1e-12)
    for ours, theirs in zip(gradients, (queries.grad, table.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    # A batch without a target, and one of one item: no negative, no loss, no gradient.
    for none in (torch.zeros(T, dtype=torch.int64), torch.full((T,), 3)):
        weights = (none > 0).double()
        value, *gradients = _loss_and_gradients(objective, queries.detach(), none, weights, step=5)
        assert value == 0.0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("in_batch", [0, 6, 30])
@pytest.mark.parametrize("logq", ["exact", "classic", "off"])
@pytest.mark.parametrize("kind", ["popularity", "log_uniform", "uniform"])
def test_sampled_loss_equals_the_formula_summed_draw_by_draw(alone, kind, logq, in_batch):
    draws = 64
    settings = {"negatives": draws, "in_batch": in_batch, "sampler": kind, "logq": logq, "block_rows": 4}
    config = Config(data="-", run_dir="-", loss=settings)
    sampler = NegativeSampler(_popularity(), config.loss, seed=11)
    objective, table = _objective(alone, sampler, **settings)
    queries, targets = _normal(T, D), _targets()
    drawn = propose(objective, _batch(targets, torch.ones(T)), step=5).negatives
    assert drawn.counts.max() > 1, "the test is about repeated draws too"
    assert set(drawn.ids) & set(targets.tolist()), "and about targets among the negatives"
    draw_list = [int(item) for item, count in zip(drawn.ids, drawn.counts, strict=True) for _ in range(count)]
    assert len(draw_list) == draws + in_batch

    def expected_count(item: int) -> float:
        of_batch = targets.tolist().count(item) / len(targets)
        return draws * math.exp(float(sampler.log_q(np.array([item]))[0])) + in_batch * of_batch

    total = 0.0
    for query, target in zip(queries.tolist(), targets.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(query, row, strict=True)) for row in table.tolist()]
        positive = math.exp(scores[target])
        if logq == "classic":
            positive /= expected_count(target)
        negative = 0.0
        for item in draw_list:
            if item != target:
                negative += math.exp(scores[item]) / (1.0 if logq == "off" else expected_count(item))
        total += -math.log(positive / (positive + negative))
    value, _, _ = _loss_and_gradients(objective, queries, targets, torch.ones(T), step=5)
    assert value == pytest.approx(total, rel=1e-12)


def test_events_of_weight_zero_cost_nothing_and_move_nothing(alone):
    sampler = NegativeSampler(_popularity(), Config(data="-", run_dir="-").loss, seed=11)
    for logq in ("exact", "classic"):
        objective, _ = _objective(alone, sampler, logq=logq)
        # Context events and dummy sessions have the padding row as their target.
        value, queries, table = _loss_and_gradients(
            objective, _normal(T, D), torch.zeros(T, dtype=torch.int64), torch.zeros(T), step=1
        )
        assert value == 0.0 and not queries.any() and not table.any()


@pytest.mark.parametrize("in_batch", [0, 9, 40], ids=["sampled", "in batch", "mostly in batch"])
@pytest.mark.parametrize("kind", ["popularity", "log_uniform", "uniform"])
def test_the_mean_sampled_gradient_tends_to_that_of_full_softmax_with_exact_logq_only(alone, kind, in_batch):
    draws, targets = 300, _targets()
    _, table = _objective(alone, None)
    # Queries near their targets: the target's own term must matter for its correction to show.
    queries = 0.5 * table[targets]
    _, _, full = _full_softmax(queries, table, targets, torch.ones(T))

    def error(logq: str, negatives: int) -> float:
        settings = {"sampler": kind, "negatives": negatives, "in_batch": in_batch, "logq": logq}
        config = Config(data="-", run_dir="-", loss=settings).loss
        objective, _ = _objective(alone, NegativeSampler(_popularity(), config, seed=1), **settings)
        gradients = (_loss_and_gradients(objective, queries, targets, torch.ones(T), step)[2] for step in range(draws))
        return float((sum(gradients) / draws - full).norm() / full.norm())

    errors = [error("exact", negatives) for negatives in (8, 64, 512)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02
    # The common form divides the target's own term too, and keeps a bias that more negatives do not cure.
    assert error("classic", 512) > 0.2
    assert error("off", 512) > 0.2


# -- columns_of -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distinct", [0, 1, 2, 17])
def test_columns_of_equals_a_search_through_a_list(distinct):
    generator = np.random.default_rng(distinct)
    ids = torch.from_numpy(np.sort(generator.choice(np.arange(2, 38), distinct, replace=False)))
    targets = torch.from_numpy(generator.integers(0, 41, 200))
    expected = [ids.tolist().index(target) if target in ids.tolist() else NOTHING for target in targets.tolist()]
    assert columns_of(targets, ids).tolist() == expected
