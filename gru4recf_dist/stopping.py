"""A wish to stop: SIGTERM, SIGUSR1, or the file that the launcher leaves for ranks that start after the signal."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# SLURM signals every process, and srun and the launcher pass on what they get: one wish arrives several times.
COPIES_SECONDS = 10.0

_first: float | None = None


def catch_signals() -> None:
    """From now on the first signal is a wish to stop (`requested`), and a second one ends the process at once.

    What comes within `COPIES_SECONDS` of the first is a copy of it. If $STOP_FILE names a file that is there, the wish
    came before this process could catch it.
    """
    global _first
    for number in SIGNALS:
        signal.signal(number, _note)
    # After the handlers: whoever asks makes the file before sending the signal, so one of both is seen.
    stop_file = os.environ.get("STOP_FILE")
    if stop_file and _first is None and Path(stop_file).exists():
        _first = time.monotonic()


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _first is not None


def _note(number: int, frame: object) -> None:
    global _first
    if _first is None:
        _first = time.monotonic()
    elif time.monotonic() - _first > COPIES_SECONDS:
        # Not by an exception: whatever hangs could catch it. A checkpoint that is being written stays incomplete.
        os._exit(128 + number)
