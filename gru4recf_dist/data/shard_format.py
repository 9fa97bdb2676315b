"""What a prepared data set looks like on disk: the manifest, and shards of columnar session blocks.

    DATA/manifest.json            everything but the arrays (`Manifest`)
    DATA/train/*.tar  valid/*.tar  test/*.tar
    DATA/items/tokens.parquet     columns `id` (int32, 1..N, ascending) and `token` (string)
    DATA/items/popularity.npy     int64 [N+1], training events of each item; 0 for padding
    DATA/items/features/*.npy     one column a feature (`Feature`)

A shard is a plain WebDataset tar. One sample is one *block* of up to `MAX_BLOCK_SESSIONS` sessions, stored as
columns: `KEY.items.npy` (int32, all events of the block, flat), `KEY.lengths.npy` (int32, events of each session),
`KEY.sessions.npy` (int64, number of each session within its split) and, if recorded, `KEY.times.npy` (int64, flat).

No torch here: preparation runs where torch need not be installed.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib import format as npy_format
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.data.ranges import DamagedFile
from gru4recf_dist.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENS = "items/tokens.parquet"
POPULARITY = "items/popularity.npy"
SPLITS = ("train", "valid", "test")
MAX_BLOCK_SESSIONS = 1024
# Far above what preparation writes; a manifest that says more is damaged or hostile.
MAX_SHARD_BYTES = 4 << 30

PADDING_ID = 0
UNKNOWN_VALUE_ID = 1  # of a feature's vocabulary: values that no training item has

# Of what a manifest holds in place of something else, in a message.
_LONGEST_SHOWN = 200

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
    """

    items: np.ndarray
    lengths: np.ndarray
    sessions: np.ndarray
    times: np.ndarray | None = None

    def columns(self) -> dict[str, np.ndarray]:
        columns = {"items": self.items, "lengths": self.lengths, "sessions": self.sessions, "times": self.times}
        return {name: column for name, column in columns.items() if column is not None}


COLUMN_DTYPES = {"items": np.int32, "lengths": np.int32, "sessions": np.int64, "times": np.int64}
_KNOWN_MEMBERS = frozenset(f"{name}.npy" for name in COLUMN_DTYPES)


def lost_sessions(count: int) -> Block:
    """In place of ``count`` sessions that cannot be read: sessions of no event, which weigh nothing anywhere."""
    return Block(np.empty(0, np.int32), np.zeros(count, np.int32), np.full(count, -1, np.int64))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShardInfo(_Strict):
    """One tar file. ``url`` is relative to the manifest's folder."""

    url: str
    stream: NonNegativeInt
    sessions: NonNegativeInt
    events: NonNegativeInt
    targets: NonNegativeInt
    bytes: int = Field(ge=0, le=MAX_SHARD_BYTES)
    sha256: str


class SplitInfo(_Strict):
    """``targets``: events to be predicted: one a session under `leave_one_out`, otherwise all but each first."""

    sessions: int
    events: int
    targets: int
    shards: list[ShardInfo]


class Feature(_Strict):
    """One item feature and its files, relative to the manifest's folder.

    kind        files                                                             values
    token       ``values``: int32 [N+1]                                           0 none, 1 unknown, 2.. vocabulary
    token_seq   ``indptr``: int64 [N+2]; ``values``: int32 [nnz], row i is        the same
                values[indptr[i]:indptr[i+1]]
    float       ``values``: float32 [N+1]                                         0 where missing
    vector      ``values``: float32 [N+1, size]                                   0 where missing

    ``size``: rows of the embedding table for tokens (padding and unknown included), 1 for float, the dimension of a
    vector. ``longest``: the most values that one item has (token_seq), else 1.
    ``vocabulary``: for tokens, a Parquet file with columns `id` (int32) and `token` (string).
    """

    name: str
    kind: Literal["token", "token_seq", "float", "vector"]
    size: int = Field(ge=1, lt=1 << 31)
    longest: int = Field(1, ge=0, lt=1 << 31)
    values: str
    indptr: str | None = None
    vocabulary: str | None = None

    @model_validator(mode="after")
    def _has_bounds(self) -> Feature:
        if self.kind == "token_seq" and self.indptr is None:
            raise ValueError("a feature of kind token_seq needs indptr")
        return self


class Manifest(_Strict):
    """The data set's table of contents.

    ``protocol``: what is predicted in valid and test: the last event of each session (`leave_one_out`: a stored
    session is the whole history and then the target), or every event but the first (`every_position`).
    ``streams``: S, the number of canonical training streams, a power of two.
    ``ancestors``: the `training_digest` of every earlier state that this data set was appended to, oldest first. Item
    ids and feature values that they had mean the same here.
    """

    format: int = FORMAT_VERSION
    name: str
    seed: int
    items: int = Field(ge=1)
    streams: int = Field(ge=1)
    protocol: Literal["leave_one_out", "every_position"]
    splits: dict[Literal["train", "valid", "test"], SplitInfo]
    features: list[Feature] = []
    ancestors: list[str] = []
    report: list[dict] = []
    recipe: dict = {}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        for name in SPLITS:
            if name not in self.splits:
                raise ValueError(f"split '{name}' is missing (one may be empty)")
            split = self.splits[name]
            for shard in split.shards:
                # A number and a length for each session, an id for each event: as many as the file has room for.
                if 12 * shard.sessions + 4 * shard.events > shard.bytes or shard.targets > shard.events:
                    raise ValueError(f"{shard.url!r}: {shard.bytes} bytes cannot hold what it should")
            for count in ("sessions", "events", "targets"):
                if getattr(split, count) != sum(getattr(shard, count) for shard in split.shards):
                    raise ValueError(f"splits.{name}.{count} is not the sum over its shards")
        for shard in self.splits["train"].shards:
            if shard.stream >= self.streams:
                raise ValueError(f"{shard.url!r}: stream {shard.stream} of {self.streams}")
        return self

    @property
    def files(self) -> list[str]:
        """Every file that the manifest names, as it names it."""
        shards = [shard.url for split in self.splits.values() for shard in split.shards]
        parts = [(feature.values, feature.indptr, feature.vocabulary) for feature in self.features]
        return shards + [name for names in parts for name in names if name is not None]

    @property
    def training_digest(self) -> str:
        """A checksum of the training shards, in their order: the same wherever the data set lies."""
        checksums = "".join(shard.sha256 for shard in self.splits["train"].shards)
        return hashlib.sha256(checksums.encode()).hexdigest()

    def feature(self, name: str) -> Feature:
        """The feature called ``name``; UserError with the known names if there is none."""
        for feature in self.features:
            if feature.name == name:
                return feature
        known = ", ".join(feature.name for feature in self.features) or "none"
        raise UserError(f"model.features: the data set has no feature '{name}' (it has: {known})")


def read_manifest(data: str) -> Manifest:
    """Read and validate ``DATA/manifest.json``.

    Raises:
        UserError: it is missing, damaged, of another format version, or names files that do not lie in ``data``
            while `storage.allow_outside` is off.
    """
    url = storage.join(data, MANIFEST)
    content = storage.read_json(url)
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        shown = repr(version)[:_LONGEST_SHOWN]
        raise UserError(f"{url}: format {shown}, this program reads format {FORMAT_VERSION}")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "manifest"
        # A key that nobody knows may hold anything, line ends too.
        text = f"{place}: {first['msg'].removeprefix('Value error, ')}".encode("unicode_escape").decode("ascii")
        raise UserError(f"{url}: {text[:_LONGEST_SHOWN]}") from error
    for name in manifest.files:
        file_url(data, name)
    return manifest


def file_url(data: str, name: str) -> str:
    """Where a file lies that the manifest of ``data`` names.

    Raises:
        UserError: it does not lie in ``data``, and `storage.allow_outside` is off.
    """
    if _lies_inside(name):
        return storage.join(data, name)
    if not filesystems.settings().allow_outside:
        raise UserError(
            f"{storage.join(data, MANIFEST)}: names {name[:_LONGEST_SHOWN]!r}, which is not a file of this data set "
            "(storage.allow_outside permits it)"
        )
    # Relative ones to the data set, as the others are.
    is_complete = name.startswith("/") or ":" in name.partition("/")[0]
    return name if is_complete else storage.join(data, name)


def _lies_inside(name: str) -> bool:
    """Whether a name of the manifest is a plain relative path; a file system may read a backslash as a slash."""
    parts = name.replace("\\", "/").split("/")
    return name.isprintable() and not any(part in ("", ".", "..") or ":" in part for part in parts)


def write_manifest(data: str, manifest: Manifest) -> None:
    """Write the manifest. It comes last: a data set without one is not there."""
    storage.write_json(storage.join(data, MANIFEST), manifest.model_dump(mode="json"))


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
                column = np.ascontiguousarray(column, dtype=COLUMN_DTYPES[name])
                npy_format.write_array(content, column, version=(1, 0), allow_pickle=False)
                member = tarfile.TarInfo(f"{prefix}-{number:05d}.{name}.npy")
                member.size = content.tell()
                member.mode = _TAR_MODE
                content.seek(0)
                tar.addfile(member, content)
    return buffer.getvalue()


def write_shard(data: str, url: str, stream: int, blocks: list[Block], targets: int) -> ShardInfo:
    """Write one shard to ``DATA/url`` and describe it.

    Args:
        stream: the canonical stream it belongs to (training), or the shard's number (valid, test).
        targets: events to be predicted in it.
    """
    prefix = url.rsplit("/", 1)[-1].removesuffix(".tar")
    content = encode_shard(blocks, prefix)
    storage.write_bytes(storage.join(data, url), content)
    return ShardInfo(
        url=url,
        stream=stream,
        sessions=sum(len(block.lengths) for block in blocks),
        events=sum(len(block.items) for block in blocks),
        targets=targets,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def check_member(name: str, source: str) -> None:
    """Refuse a member of a shard's tar that is no column of a block.

    Raises:
        DamagedFile: it is not ``KEY.COLUMN.npy``.
    """
    key, _, member = name.partition(".")
    if not key or "/" in key or not key.isprintable() or member not in _KNOWN_MEMBERS:
        raise DamagedFile(f"{source}: unknown member {name!r}")


def decode_block(sample: dict, source: str, items: int) -> Block:
    """Turn one WebDataset sample (member name -> bytes) into a block. Nothing in it is trusted.

    Args:
        sample: keys are `__key__`, `__url__` and the members, such as `items.npy`.
        source: named in errors.
        items: N, the largest id there may be.

    Raises:
        DamagedFile: a member is unknown, a column is missing, pickled or damaged, or the columns do not agree.
    """
    where = f"{source}: block {sample.get('__key__')}"
    unknown = [member for member in sample if not member.startswith("__") and member not in _KNOWN_MEMBERS]
    if unknown:
        raise DamagedFile(f"{where}: unknown member '{unknown[0]}'")
    columns = {
        name: _decode_column(sample[f"{name}.npy"], dtype, f"{where}: {name}.npy")
        for name, dtype in COLUMN_DTYPES.items()
        if f"{name}.npy" in sample
    }
    for name in ("items", "lengths", "sessions"):
        if name not in columns:
            raise DamagedFile(f"{where}: {name}.npy is missing")
    block = Block(**columns)
    events, sessions = len(block.items), len(block.lengths)
    if (
        sessions > MAX_BLOCK_SESSIONS
        or len(block.sessions) != sessions
        or (block.lengths < 1).any()
        or int(block.lengths.sum(dtype=np.int64)) != events
        or (block.times is not None and len(block.times) != events)
    ):
        raise DamagedFile(f"{where}: its columns do not agree")
    if events and not (int(block.items.min()) >= 1 and int(block.items.max()) <= items):
        raise DamagedFile(f"{where}: an item id is not within 1 to {items}")
    return block


def _decode_column(content: bytes, dtype: type[np.generic], where: str) -> np.ndarray:
    """A flat array of ``dtype`` in `.npy` form, as a view of ``content``: what its header claims allocates nothing."""
    stream = io.BytesIO(content)
    try:
        version = npy_format.read_magic(stream)
        if version != (1, 0):
            raise DamagedFile(f"{where} is damaged (.npy version {version[0]}.{version[1]})")
        shape, _, found = npy_format.read_array_header_1_0(stream)
    except storage.NPY_HEADER_ERRORS as error:
        raise DamagedFile(f"{where} is damaged ({storage.first_line(error)})") from error
    if found != dtype or len(shape) != 1:
        raise DamagedFile(f"{where} must be a flat {np.dtype(dtype)} array")
    start = stream.tell()
    if shape[0] * found.itemsize != len(content) - start:
        raise DamagedFile(f"{where} is damaged ({len(content) - start} bytes for {shape[0]} values)")
    return np.frombuffer(content, dtype=dtype, offset=start)
