"""One item is made ahead in a thread: its order, its bound, its end."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.ahead import one_ahead
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError
from tests.support.synthetic import random_sessions, write_dataset


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("one_ahead")]


class Source:
    """Yields 0, 1, ..; knows what was asked for, and whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.closed = False

    def __call__(self):
        try:
            for number in itertools.count():
                self.threads.add(threading.current_thread().name)
                if number == self.fails_at:
                    raise UserError(f"item {number} is damaged")
                if number == self.count:
                    return
                self.made.append(number)
                yield number
        finally:
            self.closed = True


def _settled(source: Source, made: int) -> bool:
    """Whether ``made`` items are made soon, and no more a little later."""
    deadline = time.monotonic() + 5
    while len(source.made) < made and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    return len(source.made) == made


def test_all_items_come_in_order_from_another_thread_which_then_ends():
    source = Source(20)
    assert list(one_ahead(source())) == list(range(20))
    assert source.closed and not _threads()
    assert threading.current_thread().name not in source.threads
    assert list(one_ahead(Source(0)())) == []


def test_exactly_one_item_is_made_ahead_and_only_after_the_first_was_asked_for():
    source = Source(10)
    items = one_ahead(source())
    assert _settled(source, 0)
    for number in range(3):
        assert next(items) == number
        assert _settled(source, number + 2)
    items.close()
    assert source.closed and len(source.made) == 4 and not _threads()


def test_an_exception_comes_where_its_item_would_have_and_ends_everything():
    source = Source(10, fails_at=3)
    items, taken = one_ahead(source()), []
    with pytest.raises(UserError, match="item 3 is damaged"):
        for item in items:
            taken.append(item)
    assert taken == [0, 1, 2] and source.closed and not _threads()
    # What was not asked for is not raised either.
    items = one_ahead(Source(10, fails_at=1)())
    assert next(items) == 0
    items.close()
    assert not _threads()


def test_closing_waits_for_the_item_in_the_making():
    release, started = threading.Event(), threading.Event()
    log = []

    def slow():
        yield 0
        started.set()
        release.wait(5)
        log.append("made")
        yield 1

    items = one_ahead(slow())
    next(items)
    started.wait(5)
    threading.Timer(0.05, release.set).start()
    items.close()
    assert log == ["made"] and not _threads()


@pytest.fixture
def data(tmp_path):
    manifest = write_dataset(str(tmp_path), random_sessions(0, 41, items=30))
    return str(tmp_path), manifest


def _loader(data, **config) -> SessionLoader:
    folder, manifest = data
    return SessionLoader(folder, manifest, LoaderConfig(shuffle_window=8, **config), 8, 3, rank=0, world=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prepared_epoch_is_the_plain_one_and_the_position_that_of_what_was_handed_over(data, workers):
    plain, ahead = _loader(data), _loader(data, workers=workers)
    for _ in range(2):
        blocks = iter(plain)
        for made in ahead.prepared(lambda block: block.sessions.tolist()):
            assert made == next(blocks).sessions.tolist()
            assert ahead.state_dict() == plain.state_dict()
        assert next(blocks, None) is None
    assert not _threads()


def test_a_loader_that_resumes_from_the_position_goes_on_with_the_next_batch(data):
    expected = [block.sessions.tolist() for block in _loader(data)]
    stopped, resumed = _loader(data), _loader(data)
    batches = stopped.prepared(lambda block: block.sessions.tolist())
    first = [next(batches) for _ in range(2)]
    time.sleep(0.05)  # the third is made by now
    resumed.load_state_dict(stopped.state_dict())
    batches.close()
    assert first + [block.sessions.tolist() for block in resumed] == expected


def test_a_damaged_shard_and_a_failing_preparation_raise_as_in_the_loop_itself(data):
    folder, manifest = data
    with pytest.raises(ZeroDivisionError):
        list(_loader(data).prepared(lambda block: 1 / 0))
    url = storage.join(folder, manifest.splits["train"].shards[0].url)
    storage.write_bytes(url, storage.read_bytes(url)[:-700])
    messages = []
    for read in (lambda loader: list(loader), lambda loader: list(loader.prepared(lambda block: block))):
        with pytest.raises(UserError) as raised:
            read(_loader(data))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert not _threads()
