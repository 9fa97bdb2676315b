"""Run torchrun so that a stop signal reaches its ranks and nobody else: `python stoppable.py torchrun ...`.

Left alone, torchrun dies of SIGUSR1 while its ranks run on, and kills them 30 s after SIGTERM whatever they write then.
Here it ignores both. They are passed on to the ranks, which stop together and end with status 0; so does torchrun then.
A second signal means "at once": the ranks end on it, and torchrun is told to give up.

Torchrun ends with this process, and the ranks with torchrun, even if these are killed.
"""

from __future__ import annotations

# ruff: noqa: E402
import signal
import time
from queue import SimpleQueue

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Before all else is loaded: until then, this process dies of them. A handler may interrupt itself, so that it must do
# little: a busy machine takes longer to find the ranks than the next signal takes to come. What comes before torchrun
# waits for it.
arrived: SimpleQueue[tuple[int, float]] = SimpleQueue()
for _number in SIGNALS:
    signal.signal(_number, lambda number, frame: arrived.put((number, time.monotonic())))

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

# As in gru4recf_dist/stopping.py, where the ranks take what comes within this time of the first signal for a copy.
COPIES_SECONDS = 10.0
# Of linux/prctl.h: the signal that the system sends when the parent is gone.
PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run ``command`` to its end; returns its exit status."""
    folder = Path(tempfile.mkdtemp(prefix="gru4recf-stop-"))
    stop_file = folder / "stop"
    if os.environ.pop("GRU4RECF_STOP_WISHED", None):
        # By a signal to the script that has become this process.
        with contextlib.suppress(OSError):
            stop_file.touch()
        arrived.put((signal.SIGTERM, time.monotonic()))
    # The second variable is torchrun's --signals-to-handle, which would include SIGTERM.
    environment = {"GRU4RECF_STOP_FILE": str(stop_file), "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}
    # For the ranks, as gru4recf_dist/launcher.py has it.
    environment["GRU4RECF_LAUNCHER_PID"] = str(os.getpid())
    with contextlib.suppress(OSError):
        environment["GRU4RECF_LAUNCHER_PID_NAMESPACE"] = os.readlink("/proc/self/ns/pid")
    torchrun = subprocess.Popen(command, env={**os.environ, **environment}, preexec_fn=in_torchrun(os.getpid()))
    threading.Thread(target=pass_on, args=(arrived, torchrun, stop_file), daemon=True).start()
    try:
        status = torchrun.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # On its way out Python forgets its handlers, and what still arrives would take the place of torchrun's status.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return status if status >= 0 else 128 - status


def in_torchrun(launcher: int) -> Callable[[], None]:
    """What the new process, which has been started by ``launcher``, does before it becomes torchrun."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        # An ignored signal, unlike a handler, is inherited: torchrun ignores it too.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(128 + signal.SIGKILL)

    return prepare


def pass_on(arrived: SimpleQueue[tuple[int, float]], torchrun: subprocess.Popen, stop_file: Path) -> None:
    """Pass signals, given with the time when they arrived, on to the ranks."""
    first: float | None = None
    while True:
        number, when = arrived.get()
        first = when if first is None else first
        # Before the signal: a rank that cannot catch it yet finds the file. Its folder is gone when torchrun has ended;
        # on a full disk there is no file, but the signal still comes.
        with contextlib.suppress(OSError):
            stop_file.touch()
        for rank in children(torchrun.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)
        if when - first > COPIES_SECONDS:
            # It would otherwise take the end of the ranks for a failure, and start them anew if it may.
            torchrun.send_signal(signal.SIGINT)


def children(parent: int) -> list[int]:
    """Processes whose parent is ``parent``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process may end between two lines.
        with contextlib.suppress(OSError):
            # pid (name, which may hold anything) state parent ...
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
