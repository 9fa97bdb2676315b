"""Features of events (their type, price, time since the last one) as inputs of an RNN, beside those of their items."""

from __future__ import annotations

import torch
from torch import nn

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.model.features import FeatureEmbedding, FeatureSpec
from gru4recf_dist.model.subnets import event_subnet


class EventInputs(nn.Module):
    """Embeds event features and appends them to the inputs of one subnet's RNN; without any, it has no parameter.

    Args:
        config: its ``event_input`` says of which.
        specs: event features; time gaps are tokens, whose vocabulary is the buckets.
    """

    def __init__(self, config: ModelConfig, specs: list[FeatureSpec]) -> None:
        super().__init__()
        self._subnet = event_subnet(config)
        self.embedding: FeatureEmbedding | None = None
        if specs:
            self.embedding = FeatureEmbedding(specs, config.embedding_size, config.pooling)
        self.dropout = nn.Dropout(config.dropout_feature)

    def width(self, subnet: str) -> int:
        """By how much the inputs of a subnet's RNN are wider."""
        return 0 if self.embedding is None or subnet != self._subnet else self.embedding.width

    def beside(self, subnet: str, inputs: torch.Tensor, events: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """Inputs of a subnet's RNN with the embedded event features behind them, if they belong there.

        Args:
            inputs: [T, in].
            events: by name, [T] each, as `FeatureEmbedding.forward` takes them.

        Returns:
            [T, in + width].
        """
        if self.embedding is None or subnet != self._subnet:
            return inputs
        return torch.cat([inputs, self.dropout(self.embedding(events))], dim=-1)
