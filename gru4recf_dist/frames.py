"""What the threads of this process are doing."""

from __future__ import annotations

import gc
import sys
from types import FrameType


def current_frames() -> dict[int, FrameType]:
    """The frame of each thread, by its number.

    Python 3.11 before 3.11.9 makes them while it holds a lock that a garbage collection may wait for, and then no
    thread of the process ever goes on (https://github.com/python/cpython/issues/106883): so there is none meanwhile.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()
