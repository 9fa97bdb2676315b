"""Features of events (their type, price, time since the last one) as inputs of an RNN, beside those of their items."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.model.features import FeatureEmbedding, FeatureSpec

Rnn = Literal["items", "features"]


class EventInputs(nn.Module):
    """Embeds event features and appends them to the inputs of one RNN. Without any it does, and holds, nothing.

    Args:
        config: its ``event_input`` says of which RNN.
        specs: event features; time gaps are tokens, whose vocabulary is the buckets.
    """

    def __init__(self, config: ModelConfig, specs: list[FeatureSpec]) -> None:
        super().__init__()
        self._of: Rnn = config.event_input
        if config.event_input == "auto":
            self._of = "items" if config.fusion == "item_only" else "features"
        self.embedding: FeatureEmbedding | None = None
        if specs:
            self.embedding = FeatureEmbedding(specs, config.embedding_size, config.pooling)
        self.dropout = nn.Dropout(config.dropout_feature)

    def width(self, rnn: Rnn) -> int:
        """By how much the inputs of ``rnn`` are wider."""
        return 0 if self.embedding is None or rnn != self._of else self.embedding.width

    def beside(self, rnn: Rnn, inputs: torch.Tensor, events: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """Inputs of ``rnn`` with the embedded event features behind them, if they belong there.

        Args:
            inputs: [T, in].
            events: by name, [T] each, as `FeatureEmbedding.forward` takes them.

        Returns:
            [T, in + width].
        """
        if self.embedding is None or rnn != self._of:
            return inputs
        return torch.cat([inputs, self.dropout(self.embedding(events))], dim=-1)
