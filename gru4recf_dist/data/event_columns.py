"""Event features: what the manifest says of them, and how raw values become the columns that lie in shards.

Preparation and recommendation encode with the same functions. Shapes: E events, n sessions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

# Members of a block that are no event features (`data.blocks`).
RESERVED_NAMES = ("items", "lengths", "sessions", "times")
# WebDataset brings the names of members to lower case; USTAR has room for some hundred characters.
NAME_PATTERN = r"^[a-z0-9_\-]{1,40}$"

MISSING_ID, UNKNOWN_ID = 0, 1
# Of a time gap: events before which the session had none. Buckets follow.
FIRST_EVENT_ID = 1
FIRST_BUCKET_ID = 2
# The unit of times that are dates is one microsecond; gaps are in seconds then.
MICROSECONDS = 1_000_000


class EventFeature(BaseModel):
    """An event feature: `KEY.NAME.npy` in every block, a value of each event.

    kind      type      values
    token     int32     0 none, 1 unknown, 2.. vocabulary
    float     float32   NaN where missing
    time_gap  int32     bucket of the time since the session's previous event: 0 not known, 1 there is none, 2 shorter
                        than ``edges[0]``, 3 from there on but shorter than ``edges[1]``, and so on

    ``size``: rows of the embedding table; 1 for float.
    ``vocabulary``: for tokens, a Parquet file with columns `id` (int32) and `token` (string).
    ``mean``, ``deviation``: what was subtracted from a standardized float, and what it was then divided by.
    ``edges``: of a time gap's buckets, ascending, in the unit of the raw times; in seconds if these are ``dates``.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=NAME_PATTERN)
    kind: Literal["token", "float", "time_gap"]
    size: int = Field(ge=1, lt=1 << 31)
    vocabulary: str | None = None
    mean: float | None = None
    deviation: float | None = Field(None, gt=0)
    edges: list[float] = []
    dates: bool = False

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> EventFeature:
        if self.name in RESERVED_NAMES:
            raise ValueError(f"an event feature cannot be called '{self.name}'")
        if self.kind == "time_gap" and self.size != FIRST_BUCKET_ID + len(self.edges) + 1:
            raise ValueError(f"size {self.size} does not fit {len(self.edges)} edges")
        if self.kind == "token" and self.vocabulary is None:
            raise ValueError("a token needs a vocabulary")
        if any(before >= after for before, after in pairwise(self.edges)):
            raise ValueError("edges do not ascend")
        return self

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32 if self.kind == "float" else np.int32

    def why_wrong(self, values: np.ndarray) -> str | None:
        """What makes ``values``, of type `dtype`, no column of this feature; None if it can be one."""
        if not len(values):
            return None
        if self.kind == "float":
            return "holds an infinite number" if np.isinf(values).any() else None
        if int(values.min()) >= 0 and int(values.max()) < self.size:
            return None
        return f"holds a value outside 0..{self.size - 1}"


def scaled(feature: EventFeature, numbers: np.ndarray) -> np.ndarray:
    """Numbers [E], NaN where missing, as the column of a float feature: float32 [E].

    A number that is none in float32 counts as missing.
    """
    numbers = numbers.astype(np.float64)
    if feature.deviation is not None:
        numbers = (numbers - feature.mean) / feature.deviation
    with np.errstate(over="ignore"):
        column = numbers.astype(np.float32)
    column[np.isinf(column)] = np.nan
    return column


def gap_buckets(feature: EventFeature, times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Times of consecutive sessions as the column of a time gap: int32 [E].

    Args:
        times: [E], whole microseconds if the feature's times are dates; NaN where not known.
        lengths: [n], events of each session.
    """
    # In the times' own type: nanoseconds since 1970 are no exact float64, their differences are.
    gaps = np.diff(times, prepend=times[:1]).astype(np.float64)
    if feature.dates:
        gaps /= MICROSECONDS
    buckets = FIRST_BUCKET_ID + np.searchsorted(feature.edges, gaps, side="right").astype(np.int32)
    buckets[np.isnan(gaps)] = MISSING_ID
    starts = np.cumsum(lengths) - lengths
    buckets[starts[lengths > 0]] = FIRST_EVENT_ID
    return buckets


def log_edges(shortest: float, longest: float, buckets: int) -> list[float]:
    """Bounds of ``buckets`` buckets, each as many times as long as the one before, between those below and above.

    Rounded to 6 digits, so that they do not depend on the machine.
    """
    edges = np.geomspace(shortest, max(longest, shortest), buckets - 1)
    return sorted({float(f"{edge:.6g}") for edge in edges})
