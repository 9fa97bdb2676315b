"""Two preparations of one output: the second is refused, a killed one stands in nobody's way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from data_prep import output_lock, writer
from data_prep.output_lock import LOCK
from data_prep.prepare import prepare
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.prepared import Prepared, make, random_rows, write_csv


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("raw")
    return [str(write_csv(folder / f"{day}.csv", random_rows(day))) for day in (1, 2, 3)]


@pytest.fixture(scope="module")
def first(tmp_path_factory, raw) -> Path:
    """The first day, prepared."""
    folder = tmp_path_factory.mktemp("first") / "data"
    prepare(recipe(raw[0], str(folder)))
    return folder


@pytest.fixture(params=["file", "memory"])
def data(request, first, tmp_path) -> str:
    """A copy of `first`."""
    url = str(tmp_path / "data") if request.param == "file" else f"memory://{uuid.uuid4().hex}/data"
    fs, path = fsspec.core.url_to_fs(url)
    fs.put(str(first), path, recursive=True)
    return url


def recipe(source: str, output: str):
    split = {"method": "temporal", "valid_from": 25, "test_from": 28}
    content = {"source": source, "output": output, "input": {"format": "csv"}, "split": split, "shard_sessions": 9}
    return make(content)


def contents(data: str) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(data)
    found = {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}
    # It has the place of the data set in it.
    found["manifest.json"] = found["manifest.json"].replace(data.encode(), b"")
    return found


def elsewhere(**changes) -> bytes:
    owner = {"host": "node-7", "process": 123, "since": "2026-01-02T03:04:05+00:00", "machine": "other", **changes}
    return json.dumps(owner).encode()


@pytest.mark.parametrize("append", [True, False], ids=["append", "anew"])
def test_the_second_of_two_at_once_is_refused_and_the_first_is_undisturbed(
    raw, first, data, tmp_path, monkeypatch, append
):
    shutil.copytree(first, tmp_path / "alone")
    prepare(recipe(raw[1], str(tmp_path / "alone")), append=True)
    original, refused = writer.write_shard, []

    def write_while_another_begins(*arguments):
        if not refused:
            with pytest.raises(UserError) as caught:
                prepare(recipe(raw[2], data), append=append)
            refused.append(str(caught.value))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", write_while_another_begins)
        prepare(recipe(raw[1], data), append=True)
    assert refused[0].startswith(f"output: {data}: process ")
    assert refused[0].endswith(f"if that is no longer so, remove {data}/{LOCK} and start again")
    alone = {
        name: content.replace(str(tmp_path / "alone").encode(), b"") for name, content in _files(tmp_path / "alone")
    }
    assert contents(data) == alone
    # Then it is its turn.
    prepare(recipe(raw[2], data), append=append)
    assert len(Prepared(data).manifest["appends"]) == (2 if append else 0)
    assert LOCK not in contents(data)


def _files(folder: Path):
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", [elsewhere(), elsewhere(machine=None), b"", b"[", b"[1]", b"\xff"])
def test_what_may_be_at_work_on_another_machine_is_waited_for_by_a_person(raw, data, content):
    storage.write_bytes(f"{data}/{LOCK}", content)
    before = contents(data)
    for append in (True, False):
        with pytest.raises(UserError) as caught:
            prepare(recipe(raw[1], data), append=append)
        who = "process 123 on node-7, since 2026-01-02T03:04:05+00:00," if b"node" in content else "another program"
        assert str(caught.value) == (
            f"output: {data}: {who} is preparing it; if that is no longer so, remove {data}/{LOCK} and start again"
        )
    assert contents(data) == before
    storage.remove_tree(f"{data}/{LOCK}")
    prepare(recipe(raw[1], data), append=True)


def test_a_line_of_a_lock_cannot_look_like_another(raw, data):
    storage.write_bytes(f"{data}/{LOCK}", elsewhere(host="x\nerror: all is well"))
    with pytest.raises(UserError) as caught:
        prepare(recipe(raw[1], data), append=True)
    assert str(caught.value).isprintable()


_IS_KILLED = """
import os, signal, sys
from data_prep import writer
from data_prep.__main__ import main

writer.write_shard = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_one_that_was_killed_on_this_machine_is_in_nobodys_way(raw, first, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(first, data)
    storage.write_bytes(str(tmp_path / "recipe.yaml"), recipe(raw[1], str(data)).model_dump_json().encode())
    command = [sys.executable, "-c", _IS_KILLED, "--append", "--config", str(tmp_path / "recipe.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (data / LOCK).exists()
    prepare(recipe(raw[1], str(data)), append=True)
    assert not (data / LOCK).exists() and len(Prepared(data).manifest["appends"]) == 1


def test_one_of_many_that_find_an_abandoned_lock_gets_it(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {**json.loads(elsewhere()), "process": ended.pid, **output_lock._identity(ended.pid)}
    ended.communicate(b"\n")
    barrier = threading.Barrier(6, timeout=60)

    def take() -> bool:
        barrier.wait()
        try:
            with output_lock.held(str(tmp_path)):
                barrier.wait()
                return True
        except UserError:
            barrier.wait()
            return False

    for _ in range(20):
        (tmp_path / LOCK).write_text(json.dumps(owner))
        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(lambda _: take(), range(6))) == 1
        assert not (tmp_path / LOCK).exists()


def test_a_process_that_lives_is_not_taken_for_another_with_its_number():
    owner = json.loads(elsewhere(process=threading.get_native_id()))
    here = output_lock._identity(owner["process"])
    assert not output_lock._is_abandoned(json.dumps({**owner, **here}).encode())
    assert output_lock._is_abandoned(json.dumps({**owner, **here, "process_start": "1"}).encode())


def test_a_process_of_which_nothing_can_be_read_is_not_taken_for_ended(monkeypatch):
    """As with another user's, where the system shows each user but his own."""
    owner = {**json.loads(elsewhere(process=threading.get_native_id())), **output_lock._identity(os.getpid())}
    here = output_lock._identity(os.getpid())
    monkeypatch.setattr(output_lock, "_identity", lambda process: here if process == os.getpid() else {})

    def kill(process: int, signal: int) -> None:
        raise PermissionError if process == 1 else ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    assert not output_lock._is_abandoned(json.dumps({**owner, "process": 1}).encode())
    assert output_lock._is_abandoned(json.dumps({**owner, "process": 2}).encode())
