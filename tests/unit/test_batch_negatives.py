"""Negatives from the batch's own targets: what is drawn, and that the joint correction fits how it is drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from gru4recf_dist.config import LossConfig
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.table.batch_negatives import BatchTargets, StepProposal, gather_targets
from gru4recf_dist.table.negatives import NegativeSampler

POPULARITY = np.array([0, 50, 20, 0, 7, 7, 3, 1, 1, 1], np.int64)
ITEMS = len(POPULARITY) - 1
TARGETS = [1, 1, 1, 1, 2, 2, 4, 9, 9, 9]


def batch_of(targets: list[int]) -> BatchTargets:
    ids, counts = np.unique(targets, return_counts=True)
    return BatchTargets(ids, counts)


def sampler(kind: str = "uniform", negatives: int = 16, seed: int = 5) -> NegativeSampler:
    return NegativeSampler(POPULARITY, LossConfig(sampler=kind, negatives=negatives), seed)


def test_ranks_targets_are_put_together_without_padding_whatever_the_division():
    ranks = process_ranks.start("cpu", timeout_seconds=20)
    try:
        divisions = ([[1, 9, 0, 4], [9, 1]], [[0, 0, 9, 1, 1, 9, 4]], [[], [4, 9, 9, 1, 1]])
        for parts in divisions:
            found = gather_targets([torch.tensor(part, dtype=torch.int64) for part in parts], ranks)
            assert (found.ids.tolist(), found.counts.tolist()) == ([1, 4, 9], [2, 1, 2])
            assert found.ids.dtype == np.int64
        assert not len(gather_targets([torch.zeros(3, dtype=torch.int64)], ranks).ids)
    finally:
        process_ranks.stop()


@pytest.mark.parametrize("draws", [1, 3, 9, 10, 25])
def test_each_target_comes_up_in_proportion_to_its_share_and_hardly_varies(draws):
    batch, rounds = batch_of(TARGETS), 4000
    total = Counter()
    for step in range(rounds):
        drawn = batch.draw(draws, np.random.default_rng((1, step)))
        assert len(drawn) == draws and (np.diff(drawn) >= 0).all() and set(drawn.tolist()) <= set(TARGETS)
        total.update(drawn.tolist())
        for item, count in Counter(drawn.tolist()).items():
            assert abs(count - draws * TARGETS.count(item) / len(TARGETS)) < 2
    for item in set(TARGETS):
        mean = draws * TARGETS.count(item) / len(TARGETS)
        assert total[item] / rounds == pytest.approx(mean, abs=5 * np.sqrt(mean / rounds))


def test_as_many_draws_as_targets_take_each_once():
    for step in range(50):
        assert batch_of(TARGETS).draw(len(TARGETS), np.random.default_rng(step)).tolist() == sorted(TARGETS)


@pytest.mark.parametrize("kind", ["popularity", "log_uniform", "uniform"])
def test_expected_counts_are_those_of_both_sources_and_what_is_observed(kind):
    draws, in_batch, rounds = 16, 6, 3000
    source, batch = sampler(kind, draws), batch_of(TARGETS)
    ids = np.arange(1, ITEMS + 1)
    share = np.array([TARGETS.count(item) / len(TARGETS) for item in ids])
    expected = draws * np.exp(source.log_q(ids)) + in_batch * share
    assert expected.sum() == pytest.approx(draws + in_batch, rel=1e-12)
    observed = np.zeros(ITEMS)
    for step in range(rounds):
        proposal = StepProposal(source, in_batch, batch, step)
        drawn = proposal.negatives
        assert drawn.counts.sum() == draws + in_batch and (np.diff(drawn.ids) > 0).all()
        np.testing.assert_allclose(np.exp(drawn.log_expected), expected[drawn.ids - 1], rtol=1e-12)
        observed[drawn.ids - 1] += drawn.counts
    np.testing.assert_allclose(np.exp(proposal.log_expected(ids)), expected, rtol=1e-12)
    np.testing.assert_allclose(observed / rounds, expected, atol=5 * np.sqrt(expected.max() / rounds))


def test_draws_depend_on_seed_and_step_and_differ_between_them():
    batch = batch_of(list(range(1, ITEMS + 1)) * 3)

    def drawn(seed: int, step: int) -> tuple:
        negatives = StepProposal(sampler(seed=seed, negatives=1), 5, batch, step).negatives
        return tuple(np.repeat(negatives.ids, negatives.counts))

    assert drawn(5, 3) == drawn(5, 3)
    assert len({drawn(seed, step) for seed in (1, 2) for step in range(10)}) > 15


def test_a_batch_without_targets_leaves_the_samplers_draws_alone():
    empty = BatchTargets(np.empty(0, np.int64), np.empty(0, np.int64))
    source = sampler()
    proposal, plain = StepProposal(source, 8, empty, 4), source.draw(4)
    np.testing.assert_array_equal(proposal.negatives.ids, plain.ids)
    np.testing.assert_array_equal(proposal.negatives.log_expected, plain.log_expected)
    np.testing.assert_array_equal(proposal.log_expected(plain.ids), plain.log_expected)
