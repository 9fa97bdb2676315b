"""Servers that cannot outlive the tests: each is killed at the latest when the process that started it is gone.

Between a test run and its server stands this file, run as a program. It waits at a pipe that only the test run holds
open; the kernel closes it however the test run ends, and then the server is killed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path


class TetheredServer:
    """A running server; its output goes to ``log``, never to the test run's own stdout.

    Args:
        environment: variables besides this process's own.
    """

    def __init__(self, command: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("wb") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                # Ctrl-C goes to the whole foreground group: the server must not fall before the tests that use it.
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self._keeper.poll() is not None

    def last_words(self) -> str:
        """The end of what the server printed."""
        return self.log.read_bytes()[-2000:].decode(errors="replace")

    def stop(self) -> None:
        """Kill the server and wait until it is gone."""
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.wait(timeout=30)


def _keep(command: list[str]) -> int:
    """Run ``command`` until it ends or stdin is closed; returns its exit status."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def kill_with_owner() -> None:
        sys.stdin.buffer.read()
        server.kill()

    threading.Thread(target=kill_with_owner, daemon=True).start()
    return server.wait()


if __name__ == "__main__":
    # The reading thread holds the lock of stdin, at which the interpreter's own way out would wait.
    os._exit(_keep(sys.argv[1:]) & 0xFF)
