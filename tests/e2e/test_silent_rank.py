"""A rank that falls silent, as when its machine freezes, is named on the terminal before the others give up."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gru4recf_dist import typed_yaml
from tests.support.launched import rank_process
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import logged_lines, small_config

pytestmark = [pytest.mark.e2e, pytest.mark.dist, pytest.mark.clock]
ROOT = Path(__file__).parents[2]


def test_a_frozen_rank_is_named_and_the_others_end_with_one_line_each(tmp_path):
    write_dataset(str(tmp_path / "data"), random_sessions(0, 512, items=50, longest=6), random_sessions(1, 16, 50))
    config = small_config(tmp_path / "data", tmp_path / "run", "max_steps=100000", "timeout_seconds=6")
    (tmp_path / "config.yaml").write_text(typed_yaml.dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [*torchrun, "train.py", "--config", str(tmp_path / "config.yaml")],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(lambda: len(logged_lines(tmp_path / "run")) > 5, log)
        frozen = rank_process(launcher.pid, 1)
        frozen.send_signal(signal.SIGSTOP)
        wait_for(lambda: "warning: step" in log.read_text(), log)
        wait_for(lambda: log.read_text().count("error: rank") == 2, log)
        # torchrun would wait half a minute for it to end by SIGTERM.
        frozen.kill()
        assert launcher.wait(timeout=60) == 1
    finally:
        with contextlib.suppress(psutil.Error):
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                process.kill()
        launcher.wait()
    text = log.read_text()
    named = r"step \d+, phase \w+: waited \d+ s in the collective '[\w ]+' for rank 1 \(last at step \d+, phase \w+"
    # One rank says it early, each that waited says it at its end, and there is no traceback.
    assert len(re.findall(rf"warning: {named}", text)) == 1, text
    assert sorted(re.findall(rf"error: rank (\d): {named}", text)) == ["0", "2"], text
    assert "silent for" in text and "stopped, or gone" in text
    # torchrun prints one of its own after that.
    assert "Traceback" not in text[: text.rindex("error: rank")]


def wait_for(what, log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.1)
