"""Blocks: some sessions as flat columns, and the tar that holds them.

A shard is a plain WebDataset tar. One sample is one *block* of up to `MAX_BLOCK_SESSIONS` sessions, stored as
columns: `KEY.items.npy` (int32, all events of the block, flat), `KEY.lengths.npy` (int32, events of each session),
`KEY.sessions.npy` (int64, number of each session within its split), if recorded `KEY.times.npy` (int64, flat), and
`KEY.NAME.npy` for each event feature of the data set (`data.event_columns`).
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.lib import format as npy_format

from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.npy_headers import NPY_HEADER_ERRORS
from gru4recf_dist.data.ranges import DamagedFile
from gru4recf_dist.errors import first_line

MAX_BLOCK_SESSIONS = 1024

# Fixed so that the same sessions give the same bytes on every machine and day.
_TAR_MODE = 0o644


@dataclass(frozen=True)
class Block:
    """Some sessions of one split, as flat columns.

    Attributes:
        items: int32 [E], item ids 1..N of all sessions, one after the other.
        lengths: int32 [n], events of each session; they sum to E.
        sessions: int64 [n], each session's number within its split.
        times: int64 [E] or None, event times in the raw data's unit.
        event_features: by name, int32 or float32 [E]. May be empty where there is no event.
    """

    items: np.ndarray
    lengths: np.ndarray
    sessions: np.ndarray
    times: np.ndarray | None = None
    event_features: dict[str, np.ndarray] = field(default_factory=dict)

    def columns(self) -> dict[str, np.ndarray]:
        columns = {"items": self.items, "lengths": self.lengths, "sessions": self.sessions, "times": self.times}
        return {**{name: column for name, column in columns.items() if column is not None}, **self.event_features}


COLUMN_DTYPES = {"items": np.int32, "lengths": np.int32, "sessions": np.int64, "times": np.int64}
_KNOWN_MEMBERS = frozenset(f"{name}.npy" for name in COLUMN_DTYPES)


def lost_sessions(count: int) -> Block:
    """In place of ``count`` sessions that cannot be read: sessions of no event, which weigh nothing anywhere."""
    return Block(np.empty(0, np.int32), np.zeros(count, np.int32), np.full(count, -1, np.int64))


def encode_shard(blocks: Iterable[Block], prefix: str) -> bytes:
    """The bytes of a tar with the given blocks; the same blocks always give the same bytes.

    Args:
        blocks: at most `MAX_BLOCK_SESSIONS` sessions each.
        prefix: start of every sample key, unique within the split.
    """
    buffer = io.BytesIO()
    # USTAR has no per-file extension headers: smaller, and read by every tar.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks):
            if len(block.lengths) > MAX_BLOCK_SESSIONS:
                raise ValueError(f"a block holds at most {MAX_BLOCK_SESSIONS} sessions, not {len(block.lengths)}")
            for name, column in block.columns().items():
                content = io.BytesIO()
                column = np.ascontiguousarray(column, dtype=COLUMN_DTYPES.get(name))
                npy_format.write_array(content, column, version=(1, 0), allow_pickle=False)
                member = tarfile.TarInfo(f"{prefix}-{number:05d}.{name}.npy")
                member.size = content.tell()
                member.mode = _TAR_MODE
                content.seek(0)
                tar.addfile(member, content)
    return buffer.getvalue()


def check_member(name: str, source: str, event_features: Sequence[EventFeature] = ()) -> None:
    """Refuse a member of a shard's tar that is no column of a block.

    Args:
        event_features: of the data set.

    Raises:
        DamagedFile: it is not ``KEY.COLUMN.npy``.
    """
    key, _, member = name.partition(".")
    if not key or "/" in key or not key.isprintable() or not _is_known(member, event_features):
        raise DamagedFile(f"{source}: unknown member {name!r}")


def _is_known(member: str, event_features: Sequence[EventFeature]) -> bool:
    return member in _KNOWN_MEMBERS or any(member == f"{feature.name}.npy" for feature in event_features)


def decode_block(sample: dict, source: str, items: int, event_features: Sequence[EventFeature] = ()) -> Block:
    """Turn one WebDataset sample (member name -> bytes) into a block. Nothing in it is trusted.

    Args:
        sample: keys are `__key__`, `__url__` and the members, such as `items.npy`.
        source: named in errors.
        items: N, the largest id there may be.
        event_features: of the data set; each must be there.

    Raises:
        DamagedFile: a member is unknown, a column is missing, pickled or damaged, or the columns do not agree.
    """
    where = f"{source}: block {sample.get('__key__')}"
    members = [member for member in sample if not member.startswith("__")]
    unknown = [member for member in members if not _is_known(member, event_features)]
    if unknown:
        raise DamagedFile(f"{where}: unknown member '{unknown[0]}'")
    columns = {
        name: _decode_column(sample[f"{name}.npy"], dtype, f"{where}: {name}.npy")
        for name, dtype in (COLUMN_DTYPES | {feature.name: feature.dtype for feature in event_features}).items()
        if f"{name}.npy" in sample
    }
    for name in ("items", "lengths", "sessions", *(feature.name for feature in event_features)):
        if name not in columns:
            raise DamagedFile(f"{where}: {name}.npy is missing")
    values = {feature.name: columns.pop(feature.name) for feature in event_features}
    block = Block(**columns, event_features=values)
    events, sessions = len(block.items), len(block.lengths)
    if (
        sessions > MAX_BLOCK_SESSIONS
        or len(block.sessions) != sessions
        or (block.lengths < 1).any()
        or int(block.lengths.sum(dtype=np.int64)) != events
        or (block.times is not None and len(block.times) != events)
        or any(len(column) != events for column in block.event_features.values())
    ):
        raise DamagedFile(f"{where}: its columns do not agree")
    if events and not (int(block.items.min()) >= 1 and int(block.items.max()) <= items):
        raise DamagedFile(f"{where}: an item id is not within 1 to {items}")
    for feature in event_features:
        wrong = feature.why_wrong(block.event_features[feature.name])
        if wrong is not None:
            raise DamagedFile(f"{where}: {feature.name}.npy {wrong}")
    return block


def _decode_column(content: bytes, dtype: type[np.generic], where: str) -> np.ndarray:
    """A flat array of ``dtype`` in `.npy` form, as a view of ``content``: what its header claims allocates nothing."""
    stream = io.BytesIO(content)
    try:
        version = npy_format.read_magic(stream)
        if version != (1, 0):
            raise DamagedFile(f"{where} is damaged (.npy version {version[0]}.{version[1]})")
        shape, _, found = npy_format.read_array_header_1_0(stream)
    except NPY_HEADER_ERRORS as error:
        raise DamagedFile(f"{where} is damaged ({first_line(error)})") from error
    if found != dtype or len(shape) != 1:
        raise DamagedFile(f"{where} must be a flat {np.dtype(dtype)} array")
    start = stream.tell()
    if shape[0] * found.itemsize != len(content) - start:
        raise DamagedFile(f"{where} is damaged ({len(content) - start} bytes for {shape[0]} values)")
    return np.frombuffer(content, dtype=dtype, offset=start)
