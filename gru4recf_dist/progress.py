"""Where a run is: what its checkpoints tell of it, and what its next log line is made from."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from gru4recf_dist.config import Config, ScheduleConfig
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.parallel import traffic


@dataclass
class Progress:
    """Where training is, besides the loader's position; JSON types only.

    Attributes:
        step: updates made.
        epoch: of the last of them. The loader's is the next one's: it goes on when it hands over an epoch's last batch.
        recent: the last validation figures, as many as are compared together.
        best, best_before: the best mean of them so far, and the best one before that.
        evaluations_since_best: early stopping's memory.
        rate_drops, risen_to, evaluations_since_drop: the memory of `schedule.name: plateau`: drops so far, the last
            mean that counted as better, and evaluations since then or since the last drop.
        sessions_lost: training sessions, each epoch anew, of damaged shards (`loader.on_bad_shard: skip`).
        skipped_steps: those whose gradients or loss were not finite.
        broken_in_a_row: of these, the last ones that no smaller loss scale would have helped.
        evaluation_owed: a signal stopped the run before the evaluation that was due after this step was made.
        trained_events, trained_seconds: over all ranks, for the throughput of the whole run.
    """

    step: int = 0
    epoch: int = 0
    recent: list[float] = field(default_factory=list)
    best: float | None = None
    best_before: float | None = None
    evaluations_since_best: int = 0
    rate_drops: int = 0
    risen_to: float | None = None
    evaluations_since_drop: int = 0
    trained_events: int = 0
    sessions_lost: int = 0
    skipped_steps: int = 0
    broken_in_a_row: int = 0
    trained_seconds: float = 0.0
    evaluation_owed: bool = False

    def evaluated(self, figure: float, window: int, schedule: ScheduleConfig, is_last_phase: bool) -> bool:
        """Take note of a validation figure.

        Args:
            window: `early_stopping.window`.
            is_last_phase: whether the whole model is in training; patience begins when its last subnet has come in.

        Returns:
            whether it is the best so far.
        """
        self.recent = [*self.recent, figure][-window:]
        mean = sum(self.recent) / len(self.recent)
        is_best = self.best is None or mean > self.best
        if is_best:
            self.best_before, self.best = self.best, mean
        waits = not is_best and is_last_phase
        self.evaluations_since_best = self.evaluations_since_best + 1 if waits else 0
        if schedule.name == "plateau":
            self._drop_rate_on_plateau(mean, schedule, is_last_phase)
        return is_best

    def _drop_rate_on_plateau(self, mean: float, schedule: ScheduleConfig, is_last_phase: bool) -> None:
        """As torch's `ReduceLROnPlateau`, with its relative threshold."""
        if self.risen_to is None or mean > self.risen_to * (1 + schedule.plateau_threshold):
            self.risen_to, self.evaluations_since_drop = mean, 0
        elif is_last_phase:
            self.evaluations_since_drop += 1
        if self.evaluations_since_drop >= schedule.plateau_patience:
            self.rate_drops, self.evaluations_since_drop = self.rate_drops + 1, 0


@dataclass
class Window:
    """Sums over the steps since the last log line; ``busy_seconds`` are those not spent waiting for other ranks."""

    steps: int = 0
    loss: float = 0.0
    targets: float = 0.0
    events: float = 0.0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    traffic: traffic.Traffic = field(default_factory=traffic.Traffic)
    started: float = field(default_factory=time.perf_counter)


def total_steps(config: Config, loader: SessionLoader, step: int) -> int:
    """Updates of the whole run, ``step`` of them made: the nearer of ``max_epochs`` and ``max_steps``.

    The epochs are the loader's: after a resume with another batch size, steps made do not tell how many there were.
    """
    by_epochs = math.inf if config.max_epochs is None else step + loader.steps_until(config.max_epochs)
    by_steps = math.inf if config.max_steps is None else config.max_steps
    return int(min(by_epochs, by_steps))
