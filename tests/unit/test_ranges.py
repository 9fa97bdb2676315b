"""Remote files as streams: ranges ahead of use, broken connections, files that are not what they should be."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from gru4recf_dist.data import filesystems, ranges, storage
from gru4recf_dist.data.ranges import DamagedFile, RangedReader
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.errors import UserError
from tests.support.http_files import HttpFiles, serving

RANGE = 1024
CONTENT = np.random.default_rng(0).bytes(10 * RANGE + 100)


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def server(running) -> HttpFiles:
    _configure()
    running.files = {"x": CONTENT, "empty": b""}
    running.requests.clear()
    running.fault, running.no_size = lambda name, earlier: "", False
    return running


def _configure(**changes) -> None:
    quick = {"range_mib": RANGE / (1 << 20), "backoff_seconds": 0.001, "attempts": 4}
    filesystems.configure(StorageConfig(**{**quick, **changes}))


def _read(server: HttpFiles, size: int | None = len(CONTENT), name: str = "x") -> bytes:
    with RangedReader(f"{server.url}/{name}", size) as reader:
        return reader.read()


def _until(condition) -> None:
    """Wait for what background threads do; the test's own time limit ends it."""
    while not condition():
        time.sleep(0.01)


@pytest.mark.parametrize("size", [len(CONTENT), None])
@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_a_file_comes_whole_and_every_range_is_asked_for_once(server, size, ahead):
    _configure(ahead_ranges=ahead)
    assert _read(server, size) == CONTENT
    assert sorted(server.requests) == [("x", start) for start in range(0, len(CONTENT), RANGE)]
    assert ranges._held._bytes == 0


@pytest.mark.parametrize("length", [0, 1, RANGE - 1, RANGE, RANGE + 1, 3 * RANGE])
@pytest.mark.parametrize("is_known", [True, False])
def test_every_length_is_read_whole(server, length, is_known):
    server.files["x"] = CONTENT[:length]
    assert _read(server, length if is_known else None) == CONTENT[:length]


def test_the_first_ranges_are_on_their_way_before_anything_is_read(server):
    with RangedReader(f"{server.url}/x", len(CONTENT)):
        _until(lambda: len(server.requests) == 2)
    assert sorted(server.requests) == [("x", 0), ("x", RANGE)]


def test_a_jump_fetches_what_is_asked_for_and_nothing_ahead(server):
    with RangedReader(f"{server.url}/x") as reader:
        reader.seek(-50, io.SEEK_END)
        assert reader.read(50) == CONTENT[-50:]
        reader.seek(5 * RANGE + 10)
        assert reader.read(20) == CONTENT[5 * RANGE + 10 :][:20]
        assert reader.tell() == 5 * RANGE + 30
        assert reader.seek(3, io.SEEK_CUR) == 5 * RANGE + 33
        with pytest.raises(ValueError, match="negative"):
            reader.seek(-1)
        reader.seek(1 << 60)
        assert reader.read(1) == b""
    assert server.requests == [("x", 10 * RANGE), ("x", 5 * RANGE)]


@pytest.mark.parametrize(("fault", "came"), [("cut", RANGE // 2), ("short", RANGE // 2), ("drop", 0), ("503", 0)])
def test_what_breaks_is_asked_for_again_from_the_byte_where_it_broke(server, fault, came):
    server.fault = lambda name, earlier: (
        fault if server.requests[-1][1] in (3 * RANGE, 7 * RANGE) and not earlier else ""
    )
    assert _read(server) == CONTENT
    starts = [start for _, start in server.requests]
    assert sorted(starts) == sorted([*range(0, len(CONTENT), RANGE), 3 * RANGE + came, 7 * RANGE + came])


def test_a_server_that_goes_on_failing_is_one_user_error(server):
    server.fault = lambda name, earlier: "cut"
    with pytest.raises(UserError) as caught:
        _read(server)
    assert not isinstance(caught.value, DamagedFile), caught.value
    assert str(caught.value).startswith(f"{server.url}/x: ") and "\n" not in str(caught.value)
    assert ranges._held._bytes == 0


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (len(CONTENT) - 1, "longer"),
        (5 * RANGE, "longer"),
        (len(CONTENT) + 1, "truncated"),
        (11 * RANGE, "truncated"),
        # Its last ranges begin behind the end, which the server refuses in its own way.
        (20 * RANGE, "truncated"),
        (1 << 40, "truncated"),
    ],
)
def test_a_file_of_another_size_is_damaged(server, size, says):
    with pytest.raises(DamagedFile, match=says):
        _read(server, size)
    # It is not asked for again and again; once more, if a connection that was kept open had just been closed.
    assert max(Counter(server.requests).values()) <= 2


@pytest.mark.parametrize("size", [100, 5 * RANGE])
def test_an_empty_file_that_should_not_be_is_damaged(server, size):
    with pytest.raises(DamagedFile, match="truncated, 0 bytes"):
        _read(server, size, "empty")


def test_a_missing_file_is_damaged(server):
    with pytest.raises(DamagedFile, match="/none: no such file"):
        _read(server, 100, "none")
    with pytest.raises(UserError, match="/none: no such file"):
        storage.read_bytes(f"{server.url}/none")


def test_a_file_that_goes_away_while_it_is_read_is_one_user_error(server):
    with pytest.raises(UserError, match="/x: no such file"), storage.open_read(f"{server.url}/x") as stream:
        stream.read(10)
        del server.files["x"]
        stream.read()


def test_a_server_without_ranges_serves_small_files_and_is_named_for_large_ones(server):
    server.fault = lambda name, earlier: "whole"
    with pytest.raises(UserError, match="/x: its server sends whole files"):
        _read(server)
    server.files["x"] = CONTENT[:RANGE]
    assert _read(server, RANGE) == CONTENT[:RANGE]
    assert _read(server, None) == CONTENT[:RANGE]


def test_a_server_that_tells_no_size_is_named(server):
    server.no_size = True
    with pytest.raises(UserError, match="/x: its server does not tell its size"):
        storage.read_bytes(f"{server.url}/x")


def test_what_is_held_ahead_stays_within_its_bound(server):
    _configure(ahead_ranges=4, ahead_mib=5 * RANGE / (1 << 20))
    readers = [RangedReader(f"{server.url}/x", len(CONTENT)) for _ in range(4)]
    assert ranges._held._bytes == 5 * RANGE
    assert [len(reader._ahead) for reader in readers] == [4, 1, 0, 0]
    assert [reader.read() for reader in readers] == [CONTENT] * 4
    for reader in readers:
        reader.close()
    assert ranges._held._bytes == 0


def test_a_range_larger_than_the_bound_is_fetched_when_it_is_needed(server):
    _configure(ahead_mib=0.5 * RANGE / (1 << 20))
    assert _read(server) == CONTENT


def test_a_reader_that_is_dropped_or_closed_gives_back_what_it_held(server):
    reader = RangedReader(f"{server.url}/x", len(CONTENT))
    assert ranges._held._bytes == 2 * RANGE
    reader.close()
    reader.close()
    assert ranges._held._bytes == 0
    reader = RangedReader(f"{server.url}/x", len(CONTENT))
    _until(lambda: all(future.done() for future in reader._ahead.values()))
    # The thread lets go of its piece of work a moment after it is done.
    del reader
    _until(lambda: ranges._held._bytes == 0)
    with pytest.raises(ValueError, match="closed"), RangedReader(f"{server.url}/x", len(CONTENT)) as reader:
        reader.close()
        reader.read(1)


def test_work_that_waits_for_work_never_waits_for_ever(server):
    """As many pieces of work as there are threads, each of which reads a file whose ranges need threads."""
    started = threading.Barrier(ranges.THREADS)

    def read() -> bytes:
        started.wait(30)
        return _read(server)

    futures = [ranges.in_background(read) for _ in range(ranges.THREADS)]
    assert [future.result(60) for future in futures] == [CONTENT] * ranges.THREADS


def test_threads_are_started_once_each_however_many_ask_at_once():
    assert _script(_ASK_AT_ONCE) == "1600 16"


_ASK_AT_ONCE = """
import sys, threading
from gru4recf_dist.data import ranges
sys.setswitchinterval(1e-6)
results = []
def ask():
    barrier.wait()
    for number in range(100):
        results.append(ranges.in_background(lambda: number))
barrier = threading.Barrier(16)
askers = [threading.Thread(target=ask) for _ in range(16)]
for asker in askers: asker.start()
for asker in askers: asker.join()
for future in results: future.result(30)
print(len(results), sum(thread.name == "storage" and thread.is_alive() for thread in threading.enumerate()))
"""


def _script(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _read_in_child(url: str, pipe) -> None:
    with RangedReader(url, len(CONTENT)) as reader:
        pipe.send((reader.read() == CONTENT, ranges._held._bytes))
    pipe.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_reads_too(server):
    # All threads are there, and none of them survives the fork.
    for future in [ranges.in_background(lambda: None) for _ in range(ranges.THREADS)]:
        future.result(30)
    kept = RangedReader(f"{server.url}/x", len(CONTENT))
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(f"{server.url}/x", theirs))
    child.start()
    theirs.close()
    try:
        assert ours.poll(60), "the forked process hangs"
        assert ours.recv() == (True, 0)
    finally:
        child.kill()
        child.join()
    assert kept.read() == CONTENT
    kept.close()


def test_a_program_ends_though_a_request_stalls(server):
    server.fault = lambda name, earlier: "stall"
    program = "import sys; from gru4recf_dist.data.ranges import RangedReader; RangedReader(sys.argv[1], 100)"
    assert _script(f"{program}; print('ends')", f"{server.url}/x") == "ends"


def test_reading_leaves_no_descriptor_open(server):
    _read(server)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        _read(server)
        reader = RangedReader(f"{server.url}/x", len(CONTENT))
        reader.read(10)
        del reader
    # The client keeps a few connections for later.
    assert len(os.listdir("/proc/self/fd")) <= before + 4 * ranges.THREADS


def test_work_that_was_given_up_is_not_done():
    release, done = threading.Event(), []
    busy = [ranges.in_background(lambda: release.wait(30)) for _ in range(ranges.THREADS)]
    waiting = ranges.in_background(lambda: done.append(1))
    assert waiting.cancel()
    release.set()
    for future in busy:
        assert future.result(30)
    assert ranges.in_background(lambda: "next").result(30) == "next"
    assert done == []
