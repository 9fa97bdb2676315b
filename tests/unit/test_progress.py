"""What a run remembers of its evaluations."""

from __future__ import annotations

import dataclasses
import json

from gru4recf_dist.config import ScheduleConfig
from gru4recf_dist.progress import Progress

FIGURES = [0.1, 0.2, 0.9, 0.1, 0.5, 0.6, 0.55, 0.2]


def remembered(window: int, figures: list[float] = FIGURES, **schedule) -> tuple[Progress, list[bool]]:
    progress = Progress()
    best = [progress.evaluated(figure, window, ScheduleConfig(**schedule), is_last_phase=True) for figure in figures]
    return progress, best


def test_alone_the_best_figure_counts():
    progress, best = remembered(1)
    assert best == [True, True, True, False, False, False, False, False]
    assert (progress.best, progress.best_before, progress.evaluations_since_best) == (0.9, 0.2, 5)


def test_with_a_window_a_single_lucky_figure_does_not():
    # Means of three: .1, .15, .4, .4, .5, .4, .55, .45.
    progress, best = remembered(3)
    assert best == [True, True, True, False, True, False, True, False]
    assert abs(progress.best - 0.55) < 1e-12 and progress.evaluations_since_best == 1
    assert progress.recent == FIGURES[-3:]


def test_a_resumed_run_remembers_the_same():
    for split in range(len(FIGURES)):
        progress, _ = remembered(3, FIGURES[:split], name="plateau")
        resumed = Progress(**json.loads(json.dumps(vars(progress))))
        for figure in FIGURES[split:]:
            resumed.evaluated(figure, 3, ScheduleConfig(name="plateau"), is_last_phase=True)
        assert dataclasses.asdict(resumed) == dataclasses.asdict(remembered(3, name="plateau")[0])


def drops_after(figures: list[float], threshold: float) -> list[int]:
    """Evaluations, from 1, after which the rates dropped."""
    settings = {"name": "plateau", "plateau_patience": 2, "plateau_threshold": threshold}
    counts = [remembered(1, figures[:end], **settings)[0].rate_drops for end in range(len(figures) + 1)]
    return [end for end in range(1, len(counts)) if counts[end] > counts[end - 1]]


def test_what_adds_less_than_the_threshold_to_the_best_is_no_rise():
    creeping = [0.5, 0.502, 0.504, 0.506, 0.507, 0.508, 0.53, 0.531]
    assert drops_after(creeping, threshold=0.0) == []
    # .506 is more than 1 % above .5; .507 and .508 are not above .506, nor .531 above .53.
    assert drops_after(creeping, threshold=0.01) == [3, 6]


def test_patience_begins_with_the_last_subnet():
    progress = Progress()
    for figure in (0.5, 0.1, 0.1):
        progress.evaluated(figure, 1, ScheduleConfig(), is_last_phase=False)
    assert progress.evaluations_since_best == 0
    progress.evaluated(0.1, 1, ScheduleConfig(), is_last_phase=True)
    assert progress.evaluations_since_best == 1
