"""Reading shards with WebDataset's pipeline, from any fsspec URL.

WebDataset opens `s3://` and the like only through `pipe:` commands, decodes pickles by default, and unpacks what is
compressed or sparse, however large it becomes. All that is left out: files are opened by fsspec, a tar is read header
by header, members are parsed as plain arrays, and what was read is checked against the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO

import webdataset as wds
from webdataset.tariterators import group_by_keys

from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.data.blocks import Block, check_member, decode_block, lost_sessions
from gru4recf_dist.data.cache import GIB, FileCache
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.ranges import DamagedFile, RangedReader, in_background
from gru4recf_dist.data.shard_format import ShardInfo, file_url
from gru4recf_dist.errors import UserError, first_line, redacted

_log = logging.getLogger(__name__)

READ_BYTES = 1 << 20


class Shard:
    """One shard to be read; on remote storage its first bytes are under way when this returns.

    Args:
        data: the data set's folder or URL.
        items: N, the largest item id there may be.
        event_features: of the data set.
    """

    def __init__(self, data: str, info: ShardInfo, items: int, event_features: Sequence[EventFeature] = ()) -> None:
        self._event_features = event_features
        self.url, self.info, self._items = file_url(data, info.url), info, items
        self._reader: RangedReader | None = None
        self._cached: Future[Path | None] | None = None
        if not filesystems.is_remote(self.url):
            return
        settings = filesystems.settings()
        if settings.cache_folder is None:
            self._reader = RangedReader(self.url, info.bytes)
            return
        cache = FileCache(settings.cache_folder, int(settings.cache_gib * GIB))
        self._cached = in_background(
            lambda: cache.path(info.sha256, info.bytes, lambda: RangedReader(self.url, info.bytes))
        )

    def blocks(self, on_bad_shard: str) -> Iterator[Block]:
        """Its blocks, in order.

        Args:
            on_bad_shard: what to do if the file is missing, damaged, truncated, holds anything but plain arrays, or
                differs from the manifest. ``fail``: raise; the last block is handed over only when all of the shard
                was found good. ``skip``: nothing is handed over before that, so that a whole shard is held in memory,
                and in place of a bad one come as many `lost_sessions` as the manifest says it has.

        Raises:
            DamagedFile: with ``fail``; the line names the shard and the reason.
            UserError: storage went on failing.
        """
        if on_bad_shard == "fail":
            yield from self._checked_blocks()
            return
        try:
            blocks = list(self._checked_blocks())
        except DamagedFile as error:
            lost = self.info.sessions
            _log.warning("skipped a bad shard, %d sessions are lost: %s", lost, redacted(str(error)))
            blocks = [lost_sessions(lost)] if lost else []
        yield from blocks

    def _checked_blocks(self) -> Iterator[Block]:
        pipeline = wds.DataPipeline(
            lambda: iter([{"url": self.url}]),
            self._open,
            self._members,
            group_by_keys,
            wds.map(lambda sample: decode_block(sample, self.url, self._items, self._event_features)),
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
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError) as error:
            raise DamagedFile(f"{self.url}: cannot be read ({type(error).__name__}: {first_line(error)})") from error
        if (sessions, events) != (self.info.sessions, self.info.events):
            raise DamagedFile(
                f"{self.url}: holds {sessions} sessions and {events} events, "
                f"the manifest says {self.info.sessions} and {self.info.events}"
            )
        if last is not None:
            yield last

    # -- WebDataset stages -------------------------------------------------------------------------------------------

    def _open(self, samples: Iterable[dict]) -> Iterator[dict]:
        """In place of WebDataset's `url_opener`: adds an open ``stream``, verifies it when tar is through."""
        for sample in samples:
            with self._opened() as raw:
                stream = _CheckedStream(raw, self.url, self.info)
                yield {"url": sample["url"], "stream": stream}
                stream.verify()

    def _members(self, samples: Iterable[dict]) -> Iterator[dict]:
        """In place of WebDataset's `tar_file_expander`: name and content of every member, which must be a known one.

        A size is held against the file's before anything is read, and no header but a plain file's is followed.
        """
        for sample in samples:
            stream = sample["stream"]
            # The tar ends with blocks of zeros.
            while any(header := stream.read(tarfile.BLOCKSIZE)):
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise DamagedFile(f"{self.url}: member {member.name!r} is not a plain file")
                check_member(member.name, self.url, self._event_features)
                if not 0 <= member.size <= stream.left:
                    raise DamagedFile(f"{self.url}: member {member.name!r} is larger than the shard")
                content = stream.read(member.size)
                stream.read(-member.size % tarfile.BLOCKSIZE)
                yield {"fname": member.name, "data": content, "__url__": sample["url"]}
            # WebDataset's mark of a shard's end.
            yield {}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with self._open_cached() or self._open_source() as stream:
            yield stream

    def _open_cached(self) -> IO[bytes] | None:
        path = self._cached.result() if self._cached is not None else None
        if path is not None:
            # Another process may have made room in the cache just now.
            with contextlib.suppress(FileNotFoundError):
                return open(path, "rb")
        return None

    def _open_source(self) -> contextlib.AbstractContextManager[IO[bytes]]:
        if not filesystems.is_remote(self.url):
            return storage.open_read(self.url)
        return io.BufferedReader(self._reader or RangedReader(self.url, self.info.bytes), READ_BYTES)


class _CheckedStream:
    """A shard as a file object that knows the checksum of what went through it, and how much may."""

    def __init__(self, stream: IO[bytes], url: str, info: ShardInfo) -> None:
        self._stream, self._url, self._info = stream, url, info
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self._info.bytes - self._bytes

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer at the end; piece by piece, since Python reserves memory for all of a read."""
        pieces = []
        while size and (piece := self._stream.read(min(size, READ_BYTES))):
            self._sha256.update(piece)
            self._bytes += len(piece)
            size -= len(piece)
            pieces.append(piece)
        if self.left < 0:
            raise DamagedFile(f"{self._url}: longer than the {self._info.bytes} bytes it should have")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def verify(self) -> None:
        """Read what tar left unread and compare the whole with the manifest."""
        while self.read(READ_BYTES):
            pass
        if self.left:
            raise DamagedFile(f"{self._url}: truncated, {self._bytes} bytes of {self._info.bytes}")
        if self._sha256.hexdigest() != self._info.sha256:
            raise DamagedFile(f"{self._url}: its sha256 is not the manifest's, the file is damaged")


def read_blocks(
    data: str, info: ShardInfo, items: int, on_bad_shard: str = "fail", event_features: Sequence[EventFeature] = ()
) -> Iterator[Block]:
    """The blocks of one shard, in order; arguments and errors as `Shard` and `Shard.blocks`."""
    return Shard(data, info, items, event_features).blocks(on_bad_shard)
