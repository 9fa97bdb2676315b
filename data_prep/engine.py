"""The engine that runs the dataframe expressions. Steps are ibis expressions and know nothing of it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Protocol

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from gru4recf_dist.errors import UserError

# Rows of a batch that leaves the engine: large enough for numpy to be fast, small enough to be nothing in memory.
BATCH_ROWS = 1 << 18


class Engine(Protocol):
    """What the steps need of an engine; one class per engine, the expressions are shared."""

    def stage(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch | pa.Table]) -> ir.Table:
        """Load Arrow batches into a table of the engine."""

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """Run an expression and keep its rows under ``name``, so that later steps do not run it again."""

    def drop(self, name: str) -> None:
        """Forget a kept or staged table."""

    def row(self, expression: ir.Table) -> dict:
        """The only row of an expression, by column name."""

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """The rows of an expression, in its order, streamed."""


class DuckDBEngine:
    """DuckDB within this process; tables larger than its memory limit spill to a temporary folder.

    Args:
        threads: of the engine; None: one a core.
        memory_limit_gib: None: DuckDB's default (80 % of the machine).
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
            settings["memory_limit"] = f"{int(memory_limit_gib * 1024)}MiB"
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

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        with self._explained():
            return self._ibis.create_table(name, expression, temp=True)

    def drop(self, name: str) -> None:
        self._ibis.drop_table(name, force=True)

    def row(self, expression: ir.Table) -> dict:
        with self._explained():
            (row,) = self._ibis.to_pyarrow(expression).to_pylist()
        return row

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        with self._explained():
            yield from self._ibis.to_pyarrow_batches(expression, chunk_size=BATCH_ROWS)

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


@contextlib.contextmanager
def open_engine(
    name: str, threads: int | None, memory_limit_gib: float | None, temporary_folder: str | None
) -> Iterator[Engine]:
    """The engine called ``name``, closed at the end of the block."""
    engines = {"duckdb": DuckDBEngine}
    engine = engines[name](threads, memory_limit_gib, temporary_folder)
    try:
        yield engine
    finally:
        engine.close()
