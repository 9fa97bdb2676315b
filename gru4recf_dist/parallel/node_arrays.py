"""Arrays with an entry for every item, in memory once a node whatever the number of its ranks.

One rank of each node makes them as files in the temporary folder (`TMPDIR`), and all map them, read-only. The files are
then removed, which takes only their names: the mapped contents last as long as a rank uses them, and nothing stays
behind, whatever ends the ranks. They are the operating system's file cache, which gives way where memory is short.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks, from_each, wait_for_all

# Makes arrays of the given lengths and types and lets a function fill them.
Allocate = Callable[[Sequence[tuple[int, type]], Callable[..., None]], list[np.ndarray]]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def in_memory(sizes: Sequence[tuple[int, type]], fill: Callable[..., None]) -> list[np.ndarray]:
    """Arrays of this process alone, filled by ``fill(*arrays)``."""
    arrays = [np.zeros(length, dtype) for length, dtype in sizes]
    fill(*arrays)
    return arrays


class NodeArrays:
    """Makes arrays that the ranks of a node share; as a function it is an `Allocate`. All ranks must call it alike."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        nodes = from_each(ranks, _temporary_folder_identity)
        self._maker = nodes.index(nodes[ranks.rank])

    def __call__(self, sizes: Sequence[tuple[int, type]], fill: Callable[..., None]) -> list[np.ndarray]:
        """Arrays of the given lengths (at least 1) and types, filled by ``fill(*arrays)`` on one rank of each node.

        Raises:
            UserError: a node's temporary folder cannot hold them, or ``fill`` raised it on a node.
        """
        made: str | None = None

        def make() -> str | None:
            nonlocal made
            if self._ranks.rank == self._maker:
                made = tempfile.mkdtemp(prefix="gru4recf-")
                _write(made, sizes, fill)
            return made

        try:
            folder = from_each(self._ranks, make)[self._maker]
            arrays = [
                np.memmap(_file(folder, place), dtype, "r", shape=(length,)).view(np.ndarray)
                for place, (length, dtype) in enumerate(sizes)
            ]
            wait_for_all(self._ranks)
        finally:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        return arrays


def _temporary_folder_identity() -> tuple:
    """The same for processes that see the same temporary folder: containers of one machine may not."""
    machine = _BOOT_ID.read_text() if _BOOT_ID.exists() else platform.node()
    status = os.stat(tempfile.gettempdir())
    return machine, status.st_dev, status.st_ino


def _file(folder: str, place: int) -> str:
    return os.path.join(folder, str(place))


def _write(folder: str, sizes: Sequence[tuple[int, type]], fill: Callable[..., None]) -> None:
    for place, (length, dtype) in enumerate(sizes):
        try:
            with open(_file(folder, place), "wb") as stream:
                # Now, as an error: a full disk would end the process when it writes to the mapping.
                os.posix_fallocate(stream.fileno(), 0, length * np.dtype(dtype).itemsize)
        except OSError as error:
            raise UserError(
                f"TMPDIR: {tempfile.gettempdir()} cannot hold {length} values an item file needs ({error.strerror})"
            ) from error
    arrays = [np.memmap(_file(folder, place), dtype, "r+", shape=(n,)) for place, (n, dtype) in enumerate(sizes)]
    fill(*arrays)
