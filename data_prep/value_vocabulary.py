"""Vocabularies of features: which values have an embedding of their own, and under which id."""

from __future__ import annotations

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.engine import Engine
from gru4recf_dist.data import storage

FIRST_VALUE_ID = 2


def grown(engine: Engine, counts: ir.Table, known: pa.Array, min_count: int) -> pa.Array:
    """Values behind the ``known`` ones, the most frequent first, ties by the value.

    Args:
        counts: `value` (text) and `count`, how often it occurs in training.
        min_count: values that occur less often are left out.
    """
    frequent = counts.filter(counts["count"] >= min_count)
    ordered = frequent.order_by(ibis.desc("count"), "value").select("value")
    pieces = [batch.column("value").cast(pa.string()) for batch in engine.batches(ordered)]
    pieces = [piece.filter(pc.invert(pc.is_in(piece, value_set=known))) for piece in pieces]
    return pa.concat_arrays([known, *pieces])


def write(url: str, vocabulary: pa.Array) -> None:
    """Write a vocabulary, with its ids, as Parquet."""
    ids = np.arange(FIRST_VALUE_ID, FIRST_VALUE_ID + len(vocabulary), dtype=np.int32)
    write_parquet(url, pa.table({"id": ids, "token": vocabulary}))


def write_parquet(url: str, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    with storage.open_atomic(url) as stream:
        pq.write_table(table, stream)
