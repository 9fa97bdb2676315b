"""Event features in shards: written, read back, and damaged in every way; what is read is right or a `UserError`."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from gru4recf_dist.data import storage
from gru4recf_dist.data.blocks import Block, encode_shard
from gru4recf_dist.data.shard_format import MANIFEST, ShardInfo, read_manifest
from gru4recf_dist.data.shards import Shard, read_blocks
from gru4recf_dist.errors import UserError
from tests.support.synthetic import EVENT_FEATURES, event_values, random_sessions, write_dataset
from tests.unit.test_fuzz_reader import DATA, SESSIONS, answer, edits, fuzz, info_of, put
from tests.unit.test_shards import _members, _npy, _tar

pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy`")
VALUES = [event_values(number, session) for number, session in enumerate(SESSIONS)]


def _block(start: int, stop: int) -> Block:
    return Block(
        items=np.concatenate(SESSIONS[start:stop]),
        lengths=np.array([len(session) for session in SESSIONS[start:stop]], np.int32),
        sessions=np.arange(start, stop, dtype=np.int64),
        event_features={name: np.concatenate([each[name] for each in VALUES[start:stop]]) for name in VALUES[0]},
    )


CONTENT = encode_shard([_block(0, 5), _block(5, 12)], "s")
GOOD = {
    "type": np.array([0, 4, 1], np.int32),
    "price": np.array([1.5, np.nan, -2], np.float32),
    "gap": np.array([1, 2, 0], np.int32),
}


def _read(content: bytes, **counts: int) -> list[Block]:
    put("x.tar", content)
    return list(read_blocks(DATA, info_of(content, **counts), 1 << 31, event_features=EVENT_FEATURES))


def test_blocks_come_back_with_their_event_features():
    for ours, theirs in zip(_read(CONTENT), [_block(0, 5), _block(5, 12)], strict=True):
        assert ours.columns().keys() == theirs.columns().keys()
        for name, column in theirs.columns().items():
            np.testing.assert_array_equal(ours.columns()[name], column)
            assert ours.columns()[name].dtype == column.dtype


def test_plain_webdataset_reads_them(tmp_path):
    (tmp_path / "s.tar").write_bytes(CONTENT)
    samples = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode())
    for sample, block in zip(samples, [_block(0, 5), _block(5, 12)], strict=True):
        for name, column in block.event_features.items():
            np.testing.assert_array_equal(sample[f"{name}.npy"], column)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": None}, "type.npy is missing"),
        ({"colour": GOOD["type"]}, "unknown member 's-0.colour.npy'"),
        ({"type": GOOD["type"].astype(np.int64)}, "type.npy must be a flat int32 array"),
        ({"price": GOOD["price"].astype(np.float64)}, "price.npy must be a flat float32 array"),
        ({"price": GOOD["type"]}, "price.npy must be a flat float32 array"),
        ({"type": GOOD["type"][:2]}, "its columns do not agree"),
        ({"price": GOOD["price"][None]}, "price.npy must be a flat float32 array"),
        ({"type": np.array([0, 5, 1], np.int32)}, "type.npy holds a value outside 0..4"),
        ({"gap": np.array([0, -1, 1], np.int32)}, "gap.npy holds a value outside 0..4"),
        ({"price": np.array([0, np.inf, 1], np.float32)}, "price.npy holds an infinite number"),
        ({"price": np.array(["a", None], dtype=object)}, "price.npy must be a flat float32 array"),
        ({"gap": b"no numbers"}, "gap.npy is damaged"),
    ],
)
def test_a_wrong_column_is_one_clear_error_and_may_be_skipped(changes, message, caplog):
    content = _tar(_members(**{**GOOD, **changes}))
    with pytest.raises(UserError) as error:
        _read(content, sessions=2, events=3)
    assert message in str(error.value) and "x.tar" in str(error.value) and "\n" not in str(error.value)
    info = info_of(content, sessions=2, events=3)
    (lost,) = Shard(DATA, info, 1 << 31, EVENT_FEATURES).blocks("skip")
    assert lost.lengths.tolist() == [0, 0] and not len(lost.items) and message in caplog.text


def test_a_good_block_is_read_and_one_of_a_data_set_without_these_features_is_not():
    content = _tar(_members(**GOOD))
    (block,) = _read(content, sessions=2, events=3)
    np.testing.assert_array_equal(block.event_features["price"], GOOD["price"])
    put("x.tar", content)
    with pytest.raises(UserError, match=r"unknown member 's-0\.type\.npy'"):
        list(read_blocks(DATA, info_of(content, sessions=2, events=3), 1 << 31))


HEADERS = [
    offset for offset in range(len(CONTENT)) if CONTENT[offset] and CONTENT[offset // 512 * 512 + 257 :][:5] == b"ustar"
]


@fuzz(300)
@given(content=edits(CONTENT, st.sampled_from(HEADERS) | st.integers(0, len(CONTENT) - 1)))
def test_mutated_tar(content):
    blocks = answer("x.tar", lambda: _read(content))
    for block in blocks or []:
        for feature in EVENT_FEATURES:
            assert feature.why_wrong(block.event_features[feature.name]) is None
            assert len(block.event_features[feature.name]) == len(block.items)


@fuzz(300)
@given(
    name=st.sampled_from(["type", "price", "gap"]),
    content=edits(_npy(GOOD["price"]), st.integers(0, 139)) | edits(_npy(GOOD["type"]), st.integers(0, 139)),
)
def test_mutated_column(name, content):
    put("x.tar", shard := _tar(_members(**{**GOOD, name: content})))
    info = info_of(shard, sessions=2, events=3)
    answer("x.tar", lambda: list(read_blocks(DATA, info, 1 << 31, event_features=EVENT_FEATURES)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: all_.append(all_[0]), "two event features have the same name"),
        (lambda all_: all_[0].update(name="sessions"), "an event feature cannot be called 'sessions'"),
        (lambda all_: all_[0].update(name="../x"), "event_features.0.name: String should match pattern"),
        (lambda all_: all_[0].update(vocabulary="../x.parquet"), "which is not a file of this data set"),
        (lambda all_: all_[2].update(edges=[1, 2, 3]), "size 5 does not fit 3 edges"),
        (lambda all_: all_[0].update(size=1 << 40), "event_features.0.size"),
    ],
)
def test_a_hostile_manifest_is_one_clear_error(tmp_path, change, message):
    write_dataset(str(tmp_path), random_sessions(0, 20, 9), event_features=True)
    content = json.loads((tmp_path / MANIFEST).read_text())
    change(content["event_features"])
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_manifest(str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_manifest_may_not_promise_more_event_values_than_its_shards_have_room_for(tmp_path):
    write_dataset(str(tmp_path), random_sessions(0, 20, 9), event_features=True)
    manifest = read_manifest(str(tmp_path))
    shard = manifest.splits["train"].shards[0]
    most = (shard.bytes - 12 * shard.sessions) // 16
    content = json.loads((tmp_path / MANIFEST).read_text())
    for events, fits in ((most, True), (most + 1, False)):
        split = content["splits"]["train"]
        more = events - split["shards"][0]["events"]
        for counts in (split, split["shards"][0]):
            counts["events"] += more
            counts["targets"] += more
        (tmp_path / MANIFEST).write_text(json.dumps(content))
        if fits:
            read_manifest(str(tmp_path))
            continue
        with pytest.raises(UserError, match="cannot hold what it should"):
            read_manifest(str(tmp_path))


def test_a_data_set_from_before_there_were_event_features_is_read(tmp_path):
    write_dataset(str(tmp_path), random_sessions(0, 20, 9))
    content = json.loads((tmp_path / MANIFEST).read_text())
    del content["event_features"]
    for feature in content["features"]:
        del feature["missing"]
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    manifest = read_manifest(str(tmp_path))
    assert manifest.event_features == [] and not manifest.feature("price").missing
    shard: ShardInfo = manifest.splits["train"].shards[0]
    with tarfile.open(storage.local_path(storage.join(str(tmp_path), shard.url))) as tar:
        assert {name.split(".", 1)[1] for name in tar.getnames()} == {"items.npy", "lengths.npy", "sessions.npy"}
    (block, *_) = read_blocks(str(tmp_path), shard, manifest.items)
    assert block.event_features == {}
