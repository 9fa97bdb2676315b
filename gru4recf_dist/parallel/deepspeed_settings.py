"""DeepSpeed's configuration from ours."""

from __future__ import annotations

import difflib
import os
from typing import Any

import torch
from pydantic import ValidationError

from gru4recf_dist.config import Config
from gru4recf_dist.errors import UserError

STAGES = (0, 1, 2, 3)

# Sections of DeepSpeed's that our own configuration decides, and the key that does.
_OWNED_SECTIONS = {
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision",
    "flops_profiler": "monitoring.profile_step",
    "tensorboard": "monitoring.tensorboard",
}
# DeepSpeed ignores a key that it does not know: a misspelt one must not go unnoticed.
_PASSED_ON = frozenset(
    {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "sparse_gradients",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "comms_logger",
        "comms_config",
        "activation_checkpointing",
        "aio",
        "compile",
        "data_types",
        "wandb",
        "csv_monitor",
        "comet",
    }
)


def choose_accelerator(device_type: str) -> None:
    """Call before DeepSpeed is imported: told the device, it does not probe the machine."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def zero_stage(config: Config) -> int:
    """The configured ZeRO stage."""
    return config.engine.deepspeed["zero_optimization"]["stage"]


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration: the user's `engine.deepspeed` with the keys that ours decides filled in.

    Raises:
        UserError: `engine.deepspeed` contradicts one of those keys, has an unknown one, or a ZeRO stage that does not
            exist.
    """
    given = config.engine.deepspeed
    owned = {
        "train_batch_size": ("batch_size", config.batch_size),
        "train_micro_batch_size_per_gpu": ("batch_size", max(1, config.batch_size // (world * config.accumulation))),
        "gradient_accumulation_steps": ("accumulation", config.accumulation),
        # 0 is "never". Left out, DeepSpeed clips at 1.
        "gradient_clipping": ("optimizer.clip", config.optimizer.clip or 0.0),
    }
    for key, value in given.items():
        if key in _OWNED_SECTIONS:
            raise UserError(f"engine.deepspeed.{key}: set {_OWNED_SECTIONS[key]} instead")
        if key in owned:
            ours, wanted = owned[key]
            if value != wanted:
                raise UserError(f"engine.deepspeed.{key}: {value!r} contradicts {ours}, from which it is {wanted!r}")
        elif key not in _PASSED_ON:
            close = difflib.get_close_matches(key, [*_PASSED_ON, *owned, *_OWNED_SECTIONS], 1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise UserError(f"engine.deepspeed.{key}: unknown key{hint}")
    if zero_stage(config) not in STAGES:
        raise UserError(
            f"engine.deepspeed.zero_optimization.stage: must be one of {STAGES}, not {zero_stage(config)!r}"
        )
    _check_zero(given["zero_optimization"])
    if config.precision == "fp64":
        raise UserError("precision: fp64 is not for engine deepspeed")
    settings = {
        # The optimizer is a plain torch one, which DeepSpeed has not tested with ZeRO; our tests have.
        "zero_allow_untested_optimizer": True,
        # Its own for offloading takes a compiler and a minute at the first start.
        "zero_force_ds_cpu_optimizer": False,
        **given,
        **{key: value for key, (_, value) in owned.items() if key != "train_batch_size"},
    }
    if zero_stage(config) == 0:
        # There we clip: DeepSpeed would not tell the norm.
        settings["gradient_clipping"] = 0.0
    return settings


def _check_zero(section: dict[str, Any]) -> None:
    """Hold the section against DeepSpeed's own schema."""
    choose_accelerator("cuda" if torch.cuda.is_available() else "cpu")
    # It takes seconds to import: only who asks for it pays.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"engine.deepspeed.zero_optimization.{key}: {first['msg']}") from error
