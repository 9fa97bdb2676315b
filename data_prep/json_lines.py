"""JSON lines: one event a line, or one session a line with a list of its events.

Arrow parses a chunk of lines at once; a chunk that it cannot parse as expected (a damaged line, a value of another
type, a blank line) is parsed again line by line, so that only the bad lines are lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from data_prep.columns import Batch, Column, Request, in_arrow_memory, rows_of
from gru4recf_dist.errors import UserError

CHUNK_BYTES = 16 << 20
# Lines that decide which types the fast path expects.
SAMPLE_LINES = 1000


def read(url: str, stream: IO[bytes], request: Request) -> Iterator[Batch]:
    """The rows of one file, in their order.

    Raises:
        UserError: a column is in none of the first lines.
    """
    expected: pa.Schema | None = None
    line = 0
    for chunk in _chunks(stream):
        count = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
        numbers = np.arange(line + 1, line + 1 + count, dtype=np.int64)
        line += count
        if expected is None:
            _check_columns(url, chunk, request)
            expected = _expected_schema(chunk, request)
        batch = _parse_chunk(chunk, expected, count)
        if batch is None:
            batch, numbers = _parse_lines(url, chunk, numbers, request)
        if batch.num_rows:
            yield rows_of(url, batch, numbers, request)


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """The stream in pieces that end with a whole line."""
    rest = b""
    while True:
        more = stream.read(CHUNK_BYTES)
        if not more:
            break
        rest += more
        cut = rest.rfind(b"\n") + 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _objects(chunk: bytes, limit: int) -> Iterator[dict[str, Any]]:
    for text in chunk.split(b"\n", limit)[:limit]:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _check_columns(url: str, chunk: bytes, request: Request) -> None:
    """A column that no line of the sample has is a wrong mapping, not a hundred thousand bad rows."""
    objects = list(_objects(chunk, SAMPLE_LINES))
    known = {name for value in objects for name in value}
    events = [event for value in objects for event in _list(value.get(request.events)) if isinstance(event, dict)]
    known_nested = {name for event in events for name in event}
    wanted = [(c.name, known) for r, c in request.columns.items() if r not in request.nested]
    wanted += [(request.events, known)] if request.events else []
    wanted += [(request.columns[result].name, known_nested) for result in request.nested]
    for name, names in wanted:
        if name not in names:
            place = f"{request.events}." if names is known_nested else ""
            listing = ", ".join(sorted(names)) or "none"
            raise UserError(f"{url}: no column '{place}{name}' (it has: {listing})")


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _expected_schema(chunk: bytes, request: Request) -> pa.Schema | None:
    """Types for Arrow's parser, from the first lines; None if only the slow path will do (lists of values)."""
    if any(column.kind in ("texts", "numbers") for column in request.columns.values()):
        return None
    samples: dict[str, list[Any]] = {result: [] for result in request.columns}
    for value in _objects(chunk, SAMPLE_LINES):
        events = [event for event in _list(value.get(request.events)) if isinstance(event, dict)]
        for result, column in request.columns.items():
            sources = events if result in request.nested else [value]
            samples[result] += [source.get(column.name) for source in sources]
    fields = {result: _arrow_type(values, request.columns[result]) for result, values in samples.items()}
    top = {c.name: fields[r] for r, c in request.columns.items() if r not in request.nested}
    if request.events:
        top[request.events] = pa.list_(pa.struct({request.columns[r].name: fields[r] for r in request.nested}))
    return pa.schema(top)


def _arrow_type(values: list[Any], column: Column) -> pa.DataType:
    types = {type(value) for value in values if value is not None}
    if types == {int}:
        return pa.int64()
    # A float as an item or session would come back spelt otherwise: only the slow path keeps it as it is.
    is_number = column.kind in ("time", "number") and types and types <= {int, float}
    return pa.float64() if is_number else pa.string()


def _parse_chunk(chunk: bytes, expected: pa.Schema | None, count: int) -> pa.RecordBatch | None:
    if expected is None:
        return None
    try:
        table = pa_json.read_json(
            in_arrow_memory(chunk),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(chunk) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=expected, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != count:
        return None
    return table.combine_chunks().to_batches()[0]


def _parse_lines(url: str, chunk: bytes, numbers: np.ndarray, request: Request) -> tuple[pa.RecordBatch, np.ndarray]:
    """The slow path: every good line of a chunk, values as text; bad lines go to quarantine."""
    rows: list[dict[str, Any]] = []
    kept: list[int] = []
    for number, text in zip(numbers.tolist(), chunk.split(b"\n"), strict=False):
        try:
            value = json.loads(text)
            row = _row(value, request) if isinstance(value, dict) else None
        except ValueError:
            row = None
        if row is None:
            reason = "not a JSON object of the expected form"
            request.bad_rows.add(url, number, reason, {"text": text.decode(errors="replace")})
            continue
        rows.append(row)
        kept.append(number)
    return pa.RecordBatch.from_pylist(rows, schema=_text_schema(request)), np.array(kept, dtype=np.int64)


def _text_schema(request: Request) -> pa.Schema:
    of = {"texts": pa.list_(pa.string()), "numbers": pa.list_(pa.float64())}
    kinds = {result: of.get(column.kind, pa.string()) for result, column in request.columns.items()}
    top = {c.name: kinds[r] for r, c in request.columns.items() if r not in request.nested}
    if request.events:
        top[request.events] = pa.list_(pa.struct({request.columns[r].name: kinds[r] for r in request.nested}))
    return pa.schema(top)


def _row(value: dict[str, Any], request: Request) -> dict[str, Any] | None:
    """One line's wanted values; None if they have another form. ValueError for a value that is no number."""
    row: dict[str, Any] = {}
    for result, column in request.columns.items():
        if result not in request.nested:
            row[column.name] = _value(value.get(column.name), column.kind, column.separator)
    if request.events:
        events = value.get(request.events)
        if events is not None and not isinstance(events, list):
            return None
        if not all(isinstance(event, dict) for event in events or ()):
            return None
        row[request.events] = [
            {
                request.columns[result].name: _value(event.get(request.columns[result].name), "text", " ")
                for result in request.nested
            }
            for event in events or ()
        ]
    return row


def _value(value: Any, kind: str, separator: str) -> Any:
    if value is None:
        return None
    if kind in ("texts", "numbers"):
        if isinstance(value, str):
            value = [part for part in value.split(separator) if part]
        if not isinstance(value, list):
            raise ValueError("not a list")
        return [str(part) if kind == "texts" else float(part) for part in value if part is not None]
    if isinstance(value, dict | list | bool):
        raise ValueError("not a plain value")
    return value if isinstance(value, str) else json.dumps(value)
