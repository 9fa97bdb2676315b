"""How `torch.distributed.checkpoint` reaches its files: through `data.storage`, which tries again what fails.

What is written is measured on its way, so that a checkpoint can say what its files must hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import IO, TypedDict

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, first_line
from gru4recf_dist.parallel.whereabouts import HERE


class FileContent(TypedDict):
    """What a file must hold: so many bytes, and their SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes a checkpoint's tensors to the folder ``url``, a file of each rank's."""

    def __init__(self, url: str) -> None:
        # `open_atomic` syncs what needs it.
        super().__init__(url, sync_files=False)
        self.fs = _Files()
        self.path = self.fs.init_path(url)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        with HERE.working():
            return super().write_data(plan, planner)

    @property
    def contents(self) -> dict[str, FileContent]:
        """By name, the files that this rank has written."""
        return self.fs.contents

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return _Files.validate_checkpoint_id(checkpoint_id)


class CheckpointReader(dcp.FileSystemReader):
    """Reads what `CheckpointWriter` wrote."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fs = _Files()
        self.path = self.fs.init_path(url)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        with HERE.working():
            return super().read_data(plan, planner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return _Files.validate_checkpoint_id(checkpoint_id)


@contextlib.contextmanager
def storage_errors(message: str) -> Iterator[None]:
    """Turn what a rank met in the block into the same `UserError` on all of them.

    Args:
        message: names the checkpoint; the reason goes behind it unless it is a line of its own.
    """
    try:
        yield
    except dcp.CheckpointException as error:
        reasons = [reason for reason, _ in error.failures.values()]
        for reason in reasons:
            if isinstance(reason, UserError):
                raise UserError(str(reason)) from error
        text = first_line(reasons[0]) if reasons else "torch gave no reason"
        raise UserError(f"{message} ({text})") from error


class _Files(FileSystemBase):
    """DCP's view of storage. Paths are URLs."""

    def __init__(self) -> None:
        self.contents: dict[str, FileContent] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes] | _Measured]:
        url = os.fspath(path)
        if mode == "rb":
            with storage.open_read(url) as stream:
                yield stream
            return
        with storage.open_atomic(url) as stream:
            measured = _Measured(stream)
            yield measured
        self.contents[_name(url)] = measured.content()

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return storage.join(os.fspath(path), suffix)

    def init_path(self, path: str | os.PathLike) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        # Object storage cannot rename. DCP does this with its small table of contents only.
        old, new = os.fspath(path), os.fspath(new_path)
        storage.write_bytes(new, storage.read_bytes(old))
        self.contents[_name(new)] = self.contents.pop(_name(old))
        self.rm_file(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        storage.make_folder(os.fspath(path))

    def exists(self, path: str | os.PathLike) -> bool:
        return storage.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        storage.remove_tree(os.fspath(path))

    def ls(self, path: str | os.PathLike) -> list[str]:
        url = os.fspath(path)
        return [storage.join(url, name) for name in storage.list_names(url)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return isinstance(checkpoint_id, str)


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


class _Measured:
    """A stream to write to, which counts and hashes what it passes on."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._sha256, self._bytes = stream, hashlib.sha256(), 0

    def content(self) -> FileContent:
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def write(self, content: bytes | memoryview) -> int:
        self._stream.write(content)
        self._sha256.update(content)
        written = memoryview(content).nbytes
        self._bytes += written
        return written

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()
