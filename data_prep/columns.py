"""Columns of raw tables: what to read of a file, and how its types become text, time, number or lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.bad_rows import BadRows
from data_prep.recipe import Layout
from gru4recf_dist.errors import UserError

ColumnKind = Literal["text", "time", "number", "texts", "numbers"]


@dataclass(frozen=True)
class Column:
    """A column to read: as text, time, number, or a list of texts or numbers.

    Attributes:
        separator: between the elements of a list that the file holds as text.
    """

    name: str
    kind: ColumnKind
    separator: str = " "


@dataclass
class Request:
    """What to read of one file.

    Attributes:
        layout: the file's format.
        columns: result name -> column.
        events: jsonl, parquet: the list column that holds a line's events, if they are nested.
        nested: the result names that are fields of an event.
        bad_rows: collects the lines that are no rows at all.
    """

    layout: Layout
    columns: dict[str, Column]
    bad_rows: BadRows
    events: str | None = None
    nested: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Batch:
    """Some rows of a file, in its order: ``lines`` int64, the number of each row's line (Parquet: row) from 1."""

    columns: dict[str, pa.Array]
    lines: np.ndarray


def missing_column(url: str, name: str, known: list[str]) -> UserError:
    return UserError(f"{url}: no column '{name}' (it has: {', '.join(known) or 'none'})")


def rows_of(url: str, batch: pa.RecordBatch, lines: np.ndarray, request: Request) -> Batch:
    """One row an event: typed columns, nested events flattened in their order."""
    flat = {
        result: batch.column(column.name) for result, column in request.columns.items() if result not in request.nested
    }
    if request.events:
        lists = batch.column(request.events)
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
            raise UserError(f"{url}: column '{request.events}' must hold lists, not {lists.type}")
        empty = pc.less_equal(pc.fill_null(pc.list_value_length(lists), 0), 0)
        for row in np.flatnonzero(empty.to_numpy(zero_copy_only=False)):
            values = {name: value[int(row)].as_py() for name, value in flat.items()}
            request.bad_rows.add(url, int(lines[row]), "no events", values)
        parents = pc.list_parent_indices(lists)
        events = pc.list_flatten(lists)
        fields = [inner.name for inner in events.type] if pa.types.is_struct(events.type) else []
        flat = {name: value.take(parents) for name, value in flat.items()}
        for result in request.nested:
            name = request.columns[result].name
            if name not in fields:
                raise missing_column(url, f"{request.events}.{name}", [f"{request.events}.{inner}" for inner in fields])
            flat[result] = pc.struct_field(events, name)
        lines = lines[parents.to_numpy()]
    return Batch({result: convert(flat[result], column, url) for result, column in request.columns.items()}, lines)


def convert(values: pa.Array, column: Column, url: str) -> pa.Array:
    """Bring a column to its kind's type: text string; time string, int64, float64 or timestamp; lists.

    Raises:
        UserError: the file's type cannot be read as that kind.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    of = values.type
    is_text = pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_null(of)
    is_list = pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of)
    try:
        if column.kind == "text" and (is_text or pa.types.is_integer(of)):
            return values.cast(pa.string())
        if column.kind in ("time", "number"):
            if pa.types.is_timestamp(of) and column.kind == "time":
                return values.cast(pa.timestamp("us", of.tz), safe=False)
            if is_text:
                return values.cast(pa.string())
            if pa.types.is_integer(of):
                return values.cast(pa.int64())
            if pa.types.is_floating(of):
                return values.cast(pa.float64())
        if column.kind in ("texts", "numbers"):
            if is_text:
                values = pc.split_pattern(values.cast(pa.string()), column.separator)
                is_list = True
            if is_list:
                return _convert_list(values, column.kind)
    except pa.ArrowInvalid as error:
        raise UserError(f"{url}: column '{column.name}': {first_sentence(error)}") from error
    raise UserError(f"{url}: column '{column.name}' cannot be read as {column.kind} (its type is {of})")


def _convert_list(values: pa.Array, kind: ColumnKind) -> pa.Array:
    if kind == "texts":
        return values.cast(pa.list_(pa.string()))
    if pa.types.is_string(values.type.value_type):
        # Double separators leave empty strings, which are no numbers.
        values = pa.array(
            [None if row is None else [float(number) for number in row if number] for row in _floats(values)],
            pa.list_(pa.float64()),
        )
    return values.cast(pa.list_(pa.float64()))


def _floats(values: pa.Array) -> list[list[str] | None]:
    rows = values.to_pylist()
    for row in rows:
        for number in row or ():
            try:
                float(number or 0)
            except ValueError as error:
                raise pa.ArrowInvalid(f"'{number}' is not a number") from error
    return rows


def in_arrow_memory(content: bytes) -> pa.BufferReader:
    """A copy for Arrow to read: its threads may hold on to it while Python ends, which no object of Python's bears."""
    copy = pa.BufferOutputStream()
    copy.write(content)
    return pa.BufferReader(copy.getvalue())


def first_sentence(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
