"""The engine that runs the dataframe expressions. Steps are ibis expressions and know nothing of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import ibis.expr.types as ir
import pyarrow as pa

from data_prep.bad_rows import BadRows
from data_prep.recipe import Recipe

# Rows of a batch that leaves an engine: large enough for numpy to be fast, small enough to be nothing in memory.
BATCH_ROWS = 1 << 18
# The unit of times that are dates is one microsecond; this many are a second.
MICROSECONDS = 1_000_000

# Reads one file, by its number: its rows. Lines that are no rows go to the collection, with the number left out.
FileReader = Callable[[int, BadRows], Iterator[pa.Table]]
# Takes sorted rows and gives texts, such as descriptions of what it wrote.
SortedTask = Callable[[Iterator[pa.RecordBatch]], Iterator[str]]


class Unread(Protocol):
    """The records of bad rows, wherever they are kept, and how many rows a recipe leaves out."""

    @property
    def left_out(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class Engine(Protocol):
    """What the steps need of an engine; one class per engine, the expressions are shared."""

    def stage(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch | pa.Table]) -> ir.Table:
        """Load Arrow batches of this process into a table of the engine."""

    def stage_files(self, name: str, schema: pa.Schema, files: int, read: FileReader) -> tuple[ir.Table, Unread]:
        """Load ``read(0)`` to ``read(files - 1)``, wherever the engine works.

        Returns:
            The rows of all files; the bad rows in the order of files and lines, and the number left out.
        """

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """Run an expression and keep its rows under ``name``, so that later steps do not run it again."""

    def drop(self, name: str) -> None:
        """Forget a kept or staged table."""

    def ranked(self, name: str, table: ir.Table, column: str, order_by: Sequence[ir.Value]) -> ir.Table:
        """``table`` with the place of each row, from 0, in one order of all rows, as ``column`` (int64).

        Args:
            name: of a table that the engine may keep for it.
            order_by: no two rows may agree in all of these.
        """

    def row(self, expression: ir.Table) -> dict:
        """The only row of an expression, by column name."""

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """The rows of an expression, in its order, streamed to this process."""

    def run_sorted(
        self, table: ir.Table, columns: Sequence[str], together: Sequence[str], order: Sequence[str], task: SortedTask
    ) -> Iterator[str]:
        """Hand ``columns`` of the rows to ``task``, wherever the engine works, and give what it yields in no order.

        Args:
            together: rows that agree in these come to the same call. The order must not tear them apart.
            order: columns that rows of one call are sorted by.
            task: can be pickled and, since the engine may repeat a call that failed, does the same thing again.
        """

    def number(self, text: ir.StringValue) -> ir.FloatingValue:
        """Text as float64; null where it is no number."""

    def microseconds(self, text: ir.StringValue) -> ir.IntegerValue:
        """A date as text (UTC where it names no offset) in microseconds since 1970; null where it is no date."""


def finite(number: ir.FloatingValue) -> ir.BooleanValue:
    """Whether a number is neither infinite nor NaN; null stays null."""
    # All engines hold NaN to be more than any number. (ibis' own `isinf` is always false on Spark.)
    return number.abs() <= sys.float_info.max


@contextlib.contextmanager
def open_engine(recipe: Recipe) -> Iterator[Engine]:
    """The engine of a recipe, closed at the end of the block.

    Raises:
        UserError: it cannot be started; the line names the key.
    """
    # Imported here: an engine's packages are not needed where the other one runs.
    if recipe.engine == "spark":
        from data_prep.spark_engine import SparkEngine

        engine = SparkEngine(recipe.spark, recipe.temporary_folder)
    else:
        from data_prep.duckdb_engine import DuckDBEngine

        engine = DuckDBEngine(recipe.threads, recipe.memory_limit_gib, recipe.temporary_folder)
    try:
        yield engine
    finally:
        engine.close()
