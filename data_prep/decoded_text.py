"""Text of any encoding, its columns apart by any separator, as the UTF-8 with a one-byte separator that Arrow reads."""

from __future__ import annotations

import codecs
import io
from typing import IO

from gru4recf_dist.errors import UserError

# Made for this and hardly ever found in text (ASCII's "unit separator").
SEPARATOR = "\x1f"
CHUNK_BYTES = 1 << 20


def decoded(url: str, stream: IO[bytes], encoding: str, delimiter: str | None) -> IO[bytes]:
    """``stream`` in UTF-8, with ``SEPARATOR`` in place of ``delimiter`` (None: its separators stay).

    Raises (when read):
        UserError: the text is not in ``encoding``, or holds ``SEPARATOR`` itself.
    """
    return io.BufferedReader(_Decoded(url, stream, encoding, delimiter), CHUNK_BYTES)


class _Decoded(io.RawIOBase):
    def __init__(self, url: str, stream: IO[bytes], encoding: str, delimiter: str | None) -> None:
        self._url = url
        self._stream = stream
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._delimiter = delimiter
        self._rest = ""
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready and not self._ended:
            self._ready = memoryview(self._next_lines().encode())
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _next_lines(self) -> str:
        """The whole lines of the next chunk: a separator may lie across the end of a chunk, but not of a line."""
        content = self._stream.read(CHUNK_BYTES)
        self._ended = not content
        try:
            text = self._rest + self._decoder.decode(content, final=self._ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._url}: is not {self._encoding} text ({error.reason})") from error
        cut = len(text) if self._ended else text.rfind("\n") + 1
        lines, self._rest = text[:cut], text[cut:]
        if self._delimiter is None:
            return lines
        if SEPARATOR in lines:
            raise UserError(f"{self._url}: holds the character U+001F, which stands for '{self._delimiter}' inside")
        return lines.replace(self._delimiter, SEPARATOR)
