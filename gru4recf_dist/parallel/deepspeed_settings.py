"""DeepSpeed's configuration from ours; without importing DeepSpeed, so that it can be checked in no time."""

from __future__ import annotations

from gru4recf_dist.config import Config
from gru4recf_dist.errors import UserError

STAGES = (1, 2)

# What our own configuration decides, and the key that does.
_OWNED = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "precision",
    "bf16": "precision",
}


def deepspeed_settings(config: Config, world: int) -> dict:
    """DeepSpeed's own configuration: the user's `engine.deepspeed` with the keys that ours decides filled in.

    Raises:
        UserError: `engine.deepspeed` sets one of those keys, or a ZeRO stage that is not supported.
    """
    given = config.engine.deepspeed
    for key in given:
        if key in _OWNED:
            raise UserError(f"engine.deepspeed.{key}: set {_OWNED[key]} instead")
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if stage not in STAGES:
        raise UserError(f"engine.deepspeed.zero_optimization.stage: must be one of {STAGES}, not {stage!r}")
    if config.precision != "fp32":
        raise UserError(f"precision: engine deepspeed supports fp32, not {config.precision}")
    return {
        **given,
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // world),
        "gradient_accumulation_steps": 1,
        # 0 is "never". Left out, DeepSpeed clips at 1.
        "gradient_clipping": config.optimizer.clip or 0.0,
        # The optimizer is a plain torch one, which DeepSpeed has not tested with ZeRO; our tests have.
        "zero_allow_untested_optimizer": True,
    }
