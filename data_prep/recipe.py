"""The typed preparation recipe: every key, its bounds and its meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_prep.feature_recipes import EventFeatureRecipe, FeatureRecipe
from gru4recf_dist.data import filesystems
from gru4recf_dist.data.blocks import MAX_BLOCK_SESSIONS
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.section import Section

Format = Literal["recbole", "csv", "tsv", "parquet", "jsonl"]


class Layout(Section):
    """How a table is laid out in its files. `.gz`, `.bz2` and `.zst` text files are decompressed on the fly."""

    format: Format = Field("csv", description="recbole (tab separated, `name:type` header), csv, tsv, parquet or jsonl")
    delimiter: str | None = Field(
        None,
        min_length=1,
        description="column separator of csv and tsv; by default comma and tab. With one of several characters (`::`) "
        "no value is quoted",
    )
    encoding: str | None = Field(
        None, description="recbole, csv, tsv: how text is encoded (`latin-1`, say); default UTF-8"
    )
    header: bool = Field(True, description="csv, tsv: the first line names the columns")
    columns: list[str] = Field([], description="csv, tsv without header: the names of all columns, in their order")

    @model_validator(mode="after")
    def _columns_without_header(self) -> Layout:
        if self.format in ("csv", "tsv") and not self.header and not self.columns:
            raise ValueError("columns must name the columns when header is false")
        return self

    @model_validator(mode="after")
    def _known_encoding(self) -> Layout:
        if self.encoding is None:
            return self
        if self.format in ("jsonl", "parquet"):
            raise ValueError(f"encoding needs format recbole, csv or tsv, not {self.format}")
        try:
            # Unlike a look-up this also refuses codecs of something else than text, such as zip.
            " ".encode(self.encoding)
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"encoding '{self.encoding}' is not known") from error
        return self


class Input(Layout):
    """The event files and their column mapping."""

    format: Format = Field("recbole", description=Layout.model_fields["format"].description)
    files: list[str] = Field(
        [],
        description="names or globs, relative to `source` unless absolute or a URL, read in the order given (the files "
        "of a glob by name). By default NAME.inter (recbole), all files of the format in `source`, or `source` itself",
    )
    train_files: list[str] = Field([], description="split.method=files: training events; default NAME.train.inter")
    valid_files: list[str] = Field([], description="split.method=files: validation events; default: cut from training")
    test_files: list[str] = Field([], description="split.method=files: test events; default NAME.test.inter")
    session: str = Field("session_id", description="column of the session; unused when `user` is given")
    user: str | None = Field(None, description="column of the user, to be cut into sessions by `session_gap`")
    item: str = Field("item_id", description="column of the item")
    time: str = Field("timestamp", description="column of the event time")
    time_format: Literal["number", "integer", "datetime"] = Field(
        "number",
        description="number: float64, exact up to 2^53; integer: int64 (nanosecond stamps, say); datetime: ISO 8601 "
        "text (UTC where it names no offset) or a Parquet timestamp, kept as microseconds since 1970",
    )
    time_within: str | None = Field(
        None,
        description="column of a number that orders the events of equal time (the seconds within a date, say), before "
        "file and line do",
    )
    keep: dict[str, list[str]] = Field(
        {},
        description="column -> its values in the rows to keep; other rows are left out and counted. With `events`, "
        "columns are fields of the list's elements",
    )
    events: str | None = Field(
        None,
        description="jsonl, parquet: the list column that holds a session's events; `item` and `time` then name fields "
        "of its elements, and `session` (or `user`) a column of the line",
    )

    @model_validator(mode="after")
    def _nested_formats(self) -> Input:
        if self.events is not None and self.format not in ("jsonl", "parquet"):
            raise ValueError(f"events needs format jsonl or parquet, not {self.format}")
        return self

    @model_validator(mode="after")
    def _values_to_keep(self) -> Input:
        for name, values in self.keep.items():
            if not values:
                raise ValueError(f"keep.{name} lists no values")
        return self


class Split(Section):
    """Which events are held out. A session belongs to the time of its *last* event."""

    method: Literal["leave_one_out", "temporal", "files"] = Field(
        "leave_one_out",
        description="leave_one_out: a session's last event is its test target, the one before its valid target; "
        "temporal: whole sessions by date or share; files: the given files",
    )
    valid_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="temporal: share of all sessions; files without valid files: share of the training sessions",
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="temporal: share of all sessions, the latest ones")
    valid_from: float | str | None = Field(
        None, description="temporal: sessions that end at this time or date or later are valid; in place of the shares"
    )
    test_from: float | str | None = Field(
        None, description="temporal: sessions that end at this time or date or later are test"
    )

    @model_validator(mode="after")
    def _bounds_agree(self) -> Split:
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("valid_from and test_from must be given together")
        if self.valid_from is not None and self.method != "temporal":
            raise ValueError("valid_from and test_from need method temporal")
        if self.method == "temporal" and self.valid_from is None and self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share must leave something to train on")
        return self


class ItemTable(Layout):
    """A table that describes the items: one row an item or, with `property`, one row a property of an item."""

    format: Format | None = Field(None, description="as `input.format`, which is the default")
    delimiter: str | None = Field(None, min_length=1, description="as `input.delimiter`, which is the default")
    encoding: str | None = Field(
        None, description="as `input.encoding`, which is the default where the format is the same"
    )
    file: str | None = Field(
        None,
        description="file of the item table, or a glob (files in the order of their names), relative to `source`; "
        "default NAME.item (recbole)",
    )
    item: str = Field("item_id", description="column of the item")
    property: str | None = Field(
        None, description="long tables: column that names a row's property; a feature's `column` is then such a name"
    )
    value: str | None = Field(None, description="long tables: column of the property's value")
    time: str | None = Field(
        None,
        description="column of a number: of several rows of an item (long tables: of an item's property) the one with "
        "the highest counts, not the first",
    )

    @model_validator(mode="after")
    def _columns_without_header(self) -> ItemTable:
        if not self.header and not self.columns:
            raise ValueError("columns must name the columns when header is false")
        return self

    @model_validator(mode="after")
    def _property_and_value(self) -> ItemTable:
        if (self.property is None) != (self.value is None):
            raise ValueError("property and value must be given together")
        return self


# What names a credential, or where it serves: to hide all settings would take words and folders out of every message.
_SECRET_KEY = re.compile(
    r"secret|password|passwd|token|credential|access[.-]?key|account[.-]?key|[.]sas[.]|keystore|endpoint", re.IGNORECASE
)


class Spark(Section):
    """The Spark cluster and its settings.

    Settings may be credentials (``spark.hadoop.fs.s3a.secret.key``): like `storage.options` they are never written.
    """

    master: str = Field(
        "local[*]", min_length=1, description="the cluster: local[N], spark://HOST:PORT, yarn, k8s://URL"
    )
    settings: dict[str, str] = Field(
        {},
        exclude=True,
        repr=False,
        description="Spark's own settings, such as `spark.executor.memory: 8g`; nested keys are joined by dots; never "
        "written to any file",
    )

    @field_validator("settings", mode="before")
    @classmethod
    def _joined(cls, settings: object) -> object:
        """An override `spark.settings.spark.executor.memory=8g` arrives as nested mappings."""
        return dict(_flat(settings)) if isinstance(settings, dict) else settings

    @field_validator("settings")
    @classmethod
    def _sparks_own(cls, settings: dict[str, str]) -> dict[str, str]:
        for key in settings:
            if not key.startswith("spark."):
                raise ValueError(f"'{key}' is no Spark setting: they start with 'spark.'")
            if key == "spark.master":
                raise ValueError("spark.master has a key of its own: spark.master=URL")
        return settings

    @property
    def secrets(self) -> list[str]:
        """The values of settings whose names say that they are credentials or endpoints."""
        return [value for key, value in self.settings.items() if _SECRET_KEY.search(key)]

    @property
    def is_local(self) -> bool:
        """Whether driver and executors are one process on this machine."""
        return self.master == "local" or self.master.startswith("local[")


def _flat(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            # Spark spells them like this.
            yield f"{prefix}{key}", str(value).lower() if isinstance(value, bool) else value


class Recipe(Section):
    """A preparation: raw event files -> shards, item features, manifest."""

    name: str = Field(min_length=1, description="name of the data set, kept in its manifest")
    source: str = Field(min_length=1, description="folder (or one file) of raw data: a path or fsspec URL")
    output: str = Field(min_length=1, description="folder of the data set: a path or fsspec URL")
    seed: int = Field(1, description="seed of the pseudo-random orders of items and sessions")
    item_order: Literal["md5", "balanced"] = Field(
        "md5",
        description="of the item ids: pseudo-random, or so that every rank's rows hold items of every popularity alike",
    )
    input: Input = Field(Input(), description="event files and column mapping")
    deduplicate: bool = Field(
        False, description="keep only the first of the events that agree in session (or user), item and time"
    )
    session_gap: float | None = Field(
        None,
        gt=0,
        description="longest pause within a session, in the unit of the time column (seconds for datetime): a longer "
        "one starts a new session of the user",
    )
    min_session_length: int = Field(2, ge=1, description="shorter sessions are dropped")
    min_item_support: int = Field(
        1, ge=1, description="items with fewer events (in training files, if given) are dropped; repeated until stable"
    )
    split: Split = Field(Split(), description="what is held out")
    items: ItemTable = Field(ItemTable(), description="the item table")
    item_tables: dict[str, ItemTable] = Field({}, description="further item tables, by the name that features use")
    features: list[FeatureRecipe] = Field([], description="the item features to keep")
    event_features: list[EventFeatureRecipe] = Field([], description="the event features to keep")
    streams: int | None = Field(
        None,
        ge=1,
        description="number of canonical training streams, a power of two; default: 2^floor(log2(sessions / 4096)), at "
        "least 8, at most 1024",
    )
    shard_sessions: int = Field(65536, ge=1, description="most sessions in a shard")
    block_sessions: int = Field(MAX_BLOCK_SESSIONS, ge=1, le=MAX_BLOCK_SESSIONS, description="most sessions in a block")
    store_times: bool = Field(False, description="store the event times too, cut to whole units")
    engine: Literal["duckdb", "spark"] = Field(
        "duckdb", description="what runs the dataframe steps: DuckDB in this process, or a Spark cluster"
    )
    spark: Spark = Field(Spark(), description="used with engine=spark")
    threads: int | None = Field(None, ge=1, description="duckdb: threads; default: one a core")
    memory_limit_gib: float | None = Field(
        None,
        gt=0,
        description="duckdb: about what the process may hold; more is spilled to disk; default: 80 % of the machine",
    )
    temporary_folder: str | None = Field(
        None,
        description="duckdb: local folder to spill to, by default the system's; spark: folder of the tables between "
        "the steps, a path or Hadoop URL, which all executors must reach",
    )
    storage: StorageConfig = Field(StorageConfig(), description="how object storage is reached")

    @field_validator("streams")
    @classmethod
    def _power_of_two(cls, streams: int | None) -> int | None:
        if streams is not None and streams & (streams - 1):
            raise ValueError("must be a power of two")
        return streams

    @model_validator(mode="after")
    def _fits_engine(self) -> Recipe:
        if self.engine == "duckdb":
            return self
        for key, instead in (("threads", "spark.master=local[N]"), ("memory_limit_gib", "spark.settings")):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is for engine duckdb; with spark use {instead}")
        for key in ("source", "output"):
            if filesystems.protocol_of(getattr(self, key)) == "memory":
                raise ValueError(f"{key}: engine spark works in other processes, which do not see memory://")
        if not self.spark.is_local and self.temporary_folder is None:
            raise ValueError(f"temporary_folder must be given with spark.master={self.spark.master}")
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        if (self.session_gap is None) != (self.input.user is None):
            raise ValueError("session_gap and input.user must be given together")
        given = [key for key in ("train_files", "valid_files", "test_files") if getattr(self.input, key)]
        if given and self.split.method != "files":
            raise ValueError(f"input.{given[0]} needs split.method=files")
        if self.input.files and self.split.method == "files":
            raise ValueError("input.files: with split.method=files give train_files and test_files")
        names = [feature.name for feature in (*self.features, *self.event_features)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"features: '{repeated[0]}' is listed twice (in features and event_features together)")
        for feature in self.features:
            if feature.table is not None and feature.table not in self.item_tables:
                known = ", ".join(self.item_tables) or "none"
                raise ValueError(
                    f"features.{feature.name}.table: no '{feature.table}' in item_tables (it has: {known})"
                )
        return self
