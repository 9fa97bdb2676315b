"""How long training steps take."""

from __future__ import annotations

import time

from gru4recf_dist.trainer import Trainer


def step_seconds(trainer: Trainer, steps: int, skip: int) -> list[float]:
    """How long each of ``steps`` updates takes, after ``skip`` that do not count."""
    seconds: list[float] = []
    while len(seconds) < skip + steps:
        with trainer.ahead.rest_of_epoch(trainer.loader) as batches:
            for _ in range(min(trainer.loader.steps_left, skip + steps - len(seconds))):
                started = time.perf_counter()
                trainer.update(next(batches))
                seconds.append(time.perf_counter() - started)
    return seconds[skip:]
