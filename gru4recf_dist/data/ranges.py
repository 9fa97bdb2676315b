"""A file on object storage as a stream: fetched in ranges, the next ones while the current one is used.

A connection that breaks costs nothing that had come by then: the rest is asked for from that byte on.
"""

from __future__ import annotations

import io
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from gru4recf_dist.data import filesystems
from gru4recf_dist.data.attempts import attempted, call, is_behind_the_end
from gru4recf_dist.data.range_requests import receive
from gru4recf_dist.errors import UserError

MIB = 1 << 20
THREADS = 16


class DamagedFile(UserError):
    """A file is not what it must be. Its text is one line that names it, and the reason."""


class RangedReader(io.RawIOBase):
    """A file that is read mostly forwards.

    Args:
        url: on any file system; worth its trouble on remote ones.
        size_bytes: the size that the file must have; None: whatever it has. If it is given, nothing is asked of
            storage but the ranges themselves, the first of which are on their way when this returns.

    Raises:
        FileNotFoundError, PermissionError: when it is made, without ``size_bytes``.
        DamagedFile: while reading: there is no such file, or it is shorter or longer than ``size_bytes``.
        UserError: it may not be read, or storage went on failing.
    """

    def __init__(self, url: str, size_bytes: int | None = None) -> None:
        settings = filesystems.settings()
        self._url = url
        self._fs, self._path = filesystems.filesystem(url)
        self._size_is_given = size_bytes is not None
        if size_bytes is None:
            size_bytes = attempted(url, self._ask_size)
        self._size = size_bytes
        self._range_bytes = int(settings.range_mib * MIB)
        self._ahead_ranges = settings.ahead_ranges
        self._position = 0
        self._current = -1
        self._content = b""
        self._ahead: dict[int, Future[bytes]] = {}
        if self._size_is_given:
            self._fetch_ahead(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        if self.closed:
            raise ValueError(f"{self._url}: reading from a closed file")
        if self._position >= self._size:
            return 0
        number, offset = divmod(self._position, self._range_bytes)
        if number != self._current:
            self._enter(number)
        part = memoryview(self._content)[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            for number in list(self._ahead):
                self._drop(number)
            self._content = b""
        super().close()

    # -- ranges ------------------------------------------------------------------------------------------------------

    def _enter(self, number: int) -> None:
        """Make range ``number`` the current one."""
        forwards = number == self._current + 1
        for other in list(self._ahead):
            if other < number or other > number + self._ahead_ranges:
                self._drop(other)
        future = self._ahead.pop(number, None)
        if future is None:
            self._content = self._fetch(number)
        else:
            try:
                # Not waited for if it waits for a thread itself: all of them may be filling the cache, from ranges.
                self._content = self._fetch(number) if future.cancel() else future.result()
            finally:
                _held.release(self._length(number))
        self._current = number
        # A reader that jumps about, as of Parquet, gets what it asks for only.
        if forwards:
            self._fetch_ahead(number + 1)

    def _fetch_ahead(self, first: int) -> None:
        for number in range(first, first + self._ahead_ranges):
            if number * self._range_bytes >= self._size or number in self._ahead:
                continue
            if not _held.acquire(self._length(number)):
                return
            self._ahead[number] = in_background(lambda number=number: self._fetch(number))

    def _drop(self, number: int) -> None:
        self._ahead.pop(number).cancel()
        _held.release(self._length(number))

    def _length(self, number: int) -> int:
        return min(self._range_bytes, self._size - number * self._range_bytes)

    def _fetch(self, number: int) -> bytes:
        received = bytearray()
        try:
            attempted(self._url, lambda: self._request(number, received))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise DamagedFile(f"{self._url}: no such file") from error
        except PermissionError as error:
            raise UserError(f"{self._url}: permission denied") from error
        return bytes(received)

    def _ask_size(self) -> int:
        size = call(self._fs, "info", self._path)["size"]
        if size is None:
            raise UserError(f"{self._url}: its server does not tell its size")
        return int(size)

    def _request(self, number: int, received: bytearray) -> None:
        """Ask for what of range ``number`` is not in ``received`` yet, and add it."""
        start = number * self._range_bytes
        stop = start + self._length(number)
        # One byte more than there should be tells a file that is too long.
        probe = 1 if self._size_is_given and stop == self._size else 0
        if len(received) == stop + probe - start:
            # The connection broke after the last byte.
            return
        try:
            receive(self._fs, self._path, start + len(received), stop + probe, received)
        except Exception as error:
            if not is_behind_the_end(error):
                raise
        missing = stop - start - len(received)
        if missing < -probe:
            raise UserError(f"{self._url}: its server sends whole files where a range is asked for")
        if missing < 0:
            raise DamagedFile(f"{self._url}: longer than the {self._size} bytes it should have")
        if missing > 0:
            # Either the file ends before its time, or the connection did.
            size = self._ask_size()
            if size < stop:
                raise DamagedFile(f"{self._url}: truncated, {size} bytes of {self._size}")
            raise ConnectionError(f"{missing} of {stop - start} bytes did not come")


class _Held:
    """Counts the bytes that this process holds, or waits for, ahead of their use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def acquire(self, count: int) -> bool:
        """Take ``count`` bytes of the bound, if they are free."""
        with self._lock:
            if self._bytes + count > filesystems.settings().ahead_mib * MIB:
                return False
            self._bytes += count
            return True

    def release(self, count: int) -> None:
        with self._lock:
            self._bytes -= count


def _start_anew() -> None:
    """A process that was forked has none of its parent's threads, and what they had to do is not for it."""
    global _held, _work, _threads, _threads_lock
    _held, _threads, _threads_lock = _Held(), [], threading.Lock()
    _work = queue.SimpleQueue()


_held: _Held
_work: queue.SimpleQueue[tuple[Future, Callable]]
_threads: list[threading.Thread]
_threads_lock: threading.Lock
_start_anew()
os.register_at_fork(after_in_child=_start_anew)


def in_background(function: Callable[[], object]) -> Future:
    """Run ``function`` in one of a few threads.

    They are daemons: a program that ends does not wait for a stalled request, as it would for `ThreadPoolExecutor`.
    """
    future: Future = Future()
    _work.put((future, function))
    with _threads_lock:
        if len(_threads) < THREADS:
            thread = threading.Thread(target=_serve, args=(_work,), daemon=True, name="storage")
            thread.start()
            _threads.append(thread)
    return future


def _serve(work: queue.SimpleQueue[tuple[Future, Callable]]) -> None:
    while True:
        future, function = work.get()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        # Not kept alive until the next piece of work comes.
        del future, function
