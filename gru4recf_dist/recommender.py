"""The distributed model: the encoder, the sharded table and the feature store, put together from data and config."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gru4recf_dist.config import Config, ModelConfig
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
    """The features that the encoder uses.

    Raises:
        UserError: a named feature is not in the data set, or there is none where the fusion needs one.
    """
    if config.fusion == "item_only":
        return []
    names = [feature.name for feature in manifest.features] if config.features == "all" else config.features
    if not names:
        raise UserError("model.fusion: concat_output needs item features and there are none (item_only needs none)")
    features = [manifest.feature(name) for name in names]
    return [FeatureSpec(feature.name, feature.kind, feature.size) for feature in features]


@dataclass
class Recommender:
    """The three parts of the model on this rank."""

    encoder: SessionEncoder
    table: ShardedItemTable
    features: FeatureStore

    @torch.no_grad()
    def encode(self, items: torch.Tensor, batch_sizes: torch.Tensor) -> torch.Tensor:
        """Queries of packed events, float32 [T, D]. Every rank must call it the same number of times.

        ``items`` and ``batch_sizes`` are on the CPU, where the routing is computed.

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
            return self.encoder(rows, self.features.lookup(exchange), places, batch_sizes).float()
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
    encoder = SessionEncoder(config.model, specs, COMPUTE_DTYPES.get(config.precision))
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
    )
