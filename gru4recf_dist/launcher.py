"""A rank ends with its launcher: it must not train on beside the ranks of the next start, in the same run folder."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

# Of linux/prctl.h: the signal that the system sends when the parent is gone.
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have the system kill this process as soon as torchrun, its parent, is gone, in whatever way; at once if it is.

    The system takes the end of the thread that started this process, in torchrun its main one, for that of the parent.
    Whoever starts torchrun may name a process that must be alive when the rank starts, by $GRU4RECF_LAUNCHER_PID and
    the namespace in which it has that number, $GRU4RECF_LAUNCHER_PID_NAMESPACE. That torchrun ends with it is up to
    that process: a plain torchrun outlives what started it. Without torchrun, as under DeepSpeed's launcher, or where
    the system is not Linux, nothing is done.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have gone before that, and this process have been given to another parent.
    launcher = _launcher()
    if os.getppid() != parent or (launcher is not None and not _descends_from(launcher)):
        print(f"error: rank {os.environ.get('RANK', '0')}: its launcher is gone", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def _launcher() -> int | None:
    """The process that must be alive; None if there is none that could be seen from here."""
    given = os.environ.get("GRU4RECF_LAUNCHER_PID", "")
    try:
        # In a container, the number may be that of another process, and the chain of parents ends early.
        is_near = os.readlink("/proc/self/ns/pid") == os.environ.get("GRU4RECF_LAUNCHER_PID_NAMESPACE")
    except OSError:
        return None
    return int(given) if is_near and given.isdecimal() else None


def _descends_from(ancestor: int) -> bool:
    """Whether this process, or one that it comes from, was started by the process ``ancestor``."""
    process = os.getppid()
    while process not in (0, ancestor):
        try:
            # pid (name, which may hold anything) state parent ...
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            # Not to be seen from here.
            return True
    return process == ancestor
