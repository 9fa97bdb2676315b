"""Whatever a manifest holds: an answer or a `UserError`, in bounded memory."""

from __future__ import annotations

import json
import uuid
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import MANIFEST, Manifest, read_manifest
from tests.support.synthetic import random_sessions, write_dataset
from tests.unit.test_fuzz_reader import DATA, SESSIONS, answer, edits, fuzz, put


@pytest.fixture(scope="module")
def manifest() -> dict:
    place = f"memory://{uuid.uuid4().hex}"
    held_out = random_sessions(1, 4, 20), random_sessions(2, 4, 20)
    written = write_dataset(place, SESSIONS, *held_out, streams=2, event_features=True)
    return json.loads(storage.read_bytes(storage.join(place, MANIFEST))) | {"report": written.report}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([1 << 63, -1, 10**300, float("inf"), float("nan"), 1e308, 0.5])
    | st.text(max_size=5)
    | st.sampled_from(
        ["../x.tar", "%2e%2e/x.tar", "a/..%2F../x.tar", "%252e%2e/x.tar", "pipe:ls", "\ud800", "a\nb", "\0"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(tree, path=()):
    yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from _places(tree[key], (*path, key))


def _mutated(tree, path, draw):
    """A copy of ``tree`` in which what is at ``path`` was replaced, removed, doubled or given a neighbour."""
    if not path:
        return draw(JSON)
    copy = json.loads(json.dumps(tree))
    target = copy
    for key in path[:-1]:
        target = target[key]
    change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if change == "replace":
        target[path[-1]] = draw(JSON)
    elif change == "remove":
        del target[path[-1]]
    elif isinstance(target, dict):
        target[draw(st.text(max_size=5))] = draw(JSON)
    else:
        target.insert(path[-1], target[path[-1]])
    return copy


def _read_manifest(content: bytes) -> Manifest | None:
    put(MANIFEST, content)
    return answer(MANIFEST, lambda: read_manifest(DATA))


@fuzz(700)
@given(draw=st.data())
def test_mutated_manifest(manifest, draw):
    changed = manifest
    for _ in range(draw.draw(st.integers(1, 3))):
        changed = _mutated(changed, draw.draw(st.sampled_from(list(_places(changed)))), draw.draw)
    read = _read_manifest(json.dumps(changed).encode())
    if read is not None:
        for name in read.files:
            # As a server reads it that unquotes twice.
            assert not {"..", ":"} & {*unquote(unquote(name)).split("/"), *unquote(unquote(name))}
        read.training_digest.encode()


@fuzz(200)
@given(draw=st.data())
def test_manifest_with_other_bytes(manifest, draw):
    content = json.dumps(manifest).encode()
    _read_manifest(draw.draw(edits(content, st.integers(0, len(content) - 1))))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"format": ' * 50_000,
        b"9" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
        b'"\\ud800"',
        b"\xff\xfe",
        b"",
    ],
    ids=["lists", "mappings", "number", "format", "surrogate", "utf-16", "empty"],
)
def test_extreme_json(content):
    assert _read_manifest(content) is None
