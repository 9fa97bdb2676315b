"""Files on any fsspec URL: `file://`, `memory://`, `s3://`, `gs://`, `abfs://`, or a plain path.

Everything that the project reads or writes goes through here, so that a URL works wherever a path does. What fails
for a moment is tried again (`attempts`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import fsspec
import numpy as np
from numpy.lib import format as npy_format

from gru4recf_dist.data.attempts import attempted, call
from gru4recf_dist.data.filesystems import filesystem, is_local, is_remote
from gru4recf_dist.data.npy_headers import header_of
from gru4recf_dist.data.ranges import DamagedFile, RangedReader
from gru4recf_dist.errors import UserError, first_line

READ_BYTES = 1 << 18
LARGEST_SINGLE_UPLOAD = 64 << 20
UPLOAD_PART_BYTES = 16 << 20
NPY_PIECE_BYTES = 8 << 20
_PRECONDITION_FAILED = 412
# A disk that can take no more, whoever writes.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

Result = TypeVar("Result")


def local_path(url: str) -> str:
    """The path of a local ``url`` on this machine."""
    return filesystem(url)[1]


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def _type(url: str) -> str | None:
    """``file``, ``directory``, or None if nothing is there."""
    fs, path = filesystem(url)

    def ask() -> str | None:
        try:
            # Not `fs.exists`, which takes any failure for an answer.
            return call(fs, "info", path)["type"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    return _answered(url, ask)


def _answered(url: str, request: Callable[[], Result]) -> Result:
    """`attempted`, where any failure is a `UserError`."""
    try:
        return attempted(url, request)
    except PermissionError as error:
        raise _refused(url) from error
    except OSError as error:
        raise UserError(f"{url}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)


def exists(url: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        UserError: storage does not answer, or refuses to.
    """
    return _type(url) is not None


def is_folder(url: str) -> bool:
    """Whether ``url`` is a folder; errors as `exists`."""
    return _type(url) == "directory"


def list_names(url: str) -> list[str]:
    """The sorted names directly under a folder; empty if it does not exist. Errors as `exists`."""
    if not is_folder(url):
        return []
    fs, path = filesystem(url)

    def ask() -> list[str]:
        # Another process may remove it in between.
        with contextlib.suppress(FileNotFoundError):
            return call(fs, "ls", path, detail=False)
        return []

    names = _answered(url, ask)
    # Object stores may list the folder itself.
    return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in names if name.rstrip("/") != path.rstrip("/")})


def glob(url: str) -> list[str]:
    """The URLs that match a pattern, sorted; a local one's are plain paths. Errors as `exists`."""
    fs, path = filesystem(url)

    def ask() -> list[str]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return call(fs, "glob", path)
        return []

    found = sorted(_answered(url, ask))
    return found if is_local(url) else [fs.unstrip_protocol(name) for name in found]


def make_folder(url: str) -> None:
    """Create a folder and its parents (a no-op on object storage, which has none). Errors as `exists`."""
    fs, path = filesystem(url)
    _answered(url, lambda: call(fs, "makedirs", path, exist_ok=True))


def is_writable(url: str) -> bool:
    """Whether a local folder can be written, or made; True for other storage, which tells only when it is written."""
    if not is_local(url):
        return True
    path = os.path.abspath(local_path(url))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def remove_tree(url: str) -> None:
    """Remove a file or folder with all it holds; nothing happens if it is not there. Errors as `exists`."""
    fs, path = filesystem(url)

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            call(fs, "rm", path, recursive=True)

    if exists(url):
        _answered(url, remove)


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Open for reading.

    Raises:
        DamagedFile: there is no such file; the line names it.
        UserError: it may not be read. Reading from remote storage raises it too, if that goes on failing.
    """
    fs, path = filesystem(url)
    try:
        stream = io.BufferedReader(RangedReader(url), READ_BYTES) if is_remote(url) else fs.open(path, "rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedFile(f"{url}: no such file") from error
    except PermissionError as error:
        raise _refused(url) from error
    with stream:
        yield stream


def _refused(url: str) -> UserError:
    return UserError(f"{url}: permission denied")


@contextlib.contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """Open for writing so that the file appears whole at the end of the block, which may close it, or not at all.

    A local file is written beside its place and renamed. For an object store the content is collected in a temporary
    file first, so that an upload that breaks can be made again.

    Raises:
        UserError: the file cannot be written, or the disk is full, that of ``TMPDIR`` too.
    """
    fs, path = filesystem(url)
    if not is_local(url):
        with _collecting(url, fs, path) as stream:
            yield stream
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        opened = open(temporary, "wb")  # noqa: SIM115 (closed by the `with` below)
    except OSError as error:
        raise _unwritable(url, error) from error
    try:
        with opened as stream:
            yield stream
        # Opened again, as the block may have closed it.
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        # Not every error of the block is this file's.
        if isinstance(error, OSError) and (error.errno in _FULL or error.filename == temporary):
            raise _unwritable(url, error) from error
        raise


@contextlib.contextmanager
def _collecting(url: str, fs: fsspec.AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    """A temporary file that is uploaded at the end of the block, which may close it."""
    folder = ""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            collected = os.path.join(folder, "content")
            with open(collected, "wb") as stream:
                yield stream
            with open(collected, "rb") as content:
                _upload(url, fs, path, content)
    except OSError as error:
        # Not every error of the block is this file's.
        if folder and error.errno not in _FULL and not str(error.filename).startswith(folder):
            raise
        place = os.path.dirname(folder) or tempfile.tempdir or os.environ.get("TMPDIR", "")
        raise _unwritable(url, error, f"TMPDIR {place}: ") from error


def _unwritable(url: str, error: OSError, place: str = "") -> UserError:
    return UserError(f"{url}: cannot be written ({place}{_reason(error)})")


def read_bytes(url: str) -> bytes:
    with open_read(url) as stream:
        return stream.read()


def write_bytes(url: str, content: bytes) -> None:
    """Write a whole file atomically.

    Raises:
        UserError: it cannot be written.
    """
    if not is_local(url):
        fs, path = filesystem(url)
        _upload(url, fs, path, io.BytesIO(content))
        return
    with open_atomic(url) as stream:
        stream.write(content)


def create(url: str, content: bytes) -> bool:
    """Write a file unless there is one; False if there is. ``content`` must be like no other.

    Of several who try at once one succeeds, on a local disk and where object storage creates exclusively, as S3 does.
    Where it does not, all may, and who reads back what it wrote is the one.

    Raises:
        UserError: it cannot be written.
    """
    fs, path = filesystem(url)
    if is_local(url):
        try:
            stream = open(path, "xb")  # noqa: SIM115
        except FileExistsError:
            return False
        except OSError as error:
            raise _unwritable(url, error) from error
        try:
            with stream:
                stream.write(content)
        except OSError as error:
            # An empty one would stand in everybody's way.
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise _unwritable(url, error) from error
        return True

    def ask() -> bool:
        try:
            call(fs, "pipe_file", path, content, mode="create")
        except Exception as error:
            if isinstance(error, FileExistsError) or _status(error) == _PRECONDITION_FAILED:
                return False
            if not _knows_no_exclusive_write(error):
                raise
            call(fs, "pipe_file", path, content)
        return True

    # If it is there already, the answer to our own request may have been lost.
    return _answered(url, ask) or read_bytes(url) == content


def _status(error: Exception) -> object:
    """The HTTP status behind an error of a backend, if it tells: S3's client does in what caused its `OSError`."""
    answer = getattr(error.__cause__, "response", None)
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", getattr(error, "code", None))


def _knows_no_exclusive_write(error: Exception) -> bool:
    """Whether a file system, or the server behind it, refused to write exclusively for want of knowing how."""
    is_unknown = isinstance(error, OSError) and error.errno == errno.ENOSYS
    return is_unknown or isinstance(error, NotImplementedError | TypeError) or "ParamValidation" in type(error).__name__


def _upload(url: str, fs: fsspec.AbstractFileSystem, path: str, stream: IO[bytes]) -> None:
    """Write what ``stream`` holds; an object store shows an object when all of it is there."""

    def upload() -> None:
        stream.seek(0)
        if size <= LARGEST_SINGLE_UPLOAD:
            call(fs, "pipe_file", path, stream.read(), upload_bytes=size)
            return
        with fs.open(path, "wb", block_size=UPLOAD_PART_BYTES) as target:
            try:
                shutil.copyfileobj(stream, target, UPLOAD_PART_BYTES)
            except BaseException:
                # Closed as it is, it would publish half a file.
                with contextlib.suppress(Exception):
                    target.discard()
                target.closed = True
                raise

    size = stream.seek(0, io.SEEK_END)
    try:
        attempted(url, upload)
    except OSError as error:
        raise _unwritable(url, error) from error


def read_json(url: str) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: it is missing or not JSON; the line names it.
    """
    content = read_bytes(url)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url}: not valid JSON ({error})") from error


def write_json(url: str, content: Any) -> None:
    """Write an object as indented JSON, atomically."""
    write_bytes(url, (json.dumps(content, indent=1, sort_keys=False) + "\n").encode())


def write_npy(url: str, array: np.ndarray) -> None:
    """Write an array as `.npy` (never pickled), atomically."""
    with open_atomic(url) as stream:
        npy_format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)


def read_npy_header(url: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of a `.npy` file.

    Raises:
        UserError: as `read_npy_rows`.
    """
    with open_read(url) as stream:
        return header_of(url, stream)


def read_npy_rows(url: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows ``start`` to ``stop`` (exclusive; None: to the end) of a `.npy` file; no other bytes are read.

    Raises:
        UserError: the file is missing, is not a plain `.npy` array, or is shorter than its header says.
    """
    with open_read(url) as stream:
        dtype, shape = header_of(url, stream)
        stop = shape[0] if stop is None else min(stop, shape[0])
        start = min(start, stop)
        row_shape = shape[1:]
        row_bytes = dtype.itemsize * math.prod(row_shape)
        first = stream.tell()
        # Before anything is read: Python reserves memory for all that a read asks for.
        if start < stop and first + stop * row_bytes > stream.seek(0, os.SEEK_END):
            raise UserError(f"{url}: truncated, its header says {shape} but rows {start} to {stop} are not all there")
        stream.seek(first + start * row_bytes if start < stop else first)
        try:
            array = np.empty((stop - start, *row_shape), dtype)
        except ValueError as error:
            # No rows, or rows of one byte, may claim any number of dimensions of any size.
            raise UserError(f"{url}: no array can have its shape ({first_line(error)})") from error
        # Piece by piece into its place: columns can be of the size of the catalog, and two of them may not fit.
        content = array.reshape(-1).view(np.uint8)
        for place in range(0, len(content), NPY_PIECE_BYTES):
            wanted = min(NPY_PIECE_BYTES, len(content) - place)
            piece = stream.read(wanted)
            if len(piece) != wanted:
                raise UserError(f"{url}: truncated while it was read")
            content[place : place + wanted] = np.frombuffer(piece, np.uint8)
    return array
