"""A small HTTP server of files in memory, which understands ranges and can be told to fail."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What happens to a GET: "" (it is answered), a status such as "503", "cut" (the connection breaks after half of the
# body), "drop" (before the first byte), "stall" (nothing comes), "whole" (the range is ignored), "short" (half of what
# was asked for, as if that were all).
Fault = Callable[[str, int], str]


@dataclass
class HttpFiles:
    """What the server has and what it was asked for.

    Attributes:
        files: content by name.
        requests: (name, first byte) of every GET, in the order in which they came.
        fault: given the name and the number of earlier GETs of the same name and first byte.
        held: while it is cleared, GETs wait.
        no_size: answers do not tell sizes.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)
    fault: Fault = lambda name, earlier: ""
    held: threading.Event = field(default_factory=threading.Event)
    no_size: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str) -> int:
        """GETs of ``name`` so far."""
        with self._lock:
            return sum(asked == name for asked, _ in self.requests)

    def note(self, name: str, start: int) -> int:
        """Write a GET down; how many of the same there were before."""
        with self._lock:
            self.requests.append((name, start))
            return self.requests.count((name, start)) - 1


@contextlib.contextmanager
def serving(stall_seconds: float = 30) -> Iterator[HttpFiles]:
    """Serve an `HttpFiles` on a free port of this machine."""
    state = HttpFiles()
    state.held.set()
    ended = threading.Event()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            content = state.files.get(self.path[1:])
            self.send_response(404 if content is None else 200)
            if not state.no_size:
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("Accept-Ranges", "bytes")
            else:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def do_GET(self) -> None:
            name = self.path[1:]
            first, last = map(int, (re.findall(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) or [(0, -1)])[0])
            fault = state.fault(name, state.note(name, first))
            state.held.wait()
            content = state.files.get(name)
            if fault == "drop":
                self.close_connection = True
            elif fault == "stall":
                ended.wait(stall_seconds)
                self.close_connection = True
            elif fault.isdigit() or content is None:
                self._answer(int(fault or 404), b"")
            elif fault == "whole" or last < 0:
                self._answer(200, content)
            elif first >= len(content):
                self._answer(416, b"")
            else:
                part = content[first : last + 1]
                self._answer(206, part[: len(part) // 2] if fault == "short" else part, cut=fault == "cut")

        def _answer(self, status: int, body: bytes, cut: bool = False) -> None:
            self.send_response(status)
            if state.no_size:
                self.send_header("Transfer-Encoding", "chunked")
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                # A client that meets the end together with the last bytes may not see these.
                self.wfile.flush()
                time.sleep(0.1)
                self.close_connection = True

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        ended.set()
        state.held.set()
        server.shutdown()
        server.server_close()
