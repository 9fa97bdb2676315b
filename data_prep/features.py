"""Item features: read, bring to item ids, build vocabularies from training items, write columns."""

from __future__ import annotations

from typing import Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import readers
from data_prep.columns import in_arrow_memory
from data_prep.engine import Engine, finite
from data_prep.item_tables import item_tables
from data_prep.recipe import FeatureRecipe, Recipe
from data_prep.sources import resolve
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import PADDING_ID, UNKNOWN_VALUE_ID, Feature
from gru4recf_dist.errors import UserError

FIRST_VALUE_ID = 2
# Rows of a `.npy` of vectors that are held at a time.
VECTOR_ROWS = 1 << 16


class ItemFeatures:
    """The features of a recipe. Built early, so that a wrong name is an error before the long work.

    Raises:
        UserError: an item table or a column is missing, or a kind is neither given nor in a RecBole header.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        for feature in recipe.features:
            if feature.npy is not None:
                for name in (feature.npy, str(feature.npy_items)):
                    if not storage.exists(resolve(recipe.source, name)):
                        raise UserError(f"features.{feature.name}: {resolve(recipe.source, name)}: no such file")
        self._tables = item_tables(recipe)
        self.kinds = {feature.name: "vector" for feature in recipe.features if feature.npy is not None}
        for table in self._tables:
            self.kinds |= table.kinds

    def write(self, engine: Engine, catalog: ir.Table, items: int, data: str) -> tuple[list[Feature], list[dict]]:
        """Write all features of ``catalog`` (`token`, `id`, `popularity`; N = ``items``) below ``data``.

        Returns:
            Their descriptions for the manifest, and their rows of the report.
        """
        columns: dict[str, ir.Table] = {}
        for table in self._tables:
            columns |= table.described(engine, catalog)
        written, rows = [], []
        for feature in self._recipe.features:
            kind = self.kinds[feature.name]
            if feature.npy is not None:
                values, present = self._npy_vectors(engine, catalog, feature, items)
                entry = _write_vector(data, feature.name, values)
            else:
                entry, present = _WRITERS[kind](engine, columns[feature.name], items, data, feature)
            written.append(entry)
            without = items - int(np.count_nonzero(present[1:]))
            rows.append(
                {
                    "feature": feature.name,
                    "kind": kind,
                    "size": entry.size,
                    "longest": entry.longest,
                    "items_without": without,
                }
            )
        return written, rows

    def _npy_vectors(
        self, engine: Engine, catalog: ir.Table, feature: FeatureRecipe, items: int
    ) -> tuple[np.ndarray, np.ndarray]:
        url = resolve(self._recipe.source, str(feature.npy))
        names_url = resolve(self._recipe.source, str(feature.npy_items))
        names = _row_names(names_url, self._recipe.items.item)
        head = storage.read_npy_rows(url, 0, 1)
        if head.ndim != 2 or not np.issubdtype(head.dtype, np.number):
            raise UserError(f"{url}: must be a table of numbers [rows, size]")
        schema = pa.schema({"row": pa.int64(), "item": pa.string()})
        table = pa.table({"row": np.arange(len(names), dtype=np.int64), "item": names}).cast(schema)
        staged = engine.stage(f"rows_{feature.name}", schema, iter([table]))
        first = staged.group_by("item").agg(row=staged.row.min())
        joined = first.join(catalog.select("id", item="token"), "item").select("row", "id").order_by("row")
        values = np.zeros((items + 1, head.shape[1]), dtype=np.float32)
        present = np.zeros(items + 1, dtype=bool)
        pairs = [(b.column("row").to_numpy(), b.column("id").to_numpy()) for b in engine.batches(joined)]
        rows = np.concatenate([pair[0] for pair in pairs]) if pairs else np.zeros(0, np.int64)
        ids = np.concatenate([pair[1] for pair in pairs]) if pairs else np.zeros(0, np.int64)
        for start in range(0, max(len(names), 1), VECTOR_ROWS):
            stop = min(start + VECTOR_ROWS, len(names))
            chunk = storage.read_npy_rows(url, start, stop)
            if len(chunk) != stop - start:
                raise UserError(f"{url}: has fewer rows than {names_url}, which names {len(names)}")
            here = slice(*np.searchsorted(rows, [start, stop]))
            values[ids[here]] = chunk[rows[here] - start]
        if len(storage.read_npy_rows(url, len(names), len(names) + 1)):
            raise UserError(f"{url}: has more rows than {names_url}, which names {len(names)}")
        present[ids] = True
        return values, present


def _row_names(url: str, item_column: str) -> pa.Array:
    """The items of a `.npy`'s rows: a text file with one a line, or Parquet (its item or only column)."""
    content = storage.read_bytes(url)
    if not url.endswith(".parquet"):
        return pa.array(content.decode().splitlines(), pa.string())
    try:
        table = pq.read_table(in_arrow_memory(content))
    except pa.ArrowInvalid as error:
        raise UserError(f"{url}: not a Parquet file") from error
    name = table.column_names[0] if table.num_columns == 1 else item_column
    if name not in table.column_names:
        raise readers.missing_column(url, name, table.column_names)
    return table.column(name).cast(pa.string()).combine_chunks()


def _vocabulary(engine: Engine, values: ir.Table, data: str, name: str) -> tuple[pa.Array, str]:
    """Values of training items, the most frequent first, ties by the value; written beside the feature."""
    seen = values.filter((values.popularity > 0) & (values.value != ""))
    counts = seen.group_by("value").agg(items=seen.count())
    ordered = counts.order_by(ibis.desc("items"), "value").select("value")
    pieces = [batch.column("value").cast(pa.string()) for batch in engine.batches(ordered)]
    vocabulary = pa.concat_arrays(pieces) if pieces else pa.array([], pa.string())
    url = f"items/features/{name}.vocabulary.parquet"
    ids = np.arange(FIRST_VALUE_ID, FIRST_VALUE_ID + len(vocabulary), dtype=np.int32)
    write_parquet(storage.join(data, url), pa.table({"id": ids, "token": vocabulary}))
    return vocabulary, url


def write_parquet(url: str, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    with storage.open_atomic(url) as stream:
        pq.write_table(table, stream)


def _encoded(values: pa.Array, vocabulary: pa.Array) -> np.ndarray:
    """Vocabulary ids of non-empty values; 1 for those that no training item has."""
    positions = pc.index_in(values.cast(pa.string()), value_set=vocabulary)
    ids = pc.add(positions, FIRST_VALUE_ID)
    return pc.fill_null(ids, UNKNOWN_VALUE_ID).to_numpy(zero_copy_only=False).astype(np.int32)


def _write_token(
    engine: Engine, column: ir.Table, items: int, data: str, feature: FeatureRecipe
) -> tuple[Feature, np.ndarray]:
    vocabulary, vocabulary_url = _vocabulary(engine, column, data, feature.name)
    values = np.full(items + 1, PADDING_ID, dtype=np.int32)
    for batch in engine.batches(column.filter(column.value != "").order_by("id")):
        values[batch.column("id").to_numpy()] = _encoded(batch.column("value"), vocabulary)
    url = f"items/features/{feature.name}.values.npy"
    storage.write_npy(storage.join(data, url), values)
    size = len(vocabulary) + FIRST_VALUE_ID
    entry = Feature(name=feature.name, kind="token", size=size, values=url, vocabulary=vocabulary_url)
    return entry, values > 0


def _write_token_seq(
    engine: Engine, column: ir.Table, items: int, data: str, feature: FeatureRecipe
) -> tuple[Feature, np.ndarray]:
    flat = column.select("popularity", value=column.value.unnest())
    vocabulary, vocabulary_url = _vocabulary(engine, flat, data, feature.name)
    lengths = np.zeros(items + 1, dtype=np.int64)
    pieces: list[np.ndarray] = []
    for batch in engine.batches(column.filter(column.value.notnull()).order_by("id")):
        lists = batch.column("value")
        owners = batch.column("id").to_numpy()[pc.list_parent_indices(lists).to_numpy()]
        values = pc.list_flatten(lists).cast(pa.string())
        # Doubled separators give empty values, which are none.
        real = pc.fill_null(pc.not_equal(values, ""), False)
        pieces.append(_encoded(values.filter(real), vocabulary))
        lengths += np.bincount(owners[real.to_numpy(zero_copy_only=False)], minlength=items + 1)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values_url, indptr_url = (f"items/features/{feature.name}.{part}.npy" for part in ("values", "indptr"))
    storage.write_npy(storage.join(data, values_url), np.concatenate([np.zeros(0, np.int32), *pieces]))
    storage.write_npy(storage.join(data, indptr_url), indptr)
    entry = Feature(
        name=feature.name,
        kind="token_seq",
        size=len(vocabulary) + FIRST_VALUE_ID,
        longest=max(int(lengths.max()), 1),
        values=values_url,
        indptr=indptr_url,
        vocabulary=vocabulary_url,
    )
    return entry, lengths > 0


def _write_float(
    engine: Engine, column: ir.Table, items: int, data: str, feature: FeatureRecipe
) -> tuple[Feature, np.ndarray]:
    number = engine.number(column.value) if isinstance(column.value.type(), dt.String) else column.value
    numbers = column.select("id", "popularity", value=number)
    usable = numbers.filter(finite(numbers.value))
    values = np.zeros(items + 1, dtype=np.float64)
    present = np.zeros(items + 1, dtype=bool)
    trained = np.zeros(items + 1, dtype=bool)
    for batch in engine.batches(usable.order_by("id")):
        ids = batch.column("id").to_numpy()
        values[ids] = batch.column("value").to_numpy()
        present[ids] = True
        trained[ids] = batch.column("popularity").to_numpy() > 0
    if feature.standardize and trained.any():
        # In numpy, in the order of ids: an engine's sums depend on its threads.
        mean, deviation = values[trained].mean(), values[trained].std()
        values[present] = (values[present] - mean) / (deviation or 1.0)
    url = f"items/features/{feature.name}.values.npy"
    storage.write_npy(storage.join(data, url), values.astype(np.float32))
    return Feature(name=feature.name, kind="float", size=1, values=url), present


def _write_column_vector(
    engine: Engine, column: ir.Table, items: int, data: str, feature: FeatureRecipe
) -> tuple[Feature, np.ndarray]:
    values: np.ndarray | None = None
    present = np.zeros(items + 1, dtype=bool)
    for batch in engine.batches(column.filter(column.value.length() > 0).order_by("id")):
        lists, ids = batch.column("value"), batch.column("id").to_numpy()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        if values is None:
            values = np.zeros((items + 1, int(lengths[0])), dtype=np.float32)
        if (lengths != values.shape[1]).any():
            sizes = f"{values.shape[1]} and {lengths[lengths != values.shape[1]][0]}"
            raise UserError(f"features.{feature.name}: vectors have different sizes ({sizes})")
        flat = pc.fill_null(pc.list_flatten(lists), 0.0).to_numpy(zero_copy_only=False)
        values[ids] = flat.reshape(len(ids), -1)
        present[ids] = True
    if values is None:
        raise UserError(f"features.{feature.name}: no item of the catalog has a vector")
    return _write_vector(data, feature.name, values), present


def _write_vector(data: str, name: str, values: np.ndarray) -> Feature:
    url = f"items/features/{name}.values.npy"
    storage.write_npy(storage.join(data, url), values)
    return Feature(name=name, kind="vector", size=values.shape[1], values=url)


_WRITERS: dict[str, Any] = {
    "token": _write_token,
    "token_seq": _write_token_seq,
    "float": _write_float,
    "vector": _write_column_vector,
}
