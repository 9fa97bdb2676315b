"""The item tables of a recipe: files of any format, wide or long, as one value of each feature for each item."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep import readers
from data_prep.bad_rows import BadRows
from data_prep.columns import Column, ColumnKind, Request, convert
from data_prep.engine import Engine, finite
from data_prep.feature_recipes import FeatureRecipe
from data_prep.recipe import ItemTable, Layout, Recipe
from data_prep.sources import expand, recbole_name
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError

RECBOLE_KINDS = {"token": "token", "token_seq": "token_seq", "float": "float", "float_seq": "vector"}
COLUMN_KINDS: dict[str, ColumnKind] = {"token": "text", "token_seq": "texts", "float": "number", "vector": "numbers"}
# Floats stay text until the engine judges which of them are numbers.
STAGED_TYPES = {
    "token": pa.string(),
    "token_seq": pa.list_(pa.string()),
    "float": pa.string(),
    "vector": pa.list_(pa.float64()),
}


def item_tables(recipe: Recipe) -> list[FeatureTable]:
    """The tables that features of ``recipe`` come from.

    Raises:
        UserError: a file or column is missing, or a kind is neither given nor in a RecBole header.
    """
    tables = []
    for name, settings in {None: recipe.items, **recipe.item_tables}.items():
        features = [feature for feature in recipe.features if feature.npy is None and feature.table == name]
        if features:
            key = "items" if name is None else f"item_tables.{name}"
            tables.append(FeatureTable(key, len(tables), recipe, settings, features))
    return tables


class FeatureTable:
    """One item table and the features that come from it.

    Attributes:
        kinds: feature name -> token, token_seq, float or vector.
    """

    def __init__(
        self, key: str, number: int, recipe: Recipe, settings: ItemTable, features: list[FeatureRecipe]
    ) -> None:
        self._key = key
        # Names of tables and features may hold what an engine does not take in a name: it sees numbers.
        self._staged = f"item_table_{number}"
        self._settings = settings
        self._layout = _layout(recipe, settings)
        self._urls = self._find_files(recipe)
        kinds = [self._kind(feature) for feature in features]
        self.kinds = {feature.name: kind for feature, kind in zip(features, kinds, strict=True)}
        pairs = zip(features, kinds, strict=True)
        self._values = [_Value.of(feature, kind, f"value_{n}") for n, (feature, kind) in enumerate(pairs)]
        # A missing column shows in the first rows.
        next(self._rows(), None)

    def _find_files(self, recipe: Recipe) -> list[str]:
        if self._settings.file is not None:
            return expand(recipe.source, [self._settings.file])
        if self._key != "items" or self._layout.format != "recbole":
            raise UserError(f"{self._key}.file must be given: the recipe lists features")
        url = storage.join(recipe.source, f"{recbole_name(recipe.source)}.item")
        if not storage.exists(url):
            raise UserError(f"{url}: no such file (the item table of the features)")
        return [url]

    def _kind(self, feature: FeatureRecipe) -> str:
        kind: str | None = feature.kind
        if self._settings.property is None and self._layout.format in ("recbole", "csv", "tsv"):
            column = feature.column or feature.name
            header = readers.column_names(self._urls[0], self._layout)
            if column not in header:
                raise readers.missing_column(self._urls[0], column, list(header))
            if kind is None and self._layout.format == "recbole":
                if header[column] not in RECBOLE_KINDS:
                    raise UserError(f"{self._urls[0]}: column '{column}' has the unknown type '{header[column]}'")
                kind = RECBOLE_KINDS[header[column]]
        if kind is None:
            raise UserError(f"features.{feature.name}: kind must be given (token, token_seq, float or vector)")
        if kind == "vector" and (feature.extract or feature.remove):
            raise UserError(f"features.{feature.name}: extract and remove are not for vectors")
        return kind

    def described(self, engine: Engine, catalog: ir.Table) -> dict[str, ir.Table]:
        """For each feature the items of ``catalog`` that have a row: `id`, `popularity`, `value`.

        Raises:
            UserError: no row of a long table has a feature's property.
        """
        staged = engine.stage(self._staged, self._schema(), self._rows())
        if self._settings.property is None:
            joined = self._joined(engine, "described", staged, catalog)
            return {value.name: self._column(joined, value) for value in self._values}
        found = {}
        for number, value in enumerate(self._values):
            rows = staged.filter(staged.property == value.column)
            if not engine.row(rows.agg(rows=rows.count()))["rows"]:
                raise UserError(f"{self._urls[0]}: no row has the property '{value.column}' (features.{value.name})")
            found[value.name] = self._column(self._joined(engine, f"described_{number}", rows, catalog), value)
        return found

    def _joined(self, engine: Engine, name: str, rows: ir.Table, catalog: ir.Table) -> ir.Table:
        """The row that counts of every item of the catalog."""
        if self._settings.time is None:
            first = rows.group_by("item").agg(ordinal=rows.ordinal.min())
            chosen = rows.semi_join(first, "ordinal")
        else:
            number = engine.number(rows.time)
            time = ibis.ifelse(finite(number), number, ibis.null("float64"))
            latest = [time.isnull(), ibis.desc(time), rows.ordinal]
            ranked = rows.mutate(rank=ibis.row_number().over(group_by="item", order_by=latest))
            chosen = ranked.filter(ranked.rank == 0)
        values = chosen.select("item", *(value.staged for value in self._values))
        joined = catalog.select("id", "popularity", item="token").join(values, "item")
        return engine.keep(f"{self._staged}_{name}", joined)

    @staticmethod
    def _column(joined: ir.Table, value: _Value) -> ir.Table:
        return joined.select("id", "popularity", value=joined[value.staged])

    def _schema(self) -> pa.Schema:
        more = {name: pa.string() for name in ("property", "time") if getattr(self._settings, name)}
        values = {value.staged: STAGED_TYPES[value.kind] for value in self._values}
        return pa.schema({"ordinal": pa.int64(), "item": pa.string(), **more, **values})

    def _rows(self) -> Iterator[pa.Table]:
        """The rows with a value of some feature, numbered through all files."""
        settings, bad_rows = self._settings, BadRows()
        columns = {"item": Column(settings.item, "text")}
        if settings.property is None:
            columns |= {
                value.staged: Column(value.column, value.column_kind, value.separator) for value in self._values
            }
        else:
            columns |= {"property": Column(settings.property, "text"), "value": Column(str(settings.value), "text")}
        if settings.time is not None:
            columns["time"] = Column(settings.time, "number")
        last = 0
        for url in self._urls:
            ordinal = last
            for batch in readers.read(url, Request(self._layout, columns, bad_rows)):
                last = ordinal + int(batch.lines[-1]) if len(batch.lines) else last
                yield self._typed(url, ordinal + batch.lines, batch.columns)
            # Unlike a bad event, a bad item row has no one to notice it later.
            for record in bad_rows:
                raise UserError(f"{record['file']}: line {record['line']}: {record['reason']}")

    def _typed(self, url: str, ordinals: np.ndarray, columns: dict[str, pa.Array]) -> pa.Table:
        rows = pa.table({"ordinal": ordinals, **columns})
        if self._settings.property is not None:
            # Most properties of a long table are of no feature: they go here, before anything handles them.
            wanted = pa.array(sorted({value.column for value in self._values}), pa.string())
            rows = rows.filter(pc.is_in(rows["property"], value_set=wanted)).combine_chunks()
        typed = {name: rows[name] for name in ("ordinal", "item", "property") if name in rows.column_names}
        if self._settings.time is not None:
            typed["time"] = rows["time"].cast(pa.string())
        for value in self._values:
            typed[value.staged] = value.read(rows, url)
        return pa.table(typed)


@dataclass(frozen=True)
class _Value:
    """How one feature is read from a table's rows; ``staged`` is its column in the engine."""

    name: str
    kind: str
    column: str
    separator: str
    staged: str
    clean: Callable[[str], str | None] | None

    @classmethod
    def of(cls, feature: FeatureRecipe, kind: str, staged: str) -> _Value:
        return cls(feature.name, kind, feature.column or feature.name, feature.separator, staged, _cleaner(feature))

    @property
    def column_kind(self) -> ColumnKind:
        return COLUMN_KINDS[self.kind]

    def read(self, rows: pa.Table, url: str) -> pa.ChunkedArray | pa.Array:
        if self.staged in rows.column_names:
            values = rows[self.staged]
        else:
            mine = pc.equal(rows["property"], self.column)
            text = pc.if_else(mine, rows["value"], pa.scalar(None, pa.string()))
            values = convert(_one_chunk(text), Column(self.column, self.column_kind, self.separator), url)
        if self.kind == "float":
            values = values.cast(pa.string())
        if self.clean is None:
            return values
        values = _one_chunk(values)
        return _cleaned_lists(values, self.clean) if self.kind == "token_seq" else _cleaned(values, self.clean)


def _cleaner(feature: FeatureRecipe) -> Callable[[str], str | None] | None:
    """What `extract` and then `remove` make of a value; None if there is nothing to do."""
    if feature.extract is None and feature.remove is None:
        return None
    pattern = re.compile(feature.extract or "(?s)(.*)")
    removed = str.maketrans("", "", feature.remove or "")

    def clean(text: str) -> str | None:
        found = pattern.search(text)
        # A group that took no part in the match is none too.
        return found[1].translate(removed) if found and found[1] is not None else None

    return clean


def _one_chunk(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _cleaned(values: pa.Array, clean: Callable[[str], str | None]) -> pa.Array:
    """Each distinct text cleaned once."""
    encoded = values.dictionary_encode()
    texts = [None if text is None else clean(text) for text in encoded.dictionary.to_pylist()]
    return pa.array(texts, pa.string()).take(encoded.indices)


def _cleaned_lists(lists: pa.Array, clean: Callable[[str], str | None]) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, _cleaned(pc.list_flatten(lists), clean), mask=lists.is_null())


def _layout(recipe: Recipe, settings: ItemTable) -> Layout:
    of = settings.format or recipe.input.format
    inherited = recipe.input.encoding if of == recipe.input.format else None
    return Layout(
        format=of,
        delimiter=settings.delimiter or recipe.input.delimiter,
        encoding=settings.encoding or inherited,
        header=settings.header,
        columns=settings.columns,
    )
