"""A rank that does not arrive is named by the others, and every rank leaves what it was doing in the run folder."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from gru4recf_dist.config import Config
from gru4recf_dist.errors import RanksLost
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_engines import data  # noqa: F401 (a fixture)
from tests.support.ranks import run_ranks
from tests.support.training import logged_lines, small_config

pytestmark = pytest.mark.dist

TIMEOUT_SECONDS = 4
# Not the last of an epoch, which is logged.
LATE_STEP = 4


def hang(_: Ranks, config: Config, late: int, where: str) -> str:
    """Train with one rank that sleeps for too long in the given phase; returns the error."""

    def keep(name: str, content: bytes) -> None:
        path = Path(config.run_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    try:
        with process_ranks.running("cpu", TIMEOUT_SECONDS, keep) as ranks:
            trainer = Trainer(config, ranks)

            def sleepy(function, *arguments):
                if ranks.rank == late and trainer.progress.step == LATE_STEP:
                    time.sleep(TIMEOUT_SECONDS + 3)
                return function(*arguments)

            if where == "forward":
                loss = trainer.step._loss
                trainer.step._loss = lambda *arguments: sleepy(loss, *arguments)
            else:
                apply = trainer.table.apply_gradients
                trainer.table.apply_gradients = lambda *arguments: sleepy(apply, *arguments)
            trainer.train()
    except RanksLost as error:
        return str(error)
    return "trained to the end"


@pytest.mark.parametrize(("where", "step", "late"), [("forward", LATE_STEP, 1), ("update", LATE_STEP + 1, 0)])
def test_the_late_rank_its_step_and_phase_are_named(tmp_path, data, where, step, late):  # noqa: F811
    config = small_config(data, tmp_path / "run", "monitoring.log_every_steps=10")
    texts = run_ranks(3, hang, tmp_path, config, late, where)
    for rank in {0, 1, 2} - {late}:
        assert texts[rank].startswith(f"step {step}, phase "), texts
        assert f"for rank {late} (last at step {LATE_STEP}, phase {where}, for " in texts[rank]
        assert "silent" not in texts[rank]
    # It comes back when the others are gone.
    assert "another rank is gone" in texts[late]
    folder = tmp_path / "run" / "flight-recorder"
    (stuck,) = folder.glob(f"*/stacks-{late}.txt")
    assert f"step {LATE_STEP}, phase {where}" in stuck.read_text() and "in sleepy" in stuck.read_text()
    for rank in range(3):
        (recorded,) = folder.glob(f"*/rank_{rank}")
        assert pickle.loads(recorded.read_bytes())["entries"]


def slow(ranks: Ranks, config: Config) -> None:
    """Train while rank 2 takes its time in every step."""
    trainer = Trainer(config, ranks)
    loss = trainer.step._loss

    def slow_loss(*arguments):
        time.sleep(0.2 if ranks.rank == 2 else 0.0)
        return loss(*arguments)

    trainer.step._loss = slow_loss
    trainer.train()


def test_the_slow_rank_is_told_from_those_that_wait_for_it(tmp_path, data):  # noqa: F811
    config = small_config(data, tmp_path / "run", "monitoring.log_every_steps=4", "max_steps=8")
    run_ranks(3, slow, tmp_path, config)
    found = [line["perf/slowest_rank"] for line in logged_lines(tmp_path / "run") if "perf/slowest_rank" in line]
    # Waiting left out, the others take a few milliseconds a step, where it takes 200.
    assert min(found) > 2.0 and np.isfinite(found).all()
