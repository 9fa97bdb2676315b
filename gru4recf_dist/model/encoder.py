"""The session encoder of GRU4RecF: two RNNs in parallel, over items and over their features.

Hidasi, Quadrana, Karatzoglou, Tikk: "Parallel Recurrent Neural Network Architectures for Feature-rich Session-based
Recommendations", RecSys 2016, in the variant that RecBole 1.2.1 implements as `GRU4RecF`: the outputs of the two RNNs
are concatenated and projected back to the embedding size.

Shapes: T packed events, L longest sequence, U distinct items, D embedding size, H hidden size, F feature fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.model.event_features import EventInputs
from gru4recf_dist.model.features import FeatureEmbedding, FeatureSpec
from gru4recf_dist.model.packed_gru import PackedGRU
from gru4recf_dist.model.scoring import transform_rows


class SessionEncoder(nn.Module):
    """Everything of the model but the item table: what DDP or DeepSpeed wraps.

    Args:
        config: the model section of the configuration.
        specs: features to use; empty with ``fusion: item_only``.
        compute_dtype: what autocast computes in, while training; None: in the parameters' type, as always otherwise.
        events: event features to use.
    """

    def __init__(
        self,
        config: ModelConfig,
        specs: list[FeatureSpec],
        compute_dtype: torch.dtype | None = None,
        events: Sequence[FeatureSpec] = (),
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        hidden = config.hidden_size
        self.event_inputs = EventInputs(config, list(events))
        width = config.embedding_size + self.event_inputs.width("items")
        self.item_gru_layers = PackedGRU(width, hidden, config.num_layers)
        self.feature_embed_layer: FeatureEmbedding | None = None
        if config.fusion == "concat_output":
            if not specs:
                raise ValueError("fusion concat_output needs at least one feature")
            self.feature_embed_layer = FeatureEmbedding(specs, config.embedding_size, config.pooling)
            width = self.feature_embed_layer.width + self.event_inputs.width("features")
            self.feature_gru_layers = PackedGRU(width, hidden, config.num_layers)
        paths = 1 if self.feature_embed_layer is None else 2
        self.dense_layer = nn.Linear(paths * hidden, config.embedding_size)
        self.dropout = nn.Dropout(config.dropout)
        self.dropout_feature = nn.Dropout(config.dropout_feature)
        self.dropout_hidden = nn.Dropout(config.dropout_hidden)
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self.apply(_initialise)

    def forward(
        self,
        rows: torch.Tensor,
        features: dict[str, torch.Tensor],
        places: torch.Tensor,
        batch_sizes: torch.Tensor,
        events: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Encode packed sessions.

        Args:
            rows: [U, D], table rows of distinct items.
            features: of the same items, as `FeatureEmbedding.forward` takes them.
            places: int64 [T], the distinct item of each packed event.
            batch_sizes: int64 [L], on the CPU.
            events: event features of the packed events, [T] each.

        Returns:
            queries [T, D]: their dot products with `candidate rows <transform_rows>` are the scores.
        """
        # In here and not around the engine: DeepSpeed switches off an autocast that it was not told of.
        half = self.training and self.compute_dtype is not None
        with torch.autocast(rows.device.type, self.compute_dtype or torch.bfloat16, enabled=half):
            embedded = self.event_inputs.beside("items", self.dropout(rows[places]), events)
            hidden = _run(self.item_gru_layers, embedded, batch_sizes)
            if self.feature_embed_layer is not None:
                # Each distinct item's features are embedded once, however often it occurs.
                described = self.dropout_feature(self.feature_embed_layer(features)[places])
                described = self.event_inputs.beside("features", described, events)
                hidden = torch.cat([hidden, _run(self.feature_gru_layers, described, batch_sizes)], dim=-1)
            output = self.dense_layer(self.dropout_hidden(hidden))
        # Scores and what follows them are not for half precision.
        output = output.to(rows.dtype)
        if self.config.score == "cosine":
            output = transform_rows(output, "cosine")
        if self.config.learn_temperature:
            return output * torch.exp(-self.log_temperature)
        return output / self.config.temperature


def _run(gru: PackedGRU, events: torch.Tensor, batch_sizes: torch.Tensor) -> torch.Tensor:
    """Packed events [T, in] -> outputs [T, H] in the same layout."""
    return gru(PackedSequence(events, batch_sizes)).data


def _initialise(module: nn.Module) -> None:
    """RecBole's `xavier_normal_initialization`: embeddings and dense layers; GRUs keep uniform(+-1/sqrt(H))."""
    if isinstance(module, nn.Embedding | nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
