"""What runs on Spark's executors: small functions that are pickled there, and how their errors come back."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from data_prep.bad_rows import BadRows
from gru4recf_dist.data import filesystems
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.errors import UserError, redacted

if TYPE_CHECKING:
    # Not to be imported by executors, which have no use for ibis.
    from data_prep.engine import FileReader, SortedTask

# Columns of a staged table, both null for rows: a line that is no row, as JSON; how many rows of a file are left out.
BAD, LEFT_OUT = "bad_row", "left_out"
# Around the text of an error in a task: Spark hands the driver a stack trace, in which only this is of use to a person.
_START, _END = "<<<data_prep: ", " >>>"

Batches = Iterator[pa.RecordBatch]


class TaskError(Exception):
    """An error in a task that the user can act on; `user_line` finds it in Spark's message."""

    def __init__(self, line: str) -> None:
        super().__init__(f"{_START}{json.dumps(line)}{_END}")


def user_line(message: str) -> str | None:
    """The line of the `TaskError` that a message of Spark tells of, if it does."""
    found = re.search(f"{_START}(.*?){_END}", message)
    return json.loads(found[1]) if found else None


@contextlib.contextmanager
def _told(settings: StorageConfig) -> Iterator[None]:
    """Reach storage as the driver does, and tell it of errors that the user can act on."""
    filesystems.hide_environment()
    filesystems.configure(settings)
    try:
        yield
    except UserError as error:
        # What is to be hidden is in this environment, not the driver's.
        raise TaskError(redacted(str(error))) from None
    except OSError as error:
        # A full disk, or a bucket that refuses.
        where = f"{error.filename}: " if error.filename else ""
        raise TaskError(redacted(f"{where}{error.strerror or error}")) from None


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of `reading`."""
    return schema.append(pa.field(BAD, pa.string())).append(pa.field(LEFT_OUT, pa.int64()))


def reading(read: FileReader, schema: pa.Schema) -> Callable[[Batches], Batches]:
    """Files by their number (column `id`) -> rows in ``schema``, bad ones, and the number left out of each file."""
    stored, settings = stored_schema(schema), filesystems.settings()

    def run(batches: Batches) -> Batches:
        with _told(settings):
            for batch in batches:
                for number in batch.column("id").to_pylist():
                    bad_rows = BadRows()
                    for table in read(number, bad_rows):
                        rows = table.cast(schema)
                        for name in (BAD, LEFT_OUT):
                            field = stored.field(name)
                            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
                        yield from rows.to_batches()
                    for place, record in enumerate(bad_rows):
                        text = json.dumps(record, default=str)
                        row = {"ordinal": place, "file": number, BAD: text}
                        yield pa.RecordBatch.from_pylist([row], schema=stored)
                    if bad_rows.left_out:
                        yield pa.RecordBatch.from_pylist([{"file": number, LEFT_OUT: bad_rows.left_out}], schema=stored)

    return run


def writing(task: SortedTask) -> Callable[[Batches], Batches]:
    """A task over sorted rows -> its texts in the column `text`."""
    settings = filesystems.settings()

    def run(batches: Batches) -> Batches:
        with _told(settings):
            for text in task(batches):
                yield pa.record_batch({"text": [text]})

    return run


def packing(batches: Batches) -> Batches:
    """Batches as Arrow IPC messages in the column `packed`: the driver can then fetch them piece by piece as rows."""
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield pa.record_batch({"packed": pa.array([sink.getvalue().to_pybytes()], pa.binary())})


def unpacked(packed: bytes) -> Iterator[pa.RecordBatch]:
    """The batches of a message of `packing`."""
    yield from pa.ipc.open_stream(packed)
