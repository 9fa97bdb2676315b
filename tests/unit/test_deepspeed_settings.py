"""DeepSpeed's configuration, made from ours."""

from __future__ import annotations

import pytest

from gru4recf_dist import config as configuration
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.deepspeed_settings import deepspeed_settings


def settings(*overrides: str, world: int = 2) -> dict:
    given = ["data=d", "run_dir=r", "engine.name=deepspeed", "batch_size=64", *overrides]
    return deepspeed_settings(configuration.load(None, given), world)


def test_what_our_configuration_decides_is_filled_in():
    filled = settings("accumulation=4", "optimizer.clip=0.5")
    assert filled["train_micro_batch_size_per_gpu"] == 8
    assert filled["gradient_accumulation_steps"] == 4
    assert filled["gradient_clipping"] == 0.5
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & filled.keys()


def test_without_clip_deepspeed_is_told_so():
    assert settings()["gradient_clipping"] == 0.0


def test_at_stage_0_we_clip_and_not_deepspeed():
    assert settings("engine.deepspeed.zero_optimization.stage=0", "optimizer.clip=0.5")["gradient_clipping"] == 0.0


def test_other_keys_are_passed_on():
    zero = "engine.deepspeed.zero_optimization"
    filled = settings(f"{zero}.stage=3", f"{zero}.offload_optimizer.device=cpu", "engine.deepspeed.dump_state=true")
    assert filled["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert filled["dump_state"] is True


def test_a_key_that_says_what_ours_says_is_accepted():
    given = settings(
        "engine.deepspeed.train_batch_size=64",
        "engine.deepspeed.gradient_accumulation_steps=2",
        "engine.deepspeed.gradient_clipping=0.5",
        "optimizer.clip=0.5",
        "accumulation=2",
    )
    assert given["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train_batch_size=128", "engine.deepspeed.train_batch_size: 128 contradicts batch_size, .* 64"),
        ("train_micro_batch_size_per_gpu=64", "train_micro_batch_size_per_gpu: 64 contradicts batch_size, .* 32"),
        ("gradient_accumulation_steps=2", "gradient_accumulation_steps: 2 contradicts accumulation"),
        ("gradient_clipping=1.0", "gradient_clipping: 1.0 contradicts optimizer.clip"),
        ("bf16.enabled=true", "bf16: set precision instead"),
        ("fp16.enabled=true", "fp16: set precision instead"),
        ("optimizer.type=Adam", "engine.deepspeed.optimizer: set optimizer instead"),
        ("scheduler.type=WarmupLR", "scheduler: set schedule instead"),
        ("flops_profiler.enabled=true", "flops_profiler: set monitoring.profile_step instead"),
        ("zero_optimisation.stage=2", "zero_optimisation: unknown key .did you mean 'zero_optimization'"),
        ("zero_optimization.stage=4", "stage: must be one of"),
        ("zero_optimization.overlap_com=true", "zero_optimization.overlap_com: "),
        ("zero_optimization.reduce_bucket_size=many", "zero_optimization.reduce_bucket_size: "),
    ],
)
def test_contradictions_and_unknown_keys_are_named(override, says):
    with pytest.raises(UserError, match=says):
        settings(f"engine.deepspeed.{override}")


def test_double_precision_is_ddps_alone():
    with pytest.raises(UserError, match="precision: fp64"):
        settings("precision=fp64")
