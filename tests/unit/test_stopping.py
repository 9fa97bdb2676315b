"""Stop signals as a process of its own meets them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


def wait_for_wish(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while ask(process) != "True":
        assert time.monotonic() < deadline


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_copies_of_a_signal_are_one_wish(number):
    process = start(1000)
    assert process.stdout.readline() == "ready\n"
    assert ask(process) == "False"
    for each in (number, number, signal.SIGTERM):
        process.send_signal(each)
        wait_for_wish(process)
    assert process.communicate()[0] == "" and process.returncode == 0


def test_a_second_signal_ends_the_process_at_once():
    process = start(0)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    wait_for_wish(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("there", [True, False])
def test_a_wish_from_before_the_start_is_in_a_file(tmp_path, there):
    if there:
        (tmp_path / "stop").touch()
    process = start(0, GRU4RECF_STOP_FILE=str(tmp_path / "stop"))
    assert process.stdout.readline() == ("requested\n" if there else "ready\n")
    process.communicate()


# Started by torchrun: waits for the others where no handler of Python can run, as torch does in C++, or has met them.
STARTING = """
import ctypes, os, signal, sys
from gru4recf_dist import stopping
stopping.FILE_SECONDS = float(sys.argv[1])
if sys.argv[2] == "met and impatient":
    stopping.COPIES_SECONDS = 0.1
stopping.catch_signals()
stopping.end_if_others_do_not_come()
if sys.argv[2] != "waiting":
    stopping.everyone_is_here()
    # As the trainer does.
    stopping.catch_signals()
for number in stopping.SIGNALS:
    signal.siginterrupt(number, False)
print("ready", flush=True)
ctypes.CDLL(None).read(0, ctypes.create_string_buffer(1), 1)
print(stopping.requested(), flush=True)
"""


def start_rank(file_seconds: float, state: str, stop_file: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTING, str(file_seconds), state],
        cwd=ROOT,
        env={**os.environ, "GRU4RECF_STOP_FILE": str(stop_file)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_starting_rank_ends_when_torchrun_ends_it_for_another_that_has_failed(tmp_path):
    process = start_rank(0.1, "waiting", tmp_path / "stop")
    process.send_signal(signal.SIGTERM)
    # Nobody writes to it, so it hangs where it is.
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("state", "number", "file_seconds", "file_comes"),
    [
        ("waiting", signal.SIGTERM, 1000, True),
        ("waiting", signal.SIGUSR1, 0, False),
        ("met", signal.SIGTERM, 0, False),
    ],
)
def test_a_wish_to_stop_does_not_end_a_starting_rank(tmp_path, state, number, file_seconds, file_comes):
    process = start_rank(file_seconds, state, tmp_path / "stop")
    process.send_signal(number)
    if file_comes:
        (tmp_path / "stop").touch()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    assert process.communicate("\n")[0] == "True\n" and process.returncode == 0


def test_a_second_signal_ends_a_rank_that_waits_where_no_handler_can_run(tmp_path):
    process = start_rank(0, "met and impatient", tmp_path / "stop")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


# Has stopped with other ranks.
STOPPED = """
import sys
from gru4recf_dist import stopping
stopping.LAUNCHER_SECONDS = float(sys.argv[1])
stopping.catch_signals()
print("ready", flush=True)
stopping.leave_end_to_launcher()
"""


@pytest.mark.parametrize("what", ["signal", "file", "time", "no launcher"])
def test_a_rank_that_stopped_with_others_leaves_its_end_to_its_launcher(tmp_path, what):
    stop_file = "" if what == "no launcher" else str(tmp_path / "stop")
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, "0.1" if what == "time" else "1000"],
        cwd=ROOT,
        env={**os.environ, "GRU4RECF_STOP_FILE": stop_file},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    if what in ("signal", "file"):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
    if what == "signal":
        process.send_signal(signal.SIGTERM)
    elif what == "file":
        (tmp_path / "stop").touch()
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 0
