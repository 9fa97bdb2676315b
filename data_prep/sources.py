"""Which files a recipe names, and a reader of their events that gives each its place in the order of all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_prep import readers
from data_prep.bad_rows import BadRows
from data_prep.columns import Batch, Column, Request
from data_prep.recipe import Input, Recipe
from data_prep.row_filter import RowFilter
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError

# What a file's events are for; other splits than `files` have one part only.
TRAIN, VALID, TEST = 0, 1, 2
# An ordinal is the file's number and, in this many low bits, the row within the file: known without reading the files
# before it.
FILE_BITS = 40
ENDINGS = {
    "csv": ("csv", "csv.gz", "csv.bz2", "csv.zst"),
    "tsv": ("tsv", "tsv.gz", "tsv.bz2", "tsv.zst"),
    "parquet": ("parquet",),
    "jsonl": ("jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.zst"),
}


@dataclass(frozen=True)
class EventFile:
    """One input file; ``part`` is TRAIN, VALID or TEST."""

    url: str
    part: int


def recbole_name(source: str) -> str:
    """NAME of a RecBole folder: its own name."""
    if storage.is_local(source):
        source = os.path.abspath(storage.local_path(source))
    return source.rstrip("/").rsplit("/", 1)[-1]


def event_files(recipe: Recipe, append: bool = False) -> list[EventFile]:
    """The input files in the order in which their events are numbered.

    Args:
        append: there may be training files only.

    Raises:
        UserError: a file is missing, a glob matches nothing, or a needed key is not given.
    """
    given = recipe.input
    if recipe.split.method != "files":
        return [EventFile(url, TRAIN) for url in expand(recipe.source, given.files) or _default_files(recipe)]
    needed = ("train",) if append else ("train", "test")
    defaults: dict[str, list[str]] = {}
    if given.format == "recbole":
        stem = storage.join(recipe.source, recbole_name(recipe.source))
        for part in ("train", "valid", "test"):
            url = f"{stem}.{part}.inter"
            defaults[part] = [url] if part in needed or storage.exists(url) else []
    files = []
    for number, part in enumerate(("train", "valid", "test")):
        urls = expand(recipe.source, getattr(given, f"{part}_files")) or defaults.get(part, [])
        if not urls and part in needed:
            raise UserError(f"input.{part}_files must be given with split.method=files")
        files += [EventFile(url, number) for url in urls]
    _check_exist([file.url for file in files])
    return files


def _default_files(recipe: Recipe) -> list[str]:
    source, of = recipe.source, recipe.input.format
    if not storage.exists(source):
        raise UserError(f"source: {source}: no such file or folder")
    if not storage.is_folder(source):
        return [source]
    if of == "recbole":
        urls = [storage.join(source, f"{recbole_name(source)}.inter")]
        _check_exist(urls)
        return urls
    names = [name for name in storage.list_names(source) if name.endswith(tuple("." + e for e in ENDINGS[of]))]
    if not names:
        raise UserError(f"source: {source}: no .{of} file in it")
    return [storage.join(source, name) for name in names]


def resolve(source: str, name: str) -> str:
    """A name of the recipe as a URL: relative ones are in ``source``."""
    return name if os.path.isabs(name) or "://" in name else storage.join(source, name)


def expand(source: str, patterns: list[str]) -> list[str]:
    """Files of names and globs, each once, globs sorted by name."""
    urls: list[str] = []
    for pattern in patterns:
        url = resolve(source, pattern)
        if not any(sign in pattern for sign in "*?["):
            _check_exist([url])
            urls.append(url)
            continue
        found = storage.glob(url)
        if not found:
            raise UserError(f"{url}: no file matches")
        urls += found
    return list(dict.fromkeys(urls))


def _check_exist(urls: list[str]) -> None:
    for url in urls:
        if not storage.exists(url):
            raise UserError(f"{url}: no such file")


def key_column(given: Input) -> str:
    """The column that tells sessions (or, to be cut by a gap, users) apart."""
    return given.user or given.session


def event_columns(recipe: Recipe) -> dict[str, Column]:
    """The columns of the recipe's event features, the n-th as `event_n`; time gaps have none."""
    return {
        f"event_{number}": Column(feature.column or feature.name, "text" if feature.kind == "token" else "number")
        for number, feature in enumerate(recipe.event_features)
        if feature.kind != "time_gap"
    }


def staged_schema(time: pa.DataType, within: bool, event_features: Iterable[str] = ()) -> pa.Schema:
    """Columns of the staged raw events. ``ordinal`` orders all events of all files: file, then place in the file."""
    return pa.schema(
        {
            **({"within": pa.string()} if within else {}),
            "ordinal": pa.int64(),
            "part": pa.int8(),
            "file": pa.int32(),
            "line": pa.int64(),
            "session": pa.string(),
            "item": pa.string(),
            "time": time,
            **dict.fromkeys(event_features, pa.string()),
        }
    )


def _time(url: str, time: pa.Array, given: Input) -> pa.Array:
    """Times for staging: text to be parsed by the engine; of Parquet files int64 or float64.

    Raises:
        UserError: a Parquet column has another kind of time than the recipe says.
    """
    if given.format != "parquet":
        return time.cast(pa.string())
    if pa.types.is_string(time.type):
        return time
    held = {pa.int64(): ("number", "integer"), pa.float64(): ("number",)}.get(time.type, ("datetime",))
    if given.time_format not in held:
        raise UserError(
            f"input.time_format: {given.time_format}, but column '{given.time}' of {url} holds {time.type} values; "
            f"set it to {held[0]}"
        )
    return time.cast(pa.int64()) if held == ("datetime",) else time


@dataclass(frozen=True)
class EventReader:
    """Reads the event files of a recipe, each by itself, in this process or in another that it is pickled to.

    Attributes:
        time: the type of the staged times.
    """

    recipe: Recipe
    files: list[EventFile]
    time: pa.DataType

    def __call__(self, number: int, bad_rows: BadRows) -> Iterator[pa.Table]:
        """Every row to keep of file ``number``, in its order, with the columns of `staged_schema`.

        Raises:
            UserError: a column is missing, the file is damaged, or its times have another type.
        """
        file, given = self.files[number], self.recipe.input
        ordinal = number << FILE_BITS
        for batch, time in _batches(self.recipe, file, bad_rows):
            if time.type != self.time:
                raise UserError(f"{file.url}: column '{given.time}' is {time.type}, in other files {self.time}")
            rows = len(batch.lines)
            within = {"within": batch.columns["within"].cast(pa.string())} if given.time_within else {}
            yield pa.table(
                {
                    **within,
                    "ordinal": np.arange(ordinal, ordinal + rows, dtype=np.int64),
                    "part": np.full(rows, file.part, dtype=np.int8),
                    "file": np.full(rows, number, dtype=np.int32),
                    "line": batch.lines,
                    "session": batch.columns["session"],
                    "item": batch.columns["item"],
                    "time": time,
                    **{name: batch.columns[name].cast(pa.string()) for name in event_columns(self.recipe)},
                }
            )
            ordinal += rows


def event_reader(recipe: Recipe, files: list[EventFile]) -> EventReader:
    """The reader of ``files``. The first that holds rows to keep decides which type the times have.

    Raises:
        UserError: a column is missing, or a file is damaged.
    """
    if recipe.input.format != "parquet":
        return EventReader(recipe, files, pa.string())
    types = (time.type for file in files for _, time in _batches(recipe, file, BadRows()))
    return EventReader(recipe, files, next(types, pa.string()))


def _batches(recipe: Recipe, file: EventFile, bad_rows: BadRows) -> Iterator[tuple[Batch, pa.Array]]:
    """A file's rows to keep, and their times as they are staged; no empty batches. Other rows are counted."""
    given, row_filter = recipe.input, RowFilter(recipe.input.keep)
    columns = {
        "session": Column(key_column(given), "text"),
        "item": Column(given.item, "text"),
        "time": Column(given.time, "time"),
        **event_columns(recipe),
        **row_filter.columns,
    }
    if given.time_within:
        columns["within"] = Column(given.time_within, "number")
    nested = tuple(result for result in columns if result != "session") if given.events else ()
    for batch in map(row_filter, readers.read(file.url, Request(given, columns, bad_rows, given.events, nested))):
        if len(batch.lines):
            yield batch, _time(file.url, batch.columns["time"], given)
    bad_rows.left_out += row_filter.left_out
