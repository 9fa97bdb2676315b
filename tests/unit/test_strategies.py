"""Whose turn it is: phases as a function of strategy, epoch and step, against sequences written out."""

from __future__ import annotations

import pytest

from gru4recf_dist import config as configuration
from gru4recf_dist.config import TrainingConfig
from gru4recf_dist.errors import UserError
from gru4recf_dist.strategies import phase_of

NAMES = ["item", "feature_0", "feature_1"]


def _turns(epochs: int, steps: int, **settings) -> str:
    """The number of the subnet that each update trains, ``steps`` updates an epoch; `*` for all."""
    config = TrainingConfig(**settings)
    phases = [phase_of(config, NAMES, number // steps, number) for number in range(epochs * steps)]
    return "".join("*" if len(each.trained) == 3 else str(NAMES.index(*each.trained)) for each in phases)


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({"strategy": "simultaneous"}, "**" * 7),
        ({"strategy": "interleaving"}, "01201201201201"),
        ({"strategy": "alternating"}, "00112200112200"),
        ({"strategy": "alternating", "epochs_per_phase": 2}, "00001111222200"),
        ({"strategy": "alternating", "epochs_per_phase": [1, 3, 1]}, "00111111220011"),
        ({"strategy": "residual", "epochs_per_phase": 1}, "00112222222222"),
        ({"strategy": "residual", "epochs_per_phase": [3, 1, 2]}, "00000011222222"),
    ],
)
def test_each_subnet_has_its_turn(settings, turns):
    assert _turns(7, 2, **settings) == turns


def test_only_with_residual_training_the_subnets_come_in_one_after_the_other():
    residual = TrainingConfig(strategy="residual", epochs_per_phase=2)
    present = [phase_of(residual, NAMES, epoch, 0).present for epoch in range(7)]
    assert present == [("item",)] * 2 + [("item", "feature_0")] * 2 + [tuple(NAMES)] * 3
    assert [phase_of(residual, NAMES, epoch, 0).is_last for epoch in range(7)] == [False] * 4 + [True] * 3
    for strategy in ("simultaneous", "alternating", "interleaving"):
        for number in range(9):
            phase = phase_of(TrainingConfig(strategy=strategy), NAMES, number, number)
            assert phase.present == tuple(NAMES) and phase.is_last


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.strategy=alternating", "model.fusion=item_only"], "with model.fusion item_only there is only one"),
        (["training.strategy=residual", "training.epochs_per_phase=2", "model.fusion=concat_input"], "only one"),
        (["training.strategy=interleaving", "model.fusion=feature_only"], "only one"),
        (["training.strategy=alternating", "engine.name=deepspeed"], "alternating needs engine.name ddp"),
        (["training.strategy=residual"], "epochs_per_phase must be given with strategy residual"),
        (["training.epochs_per_phase=2"], "epochs_per_phase is not for strategy simultaneous"),
        (
            ["training.strategy=interleaving", "training.epochs_per_phase=2"],
            "is not for strategy interleaving",
        ),
        (["training.strategy=alternating", "training.epochs_per_phase=[1,2,3]"], "3 numbers for 2 subnets"),
        (
            ["training.strategy=residual", "training.epochs_per_phase=[5,1]", "max_epochs=5"],
            "the last subnet's turn begins after 5 epochs, and max_epochs is 5",
        ),
        (["training.strategy=alternating", "max_epochs=1"], "begins after 1 epochs"),
        (["training.strategy=boosting"], "training.strategy"),
        (["training.strategy=alternating", "training.epochs_per_phase=0"], "training.epochs_per_phase"),
    ],
)
def test_contradictions_are_one_line_that_names_the_key(overrides, says):
    with pytest.raises(UserError) as caught:
        configuration.load(None, ["data=x", "run_dir=x", *overrides])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_several_feature_rnns_without_an_item_rnn_can_take_turns():
    groups = ["model.fusion=feature_only", "model.feature_groups=[[a],[b]]"]
    config = configuration.load(None, ["data=x", "run_dir=x", *groups, "training.strategy=interleaving"])
    assert config.model.subnet_count == 2
