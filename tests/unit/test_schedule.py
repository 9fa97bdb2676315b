"""The learning-rate factor, against values worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gru4recf_dist.config import ScheduleConfig
from gru4recf_dist.schedule import factor


def _factors(total: int, **settings) -> list[float]:
    config = ScheduleConfig(**settings)
    return [factor(config, step, total) for step in range(total)]


def test_constant_is_one_everywhere():
    assert _factors(5) == [1.0] * 5


def test_warmup_rises_linearly_and_its_last_step_has_the_full_rate():
    assert _factors(8, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_decay_by_hand():
    assert _factors(5, name="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert _factors(5, name="linear", final=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_linear_decay_starts_after_the_warmup():
    assert _factors(6, name="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 2 / 3, 1 / 3, 0.0])


def test_cosine_decay_by_hand():
    # Half a cosine wave in four steps: 1, 1/2 + sqrt(2)/4, 1/2, 1/2 - sqrt(2)/4, 0.
    quarter = 2**0.5 / 4
    assert _factors(5, name="cosine") == pytest.approx([1.0, 0.5 + quarter, 0.5, 0.5 - quarter, 0.0])


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_decay_falls_from_one_to_final_at_the_last_step(name, final, warmup):
    factors = _factors(30, name=name, final=final, warmup_steps=warmup)
    decay = factors[warmup:]
    assert decay[0] == pytest.approx(1.0)
    assert decay[-1] == pytest.approx(final)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(decay))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (3, 10), (5, 5)])
def test_factor_stays_between_zero_and_one_in_the_shortest_runs(name, total, warmup):
    assert all(0.0 <= value <= 1.0 for value in _factors(total, name=name, warmup_steps=warmup))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_steps_beyond_the_end_keep_the_final_factor(name):
    config = ScheduleConfig(name=name, final=0.3)
    assert factor(config, 25, 10) == pytest.approx(0.3)


def test_each_drop_of_a_plateau_takes_its_factor_after_warm_up():
    config = ScheduleConfig(name="plateau", plateau_factor=0.3, warmup_steps=2)
    assert [factor(config, step, 9, drops) for step, drops in ((0, 0), (1, 0), (2, 0), (5, 1), (8, 2))] == (
        pytest.approx([0.5, 1.0, 1.0, 0.3, 0.09])
    )
