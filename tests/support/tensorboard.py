"""TensorBoard's server on this machine, asked by HTTP as its own pages ask it."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support.s3 import free_ports
from tests.support.tethered import TetheredServer

Answer = TypeVar("Answer")


class TensorBoard:
    """A server that listens on ``port``; its runs are the folders below its log folder that hold events."""

    def __init__(self, port: int, server: TetheredServer) -> None:
        self._port, self._server = port, server

    def _ask(self, plugin: str, question: str, body: dict[str, Any] | None = None, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/data/plugin/{plugin}/{question}?{urllib.parse.urlencode(parameters)}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def runs(self) -> dict[str, list[str]]:
        """The names of each run's scalars, by the run's name."""
        return {run: sorted(tags) for run, tags in self._ask("scalars", "tags").items()}

    def curve(self, run: str, tag: str) -> list[tuple[int, float]]:
        """Steps and values, in the order in which they would be drawn."""
        points = self._ask("scalars", "scalars", run=run, tag=tag)
        return [(step, value) for _, step, value in points]

    def texts(self, run: str) -> dict[str, list[tuple[int, str]]]:
        """Steps and HTML of each text."""
        tags = self._ask("text", "tags")[run]
        shown = {tag: self._ask("text", "text", run=run, tag=tag) for tag in tags}
        return {tag: [(each["step"], each["text"]) for each in texts] for tag, texts in shown.items()}

    def session_groups(self) -> list[dict[str, Any]]:
        """The rows of HPARAMS."""
        statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
        question = {"allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 100}
        return self._ask("hparams", "session_groups", question)["sessionGroups"]

    def experiment(self) -> dict[str, Any]:
        """The columns of HPARAMS."""
        return self._ask("hparams", "experiment", {})

    def wait_until(self, answer: Callable[[], Answer], is_right: Callable[[Answer], bool]) -> Answer:
        """What ``answer`` returns once that is right: the server looks at its files every second."""
        deadline, found = time.monotonic() + 60, None
        while time.monotonic() < deadline and not self._server.has_ended:
            # It does not listen yet, or does not know the run yet.
            with contextlib.suppress(urllib.error.URLError, ConnectionError, KeyError):
                found = answer()
                if is_right(found):
                    return found
            time.sleep(0.1)
        pytest.fail(f"TensorBoard shows {found}, and says {self._server.last_words()}")


@contextlib.contextmanager
def serving(folder: Path | str, load_fast: str, environment: Mapping[str, str] | None = None) -> Iterator[TensorBoard]:
    """TensorBoard over ``folder``, a path or URL.

    Args:
        load_fast: which of its two readers of event files it uses: ``true`` the data server, ``false`` the one in
            Python, ``auto`` as it chooses itself.
        environment: variables besides this process's own.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1", "--port", port]
    command += ["--reload_interval", 1, "--load_fast", load_fast]
    with tempfile.TemporaryDirectory() as log:
        server = TetheredServer(command, Path(log) / "log", environment)
        try:
            yield TensorBoard(port, server)
        finally:
            server.stop()
