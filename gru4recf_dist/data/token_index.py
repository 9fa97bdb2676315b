"""The raw tokens of a catalog as a few flat arrays: an item's token by its id, and its id by its token.

As Python objects, tokens would take some 200 bytes an item on every rank. Here they take 20 bytes and their text, in
arrays that a caller may have mapped from files that several ranks share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import pyarrow as pa

from gru4recf_dist.data.counting_sort import take_places
from gru4recf_dist.data.shard_format import Manifest, file_url
from gru4recf_dist.data.tokens import TokenFile

# Any odd number would do; this is 2**64 over the golden ratio.
_RADIX = np.uint64(0x9E3779B97F4A7C15)
# Items that are hashed, and sorted, at a time.
_BLOCK_ITEMS = 1 << 14


class TokenIndex:
    """Tokens and ids of N items, from the arrays that `read_token_index` makes.

    Args:
        ends: int64 [N+2], where the text of each id's token begins and ends; that of the padding is empty.
        text: uint8 [.], UTF-8.
        hashes: uint64 [N], ascending.
        ids: int32 [N], the item of each hash.
    """

    def __init__(self, ends: np.ndarray, text: np.ndarray, hashes: np.ndarray, ids: np.ndarray) -> None:
        # Both share the arrays' memory.
        self._tokens = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(text))
        self._hashes, self._ids = hashes, ids

    def tokens(self, ids: np.ndarray) -> list[str]:
        """The token of each of ``ids`` [n]; the padding's is empty."""
        return self._tokens.take(pa.array(ids)).to_pylist()

    def ids(self, tokens: Collection[str]) -> dict[str, int]:
        """The ids of those of ``tokens`` that are items."""
        asked = list(dict.fromkeys(tokens))
        # JSON can hold half of a surrogate pair, which is no text: it equals no token.
        encoded = [token.encode("utf-8", "surrogatepass") for token in asked]
        ends = np.concatenate([[0], np.cumsum([len(each) for each in encoded], dtype=np.int64)])
        wanted = _hashes(ends, np.frombuffer(b"".join(encoded), np.uint8))
        places = np.searchsorted(self._hashes, wanted)
        found: dict[str, int] = {}
        open_ = np.arange(len(asked))
        # Tokens of the same hash lie one after the other, and nearly always there is just one.
        while len(open_):
            open_ = open_[places[open_] < len(self._hashes)]
            open_ = open_[self._hashes[places[open_]] == wanted[open_]]
            ids = self._ids[places[open_]]
            is_it = np.array([asked[i] == text for i, text in zip(open_, self.tokens(ids), strict=True)], bool)
            found |= {asked[i]: int(number) for i, number in zip(open_[is_it], ids[is_it], strict=True)}
            open_ = open_[~is_it]
            places[open_] += 1
        return found


def read_token_index(data: str, manifest: Manifest, allocate: Callable[..., list[np.ndarray]]) -> TokenIndex:
    """The tokens of all items of a data set.

    Args:
        allocate: a `parallel.node_arrays.Allocate`; only who fills an array of its reads the file.

    Raises:
        UserError: the file is missing or does not fit the manifest.
    """

    def measure(size: np.ndarray) -> None:
        nonlocal file
        file = TokenFile(file_url(data, manifest.tokens), manifest.items)
        size[0] = sum(len(_text(batch)) for batch in file.batches())

    def fill(ends: np.ndarray, text: np.ndarray, hashes: np.ndarray, ids: np.ndarray) -> None:
        place, ends[:2] = 0, 0
        for batch in file.batches():
            content = _text(batch)
            text[ends[place + 1] : ends[place + 1] + len(content)] = content
            ends[place + 2 : place + 2 + len(batch)] = ends[place + 1] + _ends(batch)[1:]
            place += len(batch)
        _fill_sorted(ends, text, hashes, ids)

    file = None
    # How much text there is every rank must know, to map it.
    (size,) = allocate([(1, np.int64)], measure)
    items = manifest.items
    sizes = [(items + 2, np.int64), (max(int(size[0]), 1), np.uint8), (items, np.uint64), (items, np.int32)]
    return TokenIndex(*allocate(sizes, fill))


def _fill_sorted(ends: np.ndarray, text: np.ndarray, hashes: np.ndarray, ids: np.ndarray) -> None:
    """Hashes of all items, ascending, and the item of each; of equal hashes the first item comes first.

    By a counting sort on the first bits of the hashes, and then by their rest: of all items at once there is nothing
    but these arrays.
    """
    bits = max(1, (len(ids) // _BLOCK_ITEMS).bit_length())

    def blocks() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each block: the place of its first item, hashes, and their first bits."""
        for start in range(0, len(ids), _BLOCK_ITEMS):
            own = ends[start + 1 : start + 2 + _BLOCK_ITEMS]
            found = _hashes(own - own[0], text[own[0] : own[-1]])
            yield start, found, (found >> np.uint64(64 - bits)).astype(np.int64)

    numbers = sum(np.bincount(part, minlength=1 << bits) for _, _, part in blocks())
    stops = np.cumsum(numbers)
    next_places = stops - numbers
    for start, found, part in blocks():
        order = np.argsort(part, kind="stable")
        places = take_places(part[order], next_places)
        hashes[places], ids[places] = found[order], order + (start + 1)
    for start, stop in zip(stops - numbers, stops, strict=True):
        order = np.argsort(hashes[start:stop], kind="stable")
        hashes[start:stop], ids[start:stop] = hashes[start:stop][order], ids[start:stop][order]


def _ends(tokens: pa.LargeStringArray) -> np.ndarray:
    """Where each token begins and ends in `_text`; int64 [n+1]."""
    ends = np.frombuffer(tokens.buffers()[1], np.int64)[tokens.offset : tokens.offset + len(tokens) + 1]
    return ends - ends[0]


def _text(tokens: pa.LargeStringArray) -> np.ndarray:
    """The tokens' UTF-8, uint8."""
    ends = np.frombuffer(tokens.buffers()[1], np.int64)[tokens.offset : tokens.offset + len(tokens) + 1]
    return np.frombuffer(tokens.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]


def _hashes(ends: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Of each token the sum of byte_i * radix**i modulo 2**64; uint64 [n]. Who finds one still compares the token."""
    lengths = np.diff(ends)
    powers = np.full(int(lengths.max(initial=0)), _RADIX)
    powers[:1] = 1
    places = np.arange(len(text)) - np.repeat(ends[:-1], lengths)
    running = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(text * np.multiply.accumulate(powers)[places], out=running[1:])
    # Differences of running sums are right where those have overflowed.
    return running[ends[1:]] - running[ends[:-1]]
