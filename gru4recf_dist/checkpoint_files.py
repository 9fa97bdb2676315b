"""How `torch.distributed.checkpoint` reaches its files: through `data.storage`, which tries again what fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes a checkpoint's tensors to the folder ``url``, a file of each rank's."""

    def __init__(self, url: str) -> None:
        # `open_atomic` syncs what needs it.
        super().__init__(url, sync_files=False)
        self.fs = _Files()
        self.path = self.fs.init_path(url)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return _Files.validate_checkpoint_id(checkpoint_id)


class CheckpointReader(dcp.FileSystemReader):
    """Reads what `CheckpointWriter` wrote."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fs = _Files()
        self.path = self.fs.init_path(url)

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
        text = storage.first_line(reasons[0]) if reasons else "torch gave no reason"
        raise UserError(f"{message} ({text})") from error


class _Files(FileSystemBase):
    """DCP's view of storage. Paths are URLs."""

    def create_stream(self, path: str | os.PathLike, mode: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        url = os.fspath(path)
        return storage.open_read(url) if mode == "rb" else storage.open_atomic(url)

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return storage.join(os.fspath(path), suffix)

    def init_path(self, path: str | os.PathLike) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        # Object storage cannot rename. DCP does this with its small table of contents only.
        storage.write_bytes(os.fspath(new_path), storage.read_bytes(os.fspath(path)))
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
