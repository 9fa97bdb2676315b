"""Where a data set is written: never half, and an earlier one is replaced only by a complete one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator

from data_prep.bad_rows import QUARANTINE
from data_prep.output_lock import LOCK
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import (
    KEPT_MANIFESTS,
    MANIFEST,
    SPLITS,
    Manifest,
    kept_manifest,
    read_manifest,
    write_manifest,
)
from gru4recf_dist.errors import UserError

OURS = frozenset({MANIFEST, QUARANTINE, KEPT_MANIFESTS, LOCK, "items", *SPLITS})
# Where an append writes files beside those that a manifest names.
_FILLED = ("items", "items/features", *SPLITS)
_LATER_QUARANTINE = re.compile(r"quarantine-(\d+)\.jsonl")
# A file that was being written when its program was killed.
_HALF_WRITTEN = re.compile(r"(manifest\.json|quarantine-\d+\.jsonl)\.[0-9a-f]+\.tmp")


def check_replaceable(url: str) -> None:
    """Refuse an output folder that holds anything but an earlier data set.

    Raises:
        UserError: it is a file, or holds something that would be lost.
    """
    if storage.exists(url) and not storage.is_folder(url):
        raise UserError(f"output: {url}: is a file, not a folder")
    names = storage.list_names(url)
    foreign = sorted(name for name in names if not _is_ours(name))
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
    for name in storage.list_names(url):
        if _is_ours(name) and name != LOCK:
            storage.remove_tree(storage.join(url, name))


def _is_ours(name: str) -> bool:
    return name in OURS or any(pattern.fullmatch(name) for pattern in (_LATER_QUARANTINE, _HALF_WRITTEN))


@contextlib.contextmanager
def appending(url: str) -> Iterator[str]:
    """The folder to write to, which is the data set's own; `replace_manifest` then makes what was written part of it.

    What an append that broke off has left is removed first, and what the block leaves, should it fail, at its end.
    """
    _remove_unnamed(url)
    try:
        yield url
    except BaseException:
        # The first error is the one to see; what stays now goes with the next append.
        with contextlib.suppress(UserError, OSError):
            _remove_unnamed(url)
        raise


def replace_manifest(url: str, content: bytes, manifest: Manifest) -> None:
    """Put ``manifest`` in the place of the one that holds ``content``, which is kept for the runs trained on it.

    Raises:
        UserError: another one is there by now.
    """
    before = storage.join(url, kept_manifest(manifest.ancestors[-1]))
    storage.write_bytes(before, content)
    if storage.read_bytes(storage.join(url, MANIFEST)) != content:
        raise UserError(f"output: {url}: another program has changed the data set meanwhile; append again")
    write_manifest(url, manifest)


def _remove_unnamed(url: str) -> None:
    """Remove the files that neither the manifest names nor one of those that it replaced and that are still kept."""
    manifest = read_manifest(url)
    kept = set(storage.list_names(storage.join(url, KEPT_MANIFESTS)))
    named = set(manifest.files)
    for digest in manifest.ancestors:
        if f"{digest}.json" in kept:
            named.update(read_manifest(url, digest).files)
    folders = {folder for folder in _FILLED if "/" in folder}
    found = [f"{folder}/{name}" for folder in _FILLED for name in storage.list_names(storage.join(url, folder))]
    unnamed = [name for name in found if name not in named and name not in folders]
    for name in storage.list_names(url):
        later = _LATER_QUARANTINE.fullmatch(name)
        if _HALF_WRITTEN.fullmatch(name) or (later and int(later[1]) > len(manifest.ancestors)):
            unnamed.append(name)
    unnamed += [f"{KEPT_MANIFESTS}/{name}" for name in kept if not name.endswith(".json")]
    for name in unnamed:
        storage.remove_tree(storage.join(url, name))
