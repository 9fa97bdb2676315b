"""Run torchrun so that a stop signal reaches its ranks and nobody else: `python stoppable.py torchrun ...`.

Left alone, torchrun dies of SIGUSR1 while its ranks run on, and kills them 30 s after SIGTERM whatever they write then.
Here it ignores both. They are passed on to the ranks, which stop together and end with status 0; so does torchrun then.
A second signal means "at once": the ranks end on it, and torchrun is told to give up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# As in gru4recf_dist/stopping.py, where the ranks take what comes within this time of the first signal for a copy.
COPIES_SECONDS = 10.0


def main(command: list[str]) -> int:
    """Run ``command`` to its end; returns its exit status."""
    folder = Path(tempfile.mkdtemp(prefix="gru4recf-stop-"))
    stop_file = folder / "stop"
    # An ignored signal, unlike a handler, is inherited: torchrun ignores it too.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The second variable is torchrun's --signals-to-handle, which would include SIGTERM.
    environment = {"STOP_FILE": str(stop_file), "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}
    torchrun = subprocess.Popen(command, env={**os.environ, **environment})
    first: float | None = None

    def pass_on(number: int, frame: object) -> None:
        nonlocal first
        # Before the signal: a rank that cannot catch it yet finds the file.
        stop_file.touch()
        # The time before all that takes some: the next signal may come while this one is still passed on.
        now = time.monotonic()
        first = now if first is None else first
        if now - first > COPIES_SECONDS:
            # It would otherwise take the end of the ranks for a failure, and start them anew if it may.
            torchrun.send_signal(signal.SIGINT)
        for rank in children(torchrun.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        status = torchrun.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


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
