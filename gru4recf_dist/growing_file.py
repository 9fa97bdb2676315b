"""A file of a run that grows while the run goes on, on any fsspec URL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, first_line, redacted


class GrowingFile:
    """A new file that starts with ``content`` and grows by what is appended.

    On a local disk an append is there at once, whole or not at all. Object storage cannot append: there a thread writes
    the file again as a whole, at most once in ``rewrite_seconds``, while the run goes on. What storage does not take is
    kept, and tried again with the next append.

    Args:
        warn: is told once if something cannot be written.

    Raises:
        UserError: the file cannot be written at all.
    """

    rewrite_seconds = 10.0

    def __init__(self, url: str, content: bytes, warn: Callable[[str], None]) -> None:
        self.url, self.is_local, self._warn = url, storage.is_local(url), warn
        # A run that cannot write from its start on is not worth beginning.
        storage.write_bytes(url, content)
        # On a local disk what could not be written yet; on object storage all.
        self._content = bytearray() if self.is_local else bytearray(content)
        self._uploaded_bytes, self._upload_began = len(content), 0.0
        self._thread = None if self.is_local else ThreadPoolExecutor(1, thread_name_prefix="growing-file")
        self._upload: Future[None] | None = None
        self._warned = False

    def __len__(self) -> int:
        """Bytes that are kept in memory."""
        return len(self._content)

    def append(self, part: bytes) -> None:
        self._content += part
        if self.is_local:
            self._attempt(self._write_rest)
        elif time.monotonic() - self._upload_began > self.rewrite_seconds and self._upload_is_over():
            self._upload_began = time.monotonic()
            self._upload = self._thread.submit(self._write_all, bytes(self._content))

    def flush(self) -> bool:
        """Write everything now; whether storage has it."""
        if self.is_local:
            return self._attempt(self._write_rest)
        if self._upload is not None:
            self._attempt(self._upload.result)
            self._upload = None
        if self._uploaded_bytes == len(self._content):
            return True
        return self._attempt(lambda: self._write_all(bytes(self._content)))

    def close(self) -> None:
        """Flush; nothing can be appended any more."""
        self.flush()
        if self._thread is not None:
            self._thread.shutdown()

    def _upload_is_over(self) -> bool:
        if self._upload is not None and self._upload.done():
            self._attempt(self._upload.result)
            self._upload = None
        return self._upload is None

    def _write_all(self, content: bytes) -> None:
        storage.write_bytes(self.url, content)
        self._uploaded_bytes = len(content)

    def _write_rest(self) -> None:
        if not self._content:
            return
        with open(storage.local_path(self.url), "ab", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            left = memoryview(bytes(self._content))
            try:
                # A disk that gets full takes a part, and says so by the count.
                while left:
                    left = left[stream.write(left) :]
            except OSError:
                if len(left) < len(self._content):
                    stream.truncate(size)
                raise
        self._content.clear()

    def _attempt(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except (OSError, UserError) as error:
            if not self._warned:
                reason = redacted(getattr(error, "strerror", None) or first_line(error))
                self._warn(f"warning: {self.url} cannot be written for now ({reason})")
            self._warned = True
            return False
        return True
