"""The test server and the fault proxy do what the other tests here take for granted."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest

from tests.support.s3 import BUCKET, ROOT, S3, SHARES, running_fault_proxy

pytestmark = pytest.mark.s3


def test_server_keeps_objects_and_refuses_a_wrong_secret(s3):
    files = s3.files()
    files.pipe_file(f"{BUCKET}/server/a", b"content")
    assert files.cat_file(f"{BUCKET}/server/a", start=3) == b"tent"
    with pytest.raises(PermissionError):
        S3(s3.endpoint, s3.key, "wrong").files().cat_file(f"{BUCKET}/server/a")


def _end_of_request(url: str) -> str | int:
    """How a request without credentials ends: the server's refusal (403) is as good an answer as any."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        try:
            error.read()
        except http.client.IncompleteRead:
            return "cut"
        return error.code
    except (http.client.HTTPException, OSError):
        return "closed"


def test_proxy_makes_each_kind_of_fault_in_its_share_and_the_same_ones_again(s3):
    count, logs = 500, []
    shown = {None: 403, "slow_down": 503, "drop": "closed", "truncate": "cut", "stall": 403}
    for _ in range(2):
        with running_fault_proxy(s3, seed=0, stall_seconds=0.0) as proxy:
            # Each twice: whether a request fails changes with how often it was made.
            ends = [_end_of_request(f"{proxy.endpoint}/{BUCKET}/proxy/{i // 2}") for i in range(count)]
            logs.append(proxy.requests("proxy/"))
            faults = proxy.faults("proxy/")
        assert ends == [shown[line["fault"]] for line in logs[-1]]
    assert logs[0] == logs[1]
    assert faults.keys() == SHARES.keys()
    # Four standard deviations of a binomial distribution around 25.
    assert 6 <= sum(faults.values()) <= 44


def test_a_server_ends_with_the_tests_that_started_it_however_they_end(tmp_path):
    code = (
        "import os, pathlib, sys; from tests.support.tethered import TetheredServer\n"
        "server = TetheredServer(['sleep', '600'], pathlib.Path(sys.argv[1]))\n"
        "print(server._keeper.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    owner = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ)
    keeper = psutil.Process(int(owner.stdout.readline()))
    while not keeper.children():
        pass
    (server,) = keeper.children()
    owner.kill()
    # The server has no hold on the pipe either: a reader of the tests' output sees its end.
    assert owner.stdout.read() == b""
    owner.communicate()
    _, alive = psutil.wait_procs([keeper, server], timeout=20)
    assert not alive
