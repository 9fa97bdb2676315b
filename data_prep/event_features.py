"""Event features: carried with the events as codes and numbers, and described once the training events are known.

The n-th of a recipe is the column `event_n`: text as it is read, then the code of the text (the ordinal of the first
event that has it), or a float64; null where missing. A time gap has no column: the shard writer sees the times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from data_prep import steps, value_vocabulary
from data_prep.engine import Engine
from data_prep.feature_recipes import EventFeatureRecipe
from data_prep.known import Known
from data_prep.recipe import Recipe
from data_prep.sources import event_columns
from gru4recf_dist.data import storage
from gru4recf_dist.data.event_columns import MICROSECONDS, MISSING_ID, UNKNOWN_ID, EventFeature, log_edges

_LARGEST = float(np.finfo(np.float32).max)
_IDS = pa.schema({"value": pa.string(), "id": pa.int64()})


class EventFeatures:
    """The event features of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        names = event_columns(recipe)
        numbered = {f"event_{n}": feature for n, feature in enumerate(recipe.event_features)}
        self._tokens = {name: feature for name, feature in numbered.items() if feature.kind == "token"}
        self._floats = {name: feature for name, feature in numbered.items() if feature.kind == "float"}
        # Of the events, in the order of the recipe.
        self.columns = list(names)
        self._texts: dict[str, ir.Table] = {}
        self._ids: dict[str, ir.Table] = {}

    def carried(self, engine: Engine, good: ir.Table, coded: ir.Table) -> ir.Table:
        """``coded`` events (`steps.coded`) with the columns of the event features.

        Args:
            good: the rows that the events come from, with the features as text.
        """
        if not self.columns:
            return coded
        texts = good.select("ordinal", *self.columns)
        numbers = {name: engine.number(texts[name]) for name in self._floats}
        # NaN and what is no number in float32 are missing.
        numbers = {
            name: ibis.ifelse(number.abs() <= _LARGEST, number, ibis.null("float64"))
            for name, number in numbers.items()
        }
        joined = coded.join(texts.mutate(**numbers), "ordinal")
        for name in self._tokens:
            filled = good.filter(good[name].notnull() & (good[name] != ""))
            self._texts[name] = engine.keep(f"{name}_codes", steps.codes(filled, name))
            codes = self._texts[name].select(text=name, code="code")
            joined = joined.left_join(codes, joined[name] == codes.text).drop("text", name).rename({name: "code"})
        return joined.select(*coded.columns, *self.columns)

    def describe(
        self, engine: Engine, train: ir.Table, data: str, known: Known
    ) -> tuple[list[EventFeature], list[dict]]:
        """Vocabularies (written below ``data``), scales and buckets, by the training events; those ``known`` stay.

        Returns:
            Their descriptions for the manifest, and their rows of the report.
        """
        counts = {name: train[name].isnull().cast("int64").sum().fill_null(0) for name in self.columns}
        without = engine.row(train.agg(**counts)) if counts else {}
        described, rows = [], []
        for number, recipe in enumerate(self._recipe.event_features):
            name, before = f"event_{number}", known.event_feature(recipe.name)
            if recipe.kind == "token":
                entry = self._token(engine, train, name, recipe, data, known, before)
            elif recipe.kind == "float":
                mean, deviation = _scale(engine, train, name, recipe, before)
                entry = EventFeature(name=recipe.name, kind="float", size=1, mean=mean, deviation=deviation)
            else:
                edges = before.edges if before else self._edges(engine, train, recipe)
                dates = self._recipe.input.time_format == "datetime"
                entry = EventFeature(name=recipe.name, kind="time_gap", size=len(edges) + 3, edges=edges, dates=dates)
            described.append(entry)
            rows.append(
                {
                    "event_feature": entry.name,
                    "kind": entry.kind,
                    "size": entry.size,
                    "events_without": without.get(name),
                }
            )
        return described, rows

    def numbered(self, events: ir.Table) -> ir.Table:
        """Events with vocabulary ids in place of codes; after `describe`."""
        for name, ids in self._ids.items():
            events = events.left_join(ids, events[name] == ids.code).drop("code")
            known = ibis.ifelse(events[name].isnull(), MISSING_ID, events.id.fill_null(UNKNOWN_ID))
            events = events.mutate(**{name: known.cast("int64")}).drop("id")
        return events

    def _token(
        self,
        engine: Engine,
        train: ir.Table,
        name: str,
        recipe: EventFeatureRecipe,
        data: str,
        known: Known,
        before: EventFeature | None,
    ) -> EventFeature:
        texts = self._texts[name].select(value=name, code="code")
        counts = train.group_by(train[name].name("code")).agg(count=train.count())
        values = pa.array([], pa.string())
        if before is not None:
            values = known.read_tokens(str(before.vocabulary), before.size - value_vocabulary.FIRST_VALUE_ID)
        vocabulary = value_vocabulary.grown(engine, counts.join(texts, "code"), values, recipe.min_count)
        url = known.named(f"items/features/{recipe.name}.vocabulary.parquet")
        value_vocabulary.write(storage.join(data, url), vocabulary)
        size = value_vocabulary.FIRST_VALUE_ID + len(vocabulary)
        ids = pa.array(np.arange(value_vocabulary.FIRST_VALUE_ID, size))
        staged = engine.stage(f"{name}_values", _IDS, iter([pa.table([vocabulary, ids], schema=_IDS)]))
        self._ids[name] = engine.keep(f"{name}_ids", texts.join(staged, "value").select("code", "id"))
        return EventFeature(name=recipe.name, kind="token", size=size, vocabulary=url)

    def _edges(self, engine: Engine, train: ir.Table, recipe: EventFeatureRecipe) -> list[float]:
        shortest, longest = recipe.shortest, recipe.longest
        if shortest is None or longest is None:
            before = train.time.lag().over(ibis.window(group_by="session", order_by="place"))
            gaps = train.select(gap=(train.time - before).cast("float64"))
            gaps = gaps.filter(gaps.gap > 0)
            found = engine.row(gaps.agg(shortest=gaps.gap.min(), longest=gaps.gap.max()))
            unit = MICROSECONDS if self._recipe.input.time_format == "datetime" else 1
            # Where all times are equal any bound will do.
            shortest = shortest or (found["shortest"] or unit) / unit
            longest = longest or (found["longest"] or unit) / unit
        return log_edges(shortest, longest, recipe.buckets)


def _scale(
    engine: Engine, train: ir.Table, name: str, recipe: EventFeatureRecipe, before: EventFeature | None
) -> tuple[float | None, float | None]:
    """Mean and deviation of the training events that have a number."""
    if not recipe.standardize:
        return None, None
    if before is not None:
        return before.mean, before.deviation
    filled = train.filter(train[name].notnull())
    counts = engine.keep(f"{name}_numbers", filled.group_by(filled[name].name("number")).agg(count=filled.count()))

    def numbers() -> Iterator[tuple[float, int]]:
        for batch in engine.batches(counts):
            yield from zip(batch.column("number").to_pylist(), batch.column("count").to_pylist(), strict=True)

    events = sum(count for _, count in numbers())
    if not events:
        return 0.0, 1.0
    # Exact sums: an engine's own, and the order of its rows, depend on its threads.
    mean = math.fsum(number * count for number, count in numbers()) / events
    variance = math.fsum((number - mean) ** 2 * count for number, count in numbers()) / events
    return mean, math.sqrt(variance) or 1.0
