"""A second signal while a checkpoint is written ends the process at once, and damages nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gru4recf_dist import typed_yaml
from gru4recf_dist.checkpoint_commits import complete_steps
from gru4recf_dist.stopping import COPIES_SECONDS
from tests.support.launched import rank_processes
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import logged_lines, small_config, train, whole

pytestmark = [pytest.mark.e2e, pytest.mark.dist, pytest.mark.clock]
ROOT = Path(__file__).parents[2]

# The program itself, on a storage that hangs in the middle of each file of a checkpoint from step 6 on.
_ON_HANGING_STORAGE = """
import contextlib, re, sys, time
from gru4recf_dist import stopping
stopping.catch_signals()
stopping.end_if_others_do_not_come()
print("starts", flush=True)
from gru4recf_dist.data import storage
from gru4recf_dist import train
open_atomic = storage.open_atomic

@contextlib.contextmanager
def hanging(url):
    with open_atomic(url) as stream:
        step = re.search(r"checkpoints/step-(\\d+)/__", url)
        if step and int(step[1]) > 5:
            stream.write(b"half of it")
            stream.flush()
            print("hangs", flush=True)
            time.sleep(600)
        yield stream

storage.open_atomic = hanging
sys.exit(train.main(sys.argv[1:]))
"""


OPTIONS = ("max_steps=12", "checkpoint.every_epochs=null", "checkpoint.every_steps=5")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("second-signal") / "data"
    write_dataset(str(folder), random_sessions(0, 512, items=50), random_sessions(1, 16, 50))
    return folder


def check_that_it_goes_on(folder: Path, data: Path, world: int) -> None:
    """From the last checkpoint before the one that hung, on as many ranks, to an unbroken run's end, bit by bit."""
    checkpoints = folder / "run" / "checkpoints"
    assert complete_steps(str(checkpoints)) == [5]
    unbroken, resumed = (
        whole(run_ranks(world, train, folder, small_config(data, folder / run, *OPTIONS)))
        for run in ("unbroken", "run")
    )
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(resumed[name], tensor), name
    steps = [line["step"] for line in logged_lines(folder / "run") if "train/lr" in line]
    assert steps == list(range(1, 13))
    assert not list(checkpoints.rglob("*.tmp"))


def test_a_second_signal_ends_a_checkpoint_that_hangs_and_the_one_before_is_used(tmp_path, data):
    (tmp_path / "config.yaml").write_text(typed_yaml.dump(small_config(data, tmp_path / "run", *OPTIONS)))
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_HANGING_STORAGE, "--config", str(tmp_path / "config.yaml")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        # The checkpoint of step 10; training may be ahead of it.
        assert [process.stdout.readline(), process.stdout.readline()] == [b"starts\n", b"hangs\n"]
        process.send_signal(signal.SIGTERM)
        time.sleep(COPIES_SECONDS / 4)
        # A copy of the first: nothing happens.
        process.send_signal(signal.SIGTERM)
        time.sleep(COPIES_SECONDS)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    check_that_it_goes_on(tmp_path, data, world=1)


def test_a_second_signal_ends_torchrun_too_which_starts_nothing_anew(tmp_path, data):
    (tmp_path / "config.yaml").write_text(typed_yaml.dump(small_config(data, tmp_path / "run", *OPTIONS)))
    # What comes within a second of the first signal is a copy of it, so that the test need not wait for ten.
    shorter = "stopping.COPIES_SECONDS = 1.0\nstopping.catch_signals"
    program = _ON_HANGING_STORAGE.replace("stopping.catch_signals", shorter)
    (tmp_path / "program.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}")
    launcher = (ROOT / "launch" / "stoppable.py").read_text()
    (tmp_path / "stoppable.py").write_text(launcher.replace("COPIES_SECONDS = 10.0", "COPIES_SECONDS = 1.0"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, str(tmp_path / "program.py"), "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "stoppable.py"), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert sorted(process.stdout.readline() for _ in range(4)) == [b"hangs\n"] * 2 + [b"starts\n"] * 2
        ranks = dict(rank_processes(process.pid))
        process.send_signal(signal.SIGTERM)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        # torchrun gives ranks that do not end half a minute.
        assert process.wait(timeout=20) != 0
        assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks.values())
        # No rank started, nor hung, once more.
        assert process.stdout.read() == b""
    finally:
        process.kill()
        process.wait()
    check_that_it_goes_on(tmp_path, data, world=2)
