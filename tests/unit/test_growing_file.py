"""Files that grow on disks that get full and on storage that fails."""

from __future__ import annotations

import contextlib
import resource
import threading
import uuid
from collections.abc import Iterator

import pytest

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.growing_file import GrowingFile


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/file"


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes: a write takes what fits, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_gets_full_takes_whole_parts_and_the_others_later(tmp_path):
    said: list[str] = []
    file = GrowingFile(str(tmp_path / "file"), b"start\n", said.append)
    with _largest_file(16):
        for number in range(5):
            file.append(b"part %d\n" % number)
            assert (tmp_path / "file").read_bytes() == b"start\npart 0\n"
        assert not file.flush()
    assert said == [f"warning: {tmp_path}/file cannot be written for now (File too large)"]
    file.append(b"end\n")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"start\npart 0\npart 1\npart 2\npart 3\npart 4\nend\n"


def test_a_device_without_space_is_one_warning(tmp_path):
    said: list[str] = []
    file = GrowingFile(str(tmp_path / "file"), b"", said.append)
    (tmp_path / "file").unlink()
    (tmp_path / "file").symlink_to("/dev/full")
    for _ in range(3):
        file.append(b"part")
    file.close()
    assert said == [f"warning: {tmp_path}/file cannot be written for now (No space left on device)"]


def test_a_file_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match="file: cannot be written"):
        GrowingFile(str(tmp_path / "file"), b"", print)


def test_object_storage_is_written_in_the_background_and_not_for_each_part(url, monkeypatch):
    written: list[bytes] = []
    write, may_write = storage.write_bytes, threading.Event()

    def slowly(to: str, content: bytes) -> None:
        assert threading.current_thread() is not threading.main_thread() or not written or may_write.is_set()
        if written:
            may_write.wait(10)
        written.append(content)
        write(to, content)

    monkeypatch.setattr(storage, "write_bytes", slowly)
    monkeypatch.setattr(GrowingFile, "rewrite_seconds", 0.0)
    file = GrowingFile(url, b"0", print)
    for part in (b"1", b"2", b"3"):
        file.append(part)
    assert storage.read_bytes(url) == b"0"
    may_write.set()
    file.close()
    assert written == [b"0", b"01", b"0123"]
    assert storage.read_bytes(url) == b"0123"


def test_object_storage_that_fails_for_a_while_loses_nothing(url, monkeypatch):
    said: list[str] = []
    write = storage.write_bytes
    file = GrowingFile(url, b"0", said.append)
    monkeypatch.setattr(GrowingFile, "rewrite_seconds", 0.0)

    def fail(to: str, content: bytes) -> None:
        raise UserError(f"{to}: cannot be written (503)")

    monkeypatch.setattr(storage, "write_bytes", fail)
    for _ in range(3):
        file.append(b"1")
        assert not file.flush()
    assert len(said) == 1 and "503" in said[0]
    monkeypatch.setattr(storage, "write_bytes", write)
    file.append(b"2")
    assert file.flush()
    assert storage.read_bytes(url) == b"01112"
    file.close()
    assert len(said) == 1
