"""The local cache: whole files only, whatever several processes do to it at once."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data import filesystems
from gru4recf_dist.data.cache import FileCache
from gru4recf_dist.data.shards import Shard, read_blocks
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError
from tests.support.http_files import HttpFiles, serving
from tests.support.synthetic import random_sessions, write_dataset

RANGE = 1024
CONTENT = np.random.default_rng(0).bytes(8 * RANGE)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(number: int, size: int = 100) -> bytes:
    return bytes([number]) * size


def _cached(cache: FileCache, content: bytes, source: bytes | None = None) -> Path | None:
    return cache.path(_sha256(content), len(content), lambda: io.BytesIO(content if source is None else source))


def _files(folder: Path) -> set[str]:
    """What is in the cache besides the locks, which are empty."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def server(running) -> HttpFiles:
    running.files = {"x": CONTENT}
    running.requests.clear()
    running.fault = lambda name, earlier: ""
    running.held.set()
    return running


# Prints what it was given, and whether that is right, as a process of its own.
PROGRAM = """
import hashlib, json, sys
from gru4recf_dist.data import filesystems
from gru4recf_dist.data.cache import FileCache
from gru4recf_dist.data.ranges import RangedReader
from gru4recf_dist.data.storage_config import StorageConfig

folder, url, sha256, size = sys.argv[1:]
filesystems.configure(StorageConfig(range_mib=1 / 1024))
print("ready", flush=True)
path = FileCache(folder, 1 << 20).path(sha256, int(size), lambda: RangedReader(url, int(size)))
print(path and hashlib.sha256(path.read_bytes()).hexdigest() == sha256)
"""


def _start(folder: Path, server: HttpFiles) -> subprocess.Popen:
    arguments = [str(folder), f"{server.url}/x", _sha256(CONTENT), str(len(CONTENT))]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def _until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def test_processes_that_want_the_same_file_at_once_fetch_it_once(server, tmp_path):
    server.held.clear()
    processes = [_start(tmp_path, server) for _ in range(3)]
    _until(lambda: server.requests)
    server.held.set()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["True\n"] * 3
    assert sorted(server.requests) == [("x", start) for start in range(0, len(CONTENT), RANGE)]
    assert _files(tmp_path) == {_sha256(CONTENT)}


def test_what_a_killed_process_left_is_fetched_anew_and_never_read(server, tmp_path):
    server.fault = lambda name, earlier: "stall" if server.requests[-1][1] == 6 * RANGE and not earlier else ""
    process = _start(tmp_path, server)
    waiting = _start(tmp_path, server)
    _until(lambda: ("x", 6 * RANGE) in server.requests)
    part = tmp_path / f"{_sha256(CONTENT)}.part"
    assert part.exists() and not (tmp_path / _sha256(CONTENT)).exists()
    process.kill()
    process.wait()
    # The lock of the killed one is free: who waited goes on, from the start.
    assert waiting.communicate(timeout=60)[0] == "True\n"
    assert server.requests.count(("x", 0)) == 2
    assert _files(tmp_path) == {_sha256(CONTENT)}
    assert (tmp_path / _sha256(CONTENT)).read_bytes() == CONTENT


def test_a_hit_asks_nothing_of_the_source(tmp_path):
    cache = FileCache(str(tmp_path), 1000)
    path = _cached(cache, b"content")
    assert path.read_bytes() == b"content"
    assert FileCache(str(tmp_path), 1000).path(_sha256(b"content"), 7, pytest.fail) == path


def test_the_longest_unused_make_room(tmp_path):
    cache = FileCache(str(tmp_path), 350)
    paths = [_cached(cache, _content(number)) for number in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    # Used again, so it is the newest.
    assert _cached(cache, _content(0)) == paths[0]
    assert _cached(cache, _content(3)).exists()
    assert [path.exists() for path in paths] == [True, False, True]
    # One that takes nearly all of it.
    assert _cached(cache, _content(4, 340)).exists()
    assert _files(tmp_path) == {_sha256(_content(4, 340))}


def test_a_file_larger_than_the_cache_removes_nothing(tmp_path):
    cache = FileCache(str(tmp_path), 150)
    kept = _cached(cache, _content(0))
    assert cache.path(_sha256(b"x"), 151, pytest.fail) is None
    assert kept.exists()


def test_the_bound_holds_while_files_are_being_fetched(tmp_path):
    cache = FileCache(str(tmp_path), 250)
    inside = []

    class Source(io.BytesIO):
        """While it is read, others want to put files into the cache."""

        def read(self, size: int = -1) -> bytes:
            content = super().read(10)
            if not inside:
                inside.append(_cached(FileCache(str(tmp_path), 250), _content(1)))
                inside.append(_cached(FileCache(str(tmp_path), 250), _content(2)))
                # No room for both besides what is on its way.
                inside.append(_cached(FileCache(str(tmp_path), 250), _content(3, 151)))
                assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 250
            return content

    content = _content(0)
    path = cache.path(_sha256(content), len(content), lambda: Source(content))
    assert path.read_bytes() == content
    assert inside[0] is not None and inside[1].exists() and inside[2] is None
    # The first made room for the second.
    assert _files(tmp_path) == {_sha256(content), _sha256(_content(2))}


def test_abandoned_parts_are_removed_and_take_no_room(tmp_path):
    cache = FileCache(str(tmp_path), 250)
    kept = _cached(cache, _content(0))
    (tmp_path / f"{_sha256(b'gone')}.part").write_bytes(bytes(200))
    assert _cached(cache, _content(1)).exists()
    assert _files(tmp_path) == {kept.name, _sha256(_content(1))}


def test_a_reader_reads_on_when_its_file_makes_room(tmp_path):
    cache = FileCache(str(tmp_path), 150)
    with open(_cached(cache, _content(0)), "rb") as stream:
        first = stream.read(10)
        _cached(cache, _content(1))
        assert not (tmp_path / _sha256(_content(0))).exists()
        assert first + stream.read() == _content(0)


@pytest.mark.parametrize(
    "source",
    [b"", b"conten", b"content and more", b"CONTENT", b"x" * 10_000_000],
    ids=["empty", "cut", "+", "x", "10M"],
)
def test_a_source_with_other_content_leaves_nothing(tmp_path, source):
    assert _cached(FileCache(str(tmp_path), 1000), b"content", source) is None
    assert _files(tmp_path) == set()


def test_a_source_of_another_size_leaves_nothing(tmp_path):
    cache = FileCache(str(tmp_path), 1000)
    assert cache.path(_sha256(b"content"), 8, lambda: io.BytesIO(b"content")) is None
    assert _files(tmp_path) == set()


@pytest.mark.parametrize("damage", [b"", b"conten", b"CONTENT"])
def test_a_file_that_was_damaged_on_the_disk_is_fetched_anew(tmp_path, damage):
    cache = FileCache(str(tmp_path), 1000)
    path = _cached(cache, b"content")
    path.write_bytes(damage)
    assert _cached(cache, b"content").read_bytes() == b"content"


@pytest.mark.parametrize("sha256", ["../../outside", "x" * 64, "", "A" * 64, "a" * 63, "a" * 64 + "\n", "cache"])
def test_a_checksum_of_a_manifest_is_no_path(tmp_path, sha256):
    cache = FileCache(str(tmp_path / "cache"), 1000)
    assert cache.path(sha256, 5, pytest.fail) is None
    assert _files(tmp_path / "cache") == set()


def test_a_source_that_fails_leaves_nothing_and_no_lock(tmp_path):
    class Failing(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            raise UserError("s3://b/x: gone")

    cache = FileCache(str(tmp_path), 1000)
    with pytest.raises(UserError, match="gone"):
        cache.path(_sha256(b"content"), 7, Failing)
    assert _files(tmp_path) == set()
    assert _cached(cache, b"content").read_bytes() == b"content"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"storage\.cache_folder: .*/file/cache: Not a directory"):
        FileCache(str(tmp_path / "file" / "cache"), 1000)


def test_a_full_disk_costs_the_cache_not_the_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("gru4recf_dist.data.cache.os.replace", _full)
    with caplog.at_level(logging.WARNING):
        assert _cached(FileCache(str(tmp_path), 1000), b"content") is None
    assert "is not cached (No space left on device)" in caplog.text
    assert _files(tmp_path) == set()


def _full(*arguments) -> None:
    raise OSError(28, "No space left on device")


# Shards through the cache


def _serve_dataset(server: HttpFiles, folder: Path, count: int = 60, **settings):
    """A data set in ``folder``, and its shards on the server."""
    manifest = write_dataset(str(folder), random_sessions(0, count, items=30), features=False, **settings)
    server.files = {
        f"data/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    return manifest


def _numbers(blocks) -> list[int]:
    return [number for block in blocks for number in block.sessions.tolist()]


def test_a_cached_shard_is_fetched_once_over_epochs(server, tmp_path):
    manifest = _serve_dataset(server, tmp_path / "data")
    filesystems.configure(StorageConfig(cache_folder=str(tmp_path / "cache")))
    shard = manifest.splits["train"].shards[0]
    expected = _numbers(read_blocks(str(tmp_path / "data"), shard, manifest.items))
    for _ in range(3):
        assert _numbers(read_blocks(f"{server.url}/data", shard, manifest.items)) == expected
    assert server.count(f"data/{shard.url}") == 1


def test_a_shard_that_makes_room_before_it_is_opened_comes_from_its_source(server, tmp_path):
    manifest = _serve_dataset(server, tmp_path / "data")
    filesystems.configure(StorageConfig(cache_folder=str(tmp_path / "cache")))
    info = manifest.splits["train"].shards[0]
    shard = Shard(f"{server.url}/data", info, manifest.items)
    shard._cached.result().unlink()
    assert len(_numbers(shard.blocks("fail"))) == info.sessions
    assert server.count(f"data/{info.url}") == 2


def test_a_damaged_shard_is_named_with_a_cache_too(server, tmp_path):
    manifest = _serve_dataset(server, tmp_path / "data")
    filesystems.configure(StorageConfig(cache_folder=str(tmp_path / "cache")))
    shard = manifest.splits["train"].shards[0]
    content = server.files[f"data/{shard.url}"]
    for bad, says in ((content[:-1], "truncated"), (content + b"x", "longer"), (content[:-1] + b"x", "sha256")):
        server.files[f"data/{shard.url}"] = bad
        with pytest.raises(UserError, match=says):
            list(read_blocks(f"{server.url}/data", shard, manifest.items))
        assert _files(tmp_path / "cache") == set()


@pytest.mark.parametrize("cache_gib", [1.0, 20_000 / (1 << 30)], ids=["large", "small"])
def test_more_streams_than_threads_read_through_the_cache(server, tmp_path, cache_gib):
    manifest = _serve_dataset(server, tmp_path / "data", count=72, streams=24, shard_sessions=3)

    def epoch(data: str) -> list[int]:
        config = LoaderConfig(workers=0)
        return _numbers(SessionLoader(data, manifest, config, 48, 0, 0, 1))

    expected = epoch(str(tmp_path / "data"))
    folder = tmp_path / "cache"
    filesystems.configure(StorageConfig(cache_folder=str(folder), cache_gib=cache_gib, range_mib=4 / 1024))
    assert epoch(f"{server.url}/data") == expected
    assert epoch(f"{server.url}/data") == expected
    assert sum(path.stat().st_size for path in folder.iterdir()) <= cache_gib * (1 << 30)


WORKERS = """
import json, sys
from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data import filesystems
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError

if __name__ == "__main__":
    data, *folders = sys.argv[1:]
    manifest = read_manifest(data)
    for folder in folders:
        filesystems.configure(StorageConfig(cache_folder=folder))
        try:
            blocks = list(SessionLoader(data, manifest, LoaderConfig(workers=2), 16, 0, 0, 1))
            print(json.dumps(sum(len(block.sessions) for block in blocks)))
        except UserError as error:
            print(json.dumps(str(error)))
"""


def _in_workers(tmp_path: Path, data: str, *folders: Path) -> list[int | str]:
    """What reading an epoch in loader workers gives, by cache folder: the number of sessions, or the error."""
    (tmp_path / "program.py").write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), data, *map(str, folders)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_loader_workers_share_a_cache_and_name_one_that_cannot_be_made(server, tmp_path):
    manifest = _serve_dataset(server, tmp_path / "data")
    (tmp_path / "file").write_bytes(b"")
    sessions, text = _in_workers(tmp_path, f"{server.url}/data", tmp_path / "cache", tmp_path / "file" / "cache")
    assert sessions == 60
    assert all(server.count(f"data/{shard.url}") == 1 for shard in manifest.splits["train"].shards)
    assert text == f"storage.cache_folder: {tmp_path}/file/cache: Not a directory"
