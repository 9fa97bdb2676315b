"""The distributed model: the encoder, the sharded tables and the feature store, put together from data and config."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gru4recf_dist.config import Config, ModelConfig
from gru4recf_dist.data.event_columns import MISSING_ID, UNKNOWN_ID, EventFeature
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.subnets import BIAS_TABLE, ITEM_TABLE, event_subnet, has_item_subnet
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.candidates import CandidatePart, Candidates
from gru4recf_dist.table.feature_store import FeatureStore
from gru4recf_dist.table.item_table import Exchange, ShardedItemTable
from gru4recf_dist.table.partition import route
from gru4recf_dist.table.table_group import TableGroup

# In half precision the encoder's matrix products are computed, nothing is kept.
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def weight_dtype(precision: str) -> torch.dtype:
    """The type of the weights, of table and encoder."""
    return torch.float64 if precision == "fp64" else torch.float32


def feature_specs(config: ModelConfig, manifest: Manifest) -> list[FeatureSpec]:
    """The item features that the encoder uses.

    Raises:
        UserError: a named feature is not in the data set, or there is none where the fusion needs one.
    """
    _check_named(config, manifest)
    if config.fusion == "item_only":
        return []
    if config.feature_groups is not None:
        names = [name for group in config.feature_groups for name in group]
        known = [feature.name for feature in manifest.features]
        for name in names:
            if name not in known:
                raise UserError(
                    f"model.feature_groups: the data set has no feature '{name}' (it has: {', '.join(known) or 'none'})"
                )
    elif config.features == "all":
        names = [feature.name for feature in manifest.features]
    else:
        names = config.features
    if not names:
        raise UserError(f"model.fusion: {config.fusion} needs item features and there are none (item_only needs none)")
    features = [manifest.feature(name) for name in names]
    return [
        FeatureSpec(
            feature.name,
            feature.kind,
            feature.size,
            dim=_own_size(config, feature.name),
            pooling=config.feature_pooling.get(feature.name),
            missing=feature.missing,
        )
        for feature in features
    ]


def used_event_features(config: ModelConfig, manifest: Manifest) -> list[EventFeature]:
    """The event features that the encoder uses.

    Raises:
        UserError: a named one is not in the data set, or they are to be an input of an RNN that there is not.
    """
    features = manifest.event_features
    if config.event_features != "all":
        features = [manifest.event_feature(name) for name in config.event_features]
    if features and event_subnet(config) is None:
        raise UserError(f"model.event_input: {config.event_input} have no RNN with model.fusion={config.fusion}")
    return features


def event_specs(config: ModelConfig, manifest: Manifest) -> list[FeatureSpec]:
    """`used_event_features` as the encoder embeds them. At any later event a value may be missing or unknown."""
    return [
        FeatureSpec(
            feature.name,
            "float" if feature.kind == "float" else "token",
            feature.size,
            dim=_own_size(config, feature.name),
            missing=feature.kind == "float",
            # Of a time gap 1 is a session's first event.
            blank=(MISSING_ID,) if feature.kind == "time_gap" else (MISSING_ID, UNKNOWN_ID),
        )
        for feature in used_event_features(config, manifest)
    ]


def _own_size(config: ModelConfig, name: str) -> int | None:
    size = config.feature_sizes.get(name)
    return None if size == config.embedding_size else size


def _check_named(config: ModelConfig, manifest: Manifest) -> None:
    """Whether `feature_sizes` and `feature_pooling` are about features that there are."""
    sequences = [feature.name for feature in manifest.features if feature.kind == "token_seq"]
    every = [feature.name for feature in (*manifest.features, *manifest.event_features)]
    for key, names, known, what in (
        ("feature_sizes", config.feature_sizes, every, "feature"),
        ("feature_pooling", config.feature_pooling, sequences, "token_seq feature"),
    ):
        for name in names:
            if name not in known:
                shown = ", ".join(known) or "none"
                raise UserError(f"model.{key}: the data set has no {what} '{name}' (it has: {shown})")


@dataclass(frozen=True)
class Looked:
    """What a step reads of the tables.

    Attributes:
        rows: [U, D], item rows of the distinct inputs (and targets, if their rows are the same); None if the encoder
            sees no items.
        features: of the same items.
        places: int64 [T], the row of each input.
        targets: of each part of the candidates, rows and the row of each target, int64 [T].
    """

    rows: torch.Tensor | None
    features: dict[str, torch.Tensor]
    places: torch.Tensor
    targets: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Recommender:
    """The parts of the model on this rank.

    Attributes:
        candidates: what the encoder's queries are compared with: rows of some of the tables.
        event_features: those that the encoder takes.
    """

    encoder: SessionEncoder
    tables: TableGroup
    candidates: Candidates
    features: FeatureStore
    event_features: list[EventFeature] = field(default_factory=list)

    @property
    def table(self) -> ShardedItemTable:
        """The item rows."""
        return self.tables[ITEM_TABLE]

    @property
    def reads_items(self) -> bool:
        """Whether the encoder sees item rows."""
        return has_item_subnet(self.encoder.config)

    @property
    def shares_rows(self) -> bool:
        """Whether item rows are inputs and outputs: one exchange then serves inputs and targets."""
        return self.reads_items and any(part.table is self.table for part in self.candidates.parts)

    @property
    def has_other_outputs(self) -> bool:
        """Whether targets have rows that are no inputs: they take an exchange of their own."""
        return not self.shares_rows or len(self.candidates.parts) > 1

    def lookup(self, inputs: Exchange, outputs: Exchange | None) -> Looked:
        """Read what a step needs.

        Args:
            inputs: of the inputs, and of the targets if `shares_rows`.
            outputs: of the targets; None unless `has_other_outputs`.
        """
        places, *target_places = (each.to(self.encoder_device) for each in inputs.routing.inverse)
        if outputs is not None:
            output_places = outputs.routing.inverse[0].to(self.encoder_device)
        features = self.features.lookup(inputs)
        rows = self._input_rows(inputs)
        targets = []
        for part in self.candidates.parts:
            if self.shares_rows and part.table is self.table:
                targets.append((rows, target_places[0]))
            else:
                targets.append((part.table.lookup(outputs), output_places))
        return Looked(rows, features, places, targets)

    def _input_rows(self, exchange: Exchange) -> torch.Tensor | None:
        return self.table.lookup(exchange) if self.reads_items else None

    @property
    def encoder_device(self) -> torch.device:
        return self.table.ranks.device

    @torch.no_grad()
    def encode(
        self, items: torch.Tensor, batch_sizes: torch.Tensor, events: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Queries of packed events, float32 [T, D]. Every rank must call it the same number of times.

        ``items``, ``batch_sizes`` and ``events``, the event features of `PackedBatch`, are on the CPU, where the
        routing is computed.

        On the CPU it runs on one thread: how a matrix product is divided among threads shows in its last bits, and
        what is measured must not depend on the number of processors.
        """
        was_training, threads = self.encoder.training, torch.get_num_threads()
        self.encoder.eval()
        if self.table.ranks.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            routing = route(self.table.partition, items)
            exchange = self.table.exchange(routing)
            rows = self._input_rows(exchange)
            places = routing.inverse[0].to(self.encoder_device)
            events = {name: values.to(self.encoder_device) for name, values in (events or {}).items()}
            return self.encoder(rows, self.features.lookup(exchange), places, batch_sizes, events).float()
        finally:
            torch.set_num_threads(threads)
            self.encoder.train(was_training)


def build(config: Config, manifest: Manifest, ranks: Ranks, training: bool = True) -> Recommender:
    """A freshly initialised model: the same on every rank and, row by row, for any number of ranks.

    Args:
        training: False if the table will only be read, and needs no optimizer.

    Raises:
        UserError: configuration and data set do not fit together.
    """
    specs = feature_specs(config.model, manifest)
    torch.manual_seed(config.seed)
    dtype = weight_dtype(config.precision)
    encoder = SessionEncoder(
        config.model, specs, COMPUTE_DTYPES.get(config.precision), event_specs(config.model, manifest)
    )
    rows = manifest.items + 1

    def make_table(width: int, **settings) -> ShardedItemTable:
        return ShardedItemTable(
            rows, width, ranks, config.table, config.seed, dtype=dtype, training=training, **settings
        )

    tables = {ITEM_TABLE: make_table(config.model.embedding_size)}
    for place, part in enumerate(encoder.parts):
        if part.table not in tables:
            # Without a bias at first; any other table is as the item table would be at this width.
            std = 0.0 if part.table == BIAS_TABLE else None
            tables[part.table] = make_table(part.width, std=std, stream=place)
    return Recommender(
        encoder=encoder.to(device=ranks.device, dtype=dtype),
        tables=TableGroup(tables),
        candidates=Candidates([CandidatePart(tables[part.table], part.score) for part in encoder.parts]),
        features=FeatureStore(config.data, manifest, [spec.name for spec in specs], ranks, tables[ITEM_TABLE].device),
        event_features=used_event_features(config.model, manifest),
    )
