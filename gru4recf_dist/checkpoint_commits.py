"""`commit.json`, the file that makes a checkpoint: what it says, which checkpoints there are, whether one is damaged.

It is written last and removed first. It has size and SHA-256 of every other file, taken while they were written, and a
checksum of itself. No function here needs the other ranks.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from gru4recf_dist.checkpoint_files import FileContent
from gru4recf_dist.data import storage
from gru4recf_dist.data.ranges import DamagedFile
from gru4recf_dist.errors import UserError

COMMIT = "commit.json"
_PREFIX = "step-"
_CHECKSUM = "checksum"


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is not what was written. Its text names the file, and the reason."""


def step_url(folder: str, step: int) -> str:
    """The folder of one checkpoint in a `checkpoints` folder."""
    return storage.join(folder, f"{_PREFIX}{step:08d}")


def complete_steps(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending; they may be damaged."""
    return [step for step in _steps(folder) if storage.exists(storage.join(step_url(folder, step), COMMIT))]


def _steps(folder: str) -> list[int]:
    """Steps of all that is there of checkpoints, ascending."""
    numbers = [name.removeprefix(_PREFIX) for name in storage.list_names(folder) if name.startswith(_PREFIX)]
    return sorted(int(number) for number in numbers if number.isdigit())


def write_commit(folder: str, step: int, commit: dict[str, Any]) -> None:
    """Make the checkpoint of ``step`` be there.

    Args:
        commit: JSON types; ``files`` has the content of each file by its name.

    Raises:
        UserError: it cannot be written.
    """
    url = storage.join(step_url(folder, step), COMMIT)
    storage.write_json(url, {**commit, _CHECKSUM: _checksum(commit)})


def read_commit(folder: str, step: int) -> dict[str, Any]:
    """What a checkpoint's `commit.json` says: ``state`` is what it was saved with.

    Raises:
        DamagedCheckpoint: it is missing, or not what `write_commit` wrote.
        UserError: storage does not answer.
    """
    url = storage.join(step_url(folder, step), COMMIT)
    try:
        commit = json.loads(storage.read_bytes(url))
    except DamagedFile as error:
        raise DamagedCheckpoint(str(error)) from error
    except OSError as error:
        raise DamagedCheckpoint(f"{url}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{url}: not valid JSON") from error
    if not isinstance(commit, dict) or _CHECKSUM not in commit:
        raise DamagedCheckpoint(f"{url}: has no checksum, as those of versions before checksums")
    if commit.pop(_CHECKSUM) != _checksum(commit):
        raise DamagedCheckpoint(f"{url}: its checksum does not fit its content")
    if commit["step"] != step:
        raise DamagedCheckpoint(f"{url}: is the one of step {commit['step']}")
    return commit


def _checksum(commit: dict[str, Any]) -> str:
    # Once through JSON, which turns all keys into text.
    content = json.dumps(json.loads(json.dumps(commit)), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def newest_step(folder: str) -> int | None:
    """Step of the newest checkpoint with a sound `commit.json`, None if there is none; other files are not looked at.

    Raises:
        DamagedCheckpoint: there are complete checkpoints, but none of them has; the newest one's.
    """
    commit = _newest_commit(folder, complete_steps(folder))
    return None if commit is None else commit["step"]


def best_step(folder: str) -> int | None:
    """Step of the best checkpoint, as the newest sound one has it; None if none was marked or it is gone.

    Raises:
        DamagedCheckpoint: as `newest_step`.
    """
    steps = complete_steps(folder)
    commit = _newest_commit(folder, steps)
    return commit["best_step"] if commit is not None and commit["best_step"] in steps else None


def _newest_commit(folder: str, steps: list[int]) -> dict[str, Any] | None:
    """The last sound `commit.json` of ``steps``, which are ascending."""
    damage: DamagedCheckpoint | None = None
    for step in reversed(steps):
        try:
            return read_commit(folder, step)
        except DamagedCheckpoint as error:
            damage = damage or error
    if damage is not None:
        raise damage
    return None


def file_damage(url: str, content: FileContent) -> str | None:
    """Why the file at ``url`` is not what was written, in words that name it; None if it is.

    Raises:
        UserError: storage does not answer.
    """
    try:
        with storage.open_read(url) as stream:
            size = stream.seek(0, io.SEEK_END)
            if size != content["bytes"]:
                return f"{url}: has {size} bytes, {content['bytes']} were written"
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except DamagedFile as error:
        return str(error)
    except OSError as error:
        return f"{url}: cannot be read ({error.strerror or error})"
    return None if digest == content["sha256"] else f"{url}: its sha256 is not that of what was written"


def remove(folder: str, step: int) -> None:
    """Remove what there is of a checkpoint.

    Raises:
        UserError: storage does not answer, or refuses to.
    """
    url = step_url(folder, step)
    # The commit goes first: a half-removed checkpoint must not look complete.
    storage.remove_tree(storage.join(url, COMMIT))
    storage.remove_tree(url)


def prune(folder: str, newest: int, kept_last: int, best: int | None, damaged: set[int]) -> None:
    """Remove all checkpoints but the ``kept_last`` ones up to ``newest``, and the best.

    Later ones are of a course of training that was left, when its newest checkpoint was found damaged.

    Args:
        damaged: steps of checkpoints that count for nothing.
    """
    usable = [step for step in complete_steps(folder) if step <= newest and step not in damaged]
    kept = {*usable[-kept_last:], best}
    for step in _steps(folder):
        if step not in kept:
            remove(folder, step)
