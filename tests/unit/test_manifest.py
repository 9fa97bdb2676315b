"""The manifest of a data set: written, read back, and every kind of wrong content named."""

from __future__ import annotations

import pytest

from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import (
    MANIFEST,
    Feature,
    Manifest,
    ShardInfo,
    SplitInfo,
    read_manifest,
    write_manifest,
)
from gru4recf_dist.errors import UserError


def _manifest() -> Manifest:
    shard = ShardInfo(url="train/s.tar", stream=0, sessions=12, events=90, targets=78, bytes=10240, sha256="0" * 64)
    split = SplitInfo(sessions=shard.sessions, events=shard.events, targets=shard.targets, shards=[shard])
    empty = SplitInfo(sessions=0, events=0, targets=0, shards=[])
    return Manifest(
        name="ä",
        seed=3,
        items=20,
        streams=8,
        protocol="leave_one_out",
        splits={"train": split, "valid": empty, "test": empty},
        features=[Feature(name="category", kind="token", size=6, values="items/features/category.npy")],
        report=[{"step": "read", "rows": 5}],
        recipe={"source": "x"},
    )


def test_manifest_round_trip(data):
    write_manifest(data, _manifest())
    assert read_manifest(data) == _manifest()


def _manifest_error(data: str, content: object) -> str:
    url = storage.join(data, MANIFEST)
    storage.write_json(url, content)
    with pytest.raises(UserError) as caught:
        read_manifest(data)
    text = str(caught.value)
    assert text.startswith(url)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("protocol", "split", "targets"),
    [
        ("leave_one_out", "train", 78),
        ("leave_one_out", "valid", 12),
        ("leave_one_out", "test", 12),
        ("every_position", "train", 78),
        ("every_position", "test", 78),
    ],
)
def test_targets_follow_from_events_and_sessions(memory, protocol, split, targets):
    content = _manifest().model_dump(mode="json")
    filled = content["splits"]["train"]
    content["splits"] = {name: filled if name == split else content["splits"]["test"] for name in content["splits"]}
    content["protocol"] = protocol

    def with_targets(count: int) -> dict:
        filled["targets"] = filled["shards"][0]["targets"] = count
        return content

    for wrong in (0, targets - 1, targets + 1, 90):
        says = f"'train/s.tar': has {targets} targets, not {wrong}"
        assert _manifest_error(memory, with_targets(wrong)).endswith(says)
    storage.write_json(storage.join(memory, MANIFEST), with_targets(targets))
    assert read_manifest(memory).splits[split].targets == targets


def test_missing_manifest_is_named(data):
    with pytest.raises(UserError) as caught:
        read_manifest(data)
    assert storage.join(data, MANIFEST) in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_version_names_both(memory, version):
    text = _manifest_error(memory, {**_manifest().model_dump(mode="json"), "format": version})
    assert f"format {version!r}" in text
    assert "reads format 1" in text


@pytest.mark.parametrize("content", [[], "text", 5, None, {}])
def test_manifest_that_is_no_mapping_is_refused(memory, content):
    _manifest_error(memory, content)


def test_manifest_that_is_no_json_is_named(memory):
    storage.write_bytes(storage.join(memory, MANIFEST), b'{"format": 1, ')
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        read_manifest(memory)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["surprise"], 1, "surprise"),
        (["splits", "train", "shards", 0, "command"], "ls", "command"),
        (["splits", "train", "shards", 0, "sessions"], "many", "sessions"),
        (["items"], 0, "items"),
        (["streams"], 0, "streams"),
        (["protocol"], "random", "protocol"),
        (["features", 0, "kind"], "pickle", "kind"),
        (["splits", "holdout"], {}, "holdout"),
    ],
)
def test_unknown_or_wrong_value_in_the_manifest_is_named(memory, path, value, named):
    content = _manifest().model_dump(mode="json")
    target = content
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    assert named in _manifest_error(memory, content)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["splits", "train", "shards", 0, "stream"], 8),
        (["splits", "train", "shards", 0, "stream"], -1),
        (["splits", "train", "shards", 0, "sessions"], -12),
        (["splits", "train", "sessions"], 11),
    ],
    ids=["stream too high", "negative stream", "negative sessions", "wrong total"],
)
def test_manifest_that_contradicts_itself_is_refused(memory, path, value):
    content = _manifest().model_dump(mode="json")
    target = content
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    _manifest_error(memory, content)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_manifest_without_a_split_is_refused(memory, split):
    content = _manifest().model_dump(mode="json")
    del content["splits"][split]
    assert split in _manifest_error(memory, content)


def test_unknown_feature_names_the_known_ones():
    assert _manifest().feature("category").size == 6
    with pytest.raises(UserError, match=r"'colour'.*category"):
        _manifest().feature("colour")
