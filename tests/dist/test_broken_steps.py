"""Steps whose loss or gradients are not finite: the policy, what is kept of them, and their replay."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gru4recf_dist import replay
from gru4recf_dist.broken_steps import load_batches
from gru4recf_dist.config import Config
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_engines import data, engine  # noqa: F401 (a fixture)
from tests.support.ranks import run_ranks
from tests.support.training import final_state, logged_lines, small_config

pytestmark = pytest.mark.dist


def with_broken_steps(ranks: Ranks, config: Config, broken: dict[int, str], victim: int = 1) -> dict:
    """Train, where on rank ``victim`` a gradient of the encoder, or the loss, is spoilt in the given steps."""
    trainer = Trainer(config, ranks)
    backward, update = trainer.engine.backward, trainer.update
    seen: dict = {"batches": {}, "weights": {}}

    def spoilt_backward(loss, scale):
        if broken.get(trainer.progress.step) == "gradient" and ranks.rank == victim:
            # 0, with a gradient of infinity times 0.
            loss = loss + (trainer.engine.module.dense_layer.weight * 0.0).sum().sqrt()
        backward(loss, scale)

    def spoilt_loss(*arguments, compute=trainer.step._loss):
        loss = compute(*arguments)
        return loss * torch.inf if broken.get(trainer.progress.step) == "loss" and ranks.rank == victim else loss

    def watched(prepared):
        step = trainer.progress.step + 1
        before = final_state(trainer)
        if step in broken:
            seen["batches"][step] = prepared.packed
        try:
            return update(prepared)
        finally:
            seen["weights"][step] = all(torch.equal(before[key], each) for key, each in final_state(trainer).items())

    trainer.step._loss, trainer.update, trainer.engine.backward = spoilt_loss, watched, spoilt_backward
    try:
        trainer.train()
    except UserError as error:
        seen["error"] = str(error)
    return {**seen, "step": trainer.progress.step, "skipped": trainer.progress.skipped_steps}


@pytest.mark.parametrize("stage", ["ddp", 2])
def test_the_run_ends_before_the_update_names_what_broke_and_keeps_the_batch(tmp_path, data, stage):  # noqa: F811
    config = small_config(data, tmp_path / "run", *engine(stage), "accumulation=2")
    results = run_ranks(2, with_broken_steps, tmp_path, config, {3: "loss"})
    for result in results:
        assert result["error"].startswith("step 3: loss or gradients are not finite (")
        assert "rank 1: loss" in result["error"]
        assert f"the batch: {tmp_path}/run/non-finite/step-3" in result["error"]
        assert result["step"] == 3 and result["weights"] == {1: False, 2: False, 3: True}
    folder = str(tmp_path / "run" / "non-finite" / "step-3")
    for rank, result in enumerate(results):
        mine = load_batches(folder, SimpleNamespace(rank=rank, world=2))
        for found, given in zip(mine, result["batches"][3], strict=True):
            assert found.targets_count == given.targets_count and found.sessions == given.sessions
            for name in ("items", "targets", "weights", "batch_sizes"):
                assert torch.equal(getattr(found, name), getattr(given, name))
    # One rank takes what all had.
    assert len(load_batches(folder, SimpleNamespace(rank=0, world=1))) == 4
    with pytest.raises(UserError, match="was kept by 2 ranks; replay it with as many, or with one"):
        load_batches(folder, SimpleNamespace(rank=0, world=3))


def test_skipping_goes_on_without_the_batch_on_every_rank(tmp_path, data):  # noqa: F811
    broken = {2: "gradient", 3: "loss", 7: "gradient"}
    config = small_config(data, tmp_path / "run", "non_finite.policy=skip", "non_finite.max_skips=2", "max_steps=9")
    results = run_ranks(2, with_broken_steps, tmp_path, config, broken)
    for result in results:
        assert "error" not in result and (result["step"], result["skipped"]) == (9, 3)
        # Weights, moments and the rows' state stay as they are, bit by bit, in just these steps.
        assert {step for step, same in result["weights"].items() if same} == set(broken)
    lines = logged_lines(tmp_path / "run")
    assert all(np.isfinite(line["train/loss"]) for line in lines if line["step"] not in broken)
    norms = {line["step"]: line["train/gradient_norm"] for line in lines if "train/lr" in line}
    assert norms[2] is norms[7] is None and norms[1] > 0 and norms[9] > 0
    assert [line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line][-1] == 3
    assert {path.name for path in (tmp_path / "run" / "non-finite").iterdir()} == {f"step-{step}" for step in broken}


def test_more_in_a_row_than_may_be_end_the_run(tmp_path, data):  # noqa: F811
    config = small_config(data, tmp_path / "run", "non_finite.policy=skip", "non_finite.max_skips=2")
    for result in run_ranks(2, with_broken_steps, tmp_path, config, {2: "loss", 4: "loss", 5: "loss", 6: "gradient"}):
        assert result["step"] == 6
        assert "step 6: loss or gradients are not finite (rank 1: gradient of dense_layer.weight)" in result["error"]
        assert "2 in a row before it were skipped (non_finite.max_skips)" in result["error"]


def test_a_batch_that_cannot_be_saved_does_not_hide_the_cause(tmp_path, data):  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "non-finite").write_text("a file where the folder should be")
    config = small_config(data, tmp_path / "run")
    for result in run_ranks(2, with_broken_steps, tmp_path, config, {3: "loss"}):
        assert result["error"].startswith("step 3: loss or gradients are not finite (")
        assert "rank 1: loss" in result["error"]
        assert "the batch was not saved (" in result["error"]


@pytest.mark.filterwarnings("ignore:Anomaly Detection|Error detected:UserWarning")
def test_the_replay_finds_what_the_run_found(tmp_path, data, capsys):  # noqa: F811
    """Rates that make it diverge: the replay, from the checkpoint of the step before, breaks too."""
    rates = ("optimizer.name=sgd", "optimizer.lr=1e30", "table.optimizer=sgd", "table.lr=1e30")
    config = small_config(data, tmp_path / "run", "checkpoint.every_steps=1", *rates)
    (result,) = run_ranks(1, with_broken_steps, tmp_path, config, {})
    step = result["step"]
    assert f"non-finite/step-{step}" in result["error"]
    run = ["--run", str(tmp_path / "run")]
    assert replay.main([*run, "--step", str(step), "device=cpu"]) == 0
    output = capsys.readouterr().out
    assert f"step {step} with the weights after step {step - 1}" in output
    assert "backward: " in output or "not finite: " in output
    assert replay.main([*run, "--step", "999"]) == 2
    assert "no batch was kept here" in capsys.readouterr().err
