"""Files on fsspec URLs, on the local disk and in memory."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
import uuid

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.errors import UserError


@pytest.fixture(params=["plain", "file", "memory"])
def folder(request, tmp_path):
    """The same empty folder as a plain path, a `file://` URL, and one in memory."""
    return {"plain": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


def test_what_is_written_is_read_and_listed(folder):
    storage.write_bytes(storage.join(folder, "a/b/one.bin"), b"1")
    storage.write_json(storage.join(folder, "a/two.json"), {"x": [1, "ä"]})
    assert storage.read_bytes(storage.join(folder, "a/b/one.bin")) == b"1"
    assert storage.read_json(storage.join(folder, "a/two.json")) == {"x": [1, "ä"]}
    assert storage.list_names(storage.join(folder, "a")) == ["b", "two.json"]
    assert storage.list_names(storage.join(folder, "none")) == []
    assert storage.is_folder(storage.join(folder, "a"))
    assert not storage.is_folder(storage.join(folder, "a/two.json"))


def test_a_file_is_created_once(folder):
    url = storage.join(folder, "lock")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second")
    assert storage.read_bytes(url) == b"first"


def test_an_answer_that_was_lost_does_not_make_ones_own_file_anothers():
    storage.write_bytes("memory://lost/lock", b"ours")
    assert storage.create("memory://lost/lock", b"ours")


@pytest.mark.parametrize(
    "error", [NotImplementedError(), TypeError("mode"), OSError(errno.ENOSYS, "A header that is not implemented")]
)
def test_storage_that_cannot_create_exclusively_is_written_to(monkeypatch, error):
    fs = filesystems.filesystem("memory://")[0]
    write = type(fs).pipe_file

    def write_only(fs, path, value, mode="overwrite"):
        if mode == "create":
            raise error
        write(fs, path, value)

    monkeypatch.setattr(type(fs), "pipe_file", write_only)
    assert storage.create("memory://simple/lock", b"first")
    assert storage.read_bytes("memory://simple/lock") == b"first"


def test_a_file_that_cannot_be_created_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"/none/lock: cannot be written \(No such file or directory\)$"):
        storage.create(f"{tmp_path}/none/lock", b"x")


def test_a_file_that_cannot_be_written_to_does_not_stay_empty(monkeypatch, tmp_path):
    class Full(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "open", Full, raising=False)
    with pytest.raises(UserError, match=r"lock: cannot be written \(No space left on device\)$"):
        storage.create(f"{tmp_path}/lock", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_finds_files_by_name(folder):
    for name in ("raw/b.csv", "raw/a.csv", "raw/a.txt", "raw/deeper/c.csv"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    found = storage.glob(storage.join(folder, "raw/*.csv"))
    assert [storage.read_bytes(url) for url in found] == [b"raw/a.csv", b"raw/b.csv"]
    assert storage.glob(storage.join(folder, "none/*.csv")) == []


def test_remove_tree_takes_files_and_folders_and_minds_nothing_missing(folder):
    storage.write_bytes(storage.join(folder, "a/b/one.bin"), b"1")
    storage.write_bytes(storage.join(folder, "keep.bin"), b"1")
    storage.remove_tree(storage.join(folder, "a"))
    storage.remove_tree(storage.join(folder, "a"))
    assert not storage.exists(storage.join(folder, "a/b/one.bin"))
    assert storage.exists(storage.join(folder, "keep.bin"))


def test_block_that_raises_leaves_no_file(folder):
    url = storage.join(folder, "new.bin")
    with pytest.raises(RuntimeError, match="in the middle"), storage.open_atomic(url) as stream:
        stream.write(b"half")
        raise RuntimeError("in the middle")
    assert not storage.exists(url)
    assert storage.list_names(folder) == []


def test_block_that_raises_leaves_the_old_file(folder):
    url = storage.join(folder, "old.bin")
    storage.write_bytes(url, b"old and whole")
    with pytest.raises(RuntimeError, match="in the middle"), storage.open_atomic(url) as stream:
        stream.write(b"half")
        raise RuntimeError("in the middle")
    assert storage.read_bytes(url) == b"old and whole"
    assert storage.list_names(folder) == ["old.bin"]


def test_file_appears_only_at_the_end_of_the_block(folder):
    url = storage.join(folder, "new.bin")
    with storage.open_atomic(url) as stream:
        stream.write(b"half")
        stream.flush()
        assert not storage.exists(url)
        stream.write(b" and half")
    assert storage.read_bytes(url) == b"half and half"


class _FullDisk(tempfile.TemporaryDirectory):
    """A folder in which the file that is written lies on a full device."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        os.symlink("/dev/full", f"{self.name}/content")


def test_a_full_temporary_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", _FullDisk)
    with pytest.raises(UserError) as caught, storage.open_atomic("memory://full/x.bin") as stream:
        stream.write(bytes(1 << 20))
    said = f"memory://full/x.bin: cannot be written (TMPDIR {tmp_path}: No space left on device)"
    assert str(caught.value) == said
    # What is found out at the end only.
    with pytest.raises(UserError) as caught, storage.open_atomic("memory://full/x.bin") as stream:
        stream.write(b"x")
    assert str(caught.value) == said
    assert not storage.exists("memory://full/x.bin") and list(tmp_path.iterdir()) == []


def test_a_temporary_folder_that_is_gone_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError) as caught, storage.open_atomic("memory://gone/x.bin"):
        pass
    said = f"memory://gone/x.bin: cannot be written (TMPDIR {tmp_path}/gone: No such file or directory)"
    assert str(caught.value) == said


def test_an_error_of_the_block_is_not_taken_for_one_of_its_file(folder):
    with pytest.raises(FileNotFoundError, match="elsewhere"), storage.open_atomic(storage.join(folder, "x.bin")):
        raise FileNotFoundError(2, "not there", "elsewhere")


@pytest.mark.parametrize("read", [storage.read_bytes, storage.read_json, storage.read_npy_rows])
def test_missing_file_is_named(folder, read):
    url = storage.join(folder, "none")
    with pytest.raises(UserError) as caught:
        read(url)
    assert url in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_file_that_is_not_json_is_named(folder, content):
    url = storage.join(folder, "x.json")
    storage.write_bytes(url, content)
    with pytest.raises(UserError) as caught:
        storage.read_json(url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_nested_too_deeply_is_named():
    storage.write_bytes("memory://deep/x.json", b"[" * 100_000)
    with pytest.raises(UserError, match=r"x\.json"):
        storage.read_json("memory://deep/x.json")


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/hostname",
        "pipe://cat",
        "ftp://host/x",
        "sftp://host/x",
        "github://a:b@c/x",
        "reference://x",
        "simplecache::file:///tmp/x",
        "zip://x::file:///tmp/x.zip",
        "data:,x",
    ],
)
def test_other_protocols_are_refused_by_every_way_in(url):
    for call in (storage.filesystem, storage.exists, storage.read_bytes, storage.read_npy_rows, storage.list_names):
        with pytest.raises(UserError, match="not supported"):
            call(url)
    with pytest.raises(UserError, match="not supported"):
        storage.write_bytes(url, b"")


@pytest.mark.parametrize("url", ["memory://x::zip:///tmp/x.zip", "/tmp/x::reference://x", "/tmp/a::b"])
def test_chained_urls_are_refused_not_cut_short(url):
    # fsspec reads "a::b" as a chain and would open "a": another file than the one that is named.
    with pytest.raises(UserError, match="::"):
        storage.filesystem(url)


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("a/b", "file"),
        ("/a/b:c", "file"),
        (":a", "file"),
        ("", "file"),
        ("s3://b/k", "s3"),
        ("memory://a", "memory"),
        ("pipe:ls", "pipe"),
    ],
)
def test_protocol_is_what_stands_before_the_colon(url, protocol):
    assert filesystems.protocol_of(url) == protocol


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("a", "b"), "a/b"),
        (("a/", "/b/", "c"), "a/b/c"),
        (("s3://b", "c"), "s3://b/c"),
        (("/a", "pipe:ls"), "/a/pipe:ls"),
    ],
)
def test_join(parts, joined):
    assert storage.join(*parts) == joined


class _Counting(io.BytesIO):
    """Counts the bytes that are read from it."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.count += len(content)
        return content


@pytest.mark.parametrize("shape", [(1000,), (1000, 7), (50, 3, 2)])
@pytest.mark.parametrize("rows", [(0, None), (0, 0), (10, 20), (49, 50), (40, 5000), (7, 7)])
def test_npy_rows_equal_numpys_slice(folder, shape, rows):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    url = storage.join(folder, "x.npy")
    storage.write_npy(url, array)
    np.testing.assert_array_equal(np.load(io.BytesIO(storage.read_bytes(url))), array)
    read = storage.read_npy_rows(url, *rows)
    np.testing.assert_array_equal(read, array[rows[0] : rows[1]])
    assert read.dtype == array.dtype
    assert read.flags.writeable


def test_npy_rows_read_no_bytes_but_the_header_and_their_own(monkeypatch):
    content = io.BytesIO()
    np.save(content, np.arange(1_000_000, dtype=np.int64))
    stream = _Counting(content.getvalue())
    monkeypatch.setattr(storage, "open_read", lambda url: contextlib.nullcontext(stream))
    np.testing.assert_array_equal(storage.read_npy_rows("x.npy", 500_000, 500_100), np.arange(500_000, 500_100))
    assert stream.count == 128 + 100 * 8


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


class _Bomb:
    """Its unpickling would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_pickled_npy_is_refused_and_not_run(folder, tmp_path):
    url = storage.join(folder, "x.npy")
    storage.write_bytes(url, _npy(np.array([_Bomb(str(tmp_path / "executed"))], dtype=object)))
    with pytest.raises(UserError, match=r"x\.npy"):
        storage.read_npy_rows(url)
    assert not (tmp_path / "executed").exists()


def test_npy_writer_never_pickles(folder):
    with pytest.raises(ValueError, match="pickle"):
        storage.write_npy(storage.join(folder, "x.npy"), np.array([{}], dtype=object))
    assert not storage.exists(storage.join(folder, "x.npy"))


def test_truncated_npy_is_refused_at_every_length(folder):
    url = storage.join(folder, "x.npy")
    whole = _npy(np.arange(20, dtype=np.int32))
    for length in [0, 3, 8, 9, 10, 60, 127, 128, 129, len(whole) - 1]:
        storage.write_bytes(url, whole[:length])
        with pytest.raises(UserError, match=r"x\.npy"):
            storage.read_npy_rows(url)


def test_rows_before_a_truncation_can_be_read():
    storage.write_bytes("memory://cut/x.npy", _npy(np.arange(20, dtype=np.int32))[:-4])
    np.testing.assert_array_equal(storage.read_npy_rows("memory://cut/x.npy", 0, 19), np.arange(19))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (20, }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999999,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (-2,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (), }",
        "{'descr': '<i4', 'fortran_order': True, 'shape': (5, 4), }",
        "{'descr': '|V0', 'fortran_order': False, 'shape': (20,), }",
        "{'descr': '<i5', 'fortran_order': False, 'shape': (20,), }",
        "{'descr': '<i4', 'fortran_order': False, ('shape': (20,), }",
        "[]",
    ],
)
def test_npy_with_a_crooked_header_is_refused(header):
    url = "memory://crooked/x.npy"
    padded = header.encode().ljust(117) + b"\n"
    storage.write_bytes(url, b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(80))
    with pytest.raises(UserError, match=r"x\.npy"):
        storage.read_npy_rows(url)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 207), value=st.integers(0, 255))
def test_npy_with_any_byte_changed_gives_an_array_or_a_user_error(position, value):
    content = bytearray(_npy(np.arange(20, dtype=np.int32)))
    content[position] = value
    fsspec.filesystem("memory").pipe("/mutated/x.npy", bytes(content))
    try:
        assert isinstance(storage.read_npy_rows("memory://mutated/x.npy"), np.ndarray)
    except UserError as error:
        assert "memory://mutated/x.npy" in str(error)
