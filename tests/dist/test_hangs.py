"""A rank that does not arrive is named by the others, and every rank leaves what it was doing in the run folder."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from gru4recf_dist.config import Config
from gru4recf_dist.errors import RanksLost
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.engines import make_engine
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_engines import data  # noqa: F401 (a fixture)
from tests.support.ranks import run_ranks
from tests.support.training import logged_lines, small_config
from tests.support.waits import WaitWatch

pytestmark = [pytest.mark.dist, pytest.mark.clock]
ROOT = Path(__file__).parents[2]

TIMEOUT_SECONDS = 4
# Not the last of an epoch, which is logged.
LATE_STEP = 4
CHECKPOINTS = (f"checkpoint.every_steps={LATE_STEP}", "checkpoint.every_epochs=null")


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
            elif where == "backward":
                *_, last = trainer.engine.module.parameters()
                last.register_hook(lambda gradient: sleepy(lambda: None))
            elif where == "checkpoint":
                write = dcp.FileSystemWriter.write_data

                def sleepy_write(*arguments):
                    # The first one; meanwhile training goes on, if it is written in the background.
                    dcp.FileSystemWriter.write_data = write
                    time.sleep(TIMEOUT_SECONDS + 3 if ranks.rank == late else 0)
                    return write(*arguments)

                dcp.FileSystemWriter.write_data = sleepy_write
            else:
                apply = trainer.model.tables.apply_gradients
                trainer.model.tables.apply_gradients = lambda *arguments: sleepy(apply, *arguments)
            trainer.train()
    except RanksLost as error:
        return str(error)
    return "trained to the end"


@pytest.mark.parametrize(
    ("where", "step", "late", "options"),
    [
        ("forward", LATE_STEP, 1, ()),
        ("update", LATE_STEP + 1, 0, ()),
        ("backward", LATE_STEP, 2, ()),
        ("checkpoint", LATE_STEP, 1, (*CHECKPOINTS, "checkpoint.async=false")),
        ("checkpoint", LATE_STEP, 1, (*CHECKPOINTS, "checkpoint.async=true")),
    ],
    ids=["forward", "update", "backward", "checkpoint", "checkpoint in the background"],
)
def test_the_late_rank_its_step_and_phase_are_named(tmp_path, data, where, step, late, options):  # noqa: F811
    config = small_config(data, tmp_path / "run", "monitoring.log_every_steps=10", *options)
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


BROKEN_WORKER = """
import sys
from torch.utils.data import IterableDataset
from gru4recf_dist.data.worker_processes import in_workers
from gru4recf_dist.errors import exits_cleanly
from gru4recf_dist.parallel import ranks

class Broken(IterableDataset):
    def __iter__(self):
        raise RuntimeError("timeout")

@exits_cleanly
def main():
    with ranks.running("cpu", 20):
        list(in_workers(Broken(), 1))

if __name__ == "__main__":
    sys.exit(main())
"""


def test_the_error_of_a_loader_worker_is_not_taken_for_the_end_of_a_rank(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN_WORKER)
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "broken.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert "Original Traceback" in ended.stderr and "another rank" not in ended.stderr
    assert ended.stderr.endswith("RuntimeError: timeout\n\n")


def test_what_a_device_says_of_itself_is_not_taken_for_the_end_of_a_rank():
    assert not process_ranks._tells_of_others(RuntimeError("CUDA error: the launch timed out and was terminated"))
    assert process_ranks._tells_of_others(RuntimeError("Timed out waiting 4000ms for recv operation to complete"))


def wait_in_engine(ranks: Ranks, config: Config) -> str | None:
    """A backward that rank 1 lingers in until rank 0 says where it is; returns that, on rank 0."""
    watch = WaitWatch()
    engine = make_engine(torch.nn.Linear(3, 1), config, ranks)
    meanwhile = watch.start if ranks.rank == 0 else watch.wait_until_seen
    engine.module.weight.register_hook(lambda gradient: meanwhile())
    with engine.accumulating(last=True):
        engine.backward(engine(torch.ones(2, 3)).sum(), 1.0)
    return watch.stop()


@pytest.mark.parametrize(
    "options",
    [(), *(("engine.name=deepspeed", f"engine.deepspeed.zero_optimization.stage={stage}") for stage in (0, 2))],
    ids=["ddp", "zero 0", "zero 2"],
)
def test_where_an_engine_waits_for_gradients_the_rank_is_known_to_wait(tmp_path, data, options):  # noqa: F811
    config = small_config(data, tmp_path / "run", *options)
    assert run_ranks(2, wait_in_engine, tmp_path, config) == ["encoder_gradients", None]


def slow(ranks: Ranks, config: Config) -> list[str]:
    """Train while rank 2 takes its time in every step; returns what was said."""
    trainer, said = Trainer(config, ranks), []
    loss, say = trainer.step._loss, Monitor.say

    def slow_loss(*arguments):
        time.sleep(0.2 if ranks.rank == 2 else 0.0)
        return loss(*arguments)

    def heard(monitor: Monitor, text: str) -> None:
        said.append(text)
        say(monitor, text)

    trainer.step._loss, Monitor.say = slow_loss, heard
    trainer.train()
    return said


def test_the_slow_rank_is_told_from_those_that_wait_for_it_and_named(tmp_path, data):  # noqa: F811
    # At its second log line of four steps it has been slow for long.
    options = ("monitoring.log_every_steps=4", "max_steps=12", "monitoring.slow_rank_seconds=0.5")
    said, *_ = run_ranks(3, slow, tmp_path, small_config(data, tmp_path / "run", *options))
    named = [line for line in said if "times as slow as the median of the others" in line]
    assert named and all(line.startswith("warning: rank 2 has been ") for line in named), said
    found = [line["perf/slowest_rank"] for line in logged_lines(tmp_path / "run") if "perf/slowest_rank" in line]
    # Waiting left out, the others take a few milliseconds a step, where it takes 200; but for the first one.
    assert min(found[1:]) > 2.0 and np.isfinite(found).all()
