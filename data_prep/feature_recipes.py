"""The part of a recipe that is about features: of items and of events."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from gru4recf_dist.data.event_columns import NAME_PATTERN, RESERVED_NAMES
from gru4recf_dist.section import Section

Kind = Literal["token", "token_seq", "float", "vector"]


class FeatureRecipe(Section):
    """One item feature."""

    name: str = Field(pattern=r"^[A-Za-z0-9_\-]+$", description="name in the manifest; letters, digits, _ and -")
    kind: Kind | None = Field(
        None, description="token, token_seq, float or vector; for recbole by default what the file's header says"
    )
    table: str | None = Field(None, description="its table, one of `item_tables`; default: `items`")
    column: str | None = Field(
        None, description="column of the item table (long tables: property of the item); default: `name`"
    )
    extract: str | None = Field(
        None,
        description="regular expression with one group, searched in every value: the group is the value, and one that "
        "does not match is missing",
    )
    remove: str | None = Field(
        None, min_length=1, description="characters to take out of every value: `$,` makes a number of $1,299.00"
    )
    separator: str = Field(" ", min_length=1, description="between the values of a token_seq or vector kept as text")
    standardize: bool = Field(
        False, description="float: subtract the mean and divide by the deviation of the training items"
    )
    flag_missing: bool = Field(
        True, description="float: items without a value are marked, and the model learns a vector for them; false: 0"
    )
    min_count: int = Field(
        1,
        ge=1,
        description="token, token_seq: values of fewer training items count as unknown, which is thereby trained",
    )
    npy: str | None = Field(None, description="vector: a `.npy` [rows, size] to take the values from")
    npy_items: str | None = Field(
        None, description="vector: the item of each row of `npy`: a text file with one a line, or Parquet"
    )

    @model_validator(mode="after")
    def _options_agree(self) -> FeatureRecipe:
        if (self.npy is None) != (self.npy_items is None):
            raise ValueError("npy and npy_items must be given together")
        if self.npy is not None and self.kind not in (None, "vector"):
            raise ValueError(f"npy needs kind vector, not {self.kind}")
        if self.standardize and self.kind not in (None, "float"):
            raise ValueError(f"standardize needs kind float, not {self.kind}")
        if self.min_count > 1 and self.kind not in (None, "token", "token_seq"):
            raise ValueError(f"min_count needs kind token or token_seq, not {self.kind}")
        for key in ("table", "column", "extract", "remove"):
            if self.npy is not None and getattr(self, key) is not None:
                raise ValueError(f"{key} is of no use with npy")
        return self

    @field_validator("extract")
    @classmethod
    def _one_group(cls, extract: str | None) -> str | None:
        if extract is not None:
            try:
                groups = re.compile(extract).groups
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"must have one group, not {groups}")
        return extract


class EventFeatureRecipe(Section):
    """A feature of every event, stored beside its item."""

    name: str = Field(
        pattern=NAME_PATTERN, description="name in the manifest and of the column; small letters, digits, _ and -"
    )
    kind: Literal["token", "float", "time_gap"] = Field(
        description="time_gap: time since the session's previous event, in buckets"
    )
    column: str | None = Field(
        None, description="token, float: column of the event files (with `input.events`, of an event); default: `name`"
    )
    standardize: bool = Field(
        False, description="float: subtract the mean and divide by the deviation of the training events"
    )
    min_count: int = Field(
        1, ge=1, description="token: values of fewer training events count as unknown, which is thereby trained"
    )
    buckets: int = Field(16, ge=2, le=4096, description="time_gap: number of buckets, each longer than the one before")
    shortest: float | None = Field(
        None,
        gt=0,
        description="time_gap: the first bucket is below this, in the unit of the time column (seconds for datetime); "
        "default: the shortest gap above 0 in training",
    )
    longest: float | None = Field(
        None, gt=0, description="time_gap: the last bucket begins here; default: the longest gap in training"
    )

    @model_validator(mode="after")
    def _options_agree(self) -> EventFeatureRecipe:
        if self.name in RESERVED_NAMES:
            raise ValueError(f"name '{self.name}' is that of another column of the shards")
        for key, kinds in (
            ("column", ("token", "float")),
            ("standardize", ("float",)),
            ("min_count", ("token",)),
            ("buckets", ("time_gap",)),
            ("shortest", ("time_gap",)),
            ("longest", ("time_gap",)),
        ):
            # Not by what was given: a recipe that the manifest keeps gives everything.
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is of no use with kind {self.kind}")
        if self.shortest is not None and self.longest is not None and self.shortest >= self.longest:
            raise ValueError(f"shortest ({self.shortest:g}) must be less than longest ({self.longest:g})")
        return self
