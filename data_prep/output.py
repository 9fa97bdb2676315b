"""Where a data set is written: never half, and an earlier one is replaced only by a complete one."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator

from data_prep.bad_rows import QUARANTINE
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import MANIFEST, SPLITS
from gru4recf_dist.errors import UserError

OURS = frozenset({MANIFEST, QUARANTINE, "items", *SPLITS})


def check_replaceable(url: str) -> None:
    """Refuse an output folder that holds anything but an earlier data set.

    Raises:
        UserError: it is a file, or holds something that would be lost.
    """
    if storage.exists(url) and not storage.is_folder(url):
        raise UserError(f"output: {url}: is a file, not a folder")
    names = storage.list_names(url)
    foreign = sorted(set(names) - OURS)
    if foreign:
        raise UserError(f"output: {url}: holds '{foreign[0]}', which is no part of a data set; it is not replaced")


@contextlib.contextmanager
def replacing(url: str) -> Iterator[str]:
    """The folder to write to; when the block ends well its content is at ``url``.

    Locally this is a sibling folder that takes the place of an earlier data set by a rename. Object storage has no
    rename: there an earlier data set goes when writing starts, its manifest first, so start as late as possible.
    Either way nothing is left of a block that fails.
    """
    with _local(url) if storage.is_local(url) else _remote(url) as folder:
        yield folder


@contextlib.contextmanager
def _local(url: str) -> Iterator[str]:
    # Through a link the folder that it points to is replaced, not the link.
    target = os.path.realpath(storage.local_path(url))
    tag = uuid.uuid4().hex[:12]
    fresh, earlier = f"{target}.{tag}.new", f"{target}.{tag}.old"
    try:
        os.makedirs(fresh)
    except OSError as error:
        raise UserError(f"output: {url}: {error.strerror}") from error
    try:
        yield fresh
        if os.path.exists(target):
            os.rename(target, earlier)
        try:
            os.rename(fresh, target)
        except OSError:
            if os.path.exists(earlier):
                os.rename(earlier, target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if os.path.exists(target):
            shutil.rmtree(earlier, ignore_errors=True)


@contextlib.contextmanager
def _remote(url: str) -> Iterator[str]:
    _clear(url)
    try:
        yield url
    except BaseException:
        _clear(url)
        raise


def _clear(url: str) -> None:
    storage.remove_tree(storage.join(url, MANIFEST))
    for name in sorted(OURS - {MANIFEST}):
        storage.remove_tree(storage.join(url, name))
