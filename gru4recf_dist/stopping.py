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
# What the system writes the signals' numbers to, for `_watch`.
_signals: int | None = None
# What tells, while the ranks start, a wish to stop from torchrun's ending this rank for another.
_stop_file_at_start: Path | None = None
_everyone_is_here = threading.Event()


def catch_signals() -> None:
    """From now on the first signal is a wish to stop (`requested`), and a second one ends the process at once.

    What comes within `COPIES_SECONDS` of the first is a copy of it. If $GRU4RECF_STOP_FILE names a file that is there,
    the wish came before this process could catch it. Call from the main thread.
    """
    global _first, _signals
    if _signals is None:
        reading, _signals = os.pipe()
        os.set_blocking(_signals, False)
        threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    # Python runs no handler while torch waits for the other ranks, in C++, and the next signal would be taken for the
    # same one. This is written to even then.
    signal.set_wakeup_fd(_signals, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _leave_to_watch)
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
    and nothing is done.
    """
    global _stop_file_at_start
    stop_file = os.environ.get("GRU4RECF_STOP_FILE")
    _stop_file_at_start = Path(stop_file) if stop_file else None


def everyone_is_here() -> None:
    """The ranks are connected: from now on each of them notices the end of another by itself."""
    _everyone_is_here.set()


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


def _watch(reading: int) -> None:
    global _first
    with open(reading, "rb", buffering=0) as numbers:
        while byte := numbers.read(1):
            number, now = byte[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if _first is None:
                _first = now
            elif now - _first > COPIES_SECONDS:
                # Not by an exception: whatever hangs could catch it. A checkpoint that is being written stays
                # incomplete.
                os._exit(128 + number)
            if number == signal.SIGTERM and _stop_file_at_start is not None and not _everyone_is_here.is_set():
                threading.Thread(target=_end_unless_wished, args=(_stop_file_at_start,), daemon=True).start()


def _end_unless_wished(stop_file: Path) -> None:
    deadline = time.monotonic() + FILE_SECONDS
    while not stop_file.exists():
        if time.monotonic() > deadline:
            os._exit(128 + signal.SIGTERM)
        if _everyone_is_here.wait(0.05):
            return


def _leave_to_watch(number: int, frame: object) -> None:
    """A handler of Python: without one, the system would end the process instead of telling `_watch`."""
