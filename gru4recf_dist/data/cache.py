"""A local folder of whole, verified files from object storage, shared by the processes of a machine.

A file is named by its sha256, so it cannot be stale, and whoever wants it can tell that it is whole. It gets its name
by a rename when it is complete; until then it is `NAME.part`, which only the holder of `NAME.lock` writes. The kernel
lets go of the lock of a process that is killed, and the next one starts its part anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from gru4recf_dist.errors import UserError

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
GIB = 1 << 30
Source = contextlib.AbstractContextManager[IO[bytes]]
_NAME = re.compile(r"[0-9a-f]{64}")


class FileCache:
    """At most ``bound_bytes`` of files in ``folder``; the longest unused make room for new ones.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, bound_bytes: int) -> None:
        self._folder, self._bound = Path(folder), bound_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"storage.cache_folder: {folder}: {error.strerror}") from error

    def path(self, sha256: str, size_bytes: int, open_source: Callable[[], Source]) -> Path | None:
        """The file with this checksum, fetched from its source unless it is there.

        It may be removed at any time to make room: open it at once and, if it is gone, ask again.

        Returns:
            None if the file has no room in the cache, the folder cannot take it, or what came from the source is not
            that file: then it is for the caller to read the source and to say what is wrong with it.

        Raises:
            UserError: storage went on failing.
        """
        if size_bytes > self._bound or not _NAME.fullmatch(sha256):
            return None
        path = self._folder / sha256
        try:
            with FileLock(f"{path}.lock"):
                if _checksum_of(path) == sha256:
                    # Its time of use, whatever the mount options say.
                    os.utime(path)
                    return path
                return path if self._fetch(path, size_bytes, open_source) else None
        except (OSError, NotImplementedError) as error:
            # NotImplementedError: a file system without locks. A cache that is full or broken costs time, not the run.
            _log.warning("storage.cache_folder: %s is not cached (%s)", path, getattr(error, "strerror", None) or error)
            return None

    def _fetch(self, path: Path, size_bytes: int, open_source: Callable[[], Source]) -> bool:
        part = path.with_name(f"{path.name}.part")
        digest = hashlib.sha256()
        try:
            # One process makes room at a time, or each would count on the other's.
            with FileLock(self._folder / "cache.lock"):
                if not self._make_room(size_bytes, besides=part):
                    return False
                # At its full length from the beginning: so the others know what it is going to take.
                with open(part, "wb") as target:
                    target.truncate(size_bytes)
            with open_source() as stream, open(part, "r+b") as target:
                while content := stream.read(CHUNK_BYTES):
                    digest.update(content)
                    target.write(content)
                    # A source without end must not fill the disk.
                    if target.tell() > size_bytes:
                        return False
                is_whole = target.tell() == size_bytes and digest.hexdigest() == path.name
            if is_whole:
                os.replace(part, path)
            return is_whole
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, count: int, besides: Path) -> bool:
        """Remove files until ``count`` bytes more are within the bound; False if what is being fetched takes it up."""
        held, whole = count, []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _NAME.fullmatch(path.name):
                    whole.append((path.stat().st_mtime_ns, path.stat().st_size, path))
                    held += whole[-1][1]
                elif path.suffix == ".part" and path != besides and not self._is_abandoned(path):
                    held += path.stat().st_size
        if held - sum(size for _, size, _ in whole) > self._bound:
            return False
        for _, size, path in sorted(whole):
            if held <= self._bound:
                break
            # Whoever is reading it has it open, and reads on.
            path.unlink(missing_ok=True)
            held -= size
        return True

    def _is_abandoned(self, part: Path) -> bool:
        """Remove the part of a process that was killed; False if its writer lives."""
        try:
            with FileLock(part.with_suffix(".lock"), timeout=0):
                part.unlink(missing_ok=True)
        except Timeout:
            return False
        return True


def _checksum_of(path: Path) -> str | None:
    """A damaged disk must not be taken for a damaged shard; None if there is no such file."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return None
