"""Spark: executors read the raw files and write the shards; what passes through this process is of the size of the
catalog, or a count."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import pyarrow as pa

from data_prep import spark_session, spark_tasks
from data_prep.engine import FileReader, SortedTask
from data_prep.recipe import Spark
from gru4recf_dist.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# `monotonically_increasing_id` has the partition above this many bits, the row of the partition in them.
_ROW_BITS = 33

# Spark reads other numbers and dates than DuckDB does: only what both read alike passes. A data set must not depend on
# the engine, so the rest (DuckDB's "2024-01-02 24:00:00", Spark's "2024" or "1.5f") is a bad row here.
_SPACE = r"[ \t\n\x0B\f\r]*"
_DIGITS = "[0-9](_?[0-9])*"
_NUMBER = rf"^{_SPACE}[+-]?({_DIGITS}[.]?({_DIGITS})?|[.]{_DIGITS})([eE][+-]?{_DIGITS})?{_SPACE}\z"
_DAY = rf"^{_SPACE}[0-9]{{4,6}}([-/])[0-9]{{1,2}}\1[0-9]{{1,2}}"
_ZONE = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?| UTC| [A-Z][A-Za-z_]+/[A-Za-z_+/-]+)?"
_CLOCK = rf"([T ][0-9]{{1,2}}:[0-9]{{1,2}}(:[0-9]{{1,2}}([.][0-9]*)?{_ZONE} *)?)?"
_DATE = rf"{_DAY}{_CLOCK}\z"
_SLASHES = r"([0-9])/([0-9]{1,2})/([0-9])"


@ibis.udf.scalar.builtin
def unix_micros(moment: dt.Timestamp(timezone="UTC")) -> dt.int64:  # type: ignore[empty-body]
    """Spark's own function."""


class SparkEngine:
    """A session of Spark, and a folder of Parquet tables that its executors share.

    Kept tables are files, not Spark's cache: a cached table keeps the expression that it came from, and in a k-core of
    many rounds that expression multiplies with every round; files end it. They need no memory, and outlive executors.

    Args:
        temporary_folder: where a folder for the tables is made, and removed at the end; a path or, if the master is not
            local, a Hadoop URL.
    """

    def __init__(self, settings: Spark, temporary_folder: str | None) -> None:
        self._local_folder: str | None = None
        if settings.is_local:
            try:
                self._local_folder = tempfile.mkdtemp(prefix="data_prep-", dir=temporary_folder)
            except OSError as error:
                raise UserError(f"temporary_folder: {temporary_folder}: {error.strerror}") from error
            self._folder = f"file://{self._local_folder}/tables"
        else:
            self._folder = f"{str(temporary_folder).rstrip('/')}/data_prep-{uuid.uuid4().hex}"
        try:
            self._session, self._owned = spark_session.start(settings, self._local_folder)
        except BaseException:
            self._remove_local()
            raise
        self._stopped = False
        self._ibis = ibis.pyspark.connect(self._session)
        self._paths: dict[str, str] = {}
        self._number = itertools.count()

    def close(self) -> None:
        self._stop()
        self._remove_local()

    def _stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        # An error is on its way if Spark is no longer able to do this: that one is to be seen.
        with contextlib.suppress(Exception):
            self._remove(self._folder)
        if self._owned:
            with contextlib.suppress(Exception):
                self._session.stop()

    def _remove_local(self) -> None:
        if self._local_folder is not None:
            shutil.rmtree(self._local_folder, ignore_errors=True)

    def _remove(self, url: str) -> None:
        """Remove a folder where Spark put it: fsspec does not know every file system that Spark does."""
        path = self._session.sparkContext._jvm.org.apache.hadoop.fs.Path(url)
        path.getFileSystem(self._session.sparkContext._jsc.hadoopConfiguration()).delete(path, True)

    def stage(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch | pa.Table]) -> ir.Table:
        path = self._new_path(name)
        empty = self._session.createDataFrame(schema.empty_table())
        empty.write.parquet(path)
        for batch in batches:
            table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
            with spark_session.explained():
                self._session.createDataFrame(table.cast(schema)).write.mode("append").parquet(path)
        self._session.read.schema(empty.schema).parquet(path).createOrReplaceTempView(name)
        return self._ibis.table(name)

    def stage_files(self, name: str, schema: pa.Schema, files: int, read: FileReader) -> tuple[ir.Table, StoredUnread]:
        from pyspark.sql.pandas.types import from_arrow_schema

        stored = from_arrow_schema(spark_tasks.stored_schema(schema))
        # One partition a file: a file is read from its start, in one piece, for its rows to be numbered.
        numbers = self._session.range(0, files, 1, files)
        everything = self._write(name, numbers.mapInArrow(spark_tasks.reading(read, schema), stored))
        marks = (spark_tasks.BAD, spark_tasks.LEFT_OUT)
        is_row = " AND ".join(f"{mark} IS NULL" for mark in marks)
        everything.where(is_row).drop(*marks).createOrReplaceTempView(name)
        # In files of their own, since the rows are dropped long before the end.
        unread = everything.where(f"NOT ({is_row})").select("file", "ordinal", *marks)
        self._write(f"{name}_unread", unread).createOrReplaceTempView(f"{name}_unread")
        return self._ibis.table(name), StoredUnread(self, self._ibis.table(f"{name}_unread"))

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        self._write(name, self._frame(expression)).createOrReplaceTempView(name)
        return self._ibis.table(name)

    def drop(self, name: str) -> None:
        path = self._paths.pop(name, None)
        if path is not None:
            self._session.catalog.dropTempView(name)
            self._remove(path)

    def ranked(self, name: str, table: ir.Table, column: str, order_by: Sequence[ir.Value]) -> ir.Table:
        """Sorted by all executors and numbered within each partition, then moved by the rows of those before it.

        A window function over all rows would send them to one task.
        """
        from pyspark.sql import functions

        sorted_rows = self._frame(table.order_by(order_by))
        numbered = self._write(name, sorted_rows.withColumn(column, functions.monotonically_increasing_id()))
        partition = functions.shiftrightunsigned(column, _ROW_BITS)
        place = functions.col(column).bitwiseAND((1 << _ROW_BITS) - 1)
        counts = sorted(map(tuple, numbered.groupBy(partition.alias("partition")).count().collect()))
        starts = itertools.accumulate((count for _, count in counts), initial=0)
        offsets = [(number, start) for (number, _), start in zip(counts, starts, strict=False)]
        offset = functions.broadcast(self._session.createDataFrame(offsets, "partition long, start long"))
        ranked = numbered.withColumn("partition", partition).join(offset, "partition")
        ranked = ranked.withColumn(column, place + functions.col("start")).drop("partition", "start")
        ranked.createOrReplaceTempView(name)
        return self._ibis.table(name)

    def row(self, expression: ir.Table) -> dict:
        with spark_session.explained():
            (row,) = self._frame(expression).collect()
        return row.asDict()

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        packed = self._frame(expression).mapInArrow(spark_tasks.packing, "packed binary")
        with spark_session.explained():
            for row in packed.toLocalIterator():
                yield from spark_tasks.unpacked(row.packed)

    def run_sorted(
        self, table: ir.Table, columns: Sequence[str], together: Sequence[str], order: Sequence[str], task: SortedTask
    ) -> Iterator[str]:
        frame = self._frame(table).repartition(*together).sortWithinPartitions(*order).select(*columns)
        try:
            with spark_session.explained():
                rows = frame.mapInArrow(spark_tasks.writing(task), "text string").collect()
        except BaseException:
            # Tasks beside the one that failed would write on while the output is being cleared away.
            self._stop()
            raise
        yield from (row.text for row in rows)

    def number(self, text: ir.StringValue) -> ir.FloatingValue:
        shared = ibis.ifelse(text.re_search(_NUMBER), text, ibis.null("string"))
        return shared.replace("_", "").try_cast("float64")

    def microseconds(self, text: ir.StringValue) -> ir.IntegerValue:
        shared = ibis.ifelse(text.re_search(_DATE), text, ibis.null("string"))
        dashed = shared.re_replace(_SLASHES, "$1-$2-$3")
        return unix_micros(dashed.try_cast(dt.Timestamp(timezone="UTC")))

    def _frame(self, expression: ir.Table) -> DataFrame:
        return self._session.sql(self._ibis.compile(expression))

    def _new_path(self, name: str) -> str:
        # A name comes back after a drop, its files do not: Spark remembers what it saw at a path.
        path = self._paths[name] = f"{self._folder}/{next(self._number)}-{name}"
        return path

    def _write(self, name: str, frame: DataFrame) -> DataFrame:
        """Run a query into files, and give what reads them."""
        path = self._new_path(name)
        with spark_session.explained():
            frame.write.parquet(path)
        return self._session.read.schema(frame.schema).parquet(path)


class StoredUnread:
    """The lines that readers could not turn into rows, and the numbers of rows left out, kept by the engine.

    Attributes:
        left_out: rows of all files that the recipe does not ask for.
    """

    def __init__(self, engine: SparkEngine, unread: ir.Table) -> None:
        bad, left_out = unread[spark_tasks.BAD], unread[spark_tasks.LEFT_OUT]
        self._engine = engine
        self._bad = unread.filter(bad.notnull())
        counts = engine.row(unread.agg(bad=bad.count(), left_out=left_out.sum().fill_null(0)))
        self._count: int = counts["bad"]
        self.left_out: int = counts["left_out"]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._count:
            return
        for batch in self._engine.batches(self._bad.order_by("file", "ordinal").select(spark_tasks.BAD)):
            yield from map(json.loads, batch.column(spark_tasks.BAD).to_pylist())
