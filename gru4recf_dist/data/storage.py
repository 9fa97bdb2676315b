"""Files on any fsspec URL: `file://`, `memory://`, `s3://`, `gs://`, `abfs://`, or a plain path.

Everything that the project reads or writes goes through here, so that a URL works wherever a path does.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tokenize
import uuid
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import numpy as np
from numpy.lib import format as npy_format

from gru4recf_dist.errors import UserError

# A URL may come from a manifest, which is untrusted: only protocols that name plain storage are opened.
PROTOCOLS = frozenset({"file", "local", "memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https"})

# What numpy's parser of a damaged or hostile `.npy` header raises.
NPY_HEADER_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    MemoryError,
    OverflowError,
    RecursionError,
    SyntaxError,
    tokenize.TokenError,
)


def first_line(error: Exception) -> str:
    """The first line of an exception's text: a `UserError` is one line."""
    return (str(error.args[0]) if error.args else type(error).__name__).split("\n")[0]


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of ``url`` and the path in it.

    Raises:
        UserError: the protocol is not one of plain storage (``pipe:``, say), or its package is missing.
    """
    if "::" in url:
        # fsspec reads it as a chain of file systems, and would open the first of them only.
        raise UserError(f"{url}: '::' is not supported")
    protocol = protocol_of(url)
    if protocol not in PROTOCOLS:
        raise UserError(f"{url}: protocol '{protocol}' is not supported (one of {', '.join(sorted(PROTOCOLS))})")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error


def protocol_of(url: str) -> str:
    """``file`` for a plain path, otherwise what stands before the first colon."""
    head, colon, _ = url.partition(":")
    # A path like "a/b:c" has a slash before its colon and is a plain path.
    if not colon or "/" in head or not head:
        return "file"
    return head


def is_local(url: str) -> bool:
    return protocol_of(url) in ("file", "local")


def local_path(url: str) -> str:
    """The path of a local ``url`` on this machine."""
    return filesystem(url)[1]


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return fs.exists(path)


def is_folder(url: str) -> bool:
    fs, path = filesystem(url)
    return fs.isdir(path)


def list_names(url: str) -> list[str]:
    """The sorted names directly under a folder; empty if it does not exist."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    if not fs.isdir(path):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))


def make_folder(url: str) -> None:
    """Create a folder and its parents (a no-op on object storage, which has none)."""
    fs, path = filesystem(url)
    fs.makedirs(path, exist_ok=True)


def is_writable(url: str) -> bool:
    """Whether a local folder can be written, or made; True for other storage, which tells only when it is written."""
    if not is_local(url):
        return True
    path = os.path.abspath(local_path(url))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def remove_tree(url: str) -> None:
    """Remove a file or folder with all it holds; nothing happens if it is not there."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Open for reading.

    Raises:
        UserError: there is no such file; the line names it.
    """
    fs, path = filesystem(url)
    try:
        stream = fs.open(path, "rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{url}: no such file") from error
    with stream:
        yield stream


@contextlib.contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """Open for writing so that the file appears whole at the end of the block, or not at all.

    A local file is written beside its place and renamed; an object store shows an object only once its upload
    is complete, and the upload is dropped if the block raises.
    """
    fs, path = filesystem(url)
    if fs.protocol == "memory":
        # `memory://` shows a file as soon as it is opened.
        stream = io.BytesIO()
        yield stream
        fs.pipe_file(path, stream.getvalue())
        return
    if not is_local(url):
        stream = fs.open(path, "wb")
        try:
            yield stream
        except BaseException:
            # `discard` ends a multi-part upload without publishing it; `close` would publish half a file.
            if hasattr(stream, "discard"):
                with contextlib.suppress(Exception):
                    stream.discard()
            stream.closed = True
            raise
        stream.close()
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        opened = open(temporary, "wb")  # noqa: SIM115 (closed by the `with` below)
    except OSError as error:
        raise UserError(f"{url}: cannot be written ({error.strerror})") from error
    try:
        with opened as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def read_bytes(url: str) -> bytes:
    with open_read(url) as stream:
        return stream.read()


def write_bytes(url: str, content: bytes) -> None:
    """Write a whole file atomically."""
    with open_atomic(url) as stream:
        stream.write(content)


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
        return _read_header(url, stream)


def read_npy_rows(url: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows ``start`` to ``stop`` (exclusive; None: to the end) of a `.npy` file; no other bytes are read.

    Raises:
        UserError: the file is missing, is not a plain `.npy` array, or is shorter than its header says.
    """
    with open_read(url) as stream:
        dtype, shape = _read_header(url, stream)
        stop = shape[0] if stop is None else min(stop, shape[0])
        start = min(start, stop)
        row_shape = shape[1:]
        row_bytes = dtype.itemsize * math.prod(row_shape)
        try:
            stream.seek(start * row_bytes, os.SEEK_CUR)
            content = stream.read((stop - start) * row_bytes)
        except (OverflowError, MemoryError) as error:
            raise UserError(f"{url}: its header says {shape}, more than a file can hold") from error
    if len(content) != (stop - start) * row_bytes:
        raise UserError(f"{url}: truncated, rows {start} to {stop} are not all there")
    return np.frombuffer(content, dtype=dtype).reshape(stop - start, *row_shape).copy()


def _read_header(url: str, stream: IO[bytes]) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of the `.npy` file at whose start ``stream`` is, which is left at the first row."""
    try:
        major, _ = npy_format.read_magic(stream)
        read_header = npy_format.read_array_header_1_0 if major == 1 else npy_format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    except NPY_HEADER_ERRORS as error:
        raise UserError(f"{url}: not a .npy file ({first_line(error)})") from error
    if dtype.hasobject or not dtype.itemsize or fortran_order or not shape or min(shape) < 0:
        raise UserError(f"{url}: must be a plain C-ordered array, not {dtype} of shape {shape}")
    return dtype, shape
