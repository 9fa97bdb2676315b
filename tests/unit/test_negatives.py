"""The negative sampler: its distribution, and that a draw depends on (seed, step) only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gru4recf_dist.config import LossConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import POPULARITY
from gru4recf_dist.errors import UserError
from gru4recf_dist.table.negatives import AheadSampler, NegativeSampler, read_popularity
from tests.support.synthetic import random_sessions, write_dataset

KINDS = ["popularity", "log_uniform", "uniform"]
# Entry 0 is padding; two items are tied, two have no training event.
POPULARITY_COUNTS = np.array([999, 5, 40, 0, 7, 7, 100, 1, 0, 13], np.int64)
ITEMS = len(POPULARITY_COUNTS) - 1


def make_sampler(kind: str, popularity=POPULARITY_COUNTS, seed: int = 0, **config) -> NegativeSampler:
    return NegativeSampler(popularity, LossConfig(sampler=kind, **config), seed)


def _q(sampler: NegativeSampler, items: int = ITEMS) -> np.ndarray:
    return np.exp(sampler.log_q(np.arange(1, items + 1)))


def _written_out(kind: str, alpha: float) -> list[float]:
    """q of the items 1..N, from its definition."""
    counts = POPULARITY_COUNTS[1:].tolist()
    if kind == "uniform":
        return [1 / ITEMS] * ITEMS
    if kind == "popularity":
        mass = [max(count, 1) ** alpha for count in counts]
        return [value / sum(mass) for value in mass]
    # Rank 0 is the most popular item; the smaller id comes first among equals.
    order = sorted(range(ITEMS), key=lambda item: (-counts[item], item))
    return [math.log((order.index(i) + 2) / (order.index(i) + 1)) / math.log(ITEMS + 1) for i in range(ITEMS)]


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_q_is_what_its_definition_says_and_sums_to_one(kind, alpha):
    q = _q(make_sampler(kind, alpha=alpha))
    np.testing.assert_allclose(q, _written_out(kind, alpha), rtol=1e-12)
    assert q.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_q_sums_to_one_over_many_items(kind):
    counts = (1e6 / np.arange(1, 50_002)).astype(np.int64)
    assert _q(make_sampler(kind, counts), 50_000).sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_frequencies_fit_q(kind):
    draws = 200_000
    sampler = make_sampler(kind, negatives=draws, seed=3)
    drawn = sampler.draw(step=1)
    observed = np.zeros(ITEMS, np.int64)
    observed[drawn.ids - 1] = drawn.counts
    assert stats.chisquare(observed, draws * np.array(_written_out(kind, 0.75))).pvalue > 0.01
    # Also over many steps of few draws: steps must not repeat each other.
    sampler = make_sampler(kind, negatives=50, seed=3)
    observed = np.zeros(ITEMS, np.int64)
    for step in range(2000):
        drawn = sampler.draw(step)
        observed[drawn.ids - 1] += drawn.counts
    assert stats.chisquare(observed, 100_000 * np.array(_written_out(kind, 0.75))).pvalue > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_k_draws_as_ascending_distinct_items_with_their_expected_counts(kind):
    sampler = make_sampler(kind, negatives=37)
    for step in range(20):
        drawn = sampler.draw(step)
        assert drawn.counts.sum() == 37 and drawn.counts.min() >= 1
        assert (np.diff(drawn.ids) > 0).all() and drawn.ids[0] >= 1 and drawn.ids[-1] <= ITEMS
        assert drawn.ids.dtype == drawn.counts.dtype == np.int64
        expected = [math.log(37 * q) for q in np.array(_written_out(kind, 0.75))[drawn.ids - 1]]
        np.testing.assert_allclose(drawn.log_expected, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(sampler.log_expected(drawn.ids), drawn.log_expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_depends_on_seed_and_step_and_on_nothing_else(kind):
    counts = (1000 / np.arange(1, 402)).astype(np.int64)
    sampler = make_sampler(kind, counts, negatives=50)
    first = [sampler.draw(step) for step in range(5)]
    # Another instance, the steps in another order.
    again = make_sampler(kind, counts, negatives=50)
    for step in (3, 0, 4, 1, 2):
        np.testing.assert_array_equal(again.draw(step).ids, first[step].ids)
        np.testing.assert_array_equal(again.draw(step).counts, first[step].counts)
    other_seed = make_sampler(kind, counts, negatives=50, seed=1)
    draws = [tuple(np.repeat(draw.ids, draw.counts)) for draw in [*first, *(other_seed.draw(s) for s in range(5))]]
    assert len(set(draws)) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_a_step_ahead_is_what_the_step_would_draw(kind):
    plain = make_sampler(kind, negatives=50)
    ahead = AheadSampler(POPULARITY_COUNTS, LossConfig(sampler=kind, negatives=50), 0)
    # In order, one again, one left out, and back.
    for step in (1, 2, 3, 3, 4, 6, 7, 2, 3):
        drawn, expected = ahead.draw(step), plain.draw(step)
        np.testing.assert_array_equal(drawn.ids, expected.ids)
        np.testing.assert_array_equal(drawn.counts, expected.counts)
        np.testing.assert_array_equal(drawn.log_expected, expected.log_expected)


def test_an_error_of_drawing_ahead_is_raised_in_the_step_that_it_concerns(monkeypatch):
    sampler = AheadSampler(POPULARITY_COUNTS, LossConfig(negatives=50), 0)
    sampler.draw(1)
    sampler.draw(2)
    ahead = sampler._ahead[1]
    ahead.result()
    monkeypatch.setattr(NegativeSampler, "_invert", lambda self, uniform: 1 / 0)
    assert len(sampler.draw(3).ids)
    with pytest.raises(ZeroDivisionError):
        sampler.draw(4)


def test_items_without_a_training_event_are_drawn_as_if_they_had_one():
    drawn = make_sampler("popularity", negatives=20_000).draw(step=0)
    counts = dict(zip(drawn.ids.tolist(), drawn.counts.tolist(), strict=True))
    # Items 3 and 8 have no event, item 7 has one.
    expected = 20_000 * _written_out("popularity", 0.75)[6]
    for item in (3, 7, 8):
        assert abs(counts[item] - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_are_items(kind, uniform):
    sampler = make_sampler(kind)
    assert 1 <= int(sampler._invert(np.array([uniform]))[0]) <= ITEMS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("events", [0, 5])
def test_a_catalog_of_one_item_is_drawn_with_certainty(kind, events):
    drawn = make_sampler(kind, np.array([0, events]), negatives=6).draw(step=2)
    assert drawn.ids.tolist() == [1] and drawn.counts.tolist() == [6]
    assert drawn.log_expected == pytest.approx([math.log(6)])


def test_an_item_of_little_mass_beside_very_popular_ones_keeps_a_finite_log_q():
    """With a steep alpha a running float64 sum swallows small items: their log q must stay finite (`logq: classic`)."""
    counts = np.array([0, 10**9, 1, 10**9], np.int64)
    sampler = make_sampler("popularity", counts, alpha=2.0)
    expected = np.log([0.5, 1e-18 / 2, 0.5])
    np.testing.assert_allclose(sampler.log_q(np.array([1, 2, 3])), expected, rtol=1e-9)


def test_read_popularity_gives_the_events_of_training_and_refuses_what_does_not_fit(tmp_path):
    data = str(tmp_path)
    train = random_sessions(0, 20, 15)
    manifest = write_dataset(data, train, items=17)
    expected = [sum(int((session == item).sum()) for session in train) for item in range(18)]
    assert read_popularity(data, manifest).tolist() == expected
    url = storage.join(data, POPULARITY)
    for damaged in (np.zeros(17, np.int64), np.zeros(18, np.int32), np.zeros((18, 1), np.int64)):
        storage.write_npy(url, damaged)
        with pytest.raises(UserError, match=r"popularity\.npy"):
            read_popularity(data, manifest)
