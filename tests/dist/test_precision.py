"""Half precision, dynamic loss scaling, and gradients that are not finite."""

from __future__ import annotations

import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_engines import ADAM, STAGES, data, engine, relative_error, run_each  # noqa: F401 (a fixture)
from tests.support.ranks import run_ranks
from tests.support.training import final_state, small_config, whole

pytestmark = pytest.mark.dist

# Relative error of each tensor after 20 steps of Adam: bf16 has 8 bits of mantissa, fp16 has 11.
BOUNDS = {"bf16": 0.02, "fp16": 0.01}
OVERFLOW_STEP = 4


def test_half_precision_stays_near_float32_on_every_engine(tmp_path, data):  # noqa: F811
    variants = {f"{name}-{stage}": (*ADAM, *engine(stage), f"precision={name}") for name in BOUNDS for stage in STAGES}
    results = run_each(2, tmp_path, data, {"fp32": ADAM, **variants})
    reference, reference_losses = results.pop("fp32")
    for name, (state, losses) in results.items():
        bound = BOUNDS[name.partition("-")[0]]
        assert losses == pytest.approx(reference_losses, rel=bound), name
        # It must not be float32 under another name.
        assert losses[0] != reference_losses[0], name
        for key, tensor in reference.items():
            assert state[key].dtype == tensor.dtype
            if not key.startswith(("optimizer.", "table.exp")):
                assert relative_error(state[key], tensor) < bound, (name, key)


def overflow_each(ranks: Ranks, configs: dict[str, Config], where: str) -> dict[str, dict]:
    return {name: overflow(ranks, config, where) for name, config in configs.items()}


def overflow(ranks: Ranks, config: Config, where: str) -> dict:
    """Train with a gradient on the last rank that overflows once; what was there before, after it, and at the end."""
    trainer = Trainer(config, ranks)
    backward, update = trainer.engine.backward, trainer.update
    seen: dict = {"scales": [], "updated": []}

    def broken_backward(loss, scale):
        is_now = trainer.progress.step == OVERFLOW_STEP and ranks.rank == ranks.world - 1
        backward(loss * torch.inf if is_now and where == "encoder" else loss, scale)
        if is_now and where == "table":
            gradient = next(rows.grad for _, rows in trainer.table._touched if rows.grad is not None and len(rows))
            gradient[0, 0] = torch.inf

    def watched_update(batches):
        if trainer.progress.step + 1 == OVERFLOW_STEP:
            seen["before"] = final_state(trainer)
        done = update(batches)
        if trainer.progress.step == OVERFLOW_STEP:
            seen["after"] = final_state(trainer)
        seen["scales"].append(trainer.step.loss_scale.value)
        seen["updated"].append(done.updated)
        return done

    trainer.engine.backward, trainer.update = broken_backward, watched_update
    trainer.train()
    return {**seen, "end": final_state(trainer), "skipped": trainer.progress.skipped_steps}


@pytest.mark.parametrize("where", ["encoder", "table"])
def test_an_overflow_skips_the_step_of_encoder_and_table_on_every_rank(tmp_path, data, where):  # noqa: F811
    options = (*ADAM, "precision=fp16", "loss_scale.initial=1024", "loss_scale.growth_steps=5", "max_steps=10")
    configs = {
        str(stage): small_config(data, tmp_path / f"{stage}", *options, *engine(stage), "accumulation=2")
        for stage in STAGES
    }
    results = run_ranks(2, overflow_each, tmp_path, configs, where)
    reference = whole([result["ddp"]["end"] for result in results])
    for stage in configs:
        for result in (result[stage] for result in results):
            # 3 good steps, the overflow, 5 good ones, 1 more.
            assert result["scales"] == [1024.0] * 3 + [512.0] * 5 + [1024.0] * 2, stage
            assert result["updated"] == [step != OVERFLOW_STEP for step in range(1, 11)], stage
            assert result["skipped"] == 1
            for key, tensor in result["before"].items():
                assert torch.equal(result["after"][key], tensor), (stage, key)
                assert tensor.numel() == 0 or not torch.equal(result["end"][key], tensor), (stage, key)
        for key, tensor in whole([result[stage]["end"] for result in results]).items():
            assert relative_error(tensor, reference[key]) < 1e-3, (stage, key)


def refuse(ranks: Ranks, config: Config, where: str) -> str:
    """The error of a float32 run with such a gradient."""
    with pytest.raises(UserError) as raised:
        overflow(ranks, config, where)
    return str(raised.value)


@pytest.mark.parametrize("where", ["encoder", "table"])
@pytest.mark.parametrize("stage", ["ddp", 2])
def test_in_float32_such_a_gradient_ends_every_rank_before_the_update(tmp_path, data, where, stage):  # noqa: F811
    for text in run_ranks(2, refuse, tmp_path, small_config(data, tmp_path / "run", *ADAM, *engine(stage)), where):
        assert text.startswith(f"step {OVERFLOW_STEP}: loss or gradients are not finite (")
        assert "nothing was updated" in text
