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
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import logged_lines, small_config, train, whole

pytestmark = [pytest.mark.e2e, pytest.mark.dist]
ROOT = Path(__file__).parents[2]

# The program itself, on a storage that hangs in the middle of each file of a checkpoint from step 6 on.
_ON_HANGING_STORAGE = """
import contextlib, re, sys, time
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


def test_a_second_signal_ends_a_checkpoint_that_hangs_and_the_one_before_is_used(tmp_path):
    write_dataset(str(tmp_path / "data"), random_sessions(0, 512, items=50), random_sessions(1, 16, 50))
    options = ("max_steps=12", "checkpoint.every_epochs=null", "checkpoint.every_steps=5")
    unbroken = whole(run_ranks(1, train, tmp_path, small_config(tmp_path / "data", tmp_path / "unbroken", *options)))
    config = small_config(tmp_path / "data", tmp_path / "run", *options)
    (tmp_path / "config.yaml").write_text(typed_yaml.dump(config))
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_HANGING_STORAGE, "--config", str(tmp_path / "config.yaml")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        # The checkpoint of step 10; training may be ahead of it.
        assert process.stdout.readline() == b"hangs\n"
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
    folder = tmp_path / "run" / "checkpoints"
    assert complete_steps(str(folder)) == [5]
    resumed = whole(run_ranks(1, train, tmp_path, config))
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(resumed[name], tensor), name
    steps = [line["step"] for line in logged_lines(tmp_path / "run") if "train/lr" in line]
    assert steps == list(range(1, 13))
    assert not list(folder.rglob("*.tmp"))
