"""The distributed model: the encoder, the sharded table and the feature store, put together from data and config."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gru4recf_dist.config import Config, ModelConfig
from gru4recf_dist.data.event_columns import EventFeature
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.feature_store import FeatureStore
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.partition import route

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
    names = [feature.name for feature in manifest.features] if config.features == "all" else config.features
    if not names:
        raise UserError("model.fusion: concat_output needs item features and there are none (item_only needs none)")
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
    if features and config.event_input == "features" and config.fusion == "item_only":
        raise UserError("model.event_input: features, but with model.fusion=item_only there is no RNN of the features")
    return features


def event_specs(config: ModelConfig, manifest: Manifest) -> list[FeatureSpec]:
    """`used_event_features` as the encoder embeds them. At any later event a number may be missing."""
    return [
        FeatureSpec(
            feature.name,
            "float" if feature.kind == "float" else "token",
            feature.size,
            dim=_own_size(config, feature.name),
            missing=feature.kind == "float",
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


@dataclass
class Recommender:
    """The three parts of the model on this rank, and the event features that the encoder takes."""

    encoder: SessionEncoder
    table: ShardedItemTable
    features: FeatureStore
    event_features: list[EventFeature] = field(default_factory=list)

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
            rows = self.table.lookup(exchange)
            places = routing.inverse[0].to(rows.device)
            events = {name: values.to(rows.device) for name, values in (events or {}).items()}
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
    table = ShardedItemTable(
        manifest.items + 1,
        config.model.embedding_size,
        ranks,
        config.table,
        config.seed,
        dtype=dtype,
        training=training,
    )
    return Recommender(
        encoder=encoder.to(device=ranks.device, dtype=dtype),
        table=table,
        features=FeatureStore(config.data, manifest, [spec.name for spec in specs], ranks, table.device),
        event_features=used_event_features(config.model, manifest),
    )
