"""One request for a range of a remote file, of which nothing is lost that came before its connection broke."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import fsspec
from fsspec.asyn import sync

from gru4recf_dist.data import filesystems
from gru4recf_dist.data.attempts import call

# What is taken from a connection at a time, and so the most that one that breaks may have delivered in vain.
_CHUNK_BYTES = 64 << 10


def receive(fs: fsspec.AbstractFileSystem, path: str, start: int, stop: int, into: bytearray) -> None:
    """Append the bytes ``start`` to ``stop`` of ``path`` to ``into``, those that came before an error too.

    fsspec hands out whole answers only. S3's and HTTP's clients are asked themselves, so that an answer can be taken as
    it comes; of other storage a broken answer is lost. Nothing is read any more once ``into`` has become longer by more
    than was asked for.

    Raises:
        TimeoutError: the answer did not end in time.
        Exception: as the file system's ``cat_file``.
    """
    chunks = _ANSWERS.get(_backend(fs))
    if chunks is None:
        into += call(fs, "cat_file", path, start=start, end=stop)
        return

    async def take() -> None:
        most = len(into) + stop - start
        async for chunk in chunks(fs, path, {"Range": f"bytes={start}-{stop - 1}"}):
            into.extend(chunk)
            if len(into) > most:
                return

    sync(fs.loop, take, timeout=filesystems.settings().timeout_seconds)


def _backend(fs: fsspec.AbstractFileSystem) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]


async def _s3_answer(fs, path: str, headers: dict[str, str]) -> AsyncIterator[bytes]:
    bucket, key, version = fs.split_path(path)
    answer = await fs._call_s3(
        "get_object", Bucket=bucket, Key=key, **({"VersionId": version} if version else {}), **headers
    )
    body = answer["Body"]
    try:
        while chunk := await body.read(_CHUNK_BYTES):
            yield chunk
    finally:
        # Of an answer that was not read to its end the connection cannot be used again.
        body.close()


async def _http_answer(fs, path: str, headers: dict[str, str]) -> AsyncIterator[bytes]:
    options = {**fs.kwargs, "headers": {**fs.kwargs.get("headers", {}), **headers}}
    session = await fs.set_session()
    async with session.get(fs.encode_url(path), **options) as answer:
        fs._raise_not_found_for_status(answer, path)
        async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
            yield chunk


_ANSWERS: dict[str, Callable[..., AsyncIterator[bytes]]] = {
    "s3": _s3_answer,
    "http": _http_answer,
    "https": _http_answer,
}
