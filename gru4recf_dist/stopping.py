"""A wish to stop: SIGTERM, SIGUSR1, or the file that the launcher leaves for ranks that start after the signal.

SIGTERM from torchrun may mean something else: another rank has failed. While the ranks are starting there is nothing
that could be saved, and no use in waiting for the one that is gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# SLURM signals every process, and srun and the launcher pass on what they get: one wish arrives several times.
COPIES_SECONDS = 10.0

# The launcher leaves its file before it passes a signal on, but SLURM's own may reach a rank before the launcher.
FILE_SECONDS = 3.0

# How long a rank that was not asked to stop itself leaves it to its torchrun to end it.
LAUNCHER_SECONDS = 30.0

_first: float | None = None
# What signals are written to until everyone is here.
_wakeup: int | None = None
_everyone_is_here = threading.Event()


def catch_signals() -> None:
    """From now on the first signal is a wish to stop (`requested`), and a second one ends the process at once.

    What comes within `COPIES_SECONDS` of the first is a copy of it. If $GRU4RECF_STOP_FILE names a file that is there,
    the wish came before this process could catch it.
    """
    global _first
    for number in SIGNALS:
        signal.signal(number, _note)
    # After the handlers: whoever asks makes the file before sending the signal, so one of both is seen.
    stop_file = os.environ.get("GRU4RECF_STOP_FILE")
    if stop_file and _first is None and Path(stop_file).exists():
        _first = time.monotonic()


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _first is not None


def end_if_others_do_not_come() -> None:
    """Until `everyone_is_here`, end the process at once on a SIGTERM that is no wish to stop.

    With a wish, the file that $GRU4RECF_STOP_FILE names is there. Without that variable nothing tells the two apart,
    and nothing is done. Call from the main thread.
    """
    global _wakeup
    stop_file = os.environ.get("GRU4RECF_STOP_FILE")
    if not stop_file:
        return
    reading, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    # Python runs no handler while torch waits for the other ranks, in C++. This is written to even then.
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading, Path(stop_file)), name="start", daemon=True).start()


def everyone_is_here() -> None:
    """The ranks are connected: from now on each of them notices the end of another by itself."""
    global _wakeup
    _everyone_is_here.set()
    if _wakeup is not None:
        signal.set_wakeup_fd(-1)
        os.close(_wakeup)
        _wakeup = None


def is_announced() -> bool:
    """Whether it is known to be a person's or a scheduler's wish, for all ranks; without $GRU4RECF_STOP_FILE it is."""
    stop_file = os.environ.get("GRU4RECF_STOP_FILE")
    return not stop_file or Path(stop_file).exists()


def leave_end_to_launcher() -> None:
    """Wait until this process is asked to stop itself, when it has stopped with others that were.

    A torchrun that starts its ranks anew, because a node has joined, stops the ranks of all nodes. Another one that saw
    its own ranks end well, before it has seen the node, would take the run for finished and leave it.
    """
    deadline = time.monotonic() + LAUNCHER_SECONDS
    while not requested() and not is_announced() and time.monotonic() < deadline:
        time.sleep(0.05)


def _watch(reading: int, stop_file: Path) -> None:
    with open(reading, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] != signal.SIGTERM:
                continue
            deadline = time.monotonic() + FILE_SECONDS
            while not stop_file.exists():
                if time.monotonic() > deadline:
                    os._exit(128 + signal.SIGTERM)
                if _everyone_is_here.wait(0.05):
                    return


def _note(number: int, frame: object) -> None:
    global _first
    if _first is None:
        _first = time.monotonic()
    elif time.monotonic() - _first > COPIES_SECONDS:
        # Not by an exception: whatever hangs could catch it. A checkpoint that is being written stays incomplete.
        os._exit(128 + number)
