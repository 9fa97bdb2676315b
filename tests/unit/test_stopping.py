"""Stop signals as a process of its own meets them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
from gru4recf_dist import stopping
stopping.COPIES_SECONDS = float(sys.argv[1])
stopping.catch_signals()
print("requested" if stopping.requested() else "ready", flush=True)
for line in sys.stdin:
    print(stopping.requested(), flush=True)
"""


def start(copies_seconds: float, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(copies_seconds)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_copies_of_a_signal_are_one_wish(number):
    process = start(1000)
    assert process.stdout.readline() == "ready\n"
    assert ask(process) == "False"
    for each in (number, number, signal.SIGTERM):
        process.send_signal(each)
        assert ask(process) == "True"
    assert process.communicate()[0] == "" and process.returncode == 0


def test_a_second_signal_ends_the_process_at_once():
    process = start(0)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert ask(process) == "True"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("there", [True, False])
def test_a_wish_from_before_the_start_is_in_a_file(tmp_path, there):
    if there:
        (tmp_path / "stop").touch()
    process = start(0, STOP_FILE=str(tmp_path / "stop"))
    assert process.stdout.readline() == ("requested\n" if there else "ready\n")
    process.communicate()
