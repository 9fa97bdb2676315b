"""One preparation of an output at a time: two appends at once would write shards of the same names.

A small file in the output says who works on it. It is created exclusively and removed at the end. That of a process
that was killed stays: on its own machine it is seen to be abandoned, elsewhere a person has to say so by removing it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError

_log = logging.getLogger(__name__)

LOCK = "preparation.lock"


@contextlib.contextmanager
def held(output: str) -> Iterator[None]:
    """Keep other preparations away from ``output`` during the block.

    Raises:
        UserError: another one is at work on it, or may be; the line says which, and how to go on if it is gone.
    """
    if storage.is_local(output) and not storage.is_folder(output):
        # A new folder gets its name when it is complete.
        yield
        return
    url = storage.join(output, LOCK)
    content = json.dumps({**_this_process(), "token": uuid.uuid4().hex}).encode()
    _acquire(output, url, content)
    try:
        yield
    finally:
        try:
            # Not one that lies in a data set which has been put in the place of this one.
            if _read(url) == content:
                storage.remove_tree(url)
        except (UserError, OSError) as error:
            _log.warning("%s: could not be removed (%s)", url, error)


def _acquire(output: str, url: str, content: bytes) -> None:
    there = _read(url)
    if there is not None and _is_abandoned(there):
        _remove_abandoned(url, there)
        there = _read(url)
    if there is None:
        created = storage.create(url, content)
        there = _read(url)
        if created and there == content:
            return
    who = _shown(there or b"")
    raise UserError(f"output: {output}: {who} is preparing it; if that is no longer so, remove {url} and start again")


def _read(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except storage.DamagedFile:
        return None


def _this_process() -> dict[str, str | int]:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": started, **_identity(os.getpid())}


def _identity(process: int) -> dict[str, str]:
    """What tells a process from all others, of this machine and of every other; empty if nothing can be read of it."""
    try:
        # The time of its start is the 20th after its name, which may hold anything.
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        if state in "ZX":
            return {"process_start": "ended"}
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"machine": f"{boot} {os.readlink('/proc/self/ns/pid')}", "process_start": fields[18]}
    except (OSError, IndexError):
        # It has ended, is hidden from this user, or this is another system than Linux.
        return {}


def _is_abandoned(content: bytes) -> bool:
    """Whether it is known that the process has ended: only on its own machine, and in its own container."""
    owner, here = _parsed(content), _identity(os.getpid())
    process = owner.get("process")
    if not here or owner.get("machine") != here["machine"] or not isinstance(process, int) or process < 1:
        return False
    found = _identity(process)
    if found:
        return found["process_start"] != owner.get("process_start")
    # Of another user's process nothing may be readable, but whether there is one.
    return not _exists(process)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove_abandoned(url: str, content: bytes) -> None:
    # Both of two who find it are on this machine: the second must not remove what the first then created.
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    with FileLock(os.path.join(tempfile.gettempdir(), f"data_prep-{os.getuid()}-{name}.lock")):
        if _read(url) == content:
            storage.remove_tree(url)


def _parsed(content: bytes) -> dict:
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _shown(content: bytes) -> str:
    owner = _parsed(content)
    if not {"process", "host", "since"} <= owner.keys():
        return "another program"
    shown = f"process {owner['process']} on {owner['host']}, since {owner['since']},"
    return shown if shown.isprintable() and len(shown) < 200 else "another program"
