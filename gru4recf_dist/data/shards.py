"""Reading shards through WebDataset's own stages, from any fsspec URL.

WebDataset opens `s3://` and the like only through `pipe:` commands and decodes pickles by default. Both are left out:
files are opened by fsspec, members are parsed as plain arrays, and what was read is checked against the manifest.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO

import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Block, ShardInfo, decode_block
from gru4recf_dist.errors import UserError

READ_BYTES = 1 << 20


class _CheckedStream:
    """A shard as a file object that knows the checksum of what went through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self._sha256.update(content)
        return content

    def drain(self) -> str:
        """Read what tar left unread and return the checksum of the whole."""
        while self.read(READ_BYTES):
            pass
        return self._sha256.hexdigest()


def _open_shards(samples: Iterable[dict]) -> Iterator[dict]:
    """WebDataset stage in place of its `url_opener`: adds an open ``stream``, verifies it when tar is through."""
    for sample in samples:
        info: ShardInfo = sample["info"]
        with storage.open_read(sample["url"]) as raw:
            stream = _CheckedStream(raw)
            yield {"url": sample["url"], "stream": stream}
            if stream.drain() != info.sha256:
                raise UserError(f"{sample['url']}: its sha256 is not the manifest's, the file is damaged")


def _reason(error: Exception) -> str:
    """What happened, in one line, without the stream object that webdataset writes behind it."""
    return storage.first_line(error).partition(" @ <")[0]


def read_blocks(data: str, info: ShardInfo) -> Iterator[Block]:
    """The blocks of one shard, in order.

    Raises:
        UserError: the file is missing, damaged, truncated, holds anything but plain arrays, or differs from the
            manifest. It names the shard.
    """
    url = storage.join(data, info.url)
    pipeline = wds.DataPipeline(
        lambda: iter([{"url": url, "info": info}]),
        _open_shards,
        tar_file_expander,
        group_by_keys,
        wds.map(lambda sample: decode_block(sample, url)),
    )
    sessions = events = 0
    # One block behind: the last is handed over only when the whole shard has been read and verified.
    last: Block | None = None
    try:
        for block in pipeline:
            sessions += len(block.lengths)
            events += len(block.items)
            if last is not None:
                yield last
            last = block
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{url}: cannot be read ({type(error).__name__}: {_reason(error)})") from error
    if (sessions, events) != (info.sessions, info.events):
        raise UserError(
            f"{url}: holds {sessions} sessions and {events} events, the manifest says {info.sessions} and {info.events}"
        )
    if last is not None:
        yield last
