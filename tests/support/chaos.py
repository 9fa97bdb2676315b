"""A training run whose processes can be found and killed, started by the launch script as a user starts it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from gru4recf_dist.checkpoint_commits import COMMIT
from tests.support.launched import rank_process

ROOT = Path(__file__).parents[2]
# A restart takes seconds, but more on a machine that is busy; torchrun gives a rank that does not end 30 s.
PATIENCE_SECONDS = 60

T = TypeVar("T")


class ChaosRun:
    """One run folder and whatever is started for it.

    Args:
        folder: has ``config.yaml``, whose ``run_dir`` is ``folder/run``.
        max_restarts: how often one torchrun starts the ranks anew.
    """

    def __init__(self, folder: Path, max_restarts: int) -> None:
        self.folder, self.max_restarts, self.starts = folder, max_restarts, 0
        self.log = folder / "log"
        # All that is started inherits it: processes are found by it even when their parents are dead.
        self._name = f"chaos-{uuid.uuid4().hex}"
        self._script: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the run, always with the same command."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VENV": "",
            "NPROC_PER_NODE": "2",
            "MAX_RESTARTS": str(self.max_restarts),
            "RDZV_ID": self._name,
            "CHECK": "no",
            "OMP_NUM_THREADS": "1",
        }
        command = ["bash", "launch/torchrun_node.sh", "--config", str(self.folder / "config.yaml")]
        with self.log.open("ab") as log:
            self._script = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.starts += 1

    @property
    def status(self) -> int | None:
        """What the launch script ended with; None while it runs."""
        return self._script.poll()

    def processes(self) -> list[psutil.Process]:
        """All that is left of everything that was ever started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RDZV_ID") == self._name and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def torchrun(self) -> psutil.Process | None:
        """torchrun, which the launch script has become the parent of."""
        return next(iter(psutil.Process(self._script.pid).children()), None)

    def rank(self, number: int) -> psutil.Process | None:
        """The process of one rank."""
        return rank_process(self._script.pid, number)

    def loader_worker(self, rank: int) -> psutil.Process | None:
        """The loader worker of one rank: its only grandchild, forked by the server of Python's `forkserver`."""
        owner = self.rank(rank)
        for child in owner.children() if owner else []:
            for worker in child.children():
                return worker
        return None

    def newest_step(self) -> int:
        """The last step that was logged."""
        try:
            with (self.folder / "run" / "metrics.jsonl").open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - 8192))
                return max(map(int, re.findall(rb'"step": (\d+),', stream.read())), default=0)
        except FileNotFoundError:
            return 0

    def unfinished_checkpoints(self) -> dict[str, int]:
        """Folders of checkpoints that are being written or never were to the end, with the time of their last change.

        Those older than a complete one are left out: they are being removed.
        """
        found: dict[str, int] = {}
        with contextlib.suppress(OSError):
            for entry in sorted(os.scandir(self.folder / "run" / "checkpoints"), key=lambda entry: entry.name):
                if os.path.exists(os.path.join(entry.path, COMMIT)):
                    found.clear()
                else:
                    with contextlib.suppress(OSError):
                        found[entry.name] = entry.stat().st_mtime_ns
        return found

    def wait_for(self, what: Callable[[], T], while_running: bool = True, poll_seconds: float = 0.01) -> T:
        """Wait until ``what()`` gives something that counts as true, and return it.

        Raises:
            AssertionError: it did not in `PATIENCE_SECONDS`; or the run ended before, ``while_running``.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(psutil.Error):
                if found := what():
                    return found
            assert not while_running or self.status is None, f"ended with {self.status}:\n{self.last_words()}"
            assert time.monotonic() < deadline, (
                f"nothing for {PATIENCE_SECONDS} s, {self._left()}:\n{self.last_words()}"
            )
            time.sleep(poll_seconds)

    def last_words(self) -> str:
        """The end of what all starts printed."""
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""

    def _left(self) -> str:
        return f"there is {[process.as_dict(['pid', 'ppid', 'cmdline']) for process in self.processes()]}"

    def kill_everything(self) -> None:
        """End all that is left, as a scheduler does with what a job leaves behind."""
        # What was just being started is found when its parent is dead.
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            # Not until they are reaped: that is up to this machine's init, and takes it seconds.
            time.sleep(0.01)
        if self._script is not None:
            self._script.wait()
