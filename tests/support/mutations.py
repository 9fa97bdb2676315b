"""Damaged content for tests with hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st


def edited(
    content: bytes, places: st.SearchStrategy[int], removed: st.SearchStrategy[int], longest: int, most: int
) -> st.SearchStrategy[bytes]:
    """``content`` with bytes changed, put in or cut out.

    Args:
        places: where an edit begins.
        removed: how many bytes it takes away.
        longest: the most bytes that it puts in.
        most: the most edits; there is at least one.
    """
    edit = st.tuples(places, removed, st.binary(max_size=longest))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for start, count, added in edits:
            result = result[:start] + added + result[start + count :]
        return result

    return st.lists(edit, min_size=1, max_size=most).map(apply)
