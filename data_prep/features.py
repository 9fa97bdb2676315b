"""Item features: read, bring to item ids, build vocabularies from training items, write columns."""

from __future__ import annotations

from typing import Any

import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import readers, value_vocabulary
from data_prep.columns import in_arrow_memory
from data_prep.engine import Engine, finite
from data_prep.feature_recipes import FeatureRecipe
from data_prep.item_tables import item_tables
from data_prep.known import Known
from data_prep.recipe import Recipe
from data_prep.sources import resolve
from data_prep.value_vocabulary import FIRST_VALUE_ID
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import PADDING_ID, UNKNOWN_VALUE_ID, Feature
from gru4recf_dist.errors import UserError

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

    def write(
        self, engine: Engine, catalog: ir.Table, items: int, data: str, known: Known
    ) -> tuple[list[Feature], list[dict]]:
        """Write all features of ``catalog`` (`token`, `id`, `popularity`; N = ``items``) below ``data``.

        Items of ``known`` keep the values that they have there.

        Returns:
            Their descriptions for the manifest, and their rows of the report.
        """
        catalog = catalog.filter(catalog.id > known.items)
        columns: dict[str, ir.Table] = {}
        for table in self._tables:
            columns |= table.described(engine, catalog)
        written, rows = [], []
        for feature in self._recipe.features:
            kind, files = self.kinds[feature.name], _Files(feature.name, data, known)
            if feature.npy is not None:
                values, present = self._npy_vectors(engine, catalog, feature, items)
                entry = _write_vector(feature.name, values, files)
            else:
                entry, present = _WRITERS[kind](engine, columns[feature.name], items, files, feature)
            written.append(entry)
            without = int(np.count_nonzero(~present[known.items + 1 :]))
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
            values[ids[here]] = _finite_vectors(url, chunk[rows[here] - start])
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


class _Files:
    """The files of one feature: those to write and, when a data set is appended to, those that it has."""

    def __init__(self, name: str, data: str, known: Known) -> None:
        self._name, self._data, self._known = name, data, known
        self.before = known.feature(name)
        self.known_items = known.items

    def url(self, part: str) -> str:
        """The name of a part (`values.npy`, say) for the manifest."""
        return self._known.named(f"items/features/{self._name}.{part}")

    def write(self, part: str, values: np.ndarray) -> str:
        """Write a `.npy`; gives its name for the manifest."""
        url = self.url(f"{part}.npy")
        storage.write_npy(storage.join(self._data, url), values)
        return url

    def read_before(self, url: str | None) -> np.ndarray:
        """A `.npy` of the known items, whose name is in ``before``."""
        return self._known.read_values(str(url))

    def extended(self, values: np.ndarray) -> np.ndarray:
        """``values`` [N+1, ...] with those of the known items put in."""
        if self.before is not None:
            before = self.read_before(self.before.values)
            if len(before) != self.known_items + 1 or before.shape[1:] != values.shape[1:]:
                raise UserError(f"{self.before.values}: has shape {before.shape}, which does not fit the manifest")
            values[: len(before)] = before
        return values

    def vocabulary(self, engine: Engine, values: ir.Table, min_count: int) -> tuple[pa.Array, str]:
        """Values of at least ``min_count`` training items, behind those that there are already.

        Returns:
            the vocabulary, and the name of the file that it was written to.
        """
        known = pa.array([], pa.string())
        if self.before is not None:
            known = self._known.read_tokens(str(self.before.vocabulary), self.before.size - FIRST_VALUE_ID)
        seen = values.filter((values.popularity > 0) & (values.value != ""))
        counts = seen.group_by("value").agg(count=seen.count())
        vocabulary, url = value_vocabulary.grown(engine, counts, known, min_count), self.url("vocabulary.parquet")
        value_vocabulary.write(storage.join(self._data, url), vocabulary)
        return vocabulary, url


def _encoded(values: pa.Array, vocabulary: pa.Array) -> np.ndarray:
    """Vocabulary ids of non-empty values; 1 for those that are not in it."""
    positions = pc.index_in(values.cast(pa.string()), value_set=vocabulary)
    ids = pc.add(positions, FIRST_VALUE_ID)
    return pc.fill_null(ids, UNKNOWN_VALUE_ID).to_numpy(zero_copy_only=False).astype(np.int32)


def _write_token(
    engine: Engine, column: ir.Table, items: int, files: _Files, feature: FeatureRecipe
) -> tuple[Feature, np.ndarray]:
    vocabulary, vocabulary_url = files.vocabulary(engine, column, feature.min_count)
    values = files.extended(np.full(items + 1, PADDING_ID, dtype=np.int32))
    for batch in engine.batches(column.filter(column.value != "").order_by("id")):
        values[batch.column("id").to_numpy()] = _encoded(batch.column("value"), vocabulary)
    url = files.write("values", values)
    size = len(vocabulary) + FIRST_VALUE_ID
    entry = Feature(name=feature.name, kind="token", size=size, values=url, vocabulary=vocabulary_url)
    return entry, values > 0


def _write_token_seq(
    engine: Engine, column: ir.Table, items: int, files: _Files, feature: FeatureRecipe
) -> tuple[Feature, np.ndarray]:
    flat = column.select("popularity", value=column.value.unnest())
    vocabulary, vocabulary_url = files.vocabulary(engine, flat, feature.min_count)
    lengths = np.zeros(items + 1, dtype=np.int64)
    pieces = [np.zeros(0, np.int32)]
    if files.before is not None:
        pieces = [files.read_before(files.before.values)]
        lengths[: files.known_items + 1] = np.diff(files.read_before(files.before.indptr))
    for batch in engine.batches(column.filter(column.value.notnull()).order_by("id")):
        lists = batch.column("value")
        owners = batch.column("id").to_numpy()[pc.list_parent_indices(lists).to_numpy()]
        values = pc.list_flatten(lists).cast(pa.string())
        # Doubled separators give empty values, which are none.
        real = pc.fill_null(pc.not_equal(values, ""), False)
        pieces.append(_encoded(values.filter(real), vocabulary))
        lengths += np.bincount(owners[real.to_numpy(zero_copy_only=False)], minlength=items + 1)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values_url, indptr_url = files.write("values", np.concatenate(pieces)), files.write("indptr", indptr)
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
    engine: Engine, column: ir.Table, items: int, files: _Files, feature: FeatureRecipe
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
    mean = deviation = None
    if feature.standardize:
        if files.before is not None:
            mean, deviation = files.before.mean, files.before.deviation
        elif trained.any():
            # In numpy, in the order of ids: an engine's sums depend on its threads.
            mean, deviation = float(values[trained].mean()), float(values[trained].std()) or 1.0
        else:
            mean, deviation = 0.0, 1.0
        values[present] = (values[present] - mean) / deviation
    with np.errstate(over="ignore"):
        column_values = values.astype(np.float32)
    # What is no number in float32 is none.
    present &= np.isfinite(column_values)
    column_values[~present] = np.nan if feature.flag_missing else 0.0
    # Of padding, which is no item, nothing is missing.
    column_values[PADDING_ID] = 0.0
    column_values = files.extended(column_values)
    missing = bool(np.isnan(column_values).any())
    url = files.write("values", column_values)
    entry = Feature(
        name=feature.name, kind="float", size=1, values=url, mean=mean, deviation=deviation, missing=missing
    )
    return entry, present


def _write_column_vector(
    engine: Engine, column: ir.Table, items: int, files: _Files, feature: FeatureRecipe
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
        flat = pc.fill_null(pc.list_flatten(lists).cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
        values[ids] = _finite_vectors(f"features.{feature.name}", flat.reshape(len(ids), -1))
        present[ids] = True
    if values is None and files.before is not None:
        values = np.zeros((items + 1, files.before.size), dtype=np.float32)
    if values is None:
        raise UserError(f"features.{feature.name}: no item of the catalog has a vector")
    return _write_vector(feature.name, values, files), present


def _finite_vectors(place: str, vectors: np.ndarray) -> np.ndarray:
    """``vectors`` as float32, every element of which is a number."""
    with np.errstate(over="ignore"):
        vectors = vectors.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{place}: a vector has an element that is missing or no finite float32 number")
    return vectors


def _write_vector(name: str, values: np.ndarray, files: _Files) -> Feature:
    size = values.shape[1]
    if files.before is not None and files.before.size != size:
        raise UserError(f"features.{name}: vectors of size {size}, but the data set has size {files.before.size}")
    return Feature(name=name, kind="vector", size=size, values=files.write("values", files.extended(values)))


_WRITERS: dict[str, Any] = {
    "token": _write_token,
    "token_seq": _write_token_seq,
    "float": _write_float,
    "vector": _write_column_vector,
}
