"""Headers of `.npy` files, which are not trusted: a hostile one is refused before anything is allocated."""

from __future__ import annotations

import tokenize
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from gru4recf_dist.errors import UserError, first_line

# numpy takes 10000 characters at most, but reads as many as the file claims before it counts them.
NPY_HEADER_BYTES = 1 << 16
_NPY_VERSIONS = {(1, 0), (2, 0), (3, 0)}

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


def header_of(url: str, stream: IO[bytes]) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of the `.npy` file at whose start ``stream`` is, which is left at the first row."""
    try:
        header = _Header(stream)
        version = npy_format.read_magic(header)
        if version not in _NPY_VERSIONS:
            raise ValueError(f"version {version[0]}.{version[1]}")
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(header)
    except NPY_HEADER_ERRORS as error:
        raise UserError(f"{url}: not a .npy file ({first_line(error)})") from error
    # Python counts True as 1, numpy does not.
    is_countable = shape and all(type(size) is int and size >= 0 for size in shape) and 0 not in shape[1:]
    if dtype.kind not in "biufc" or fortran_order or not is_countable:
        raise UserError(f"{url}: must be a plain C-ordered array of numbers, not {dtype.kind!r} of shape {shape}")
    return dtype, shape


class _Header:
    """The first bytes of a stream, and no more of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, NPY_HEADER_BYTES

    def read(self, size: int) -> bytes:
        content = self._stream.read(min(size, self._left))
        self._left -= len(content)
        return content
