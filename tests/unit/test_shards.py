"""The shard format: written, read back by ourselves and by plain WebDataset, and every kind of damage to it."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gru4recf_dist.data import storage
from gru4recf_dist.data.blocks import MAX_BLOCK_SESSIONS, Block, encode_shard
from gru4recf_dist.data.shard_format import ShardInfo, write_shard
from gru4recf_dist.data.shards import read_blocks
from gru4recf_dist.errors import UserError
from tests.support.mutations import edited
from tests.support.synthetic import random_sessions, to_block

SESSIONS = random_sessions(0, 12, 20)
BLOCKS = [to_block(SESSIONS[:5]), to_block(SESSIONS[5:], 5)]
CONTENT = encode_shard(BLOCKS, "s")
SHARD = "train/s.tar"


# N of the shards written here.
ITEMS = 2**31 - 1


def _info(content: bytes = CONTENT, **changes) -> ShardInfo:
    """What the manifest would say of ``content``, checksum included: only what is in the tar can give it away."""
    values = {
        "url": SHARD,
        "stream": 0,
        "sessions": len(SESSIONS),
        "events": sum(len(session) for session in SESSIONS),
        "targets": 1,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return ShardInfo(**{**values, **changes})


def _read(data: str, content: bytes, info: ShardInfo | None = None) -> list[Block]:
    storage.write_bytes(storage.join(data, SHARD), content)
    return list(read_blocks(data, info or _info(content), ITEMS))


def _error(data: str, content: bytes, info: ShardInfo | None = None) -> str:
    """The one line of the UserError that reading ``content`` ends with."""
    with pytest.raises(UserError) as caught:
        _read(data, content, info)
    text = str(caught.value)
    assert storage.join(data, SHARD) in text
    assert "\n" not in text
    return text


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def _members(**changes: np.ndarray | bytes | None) -> dict[str, bytes]:
    """The members of a good block of two sessions, with some columns replaced, added or (None) left out."""
    columns = {
        "items": np.array([3, 1, 2], np.int32),
        "lengths": np.array([2, 1], np.int32),
        "sessions": np.array([0, 1], np.int64),
        **changes,
    }
    return {
        f"s-0.{name}.npy": column if isinstance(column, bytes) else _npy(column)
        for name, column in columns.items()
        if column is not None
    }


def _tar(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, member in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(member)
            tar.addfile(header, io.BytesIO(member))
    return content.getvalue()


def _of_two(content: bytes, **changes) -> ShardInfo:
    return _info(content, **{"sessions": 2, "events": 3, **changes})


def _assert_equal(read: list[Block], expected: list[Block]) -> None:
    assert len(read) == len(expected)
    for ours, theirs in zip(read, expected, strict=True):
        assert ours.columns().keys() == theirs.columns().keys()
        for name, column in theirs.columns().items():
            np.testing.assert_array_equal(ours.columns()[name], column)
            assert ours.columns()[name].dtype == column.dtype


def test_blocks_come_back_in_order(data):
    info = write_shard(data, SHARD, 3, BLOCKS, targets=17)
    _assert_equal(list(read_blocks(data, info, ITEMS)), BLOCKS)


def test_times_come_back_when_recorded(data):
    block = BLOCKS[0]
    timed = replace(block, times=np.arange(len(block.items), dtype=np.int64) * 10**12)
    info = write_shard(data, SHARD, 0, [timed], targets=1)
    _assert_equal(list(read_blocks(data, info, ITEMS)), [timed])


def test_shard_is_described_by_what_is_in_it(data):
    info = write_shard(data, SHARD, 3, BLOCKS, targets=17)
    content = storage.read_bytes(storage.join(data, SHARD))
    assert info == ShardInfo(
        url=SHARD,
        stream=3,
        sessions=12,
        events=sum(len(session) for session in SESSIONS),
        targets=17,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def test_same_blocks_give_the_same_bytes():
    again = [Block(block.items.copy(), block.lengths.copy(), block.sessions.copy()) for block in BLOCKS]
    assert encode_shard(again, "s") == CONTENT
    wider = [Block(block.items.astype(np.int64), block.lengths, block.sessions) for block in BLOCKS]
    assert encode_shard(wider, "s") == CONTENT
    assert encode_shard(BLOCKS, "t") != CONTENT
    assert encode_shard(BLOCKS[::-1], "s") != CONTENT


def test_bytes_hold_nothing_of_the_machine_that_wrote_them():
    with tarfile.open(fileobj=io.BytesIO(CONTENT)) as tar:
        headers = {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in tar}
    assert headers == {(0, 0, 0, "", "")}


def test_block_that_is_too_large_cannot_be_written():
    count = MAX_BLOCK_SESSIONS + 1
    block = to_block([np.array([1], np.int32)] * count)
    with pytest.raises(ValueError, match=str(count)):
        encode_shard([block], "s")
    assert encode_shard([to_block([np.array([1], np.int32)] * MAX_BLOCK_SESSIONS)], "s")


def test_plain_webdataset_reads_the_shards(tmp_path):
    write_shard(str(tmp_path), "train/a.tar", 0, BLOCKS, targets=1)
    write_shard(str(tmp_path), "train/b.tar", 1, BLOCKS[:1], targets=1)
    urls = [str(tmp_path / "train" / name) for name in ("a.tar", "b.tar")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len({sample["__key__"] for sample in samples}) == 3
    for sample, block in zip(samples, [*BLOCKS, BLOCKS[0]], strict=True):
        arrays = {name: sample[name] for name in sample if not name.startswith("__")}
        assert arrays.keys() == {"items.npy", "lengths.npy", "sessions.npy"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, block.columns()[name.removesuffix(".npy")])


def test_every_truncation_is_one_user_error(memory):
    for length in [*range(0, len(CONTENT), 101), len(CONTENT) - 1]:
        _error(memory, CONTENT[:length], _info())


def test_truncated_file_with_a_fitting_checksum_is_still_found(memory):
    # The zeros at the end only fill the tar up to its record size.
    for length in range(0, len(CONTENT.rstrip(b"\x00")), 101):
        _error(memory, CONTENT[:length])


def test_every_flipped_byte_is_one_user_error(memory):
    for position in range(0, len(CONTENT), 67):
        content = bytearray(CONTENT)
        content[position] ^= 0x41
        _error(memory, bytes(content), _info())


def test_flipped_bit_of_the_data_is_found_by_the_checksum(memory):
    position = CONTENT.index(SESSIONS[0].tobytes())
    content = bytearray(CONTENT)
    content[position] ^= 1
    assert "sha256" in _error(memory, bytes(content), _info())


def test_missing_shard_is_named(data):
    with pytest.raises(UserError, match="no such file") as caught:
        list(read_blocks(data, _info(), ITEMS))
    assert storage.join(data, SHARD) in str(caught.value)


class _Bomb:
    """Its unpickling would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("column", ["items", "times"])
def test_pickled_member_is_refused_and_not_run(data, tmp_path, column):
    bomb = _npy(np.array([_Bomb(str(tmp_path / "executed"))], dtype=object))
    content = _tar(_members(**{column: bomb}))
    assert f"{column}.npy" in _error(data, content, _of_two(content))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["s-0.pyd", "s-0.model.pkl", "s-0.items.pth", "s-0.Items.json", "s-1.cls"])
def test_unknown_member_is_named(data, name):
    content = _tar({**_members(), name: b"\x80\x04."})
    assert name.partition(".")[2] in _error(data, content, _of_two(content))


@pytest.mark.parametrize("column", ["items", "lengths", "sessions"])
def test_missing_column_is_named(data, column):
    content = _tar(_members(**{column: None}))
    assert f"{column}.npy is missing" in _error(data, content, _of_two(content))


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": np.array([2, 2], np.int32)},
        {"lengths": np.array([3, 0], np.int32)},
        {"lengths": np.array([4, -1], np.int32)},
        {"lengths": np.array([3], np.int32)},
        {"lengths": np.array([2**31 - 1, 2**31 - 1], np.int32)},
        {"sessions": np.array([0], np.int64)},
        {"times": np.array([1, 2], np.int64)},
        {"items": np.array([3, 0, 2], np.int32)},
        {"items": np.array([3, -1, 2], np.int32)},
        {"items": np.array([], np.int32)},
        {"items": np.array([3, 1, 2], np.int64)},
        {"items": np.array([3, 1, 2], np.float32)},
        {"items": np.array([3, 1, 2], ">i4")},
        {"items": np.array([[3, 1, 2]], np.int32)},
        {"items": b"no array"},
        {"items": b""},
    ],
)
def test_columns_that_do_not_agree_are_refused(memory, changes):
    content = _tar(_members(**changes))
    assert "block s-0" in _error(memory, content, _of_two(content))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (3, }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999999,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<i4', ('fortran_order': False, 'shape': (3,), }",
        "{'descr': '<i5', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<i4'" + " " * 20_000,
    ],
    ids=["bracket", "over int64", "over memory", "negative", "tokens", "dtype", "very long"],
)
def test_member_with_a_crooked_header_is_one_user_error(memory, header):
    padded = header.encode().ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(12)
    content = _tar(_members(items=member))
    _error(memory, content, _of_two(content))


def test_error_shows_no_python_object(memory):
    assert " object at 0x" not in _error(memory, CONTENT[:700], _info())


@pytest.mark.parametrize(
    ("changes", "shown"), [({"sessions": 13}, "13"), ({"events": 1}, "1"), ({"sessions": 0, "events": 0}, "0")]
)
def test_counts_of_the_manifest_must_be_right(data, changes, shown):
    text = _error(data, CONTENT, _info(**changes))
    assert f"the manifest says {changes.get('sessions', 12)} and" in text
    assert shown in text


def test_empty_tar_is_not_what_the_manifest_says(data):
    _error(data, _tar({}))
    _error(data, b"")


@pytest.mark.parametrize("scheme", ["pipe:", "pipe://", "file://", "cmd:"])
def test_url_of_the_manifest_stays_within_the_data_set(tmp_path, scheme):
    secret = tmp_path / "outside.tar"
    secret.write_bytes(CONTENT)
    (tmp_path / "data").mkdir()
    url = f"{scheme}touch {tmp_path}/executed" if scheme != "file://" else f"file://{secret}"
    with pytest.raises(UserError) as caught:
        list(read_blocks(str(tmp_path / "data"), _info(url=url), ITEMS))
    assert url in str(caught.value)
    assert not (tmp_path / "executed").exists()


def _mutations() -> st.SearchStrategy[bytes]:
    """The good shard with a few bytes changed, cut out or put in; most edits hit the tar and npy headers."""
    headers = [offset for start in range(0, len(CONTENT) - 1024, 512) for offset in range(start, start + 130)]
    place = st.one_of(st.sampled_from(headers), st.integers(0, len(CONTENT) - 1))
    return edited(CONTENT, place, removed=st.integers(0, 3), longest=6, most=4)


def _crooked_tuple() -> bytes:
    """The first header's ``(n,)`` with a bracket that is not closed."""
    return CONTENT.replace(b",), }", b",(, }", 1)


@settings(max_examples=600, deadline=None)
@example(content=_crooked_tuple(), matches=False)
@example(content=_crooked_tuple(), matches=True)
@given(content=_mutations(), matches=st.booleans())
@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
def test_mutated_shard_reads_or_is_a_user_error_and_nothing_else(content, matches):
    # matches: the manifest was forged along with the shard, so that the checksum tells nothing.
    fsspec.filesystem("memory").pipe(f"/mutated/{SHARD}", content)
    info = _info(content) if matches else _info()
    try:
        blocks = list(read_blocks("memory://mutated", info, ITEMS))
    except UserError as error:
        assert f"memory://mutated/{SHARD}" in str(error)
        assert "\n" not in str(error)
    else:
        assert matches or content == CONTENT
        assert sum(len(block.lengths) for block in blocks) == info.sessions
        assert all(block.items.min() >= 1 for block in blocks if len(block.items))


def test_reading_leaves_no_file_open(tmp_path):
    write_shard(str(tmp_path), SHARD, 0, BLOCKS, targets=1)
    blocks = read_blocks(str(tmp_path), _info(), ITEMS)
    next(blocks)
    blocks.close()
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        opened = [os.readlink(link) for link in descriptors.iterdir() if link.exists()]
        assert str(tmp_path / SHARD) not in opened
