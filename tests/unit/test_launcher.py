"""What becomes of a rank whose launcher is killed; seen from a process in the launcher's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")

RANK = """
import os, time
from gru4recf_dist.launcher import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
# In torchrun's place.
LAUNCHER = f"""
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", {RANK!r}]).returncode)
"""


def start(program: str, **environment: str) -> subprocess.Popen:
    """As torchrun starts a rank: with a name of the run, unless the test takes it away."""
    variables = {**os.environ, "TORCHELASTIC_RUN_ID": "run", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={name: value for name, value in variables.items() if value},
        stdout=subprocess.PIPE,
        text=True,
    )


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("run", ["run", ""])
def test_a_rank_of_torchrun_ends_with_it(run):
    launcher = start(LAUNCHER, TORCHELASTIC_RUN_ID=run)
    rank = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait()
    if not run:
        # Nobody's rank: it lives on.
        time.sleep(0.5)
        assert not has_ended(rank)
        rank.kill()
    deadline = time.monotonic() + 30
    while not has_ended(rank):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_whose_launcher_went_before_it_could_look_ends_at_once():
    rank = start(RANK, **named(gone_process()))
    assert rank.communicate(timeout=30)[0] == "" and rank.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "told",
    [
        # Of a container, where the number may be another process's.
        {"GRU4RECF_LAUNCHER_PID_NAMESPACE": "pid:[1]"},
        {"GRU4RECF_LAUNCHER_PID_NAMESPACE": ""},
        {"GRU4RECF_LAUNCHER_PID": "none"},
        # A site's own.
        {"GRU4RECF_LAUNCHER_PID": "", "LAUNCHER_PID": "1"},
    ],
)
def test_a_launcher_that_cannot_be_looked_for_is_not_taken_for_gone(told):
    rank = start(RANK, **{**named(gone_process()), **told})
    assert rank.stdout.readline() == f"{rank.pid}\n"
    rank.kill()
    rank.wait()


def gone_process() -> int:
    gone = subprocess.Popen(["true"])
    gone.wait()
    return gone.pid


def named(launcher: int) -> dict[str, str]:
    """What tells a rank of its launcher."""
    return {
        "GRU4RECF_LAUNCHER_PID": str(launcher),
        "GRU4RECF_LAUNCHER_PID_NAMESPACE": os.readlink("/proc/self/ns/pid"),
    }


def test_between_launcher_and_rank_there_may_be_others():
    launcher = start(LAUNCHER, **named(os.getpid()))
    assert psutil.Process(int(launcher.stdout.readline())).ppid() == launcher.pid != os.getpid()
    launcher.kill()
    launcher.wait()
