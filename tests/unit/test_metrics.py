"""Metrics from counts against loops over targets, and against every order of a tie."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from gru4recf_dist.evaluation.metrics import ExpectedOverTies, RankHistogram

KS = [1, 3, 10]


def _expected(above, tied, found, ks: list[int] = KS) -> dict[str, float]:
    sums = ExpectedOverTies(ks)
    sums.add(np.array(above, np.int64), np.array(tied, np.int64), np.array(found, bool))
    return sums.metrics()


def _by_loop(ranks: list[int | None], ks: list[int]) -> dict[str, float]:
    """Metrics of single targets, None for a miss, averaged over all of them."""
    result = {}
    for k in ks:
        gains = {"hit": 0.0, "ndcg": 0.0, "mrr": 0.0}
        for rank in ranks:
            if rank is not None and rank <= k:
                gains["hit"] += 1
                gains["ndcg"] += 1 / math.log2(rank + 1)
                gains["mrr"] += 1 / rank
        for name, gain in gains.items():
            result[f"{name}@{k}"] = gain / len(ranks) if ranks else 0.0
        result[f"recall@{k}"] = result[f"hit@{k}"]
    return result


def _random_targets(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(1, 25, count), generator.random(count) < 0.8


@pytest.mark.parametrize("count", [1, 2, 50])
def test_histogram_equals_a_loop_over_targets_with_misses_in_the_denominator(count):
    ranks, found = _random_targets(count, count)
    histogram = RankHistogram(max(KS))
    histogram.add(ranks, found)
    expected = _by_loop([int(r) if f else None for r, f in zip(ranks, found, strict=True)], KS)
    assert histogram.metrics(KS) == pytest.approx(expected, rel=1e-13)
    assert histogram.total == count


def test_histogram_does_not_depend_on_how_targets_are_divided():
    ranks, found = _random_targets(0, 200)
    whole, parts = RankHistogram(max(KS)), RankHistogram(max(KS))
    whole.add(ranks, found)
    order = np.random.default_rng(1).permutation(200)
    for part in np.split(order, [0, 3, 90]):
        parts.add(ranks[part], found[part])
    assert parts.metrics(KS) == whole.metrics(KS)


def test_ranks_at_and_just_beyond_k():
    histogram = RankHistogram(10)
    histogram.add(np.array([10, 11, 10**12]), np.array([True, True, True]))
    metrics = histogram.metrics([3, 10])
    assert metrics["hit@3"] == 0.0 and metrics["hit@10"] == 1 / 3
    assert metrics["mrr@10"] == pytest.approx(1 / 30) and metrics["ndcg@10"] == pytest.approx(1 / math.log2(11) / 3)


def test_without_targets_every_metric_is_zero():
    histogram = RankHistogram(max(KS))
    histogram.add(np.empty(0, np.int64), np.empty(0, bool))
    for metrics in (histogram.metrics(KS), ExpectedOverTies(KS).metrics(), _expected([], [], [])):
        assert metrics == _by_loop([], KS)
        assert set(metrics.values()) == {0.0}


def test_only_misses_give_zero_not_nothing():
    histogram = RankHistogram(max(KS))
    histogram.add(np.array([1, 1]), np.array([False, False]))
    assert histogram.metrics(KS) == _by_loop([None, None], KS)
    misses = _expected([0, 5], [1, 2], [False, False])
    assert misses == _by_loop([None, None], KS)


@pytest.mark.parametrize(("above", "tied"), [(0, 1), (0, 4), (2, 3), (9, 5), (12, 2), (0, 6)])
def test_expected_over_ties_is_the_mean_over_every_order_of_the_tie(above, tied):
    sums: dict[str, float] = {}
    orders = list(permutations(range(tied)))
    for order in orders:
        # Element 0 of the tie is the target.
        for name, value in _by_loop([above + order.index(0) + 1], KS).items():
            sums[name] = sums.get(name, 0.0) + value
    ours = _expected([above], [tied], [True])
    assert ours == pytest.approx({name: value / len(orders) for name, value in sums.items()}, rel=1e-12)


def test_expected_over_ties_averages_over_targets_and_keeps_misses_in_the_denominator():
    above, tied = np.array([0, 3, 1, 0]), np.array([2, 1, 30, 5])
    found = np.array([True, True, True, False])
    expected: dict[str, float] = {}
    for i in range(3):
        for rank in range(int(above[i]) + 1, int(above[i] + tied[i]) + 1):
            for name, value in _by_loop([rank], KS).items():
                expected[name] = expected.get(name, 0.0) + value / int(tied[i]) / 4
    assert _expected(above, tied, found) == pytest.approx(expected, rel=1e-12)


def test_without_ties_the_expectation_is_the_histograms_value():
    ranks, found = _random_targets(3, 60)
    histogram = RankHistogram(max(KS))
    histogram.add(ranks, found)
    ours = _expected(ranks - 1, np.ones(60), found, [10, 1, 3])
    assert ours == pytest.approx(histogram.metrics(KS), rel=1e-13)


def _summed_at_once(above: np.ndarray, tied: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The expectation over all targets as one expression in float64: what blocks must come to."""
    gains = {"hit": lambda rank: 1.0, "ndcg": lambda rank: 1.0 / math.log2(rank + 1), "mrr": lambda rank: 1.0 / rank}
    result = {}
    for name, gain in gains.items():
        for k in KS:
            upto = np.array([math.fsum(gain(rank) for rank in range(1, last + 1)) for last in range(k + 1)])
            each = (upto[np.minimum(above + tied, k)] - upto[np.minimum(above, k)]) / tied
            result[f"{name}@{k}"] = float(each[found].sum() / len(above))
    return result | {f"recall@{k}": result[f"hit@{k}"] for k in KS}


def test_expectations_are_the_same_to_the_last_digit_for_blocks_of_any_size():
    generator = np.random.default_rng(5)
    above = generator.integers(0, 12, 5000) * generator.integers(0, 2, 5000)
    # Ties of one item, of a few, and of most of a large catalog.
    tied = np.where(
        generator.random(5000) < 0.3, generator.integers(10**5, 10**7, 5000), generator.integers(1, 9, 5000)
    )
    found = generator.random(5000) < 0.9
    order = generator.permutation(5000)
    results = []
    for size in (1, 7, 1024, 5000):
        sums = ExpectedOverTies(KS)
        for start in range(0, 5000, size):
            block = order[start : start + size]
            sums.add(above[block], tied[block], found[block])
        results.append(sums.metrics())
    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(_summed_at_once(above, tied, found), rel=1e-12)
