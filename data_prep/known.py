"""What a data set holds before events are added to it. Preparing one is appending to a data set that holds nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from data_prep.engine import Engine
from data_prep.recipe import Recipe
from gru4recf_dist.data import storage
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.shard_format import (
    MANIFEST,
    POPULARITY,
    TOKENS,
    Append,
    Feature,
    InputFile,
    Manifest,
    SplitInfo,
    file_url,
    read_manifest,
)
from gru4recf_dist.data.tokens import TokenFile
from gru4recf_dist.errors import UserError

# Rows that are staged at a time.
_BATCH_ROWS = 1 << 20
_SCHEMA = pa.schema({"token": pa.string(), "id": pa.int64(), "popularity": pa.int64()})


@dataclass(frozen=True)
class Known:
    """A data set as it is before an append.

    Attributes:
        data: its folder.
        manifest: None if there is no data set yet.
        content: the manifest as it lies there.
    """

    data: str = ""
    manifest: Manifest | None = None
    content: bytes = b""

    @property
    def items(self) -> int:
        return self.manifest.items if self.manifest else 0

    def sessions(self, split: str) -> int:
        return self.manifest.splits[split].sessions if self.manifest else 0

    def shards(self, split: str, streams: int) -> list[int]:
        """How many shards each of the ``streams`` of a split has; valid and test are one stream."""
        if self.manifest is None:
            return [0] * streams
        shards = self.manifest.splits[split].shards
        if split != "train":
            return [len(shards)]
        counts = Counter(shard.stream for shard in shards)
        return [counts[stream] for stream in range(streams)]

    def feature(self, name: str) -> Feature | None:
        return self.manifest.feature(name) if self.manifest else None

    def event_feature(self, name: str) -> EventFeature | None:
        return self.manifest.event_feature(name) if self.manifest else None

    def named(self, name: str) -> str:
        """The name of a file that is written anew with every append: no manifest before names it."""
        if self.manifest is None:
            return name
        stem, dot, ending = name.rpartition(".")
        return f"{stem}-{len(self.manifest.ancestors) + 1}{dot}{ending}"

    def read_values(self, name: str) -> np.ndarray:
        """A `.npy` that the manifest names."""
        return storage.read_npy_rows(file_url(self.data, name))

    def read_tokens(self, name: str, expected: int) -> pa.Array:
        """The ``expected`` tokens of a file that the manifest names, in the order of ids; errors as `TokenFile`."""
        batches = list(TokenFile(file_url(self.data, name), expected).batches())
        return pa.chunked_array(batches, pa.large_string()).cast(pa.string()).combine_chunks()

    def read_items(self) -> tuple[pa.Array, np.ndarray]:
        """The token of every item from 1 on; its training events, int64 [N+1].

        Raises:
            UserError: a file is missing, or does not fit the manifest.
        """
        if self.manifest is None:
            return pa.array([], pa.string()), np.zeros(1, np.int64)
        tokens = self.read_tokens(self.manifest.tokens, self.items)
        name, expected = self.manifest.popularity, self.items + 1
        popularity = self.read_values(name)
        if len(popularity) != expected:
            raise UserError(f"{file_url(self.data, name)}: has {len(popularity)} rows, the manifest says {expected}")
        return tokens, popularity

    def stage(self, engine: Engine) -> ir.Table | None:
        """The items as a table of the engine: `token`, `id`, `popularity`; None if there is no data set yet."""
        if self.manifest is None:
            return None
        tokens, popularity = self.read_items()

        def batches() -> Iterator[pa.Table]:
            for start in range(0, self.items, _BATCH_ROWS):
                part = slice(start, min(start + _BATCH_ROWS, self.items))
                ids = np.arange(part.start + 1, part.stop + 1)
                yield pa.table([tokens[part], ids, popularity[ids]], schema=_SCHEMA)

        return engine.stage("known_items", _SCHEMA, batches())

    def manifest_with(
        self,
        recipe: Recipe,
        items: int,
        streams: int,
        splits: dict[str, SplitInfo],
        features: list[Feature],
        event_features: list[EventFeature],
        inputs: list[InputFile],
        report: list[dict],
    ) -> Manifest:
        """The manifest of the data set once the rest is added: N is then ``items``, ``splits`` are the new shards."""
        told = recipe.model_dump(mode="json", exclude={"storage"})
        old = self.manifest
        if old is not None:
            splits = {name: _joined(old.splits[name], info) for name, info in splits.items()}
            inputs = [*old.inputs, *inputs]
        return Manifest(
            name=recipe.name,
            seed=recipe.seed,
            items=items,
            streams=streams,
            protocol="leave_one_out" if recipe.split.method == "leave_one_out" else "every_position",
            splits=splits,
            features=features,
            event_features=event_features,
            ancestors=[*old.ancestors, old.training_digest] if old else [],
            tokens=self.named(TOKENS),
            popularity=self.named(POPULARITY),
            inputs=inputs,
            report=old.report if old else report,
            recipe=old.recipe if old else told,
            appends=[*old.appends, Append(recipe=told, report=report)] if old else [],
        )


def check_there(data: str) -> None:
    """Raises UserError if there is no data set to append to."""
    if not storage.exists(storage.join(data, MANIFEST)):
        raise UserError(f"output: {data}: there is no data set to append to")


def read_known(recipe: Recipe, kinds: dict[str, str], inputs: list[InputFile]) -> Known:
    """The data set at ``recipe.output``, once it is known that what ``recipe`` makes can be added to it.

    Args:
        kinds: of the recipe's features.
        inputs: its event files.

    Raises:
        UserError: the data set is damaged, or the recipe does not fit it, or an event file is in it already.
    """
    data = recipe.output
    content = storage.read_bytes(storage.join(data, MANIFEST))
    manifest = read_manifest(data)
    _check_keys(recipe, kinds, manifest, data)
    there = {(file.bytes, file.sha256): file.name for file in manifest.inputs}
    for file in inputs:
        name = there.get((file.bytes, file.sha256))
        if name is not None:
            raise UserError(f"source: {file.name}: the data set holds these events already (they came from {name})")
    return Known(data, manifest, content)


def _check_keys(recipe: Recipe, kinds: dict[str, str], manifest: Manifest, data: str) -> None:
    try:
        first = Recipe.model_validate(manifest.recipe)
    except ValidationError as error:
        raise UserError(f"output: {data}: was prepared by another version, which this one cannot append to") from error
    if first.split.method == "leave_one_out":
        raise UserError(
            "split.method: leave_one_out holds out the last events of each session, and stored sessions cannot be "
            "continued; prepare old and new events together, or split by time"
        )

    def shown(described: list[tuple[str, str]]) -> str:
        return ", ".join(f"{name} ({kind})" for name, kind in described) or "none"

    pairs = {
        "name": (recipe.name, manifest.name),
        "seed": (recipe.seed, manifest.seed),
        "streams": (recipe.streams or manifest.streams, manifest.streams),
        "split.method": (recipe.split.method, first.split.method),
        "store_times": (recipe.store_times, first.store_times),
        "features": (
            shown([(feature.name, kinds[feature.name]) for feature in recipe.features]),
            shown([(feature.name, feature.kind) for feature in manifest.features]),
        ),
        "event_features": (
            shown([(feature.name, feature.kind) for feature in recipe.event_features]),
            shown([(feature.name, feature.kind) for feature in manifest.event_features]),
        ),
    }
    if first.store_times or any(feature.kind == "time_gap" for feature in manifest.event_features):
        pairs["input.time_format"] = (recipe.input.time_format, first.input.time_format)
    told = {feature["name"]: feature for feature in manifest.recipe.get("features", [])}
    for now, then in zip(recipe.features, first.features, strict=False):
        pairs[f"features.{now.name}.standardize"] = (now.standardize, then.standardize)
        if kinds[now.name] == "float":
            # A recipe from before there was this key: missing numbers are 0 there, and cannot be told from others.
            flagged = "flag_missing" in told.get(now.name, {}) and then.flag_missing
            pairs[f"features.{now.name}.flag_missing"] = (now.flag_missing, flagged)
    for now, then in zip(recipe.event_features, first.event_features, strict=False):
        pairs[f"event_features.{now.name}.standardize"] = (now.standardize, then.standardize)
    for key, (now, then) in pairs.items():
        if now != then:
            raise UserError(f"{key}: {now}, but the data set at {data} was prepared with {then}")
    for feature in recipe.features:
        written = manifest.feature(feature.name)
        if feature.standardize and written.kind == "float" and written.mean is None:
            raise UserError(
                f"features.{feature.name}.standardize: the data set at {data} does not say by what it was scaled; "
                "prepare it anew"
            )


def _joined(old: SplitInfo, new: SplitInfo) -> SplitInfo:
    """The old shards, then the new ones."""
    return SplitInfo(
        sessions=old.sessions + new.sessions,
        events=old.events + new.events,
        targets=old.targets + new.targets,
        shards=[*old.shards, *new.shards],
    )
