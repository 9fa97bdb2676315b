"""Tokens and ids as flat arrays against a dictionary."""

from __future__ import annotations

import errno
import io
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gru4recf_dist.data import storage, token_index
from gru4recf_dist.data import tokens as tokens_module
from gru4recf_dist.data.shard_format import Manifest, SplitInfo
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.node_arrays import NodeArrays, in_memory
from tests.support.ranks import run_ranks

EMPTY = SplitInfo(sessions=0, events=0, targets=0, shards=[])


def _write(data: str, tokens: list[str], items: int | None = None, row_group: int = 1000) -> Manifest:
    stream = io.BytesIO()
    pq.write_table(pa.table({"token": pa.array(tokens, pa.string())}), stream, row_group_size=row_group)
    manifest = Manifest(
        name="tokens",
        seed=0,
        items=items or len(tokens),
        streams=8,
        protocol="every_position",
        splits={"train": EMPTY, "valid": EMPTY, "test": EMPTY},
    )
    storage.write_bytes(f"{data}/{manifest.tokens}", stream.getvalue())
    return manifest


def _index(data: str, tokens: list[str], **layout) -> token_index.TokenIndex:
    return token_index.read_token_index(data, _write(data, tokens, **layout), in_memory)


def _check(index: token_index.TokenIndex, tokens: list[str], others: list[str]) -> None:
    expected = {token: number for number, token in enumerate(tokens, 1)}
    assert index.ids([*tokens, *others, *tokens]) == expected
    order = np.random.default_rng(0).permutation(len(tokens)) + 1
    assert index.tokens(np.append(order, 0)) == [*(tokens[number - 1] for number in order), ""]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=40, unique=True), st.data())
def test_every_token_has_its_id_and_every_id_its_token(tmp_path_factory, tokens, data):
    row_group = data.draw(st.integers(1, 12))
    others = [token for token in ("other", "a", "\x00", "é") if token not in tokens]
    _check(_index(str(tmp_path_factory.mktemp("data")), tokens, row_group=row_group), tokens, others)


def test_many_tokens_over_several_batches(tmp_path):
    tokens = [f"item-{number * 7919 % 40_009}" for number in range(40_009)]
    others = ["item-40009", "item-", "tem-1", "item-1 ", "item-1\x00", "", "\ud800"]
    _check(_index(str(tmp_path), tokens), tokens, others)


def test_tokens_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    tokens = [f"item-{number}" for number in range(500)]
    monkeypatch.setattr(token_index, "_hashes", lambda ends, text: (np.diff(ends) % 2).astype(np.uint64))
    _check(_index(str(tmp_path), tokens), tokens, ["item-500", "other", "item-x"])


@pytest.mark.parametrize("in_memory_at_most", [0, 10_000])
def test_what_is_made_in_blocks_is_what_is_made_at_once(tmp_path, monkeypatch, in_memory_at_most):
    tokens = [f"item-{number * 7919 % 5003}" for number in range(5003)]
    at_once = _index(str(tmp_path), tokens)
    monkeypatch.setattr(token_index, "_BLOCK_ITEMS", 100)
    monkeypatch.setattr(tokens_module, "_MOST_IN_MEMORY", in_memory_at_most)
    in_blocks = _index(str(tmp_path), tokens)
    for name in ("_hashes", "_ids"):
        assert np.array_equal(getattr(in_blocks, name), getattr(at_once, name))
    assert (np.diff(at_once._hashes.astype(object)) > 0).all()
    _check(in_blocks, tokens, ["item-5003", "other"])


def test_of_equal_hashes_the_first_item_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(token_index, "_hashes", lambda ends, text: np.diff(ends).astype(np.uint64) << np.uint64(62))
    monkeypatch.setattr(token_index, "_BLOCK_ITEMS", 10)
    index = _index(str(tmp_path), [f"{number}" for number in range(500)])
    for length in (1, 2, 3):
        ids = index._ids[index._hashes == np.uint64(length) << np.uint64(62)]
        assert (np.diff(ids) > 0).all()


def test_sorting_takes_no_memory_of_the_size_of_the_catalog(tmp_path, monkeypatch):
    items = 200_000
    tokens = [str(number).encode() for number in range(items)]
    ends = np.concatenate([[0, 0], np.cumsum([len(token) for token in tokens])])
    text = np.frombuffer(b"".join(tokens), np.uint8)
    hashes, ids = (
        np.memmap(tmp_path / str(place), dtype, "w+", shape=items) for place, dtype in enumerate((np.uint64, np.int32))
    )
    monkeypatch.setattr(token_index, "_BLOCK_ITEMS", 1000)
    tracemalloc.start()
    token_index._fill_sorted(ends, text, hashes, ids)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (np.diff(hashes.astype(object)) > 0).all()
    # An integer for each item would be twice as much.
    assert peak < 4 * items


@pytest.mark.parametrize("content", [b"", b"PAR1"])
def test_a_large_file_that_is_damaged_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tokens_module, "_MOST_IN_MEMORY", 0)
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(UserError, match=r"tokens: damaged, or no Parquet file"):
        tokens_module.TokenFile(str(tmp_path / "tokens"), 1)


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokens_module, "_MOST_IN_MEMORY", 0)
    monkeypatch.setattr(tokens_module.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"TMPDIR: \S+ cannot hold a copy of \S+parquet \(No space left"):
        _index(str(tmp_path), ["a", "b"])


def test_a_file_that_does_not_fit_is_named(tmp_path):
    manifest = _write(str(tmp_path), ["a", "b"], items=3)
    with pytest.raises(UserError, match=r"tokens\.parquet: holds 2 tokens, the manifest says 3"):
        token_index.read_token_index(str(tmp_path), manifest, in_memory)


def _read(ranks, data: str, tokens: list[str]) -> tuple[dict, list[str], int]:
    opened, open_file = [], token_index.TokenFile

    def counted(*arguments):
        opened.append(arguments)
        return open_file(*arguments)

    token_index.TokenFile = counted
    manifest = _write(f"{data}/{ranks.rank}", tokens)
    index = token_index.read_token_index(f"{data}/{ranks.rank}", manifest, NodeArrays(ranks))
    return index.ids(["b", "none"]), index.tokens(np.array([3, 1])), len(opened)


@pytest.mark.dist
def test_one_rank_of_a_node_reads_the_file_for_all(tmp_path):
    results = run_ranks(2, _read, tmp_path, str(tmp_path / "data"), ["a", "b", "c"])
    assert results == [({"b": 2}, ["c", "a"], 1), ({"b": 2}, ["c", "a"], 0)]
