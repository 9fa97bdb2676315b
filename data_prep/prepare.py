"""The preparation from raw files to a data set: every step in its order, each counted."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_prep import output, output_lock, splits, steps, vocabulary, writer
from data_prep.bad_rows import QUARANTINE, write_record
from data_prep.engine import MICROSECONDS, Engine, Unread, open_engine
from data_prep.event_features import EventFeatures
from data_prep.features import ItemFeatures
from data_prep.fingerprint import fingerprints
from data_prep.known import Known, check_there, read_known
from data_prep.recipe import Recipe
from data_prep.report import Report
from data_prep.sources import VALID, EventFile, event_files, event_reader, staged_schema
from data_prep.value_vocabulary import write_parquet
from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.shard_format import POPULARITY, SPLITS, TOKENS, InputFile, ShardInfo, SplitInfo, write_manifest
from gru4recf_dist.errors import UserError

# The first event of a session is history only.
SHORTEST_WITH_TARGET = 2


def prepare(recipe: Recipe, append: bool = False) -> Report:
    """Run a recipe; the data set is at ``recipe.output`` when this returns.

    Args:
        append: add the events to the data set that is there, instead of replacing it.

    Raises:
        UserError: a file or column is missing, or a step leaves nothing over, or there is nothing that the events can
            be added to, or another preparation is at work on the output. The output is then as it was before (object
            storage, unless appending: if the error did not come while writing).
    """
    filesystems.hide_texts(recipe.spark.secrets)
    if not append:
        output.check_replaceable(recipe.output)
    files = event_files(recipe, append)
    features = ItemFeatures(recipe)
    inputs = fingerprints(file.url for file in files)
    if append:
        check_there(recipe.output)
    with output_lock.held(recipe.output):
        known = read_known(recipe, features.kinds, inputs) if append else Known()
        with open_engine(recipe) as engine:
            return _Preparation(recipe, engine, files, features, inputs, known).run()


class _Preparation:
    """The state that the steps share."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        files: list[EventFile],
        features: ItemFeatures,
        inputs: list[InputFile],
        known: Known,
    ) -> None:
        self.recipe = recipe
        self.engine = engine
        self.files = files
        self.features = features
        self.event_features = EventFeatures(recipe)
        self.inputs = inputs
        self.known = known
        self.appends = known.manifest is not None
        self.report = Report()
        self.unread: Unread
        self.bad = 0
        self.bad_table: ir.Table | None = None
        self.one_target = recipe.split.method == "leave_one_out"

    def run(self) -> Report:
        good = self._good(self._read())
        events, sessions, items = self._sessionize(good)
        known = self.known.stage(self.engine)
        parts, dropped = self._split(self._filter(events, items, known))
        seed, order = self.recipe.seed, self.recipe.item_order
        catalog = vocabulary.catalog(self.engine, parts, items, seed, known, self.known.items, order)
        catalog = self.engine.keep("catalog", catalog)
        self._count_splits(parts, dropped, catalog)
        streams = self._streams()
        numbers = {
            name: self.engine.keep(
                f"numbers_{name}",
                vocabulary.session_numbers(self.engine, name, part, sessions, seed, self.known.sessions(name)),
            )
            for name, part in parts.items()
        }
        writing = output.appending if self.appends else output.replacing
        with writing(self.recipe.output) as data:
            self._write_quarantine(data)
            count = self._write_items(catalog, data)
            written, rows = self.features.write(self.engine, catalog, count, data, self.known)
            described, more_rows = self.event_features.describe(self.engine, parts["train"], data, self.known)
            for row in (*rows, *more_rows):
                self.report.add_feature(row)
            infos = {}
            for name in SPLITS:
                dealt = streams if name == "train" else 1
                shard = self.recipe.shard_sessions
                first = self.known.sessions(name)
                events = self.event_features.numbered(parts[name])
                more = self.event_features.columns
                table = vocabulary.numbered_events(events, numbers[name], catalog, dealt, shard, first, more)
                infos[name] = self._write_split(name, table, dealt, data, described)
            manifest = self.known.manifest_with(
                self.recipe, count, streams, infos, written, described, self.inputs, self.report.rows
            )
            if self.appends:
                output.replace_manifest(data, self.known.content, manifest)
            else:
                write_manifest(data, manifest)
        return self.report

    def _read(self) -> ir.Table:
        """Stage the raw rows and judge each."""
        reader = event_reader(self.recipe, self.files)
        within = self.recipe.input.time_within is not None
        schema = staged_schema(reader.time, within, self.event_features.columns)
        raw, self.unread = self.engine.stage_files("raw", schema, len(self.files), reader)
        return steps.judged(self.engine, raw, self.recipe.input.time_format)

    def _good(self, judged: ir.Table) -> ir.Table:
        columns = judged.agg(rows=judged.count(), bad=judged.reason.count())
        counts = self.engine.row(columns)
        unread, left_out = len(self.unread), self.unread.left_out
        if not counts["rows"]:
            bad = next(iter(self.unread), None)
            reason = f" (line {bad['line']}: {bad['reason']})" if bad else ""
            if left_out:
                reason = f" (input.keep leaves out all of its {left_out} rows)"
            raise UserError(f"{self.files[0].url}: no events in the input{reason}")
        self.bad = counts["bad"] + unread
        plural = "s" if len(self.files) > 1 else ""
        read = counts["rows"] + unread
        self.report.add("read", {"events": read + left_out}, note=f"{len(self.files)} file{plural}")
        if self.recipe.input.keep:
            self.report.add("keep rows", {"events": read}, note=f"by {', '.join(self.recipe.input.keep)}")
        note = f"{self.bad} rows quarantined" if self.bad else ""
        # Where nothing is bad the engine need not judge every row again in each of the next steps.
        good = judged
        if counts["bad"]:
            good = judged.filter(judged.reason.isnull())
            # Kept apart, so that the raw rows can go long before the end.
            self.bad_table = self.engine.keep("bad", judged.filter(judged.reason.notnull()))
        if counts["bad"] == counts["rows"]:
            first = next(self._quarantined())
            note = f"{first['file']}: line {first['line']}: {first['reason']}"
        self.report.add("drop bad rows", {"events": counts["rows"] - counts["bad"]}, note=note)
        if "parsed_within" in good.columns:
            good = self.engine.keep("ordered", steps.ordered_within(self.engine, good))
        if self.recipe.deduplicate:
            good = self.engine.keep("deduplicated", steps.deduplicated(good))
            self.report.add("deduplicate", {"events": self._count(good)})
        return good

    def _sessionize(self, good: ir.Table) -> tuple[ir.Table, ir.Table, ir.Table]:
        """Events in codes; the sessions' codes and keys; the items' codes and tokens."""
        sessions = self.engine.keep("session_codes", steps.codes(good, "session", "part"))
        items = self.engine.keep("item_codes", steps.codes(good, "item"))
        coded = self.event_features.carried(self.engine, good, steps.coded(good, sessions, items))
        events = self.engine.keep("events", coded)
        for name in ("raw", "ranked_within", "ordered", "deduplicated"):
            self.engine.drop(name)
        gap = self.recipe.session_gap
        counts = {name: self._count(table) for name, table in (("sessions", sessions), ("events", events))}
        self.report.add("users" if gap else "sessions", {**counts, "items": self._count(items)})
        if gap is None:
            return events, sessions.mutate(key=sessions.session), items
        if self.recipe.input.time_format == "datetime":
            gap *= MICROSECONDS
        numbered = self.engine.keep("numbered", steps.cut_by_gap(events, gap))
        cut = self.engine.keep("gap_sessions", steps.gap_sessions(numbered, sessions))
        self.engine.drop("events")
        events = self.engine.keep("events", steps.with_gap_sessions(numbered, cut, self.event_features.columns))
        self.engine.drop("numbered")
        self._add("sessionize", events)
        return events, cut.select("code", "key"), items

    def _filter(self, events: ir.Table, items: ir.Table, known: ir.Table | None) -> ir.Table:
        """Drop short sessions and rare items (no known ones); the events left, each with its place in its session."""
        shortest, support = self.recipe.min_session_length, self.recipe.min_item_support
        note = f"of fewer than {shortest} events"
        if support == 1:
            placed = self.engine.keep("placed", steps.placed(events))
            self.engine.drop("events")
            long_enough = placed.filter(placed.length >= shortest)
            self._add("drop short sessions", long_enough, note=note)
            return long_enough
        events = self.engine.keep("long_enough", steps.without_short(events, shortest))
        self.engine.drop("events")
        self._add("drop short sessions", events, note=note)
        exempt, which = None, ""
        if known is not None:
            named = items.select(token="item", item="code")
            exempt, which = self.engine.keep("exempt", named.semi_join(known, "token").select("item")), "new "
        events, rounds = steps.k_core(self.engine, events, support, shortest, exempt)
        self._add("k-core filter", events, note=f"{which}items of at least {support} events, {rounds} rounds")
        return self.engine.keep("placed", steps.placed(events))

    def _split(self, placed: ir.Table) -> tuple[dict[str, ir.Table], dict[str, ir.Table]]:
        """The stored sessions of train, valid and test; the first events of those left out for lack of a target."""
        valid_given = any(file.part == VALID for file in self.files)
        settings, time_format = self.recipe.split, self.recipe.input.time_format
        parts = splits.split(self.engine, placed, settings, time_format, valid_given)
        kept = {name: part.filter(part.stored >= SHORTEST_WITH_TARGET) for name, part in parts.items()}
        dropped = {
            name: part.filter((part.stored < SHORTEST_WITH_TARGET) & (part.place == 0)) for name, part in parts.items()
        }
        return kept, dropped

    def _count_splits(self, parts: dict[str, ir.Table], dropped: dict[str, ir.Table], catalog: ir.Table) -> None:
        for name, part in parts.items():
            counts = self.engine.row(steps.totals(part))
            without = self._count(dropped[name])
            # What is held out of an append may be nothing; what is trained on may not.
            may_be_empty = self.appends and name != "train"
            if not counts["events"] and not may_be_empty:
                raise UserError(f"split: no {name} session with a target is left ({without} without one)")
            more: dict[str, Any] = {"targets": counts["events"] - counts["sessions"]}
            if name != "train":
                last_only = (part.place == part.stored - 1) if self.one_target else (part.place > 0)
                joined = part.filter(last_only).join(catalog, "item")
                untrained = (joined.popularity == 0).cast("int64").sum().fill_null(0)
                found = self.engine.row(joined.agg(targets=joined.count(), untrained=untrained))
                more = {"targets": found["targets"], "untrained_targets": int(found["untrained"])}
                more["untrained_share"] = round(more["untrained_targets"] / max(more["targets"], 1), 6)
            if without:
                more["note"] = f"{without:,} sessions without a target dropped"
                more["sessions_without_target"] = without
            self.report.add(f"split: {name}", counts, may_be_empty, **more)

    def _streams(self) -> int:
        if self.known.manifest is not None:
            return self.known.manifest.streams
        sessions = next(row["sessions"] for row in self.report.rows if row["step"] == "split: train")
        return self.recipe.streams or writer.choose_streams(sessions)

    def _count(self, table: ir.Table) -> int:
        return self.engine.row(table.agg(rows=table.count()))["rows"]

    def _add(self, step: str, events: ir.Table, **more: Any) -> None:
        self.report.add(step, self.engine.row(steps.totals(events)), **more)

    def _quarantined(self) -> Iterator[dict[str, Any]]:
        """Bad rows of the reader and of the engine, in the order of files and lines."""
        order = {file.url: number for number, file in enumerate(self.files)}

        def from_engine() -> Iterator[dict[str, Any]]:
            if self.bad_table is None:
                return
            # As they stand in the file; `within` is there with input.time_within only.
            raw = [name for name in ("session", "item", "time", "within") if name in self.bad_table.columns]
            chosen = self.bad_table.order_by("ordinal").select("file", "line", "reason", *raw)
            for batch in self.engine.batches(chosen):
                for row in batch.to_pylist():
                    values = {name: row[name] for name in raw}
                    url = self.files[row["file"]].url
                    yield {"file": url, "line": row["line"], "reason": row["reason"], "values": values}

        return heapq.merge(self.unread, from_engine(), key=lambda record: (order[record["file"]], record["line"]))

    def _write_quarantine(self, data: str) -> None:
        if not self.bad:
            return
        with storage.open_atomic(storage.join(data, self.known.named(QUARANTINE))) as stream:
            for record in self._quarantined():
                write_record(stream, record)

    def _write_items(self, catalog: ir.Table, data: str) -> int:
        """Tokens and popularity; gives N."""
        first_tokens, before = self.known.read_items()
        fresh = catalog.filter(catalog.id > self.known.items)
        count = self.known.items + self._count(fresh)
        popularity = np.zeros(count + 1, dtype=np.int64)
        popularity[: len(before)] = before
        for batch in self.engine.batches(catalog.select("id", "popularity")):
            popularity[batch.column("id").to_numpy()] = batch.column("popularity").to_numpy()
        tokens = [first_tokens]
        for batch in self.engine.batches(fresh.select("id", "token").order_by("id")):
            tokens.append(batch.column("token").cast(pa.string()))
        ids = np.arange(1, count + 1, dtype=np.int32)
        named = pa.table({"id": ids, "token": pa.concat_arrays(tokens)})
        write_parquet(storage.join(data, self.known.named(TOKENS)), named)
        storage.write_npy(storage.join(data, self.known.named(POPULARITY)), popularity)
        return count

    def _write_split(
        self, name: str, table: ir.Table, streams: int, data: str, event_features: list[EventFeature]
    ) -> SplitInfo:
        total = next(row["events"] for row in self.report.rows if row.get("step") == f"split: {name}")
        write = functools.partial(
            writer.write_described,
            data=data,
            split=name,
            streams=streams,
            shard_sessions=self.recipe.shard_sessions,
            block_sessions=self.recipe.block_sessions,
            last_event_only=self.one_target and name != "train",
            first_number=self.known.sessions(name),
            earlier_shards=self.known.shards(name, streams),
            event_features=event_features,
            store_times=self.recipe.store_times,
        )
        needs_times = self.recipe.store_times or any(feature.kind == "time_gap" for feature in event_features)
        columns = ["number", "item", *(["time"] if needs_times else []), *self.event_features.columns]
        shards = []
        with tqdm(total=total, desc=f"writing {name}", unit=" events", unit_scale=True, disable=None) as bar:
            for text in self.engine.run_sorted(
                table, columns, together=("stream", "shard"), order=("stream", "number", "place"), task=write
            ):
                shards.append(ShardInfo.model_validate_json(text))
                bar.update(shards[-1].events)
        return writer.split_info(shards)
