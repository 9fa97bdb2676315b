"""Faults of an object store, for mitmproxy: `mitmdump -s fault_addon.py`, settings in the file that $FAULTS names.

Which request fails is a function of (seed, method, path, end of range, how often that request was seen before), so the
same requests meet the same faults whatever their timing. Every request is logged as one JSON line.

It runs in mitmproxy's own virtual environment: of this project it can import nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mitmproxy import http

ACCESS_DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>injected</Message></Error>'
)
SLOW_DOWN = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>injected</Message></Error>'


class Faults:
    """The settings are JSON: `seed`, `shares` (kind of fault: share of all requests), `stall_seconds`, `log`, `denied`.

    Kinds: `slow_down` (503 in place of an answer), `drop` (closed before the store sees the request), `truncate`
    (closed in the middle of the answer; where that has no body, before it, when the store has acted), `stall` (the
    request reaches the store only after a while). Besides them, requests that write to a path with the text of the file
    `denied` in it, if there is one, are refused for good (`deny`).
    """

    def __init__(self, settings: dict) -> None:
        self.seed, self.shares, self.stall_seconds = settings["seed"], settings["shares"], settings["stall_seconds"]
        self._denied = Path(settings["denied"])
        self._log = Path(settings["log"]).open("a", buffering=1)  # noqa: SIM115 (open as long as the proxy)
        self._seen: Counter[str] = Counter()

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        fault = "deny" if self._is_denied(flow.request) else self._choose(flow.request)
        flow.metadata["fault"] = fault
        asked = {"method": flow.request.method, "path": flow.request.path, "range": flow.request.headers.get("Range")}
        self._log.write(json.dumps({**asked, "fault": fault}) + "\n")

    async def request(self, flow: http.HTTPFlow) -> None:
        fault = flow.metadata["fault"]
        if fault == "slow_down":
            flow.response = http.Response.make(503, SLOW_DOWN, {"Content-Type": "application/xml"})
        elif fault == "deny":
            flow.response = http.Response.make(403, ACCESS_DENIED, {"Content-Type": "application/xml"})
        elif fault == "drop":
            flow.kill()
        elif fault == "stall":
            await asyncio.sleep(self.stall_seconds)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.metadata["fault"] != "truncate":
            return
        length = int(flow.response.headers.get("Content-Length", "0"))
        if flow.request.method == "HEAD" or length < 2:
            flow.kill()
        else:
            flow.response.stream = _cut(flow, length // 2)

    def _is_denied(self, request: http.Request) -> bool:
        return request.method in ("PUT", "POST") and self._denied.exists() and self._denied.read_text() in request.path

    def _choose(self, request: http.Request) -> str | None:
        # The store invents the ids of multi-part uploads: they are other ones in every run.
        query = sorted((name, value) for name, value in request.query.items(multi=True) if name != "uploadId")
        path = request.path.partition("?")[0]
        # Where a range is gone on with depends on what came before the connection broke; where it ends does not.
        range_end = request.headers.get("Range", "").rpartition("-")[2]
        key = json.dumps([self.seed, request.method, path, query, range_end])
        digest = hashlib.sha256(f"{key}{self._seen[key]}".encode()).digest()
        self._seen[key] += 1
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        for kind, share in self.shares.items():
            if drawn < share:
                return kind
            drawn -= share
        return None


def _cut(flow: http.HTTPFlow, left: int) -> Callable[[bytes], bytes]:
    """A stream that lets ``left`` bytes through and then ends the connection."""

    def pass_on(content: bytes) -> bytes:
        nonlocal left
        if left <= 0:
            if flow.killable:
                flow.kill()
            return b""
        part = content[:left]
        left -= len(part)
        return part

    return pass_on


addons = [Faults(json.loads(Path(os.environ["FAULTS"]).read_text()))]
