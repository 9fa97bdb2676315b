"""Tables in files of any format and on any storage, as streams of Arrow batches with line numbers.

Lines are numbered here, by one reader that goes through a file from its start: the order of events depends on
them, and an engine that reads a file in parallel promises no order.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_prep import json_lines
from data_prep.columns import Batch, Request, convert, first_sentence, missing_column, rows_of
from data_prep.decoded_text import SEPARATOR, decoded
from data_prep.recipe import Layout
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError

# Bytes of text that are parsed at a time; a line longer than this cannot be read.
BLOCK_BYTES = 16 << 20
PARQUET_ROWS = 1 << 19
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def read(url: str, request: Request) -> Iterator[Batch]:
    """The rows of one file, in their order.

    Raises:
        UserError: no such file, a column is missing, or the file is damaged; the line names the file.
    """
    if request.layout.format == "parquet":
        with _open_for_arrow(url) as stream:
            yield from _read_parquet(url, stream, request)
    elif request.layout.format == "jsonl":
        with open_text(url) as stream:
            yield from json_lines.read(url, stream, request)
    else:
        # Before the file is opened again: two readers of a `memory://` file share one position.
        header = _header(url, request.layout)
        with _open_delimited(url, request.layout) as stream:
            yield from _read_delimited(url, stream, request, header)


@contextlib.contextmanager
def _open_for_arrow(url: str) -> Iterator[IO[bytes]]:
    """Open for reading: a local file by Arrow itself.

    Arrow reads ahead in threads that outlive a reader a little, and one that lets go of a Python object (any other
    stream) while Python ends, after an error say, aborts the process.
    """
    with storage.open_read(url) as stream:
        if not storage.is_local(url):
            yield stream
            return
        with pa.OSFile(storage.local_path(url)) as file:
            yield file


@contextlib.contextmanager
def open_text(url: str) -> Iterator[IO[bytes]]:
    """Open for reading, decompressing by the name's ending."""
    with _open_for_arrow(url) as stream:
        compression = next((name for ending, name in COMPRESSIONS.items() if url.endswith(ending)), None)
        yield pa.CompressedInputStream(stream, compression) if compression else stream


@contextlib.contextmanager
def _open_delimited(url: str, layout: Layout) -> Iterator[IO[bytes]]:
    """Open a delimited file as Arrow reads it: in UTF-8, its separator a single byte."""
    replaced = layout.delimiter if _is_long(layout) else None
    with open_text(url) as stream:
        plain = layout.encoding is None and replaced is None
        yield stream if plain else decoded(url, stream, layout.encoding or "utf-8", replaced)


def column_names(url: str, layout: Layout) -> dict[str, str]:
    """The columns of a delimited file: name -> type as RecBole's header gives it (`token` where it gives none).

    Raises:
        UserError: the file is empty or its header is not text.
    """
    return {name: kind for name, kind, _ in _header(url, layout)}


def _delimiter(layout: Layout) -> str:
    if layout.format == "recbole":
        return "\t"
    if _is_long(layout):
        return SEPARATOR
    return layout.delimiter or ("\t" if layout.format == "tsv" else ",")


def _is_long(layout: Layout) -> bool:
    """Whether the separator is more than the one byte that Arrow takes."""
    return layout.format != "recbole" and len((layout.delimiter or "").encode()) > 1


def _header(url: str, layout: Layout) -> list[tuple[str, str, str]]:
    """(name, RecBole type, name as it stands in the file) of each column."""
    if layout.format != "recbole" and not layout.header:
        return [(name, "token", name) for name in layout.columns]
    with _open_delimited(url, layout) as stream:
        first = _first_line(stream)
    try:
        text = first.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: its header is not UTF-8 text") from error
    if not text:
        raise UserError(f"{url}: the file is empty")
    if layout.format == "recbole":
        parts = [(raw, *raw.partition(":")[::2]) for raw in text.split("\t")]
        columns = [(name, kind or "token", raw) for raw, name, kind in parts]
    else:
        columns = [(raw, "token", raw) for raw in next(csv.reader([text], delimiter=_delimiter(layout)))]
    names = [name for name, _, _ in columns]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{url}: its header names column '{name}' twice")
    return columns


def _first_line(stream: IO[bytes]) -> bytes:
    content = b""
    while b"\n" not in content:
        more = stream.read(4096)
        if not more:
            break
        content += more
    return content.split(b"\n", 1)[0]


def _read_delimited(
    url: str, stream: IO[bytes], request: Request, header: list[tuple[str, str, str]]
) -> Iterator[Batch]:
    layout = request.layout
    raw_names = {name: raw for name, _, raw in header}
    for column in request.columns.values():
        if column.name not in raw_names:
            raise missing_column(url, column.name, list(raw_names))
    names_in_file = layout.format == "recbole" or layout.header
    skipped: list[int] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        reason = f"{row.actual_columns} columns, not {row.expected_columns}"
        text = row.text.replace(SEPARATOR, str(layout.delimiter)) if _is_long(layout) else row.text
        request.bad_rows.add(url, row.number, reason, {"text": text})
        skipped.append(row.number)
        return "skip"

    wanted = list(dict.fromkeys(raw_names[column.name] for column in request.columns.values()))
    quoted = layout.format != "recbole" and not _is_long(layout)
    try:
        reader = pa_csv.open_csv(
            stream,
            # One thread: only then are bad rows reported with their number.
            read_options=pa_csv.ReadOptions(
                use_threads=False,
                block_size=BLOCK_BYTES,
                column_names=None if names_in_file else [raw for _, _, raw in header],
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=_delimiter(layout),
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types={raw: pa.string() for raw in wanted},
                include_columns=wanted,
                strings_can_be_null=False,
            ),
        )
        line = 1 if names_in_file else 0
        for batch in reader:
            lines = _next_lines(line, batch.num_rows, skipped)
            line = int(lines[-1]) if len(lines) else line
            columns = {
                result: convert(batch.column(raw_names[column.name]), column, url)
                for result, column in request.columns.items()
            }
            yield Batch(columns, lines)
    except pa.ArrowInvalid as error:
        raise UserError(f"{url}: {first_sentence(error)}") from error


def _next_lines(last: int, count: int, skipped: list[int]) -> np.ndarray:
    """The ``count`` line numbers after ``last`` that are not among those skipped."""
    ahead = np.array([number for number in skipped if number > last], dtype=np.int64)
    skipped[:] = ahead.tolist()
    candidates = np.arange(last + 1, last + 1 + count + len(ahead), dtype=np.int64)
    return candidates[~np.isin(candidates, ahead)][:count]


def _read_parquet(url: str, stream: IO[bytes], request: Request) -> Iterator[Batch]:
    try:
        file = pq.ParquetFile(stream)
        known = file.schema_arrow.names
        top = [column.name for result, column in request.columns.items() if result not in request.nested]
        top += [request.events] if request.events else []
        for name in top:
            if name not in known:
                raise missing_column(url, name, known)
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(top))):
            lines = np.arange(row + 1, row + 1 + batch.num_rows, dtype=np.int64)
            row += batch.num_rows
            yield rows_of(url, batch, lines, request)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{url}: {first_sentence(error)}") from error
