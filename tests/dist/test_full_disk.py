"""A run whose logs meet a full disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gru4recf_dist.config import Config
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import logged_lines, small_config

pytestmark = pytest.mark.dist


def _train_with_full_disk(ranks: Ranks, config: Config, until_step: int | None) -> list[str]:
    """Train, while after step 3 both logs lie on a full device, until after a step or to the end; what is said."""
    said: list[str] = []
    Monitor.say = lambda monitor, text: said.append(text) if monitor.enabled else None
    trainer = Trainer(config, ranks)
    update = trainer.update

    def update_and_fill(batches):
        if ranks.is_first:
            run = Path(config.run_dir)
            logs = [run / "metrics.jsonl", *(run / "tensorboard").glob("events*rank0")]
            for log in logs if trainer.progress.step == 3 else ():
                log.rename(log.with_suffix(".kept"))
                log.symlink_to("/dev/full")
            for log in logs if trainer.progress.step == until_step else ():
                log.unlink()
                log.with_suffix(".kept").rename(log)
        return update(batches)

    trainer.update = update_and_fill
    trainer.train()
    return said


@pytest.mark.parametrize("until_step", [6, None])
def test_a_full_disk_is_one_warning_for_each_log_and_the_run_goes_on(tmp_path, until_step):
    write_dataset(str(tmp_path / "data"), random_sessions(0, 41, items=30), random_sessions(1, 9, 30))
    config = small_config(tmp_path / "data", tmp_path / "run", "max_steps=9", "monitoring.tensorboard=true")
    said = run_ranks(2, _train_with_full_disk, tmp_path, config, until_step)[0]
    (events,) = (tmp_path / "run/tensorboard").glob("*rank0")
    assert [line for line in said if line.startswith("warning")] == [
        f"warning: {path} cannot be written for now (No space left on device)"
        for path in (tmp_path / "run/metrics.jsonl", events)
    ]
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 9
    if until_step is None:
        return
    # What could not be written for a while is there.
    lines = [line["step"] for line in logged_lines(tmp_path / "run") if "train/lr" in line]
    points = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Scalars("train/lr")
    assert lines == [point.step for point in points] == list(range(1, 10))
