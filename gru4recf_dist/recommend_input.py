"""Sessions to recommend for: JSON lines of raw tokens and values, as ids and as columns of event features.

A line is `{"items": ["token", ...]}`, with `"events": {"NAME": [value, ...], ...}` and `"times": [...]` beside it if
the model takes event features, and any other keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.event_columns import (
    MICROSECONDS,
    MISSING_ID,
    UNKNOWN_ID,
    EventFeature,
    gap_buckets,
    scaled,
)
from gru4recf_dist.data.shard_format import PADDING_ID, Manifest, file_url
from gru4recf_dist.data.token_index import read_token_index
from gru4recf_dist.data.tokens import read_tokens
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.node_arrays import Allocate, in_memory

FIRST_VALUE_ID = 2
# Lines whose tokens are looked up together.
_CHUNK_LINES = 1024


@dataclass
class Counts:
    """What the summary line reports."""

    sessions: int = 0
    unknown_tokens: int = 0
    empty_sessions: int = 0
    unknown_values: int = 0


@dataclass(frozen=True)
class Session:
    """The known items of a line, and what is known of their events.

    Attributes:
        line: as it came.
        items: int32 [n].
        event_features: by name, [n] each.
    """

    line: dict[str, Any]
    items: np.ndarray
    event_features: dict[str, np.ndarray]


class SessionReader:
    """Reads sessions as a model takes them.

    Args:
        features: the event features of the model.
        allocate: where the items' tokens lie: `NodeArrays` shares them among the ranks of a node.

    Attributes:
        index: tokens and ids of the items.
        counts: of the sessions read so far.
    """

    def __init__(
        self, data: str, manifest: Manifest, features: Sequence[EventFeature], allocate: Allocate = in_memory
    ) -> None:
        self.index = read_token_index(data, manifest, allocate)
        self.counts = Counts()
        self._features, self._known = features, [feature.name for feature in manifest.event_features]
        self._needs_times = any(feature.kind == "time_gap" for feature in features)
        self._values = {
            feature.name: _value_ids(file_url(data, str(feature.vocabulary)), feature)
            for feature in features
            if feature.kind == "token"
        }

    def read(self, source, url: str) -> Iterator[Session]:
        """The sessions of a stream of lines.

        Raises:
            UserError: a line is not of the expected form; it is named by its number.
        """
        for chunk in _chunks(_lines(source, url)):
            yield from self.sessions(chunk)

    def sessions(self, lines: list[tuple[str, dict[str, Any]]]) -> Iterator[Session]:
        """The sessions of parsed lines, each with its place, which messages name; errors as `read`."""
        known = self.index.ids({str(token) for _, line in lines for token in line["items"]})
        for place, line in lines:
            yield self._session(line, place, known)

    def padding(self) -> Session:
        """In place of a session without a known item: one event that is none."""
        zeros = {feature.name: np.zeros(1, feature.dtype) for feature in self._features}
        return Session({}, np.array([PADDING_ID], np.int32), zeros)

    def _session(self, line: dict[str, Any], place: str, ids: dict[str, int]) -> Session:
        tokens = [str(token) for token in line["items"]]
        # Of an unknown item its event goes too: the gap to the event after it is then counted from the one before it,
        # as in preparation, where filtered events are no events.
        known = np.array([token in ids for token in tokens], dtype=bool)
        items = np.array([ids[token] for token in tokens if token in ids], np.int32)
        self.counts.sessions += 1
        self.counts.unknown_tokens += len(tokens) - len(items)
        self.counts.empty_sessions += not len(items)
        events = line.get("events", {}) if self._features else {}
        if not isinstance(events, dict):
            raise UserError(f"{place}: 'events' must be an object of lists, by the name of the event feature")
        for name in events:
            # One that only this model does not take is no mistake.
            if name not in self._known:
                raise UserError(f"{place}: events.{name}: no such event feature (there are: {', '.join(self._known)})")
        times = _list(line.get("times") if self._needs_times else None, known, f"{place}: times")
        columns = {}
        for feature in self._features:
            if feature.kind == "time_gap":
                moments = _times(times, feature.dates, f"{place}: times")
                columns[feature.name] = gap_buckets(feature, moments, np.array([len(items)]))
                continue
            values = _list(events.get(feature.name), known, f"{place}: events.{feature.name}")
            encode = self._value_ids if feature.kind == "token" else _numbers
            columns[feature.name] = encode(feature, values, f"{place}: events.{feature.name}")
        return Session(line, items, columns)

    def _value_ids(self, feature: EventFeature, values: list, place: str) -> np.ndarray:
        ids = self._values[feature.name]
        texts = [None if value is None or value == "" else str(value) for value in values]
        column = np.array([MISSING_ID if text is None else ids.get(text, UNKNOWN_ID) for text in texts], np.int32)
        self.counts.unknown_values += int((column == UNKNOWN_ID).sum())
        return column


def _lines(source, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not empty, by its place."""
    for number, text in enumerate(source, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{url}:{number}: not a JSON object ({error})") from error
        if not isinstance(line, dict) or not isinstance(line.get("items"), list):
            raise UserError(f"{url}:{number}: must be an object with a list called 'items'")
        yield f"{url}:{number}", line


def _chunks(lines: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    chunk = []
    try:
        for line in lines:
            chunk.append(line)
            if len(chunk) == _CHUNK_LINES:
                yield chunk
                chunk = []
    except UserError:
        # The lines before it come first: one of them may be wrong in a way that only shows later.
        yield chunk
        raise
    yield chunk


def to_block(sessions: list[Session]) -> Block:
    """Sessions of at least one item as one block."""
    names = sessions[0].event_features
    return Block(
        items=np.concatenate([session.items for session in sessions]),
        lengths=np.array([len(session.items) for session in sessions], np.int32),
        sessions=np.arange(len(sessions), dtype=np.int64),
        event_features={name: np.concatenate([session.event_features[name] for session in sessions]) for name in names},
    )


def _list(values: Any, known: np.ndarray, place: str) -> list:
    """The values of the events with a known item; missing ones if there are none."""
    if values is None:
        return [None] * int(known.sum())
    if not isinstance(values, list) or len(values) != len(known):
        raise UserError(f"{place} must be a list of {len(known)} values, one for each item")
    return [value for value, is_known in zip(values, known, strict=True) if is_known]


def _numbers(feature: EventFeature, values: list, place: str) -> np.ndarray:
    return scaled(feature, np.array([_number(value, place) for value in values], np.float64))


def _number(value: Any, place: str) -> float:
    if value is None or value == "":
        return np.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{place}: {json.dumps(value)} is not a number") from error


def _times(values: list, dates: bool, place: str) -> np.ndarray:
    """Times as `gap_buckets` takes them: float64, NaN where missing.

    Where they are dates, they may be given as ISO 8601 text or as seconds since 1970.
    """
    if not dates:
        return np.array([_number(value, place) for value in values], np.float64)
    return np.array([_microseconds(value, place) for value in values], np.float64)


def _microseconds(value: Any, place: str) -> float:
    if not isinstance(value, str) or not value:
        return np.round(_number(value, place) * MICROSECONDS)
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError as error:
        raise UserError(f"{place}: {json.dumps(value)} is not a date") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    difference = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (difference.days * 86400 + difference.seconds) * MICROSECONDS + difference.microseconds


def _value_ids(url: str, feature: EventFeature) -> dict[str, int]:
    values = read_tokens(url, feature.size - FIRST_VALUE_ID)
    return {value: number for number, value in enumerate(values, start=FIRST_VALUE_ID)}
