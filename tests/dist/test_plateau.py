"""`schedule.name: plateau`: the rates drop when validation stands still, in a resumed run as in an unbroken one."""

from __future__ import annotations

import pytest

from gru4recf_dist.config import Config
from gru4recf_dist.evaluation.evaluator import Evaluator
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.whereabouts import HERE
from tests.dist.test_resume import data, train_until  # noqa: F401 (a fixture)
from tests.support.ranks import run_ranks
from tests.support.training import logged_lines, small_config, train

pytestmark = pytest.mark.dist

# Step: validation figure. With patience 2 the rates drop after steps 8 (two not better than at 4) and 12.
FIGURES = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.29, 10: 0.1, 12: 0.1, 14: 0.4, 16: 0.1, 17: 0.2}
RATES = [0.01] * 8 + [0.005] * 4 + [0.0025] * 5
OPTIONS = (
    *("schedule.name=plateau", "schedule.plateau_patience=2", "schedule.plateau_factor=0.5", "optimizer.lr=0.01"),
    *("evaluation.every_steps=2", "checkpoint.every_epochs=null", "checkpoint.every_steps=1", "max_steps=17"),
)


def with_given_figures(ranks: Ranks, function, *arguments) -> None:
    """Train while the validation split gives `FIGURES`."""
    evaluate = Evaluator.evaluate

    def given(evaluator, model, split, *more):
        found = evaluate(evaluator, model, split, *more)
        return {**found, "valid": {**found["valid"], "ndcg@10": FIGURES[HERE.step]}} if split == "valid" else found

    Evaluator.evaluate = given
    function(ranks, *arguments)


def rates(config: Config) -> list[float]:
    lines = [line for line in logged_lines(config.run_dir) if "train/lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 18))
    return [line["train/lr"] for line in lines]


@pytest.mark.parametrize("stopped", [None, 7, 9, 13])
def test_the_rates_drop_where_validation_stands_still(tmp_path, data, stopped):  # noqa: F811
    config = small_config(data, tmp_path / "run", *OPTIONS)
    if stopped is not None:
        run_ranks(1, with_given_figures, tmp_path, train_until, config, stopped)
    run_ranks(1, with_given_figures, tmp_path, train, config)
    config.run_dir = tmp_path / "run"
    assert rates(config) == pytest.approx(RATES)
