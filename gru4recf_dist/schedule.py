"""The learning-rate factor of each step, shared by the encoder's and the table's optimizer."""

from __future__ import annotations

import math

from gru4recf_dist.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, total_steps: int, drops: int = 0) -> float:
    """What the learning rates are multiplied by at ``step`` (from 0) of ``total_steps``.

    Linear warm-up over ``warmup_steps``, then constant, or a linear or cosine decay that reaches ``final`` at the last
    step, or, with `plateau`, ``plateau_factor`` times less after each of ``drops`` (`Progress.evaluated`).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant":
        return 1.0
    if config.name == "plateau":
        return config.plateau_factor**drops
    length = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    shape = 1.0 - progress if config.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final + (1.0 - config.final) * shape
