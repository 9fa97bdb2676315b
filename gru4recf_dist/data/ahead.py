"""Making the next item in a thread while the one before it is in use."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")

_END = object()


def one_ahead(items: Generator[T]) -> Generator[T]:
    """What ``items`` yields; each is asked for in a thread as soon as the one before it has been handed over.

    Never more than one is made ahead. An exception of ``items`` is raised here, in the place of the item that it
    prevented. When this generator is closed, it waits for the item in the making and closes ``items``: nothing runs on.
    """
    # A thread that is only ever given the next item cannot be left waiting for room, as one that fills a queue can.
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="one_ahead") as thread:
        pending = thread.submit(next, items, _END)
        while (item := pending.result()) is not _END:
            pending = thread.submit(next, items, _END)
            yield item
