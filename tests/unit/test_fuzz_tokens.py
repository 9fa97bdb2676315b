"""Whatever a file of tokens holds: the tokens or a `UserError`, in bounded memory, for all who read it."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.known import Known
from gru4recf_dist.data import token_index, tokens
from gru4recf_dist.data.shard_format import Manifest, SplitInfo
from gru4recf_dist.parallel.node_arrays import in_memory
from tests.unit.test_fuzz_reader import DATA, MEMORY_BYTES, answer, edits, fuzz, put

TOKENS = [f"item-{number}" for number in range(40)]
EMPTY = SplitInfo(sessions=0, events=0, targets=0, shards=[])


def parquet(columns: dict, **layout) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **layout)
    return stream.getvalue()


WHOLE = parquet({"id": pa.array(range(1, 41), pa.int32()), "token": TOKENS})


@pytest.fixture(autouse=True)
def measured_memory():
    """Arrow's memory is not Python's, and is held against the same bound."""
    own = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(own)
    yield
    pa.set_memory_pool(before)
    assert own.max_memory() < MEMORY_BYTES


def _read(content: bytes, expected: int = 40) -> list[list[str] | None]:
    """What each of the readers gives."""
    url = put("tokens.parquet", content)
    splits = {"train": EMPTY, "valid": EMPTY, "test": EMPTY}
    names = {"tokens": "tokens.parquet", "protocol": "every_position", "splits": splits}
    manifest = Manifest(name="x", seed=0, items=expected, streams=1, **names)

    def indexed() -> list[str]:
        index = token_index.read_token_index(DATA, manifest, in_memory)
        return index.tokens(np.arange(1, expected + 1))

    readers = (
        lambda: tokens.read_tokens(url, expected),
        lambda: tokens.read_item_tokens(DATA, manifest)[1:],
        lambda: Known(DATA, manifest).read_tokens("tokens.parquet", expected).to_pylist(),
        indexed,
    )
    return [answer("tokens.parquet", reader) for reader in readers]


def _agree(content: bytes, expected: int = 40) -> list[str] | None:
    first, *others = _read(content, expected)
    assert all(other == first for other in others)
    if first is not None:
        assert len(first) == expected and all(type(token) is str for token in first)
    return first


def test_a_whole_file_is_read():
    assert _agree(WHOLE) == TOKENS
    assert _agree(parquet({"token": pa.array(TOKENS, pa.large_string())}, compression="none")) == TOKENS


@fuzz(500)
@given(draw=st.data())
def test_mutated_file(draw):
    _agree(draw.draw(edits(WHOLE, st.integers(0, len(WHOLE) - 1))))


@fuzz(300)
@given(draw=st.data())
def test_mutated_footer(draw):
    footer = int.from_bytes(WHOLE[-8:-4], "little")
    _agree(draw.draw(edits(WHOLE, st.integers(len(WHOLE) - 8 - footer, len(WHOLE) - 1))))


@pytest.mark.parametrize("length", [0, 1, 4, 8, 12, 100, len(WHOLE) - 1])
def test_truncated_file(length):
    assert _agree(WHOLE[:length]) is None


def _bad_text() -> bytes:
    """Bytes that say of themselves that they are text."""
    whole = parquet({"token": TOKENS}, compression="none", use_dictionary=False, write_statistics=False)
    assert whole.count(b"item-7") == 1
    return whole.replace(b"item-7", b"item\xff7")


SAME = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, np.int32)), pa.array(["x" * 20_000]))
LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (parquet({"text": TOKENS}), 40),
        (parquet({"token": list(range(40))}), 40),
        (parquet({"token": [token.encode() for token in TOKENS]}), 40),
        (parquet({"token": [[token] for token in TOKENS]}), 40),
        (parquet({"token": [*TOKENS[:-1], None]}), 40),
        (parquet({"token": TOKENS[:-1]}), 40),
        (_bad_text(), 40),
        # 4 GB of text, two million rows of none, and what could become as much.
        (parquet({"token": SAME}), 200_000),
        (parquet({"token": pa.repeat("", 2_000_000)}), 2_000_000),
        (parquet({"token": [LONG] * 40}, compression="zstd", use_dictionary=False), 40),
        (
            parquet(
                {"token": [f"{LONG}{number}" for number in range(40)]},
                use_dictionary=False,
                column_encoding={"token": "DELTA_BYTE_ARRAY"},
            ),
            40,
        ),
    ],
    ids=["name", "number", "bytes", "list", "null", "few", "utf-8", "same", "empty", "zstd", "shared beginnings"],
)
def test_what_is_no_file_of_tokens_is_refused(content, expected):
    assert _agree(content, expected) is None
