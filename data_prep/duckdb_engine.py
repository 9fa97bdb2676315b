"""DuckDB within this process: the default engine."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import duckdb
import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import pyarrow as pa
from tqdm import tqdm

from data_prep.bad_rows import BadRows
from data_prep.engine import BATCH_ROWS, MICROSECONDS, FileReader, SortedTask
from gru4recf_dist.errors import UserError

# What the process holds besides what DuckDB counts: the interpreter, Arrow's batches, DuckDB's own uncounted part.
_BESIDES_GIB = 0.5


class DuckDBEngine:
    """DuckDB within this process; tables larger than its memory limit spill to a temporary folder.

    Args:
        threads: of the engine; None: one a core.
        memory_limit_gib: of the process as a whole; None: DuckDB's default (80 % of the machine for itself).
        temporary_folder: where a spill folder is made, and removed at the end.
    """

    def __init__(
        self,
        threads: int | None = None,
        memory_limit_gib: float | None = None,
        temporary_folder: str | None = None,
    ) -> None:
        try:
            self._spill = tempfile.mkdtemp(prefix="data_prep-", dir=temporary_folder)
        except OSError as error:
            raise UserError(f"temporary_folder: {temporary_folder}: {error.strerror}") from error
        settings: dict[str, object] = {"temp_directory": self._spill, "preserve_insertion_order": False}
        if threads is not None:
            settings["threads"] = threads
        if memory_limit_gib is not None:
            own = max(memory_limit_gib - _BESIDES_GIB, memory_limit_gib / 2)
            settings["memory_limit"] = f"{int(own * 1024)}MiB"
        self._ibis = ibis.duckdb.connect(**settings)
        # Dates without an offset are UTC on every machine.
        self._ibis.raw_sql("SET TimeZone = 'UTC'")

    def close(self) -> None:
        self._ibis.disconnect()
        shutil.rmtree(self._spill, ignore_errors=True)

    def stage(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch | pa.Table]) -> ir.Table:
        self._ibis.create_table(name, schema=ibis.Schema.from_pyarrow(schema), temp=True, overwrite=True)
        connection = self._ibis.con
        for batch in batches:
            table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
            # Inserted one by one, not through a RecordBatchReader: an error of the reader stays itself that way.
            connection.register("arriving", table.cast(schema))
            with self._explained():
                connection.execute(f'INSERT INTO "{name}" SELECT * FROM arriving')
            connection.unregister("arriving")
        return self._ibis.table(name)

    def stage_files(self, name: str, schema: pa.Schema, files: int, read: FileReader) -> tuple[ir.Table, BadRows]:
        bad_rows = BadRows()
        with tqdm(desc="reading", unit=" events", unit_scale=True, disable=None) as bar:

            def watched() -> Iterator[pa.Table]:
                for number in range(files):
                    for table in read(number, bad_rows):
                        yield table
                        bar.update(table.num_rows)

            return self.stage(name, schema, watched()), bad_rows

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        with self._explained():
            return self._ibis.create_table(name, expression, temp=True)

    def drop(self, name: str) -> None:
        self._ibis.drop_table(name, force=True)

    def ranked(self, name: str, table: ir.Table, column: str, order_by: Sequence[ir.Value]) -> ir.Table:
        return table.mutate(ibis.row_number().over(order_by=order_by).cast("int64").name(column))

    def row(self, expression: ir.Table) -> dict:
        with self._explained():
            (row,) = self._ibis.to_pyarrow(expression).to_pylist()
        return row

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        with self._explained():
            yield from self._ibis.to_pyarrow_batches(expression, chunk_size=BATCH_ROWS)

    def run_sorted(
        self, table: ir.Table, columns: Sequence[str], together: Sequence[str], order: Sequence[str], task: SortedTask
    ) -> Iterator[str]:
        # One call takes everything, so all that belongs together is.
        yield from task(self.batches(table.order_by(*order).select(*columns)))

    def number(self, text: ir.StringValue) -> ir.FloatingValue:
        return text.try_cast("float64")

    def microseconds(self, text: ir.StringValue) -> ir.IntegerValue:
        # A zone's name (letters other than those of 2024-01-02T03:04Z) sets the zone of the dates after it, too, that
        # DuckDB casts with it: those with a name are cast apart, where each names its own.
        moment = text.try_cast(dt.Timestamp(timezone="UTC"))
        utc = ibis.ifelse(text.re_search("[A-SU-Ya-z]"), moment, moment).cast("timestamp")
        return utc.epoch_seconds().cast("int64") * MICROSECONDS + utc.microsecond().cast("int64")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """The machine's limits are the user's to change: say which key does it."""
        try:
            yield
        except duckdb.OutOfMemoryException as error:
            first_line = str(error).splitlines()[0]
            raise UserError(f"memory_limit_gib: too little for this data ({first_line})") from error
        except duckdb.IOException as error:
            raise UserError(f"temporary_folder: {str(error).splitlines()[0]}") from error
