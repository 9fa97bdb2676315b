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

    Whoever starts torchrun may name a process that must be alive too, by $LAUNCHER_PID. Without torchrun, or where the
    system is not Linux, nothing is done.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have gone before that, and this process have been given to another parent.
    if os.getppid() != parent or not _descends_from(int(os.environ.get("LAUNCHER_PID", parent))):
        print(f"error: rank {os.environ.get('RANK', '0')}: its launcher is gone", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


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
