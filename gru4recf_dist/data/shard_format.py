"""What a prepared data set looks like on disk: the manifest, and shards of columnar session blocks.

    DATA/manifest.json            everything but the arrays (`Manifest`)
    DATA/train/*.tar  valid/*.tar  test/*.tar
    DATA/items/tokens.parquet     columns `id` (int32, 1..N, ascending) and `token` (string)
    DATA/items/popularity.npy     int64 [N+1], training events of each item; 0 for padding
    DATA/items/features/*.npy     one column a feature (`Feature`)
    DATA/manifests/DIGEST.json    the manifests of states that the data set was appended to (`Manifest.ancestors`)

Where the files in `items` lie the manifest says: an append writes them anew beside the old ones.

What is in a shard: `data.blocks`.

No torch here: preparation runs where torch need not be installed.
"""

from __future__ import annotations

import hashlib
from typing import Literal
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.data.blocks import Block, encode_shard
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KEPT_MANIFESTS = "manifests"
TOKENS = "items/tokens.parquet"
POPULARITY = "items/popularity.npy"
SPLITS = ("train", "valid", "test")
# Far above what preparation writes; a manifest that says more is damaged or hostile.
MAX_SHARD_BYTES = 4 << 30

PADDING_ID = 0
UNKNOWN_VALUE_ID = 1  # of a feature's vocabulary: values that no training item has

# Of what a manifest holds in place of something else, in a message.
_LONGEST_SHOWN = 200
# `%25252e` is a dot that was quoted three times; nobody means that.
_MOST_QUOTINGS = 4


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
    """``targets``: events to be predicted: one a held-out session under `leave_one_out`, else all but each first."""

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
    float       ``values``: float32 [N+1]                                         NaN where ``missing``, or 0
    vector      ``values``: float32 [N+1, size]                                   0 where missing

    ``size``: rows of the embedding table for tokens (padding and unknown included), 1 for float, the dimension of a
    vector. ``longest``: the most values that one item has (token_seq), else 1.
    ``vocabulary``: for tokens, a Parquet file with columns `id` (int32) and `token` (string).
    ``mean``, ``deviation``: what was subtracted from a standardized float, and what it was then divided by.
    ``missing``: of a float: there are items without a value, which is NaN. Otherwise it is 0, as for padding always.
    """

    name: str
    kind: Literal["token", "token_seq", "float", "vector"]
    size: int = Field(ge=1, lt=1 << 31)
    longest: int = Field(1, ge=0, lt=1 << 31)
    values: str
    indptr: str | None = None
    vocabulary: str | None = None
    mean: float | None = None
    deviation: float | None = None
    missing: bool = False

    @model_validator(mode="after")
    def _has_bounds(self) -> Feature:
        if self.kind == "token_seq" and self.indptr is None:
            raise ValueError("a feature of kind token_seq needs indptr")
        return self


class InputFile(_Strict):
    """An event file that the data set was made from, known by its content.

    ``sha256``: of the file's first and last MiB (of all of it, if it is no longer than these).
    """

    name: str
    bytes: NonNegativeInt
    sha256: str


class Append(_Strict):
    """An append to the data set: its recipe, and what each of its steps left."""

    recipe: dict
    report: list[dict]


class Manifest(_Strict):
    """The data set's table of contents.

    ``protocol``: what is predicted in valid and test: the last event of each session (`leave_one_out`: a stored
    session is the whole history and then the target), or every event but the first (`every_position`).
    ``streams``: S, the number of canonical training streams, a power of two.
    ``ancestors``: the `training_digest` of every earlier state that this data set was appended to, oldest first. Item
    ids and feature values that they had mean the same here.
    ``event_features``: columns of every block beside items (`EventFeature`).
    ``tokens``, ``popularity``: the files in `items`, relative to the manifest's folder.
    ``recipe``, ``report``: of the first preparation; ``appends``: of those that followed, oldest first. ``inputs``: the
    event files of all of them.
    """

    format: int = FORMAT_VERSION
    name: str
    seed: int
    items: int = Field(ge=1)
    streams: int = Field(ge=1)
    protocol: Literal["leave_one_out", "every_position"]
    splits: dict[Literal["train", "valid", "test"], SplitInfo]
    features: list[Feature] = []
    event_features: list[EventFeature] = []
    ancestors: list[str] = []
    tokens: str = TOKENS
    popularity: str = POPULARITY
    inputs: list[InputFile] = []
    report: list[dict] = []
    recipe: dict = {}
    appends: list[Append] = []

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        for name in SPLITS:
            if name not in self.splits:
                raise ValueError(f"split '{name}' is missing (one may be empty)")
            split = self.splits[name]
            for shard in split.shards:
                # A number and a length for each session, an id and 4 bytes a feature for each event: as many as the
                # file has room for.
                of_event = 4 + 4 * len(self.event_features)
                if 12 * shard.sessions + of_event * shard.events > shard.bytes:
                    raise ValueError(f"{shard.url!r}: {shard.bytes} bytes cannot hold what it should")
                last_only = self.protocol == "leave_one_out" and name != "train"
                targets = shard.sessions if last_only else shard.events - shard.sessions
                if shard.targets != targets:
                    raise ValueError(f"{shard.url!r}: has {targets} targets, not {shard.targets}")
            for count in ("sessions", "events", "targets"):
                if getattr(split, count) != sum(getattr(shard, count) for shard in split.shards):
                    raise ValueError(f"splits.{name}.{count} is not the sum over its shards")
        names = [feature.name for feature in self.event_features]
        if len(set(names)) < len(names):
            raise ValueError("two event features have the same name")
        for shard in self.splits["train"].shards:
            if shard.stream >= self.streams:
                raise ValueError(f"{shard.url!r}: stream {shard.stream} of {self.streams}")
        return self

    @property
    def files(self) -> list[str]:
        """Every file that the manifest names, as it names it."""
        shards = [shard.url for split in self.splits.values() for shard in split.shards]
        parts = [(feature.values, feature.indptr, feature.vocabulary) for feature in self.features]
        parts += [(feature.vocabulary,) for feature in self.event_features]
        named = [name for names in parts for name in names if name is not None]
        return [*shards, self.tokens, self.popularity, *named]

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

    def event_feature(self, name: str) -> EventFeature:
        """The event feature called ``name``; UserError with the known names if there is none."""
        for feature in self.event_features:
            if feature.name == name:
                return feature
        known = ", ".join(feature.name for feature in self.event_features) or "none"
        raise UserError(f"model.event_features: the data set has no event feature '{name}' (it has: {known})")


def read_manifest(data: str, training_digest: str | None = None) -> Manifest:
    """Read and validate ``DATA/manifest.json``.

    Args:
        training_digest: of an earlier state of the data set, to read what was its manifest. Where no such state was
            appended to, it is the current one that is read.

    Raises:
        UserError: it is missing, damaged, of another format version, or names files that do not lie in ``data``
            while `storage.allow_outside` is off. Or the earlier state's manifest has been removed.
    """
    current = _read_manifest(data, MANIFEST)
    if training_digest not in current.ancestors:
        return current
    name = kept_manifest(training_digest)
    if not storage.exists(storage.join(data, name)):
        raise UserError(f"data: {data} has been appended to since, and {name}, its manifest of then, is gone")
    return _read_manifest(data, name)


def kept_manifest(training_digest: str) -> str:
    """Where the manifest of an earlier state of a data set lies, relative to the current one's folder."""
    return f"{KEPT_MANIFESTS}/{training_digest}.json"


def _read_manifest(data: str, name: str) -> Manifest:
    url = storage.join(data, name)
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
        text = f"{place}: {first['msg'].removeprefix('Value error, ')}"
        shown = filesystems.without_userinfo(text).encode("unicode_escape").decode("ascii")
        raise UserError(f"{url}: {shown[:_LONGEST_SHOWN]}") from error
    for file in manifest.files:
        file_url(data, file)
    return manifest


def file_url(data: str, name: str) -> str:
    """Where a file lies that the manifest of ``data`` names.

    Raises:
        UserError: it does not lie in ``data``, and `storage.allow_outside` is off; or it is a URL with a password.
    """
    filesystems.refuse_userinfo(name, f"{storage.join(data, MANIFEST)}: the name of a file")
    if _lies_inside(name, is_of_url=filesystems.protocol_of(data) in ("http", "https")):
        return storage.join(data, name)
    if not filesystems.settings().allow_outside:
        raise UserError(
            f"{storage.join(data, MANIFEST)}: names {name[:_LONGEST_SHOWN]!r}, which is not a file of this data set "
            "(storage.allow_outside permits it)"
        )
    # Relative ones to the data set, as the others are.
    is_complete = name.startswith("/") or ":" in name.partition("/")[0]
    return name if is_complete else storage.join(data, name)


def _lies_inside(name: str, is_of_url: bool) -> bool:
    """Whether a name of the manifest is a plain relative path.

    A file system may read a backslash as a slash, and a server `%2e` as a dot.

    Args:
        is_of_url: what follows a `?` or `#` is not part of the path.
    """
    read = name
    for _ in range(_MOST_QUOTINGS):
        parts = read.replace("\\", "/").split("/")
        if not read.isprintable() or any(part in ("", ".", "..") or ":" in part for part in parts):
            return False
        if is_of_url and any(sign in read for sign in "?#"):
            return False
        before, read = read, unquote(read)
        if read == before:
            return True
    return False


def write_manifest(data: str, manifest: Manifest) -> None:
    """Write the manifest. It comes last: a data set without one is not there."""
    storage.write_json(storage.join(data, MANIFEST), manifest.model_dump(mode="json"))


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
