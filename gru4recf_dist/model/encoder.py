"""The session encoder of GRU4RecF: RNNs in parallel, over items and over their features.

Hidasi, Quadrana, Karatzoglou, Tikk: "Parallel Recurrent Neural Network Architectures for Feature-rich Session-based
Recommendations", RecSys 2016. The default is the variant that RecBole 1.2.1 implements as `GRU4RecF`: the outputs of
two RNNs are concatenated and projected back to the embedding size. `model.fusions` has the others.

Shapes: T packed events, L longest sequence, U distinct items, D embedding size, H hidden size, F feature fields, Q
size of a query.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.model.event_features import EventInputs
from gru4recf_dist.model.features import FeatureEmbedding, FeatureSpec
from gru4recf_dist.model.fusions import dense_inputs, initial_weights, put_together
from gru4recf_dist.model.packed_gru import PackedGRU
from gru4recf_dist.model.places import rows_at
from gru4recf_dist.model.scoring import transform_rows
from gru4recf_dist.model.subnets import ITEM, feature_subnets, grouped, has_item_subnet, output_parts, subnets


class SessionEncoder(nn.Module):
    """Everything of the model but the tables of items: what DDP or DeepSpeed wraps.

    Args:
        config: the model section of the configuration.
        specs: features to use; empty with ``fusion: item_only``.
        compute_dtype: what autocast computes in, while training; None: in the parameters' type, as always otherwise.
        events: event features to use.

    Attributes:
        present: names of the subnets that take part; all, unless training brings them in one after the other.
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
        self.parts = output_parts(config)
        self.take_part(None)
        hidden = config.hidden_size

        def make_gru(width: int) -> PackedGRU:
            return PackedGRU(width, hidden, config.num_layers, config.dropout_hidden)

        groups = grouped(config, specs)
        concatenates_input = config.fusion == "concat_input"
        self.event_inputs = EventInputs(config, list(events))
        item_width = config.embedding_size + self.event_inputs.width(ITEM)
        # In this order: the initial values depend on it.
        if has_item_subnet(config) and not concatenates_input:
            self.item_gru_layers = make_gru(item_width)
        self.feature_embed_layer: nn.Module | None = None
        if groups:
            embeds = [FeatureEmbedding(specs, config.embedding_size, config.pooling) for specs in groups]
            self.feature_embed_layer = _one_or_list(embeds)
            widths = [embed.width for embed in embeds]
            if concatenates_input:
                self.item_gru_layers = make_gru(item_width + widths[0])
            else:
                names = feature_subnets(config)
                widths = [width + self.event_inputs.width(name) for name, width in zip(names, widths, strict=True)]
                self.feature_gru_layers = _one_or_list([make_gru(width) for width in widths])
        inputs = dense_inputs(config)
        self.dense_layer = nn.Linear(inputs, config.embedding_size) if inputs is not None else None
        weights = initial_weights(config)
        self.fusion_weights = nn.Parameter(weights) if weights is not None else None
        self.dropout = nn.Dropout(config.input_dropout)
        self.dropout_feature = nn.Dropout(config.dropout_feature)
        self.dropout_hidden = nn.Dropout(config.dropout_hidden)
        self.dropout_output = nn.Dropout(config.dropout_output)
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self.apply(_initialise)

    def take_part(self, names: Collection[str] | None) -> None:
        """Let only the subnets of ``names`` take part; None: all."""
        self.present = frozenset(subnets(self.config) if names is None else names)

    def forward(
        self,
        rows: torch.Tensor | None,
        features: dict[str, torch.Tensor],
        places: torch.Tensor,
        batch_sizes: torch.Tensor,
        events: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Encode packed sessions.

        Args:
            rows: [U, D], item rows of distinct items; None with ``fusion: feature_only``.
            features: of the same items, as `FeatureEmbedding.forward` takes them.
            places: int64 [T], the distinct item of each packed event.
            batch_sizes: int64 [L], on the CPU.
            events: event features of the packed events, [T] each.

        Returns:
            queries [T, Q], the columns of `parts` side by side: their dot products with the candidates' rows,
            transformed as each part's score says, are the scores. With an output bias the last column is 1.
        """
        weight = next(self.parameters())
        # In here and not around the engine: DeepSpeed switches off an autocast that it was not told of.
        half = self.training and self.compute_dtype is not None
        with torch.autocast(weight.device.type, self.compute_dtype or torch.bfloat16, enabled=half):
            hidden = self._hidden(rows, features, places, batch_sizes, events)
            outputs = put_together(self.config.fusion, hidden, self.fusion_weights)
            outputs = [self.dropout_hidden(output) for output in outputs]
            if self.dense_layer is not None:
                outputs = [self.dense_layer(output) for output in outputs]
        # Scores and what follows them are not for half precision.
        queries = [self._query(output.to(weight.dtype)) for output in outputs]
        if self.config.output_bias:
            queries.append(torch.ones_like(queries[0][:, :1]))
        return queries[0] if len(queries) == 1 else torch.cat(queries, dim=1)

    def _hidden(self, rows, features, places, batch_sizes, events) -> list[torch.Tensor | None]:
        """Outputs [T, H] of each subnet's RNN; None for those that take no part."""
        hidden: list[torch.Tensor | None] = []
        embeds = _as_list(self.feature_embed_layer)
        if has_item_subnet(self.config):
            output = None
            if ITEM in self.present:
                inputs = self.dropout(rows_at(rows, places))
                if self.config.fusion == "concat_input":
                    inputs = torch.cat([inputs, self._described(embeds[0], features, places)], dim=-1)
                output = _run(self.item_gru_layers, self.event_inputs.beside(ITEM, inputs, events), batch_sizes)
            hidden.append(output)
        for number, name in enumerate(feature_subnets(self.config)):
            output = None
            if name in self.present:
                gru = _as_list(self.feature_gru_layers)[number]
                inputs = self._described(embeds[number], features, places)
                output = _run(gru, self.event_inputs.beside(name, inputs, events), batch_sizes)
            hidden.append(output)
        return hidden

    def _described(self, embed: nn.Module, features: dict[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
        # Each distinct item's features are embedded once, however often it occurs.
        return self.dropout_feature(rows_at(embed(features), places))

    def _query(self, output: torch.Tensor) -> torch.Tensor:
        output = self.dropout_output(output)
        if self.config.score == "cosine":
            output = transform_rows(output, "cosine")
        if self.config.learn_temperature:
            return output * torch.exp(-self.log_temperature)
        return output / self.config.temperature


def _one_or_list(modules: list[nn.Module]) -> nn.Module:
    """RecBole's names have no number where there is one of a kind."""
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules)


def _as_list(module: nn.Module | None) -> list[nn.Module]:
    if module is None:
        return []
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _run(gru: PackedGRU, events: torch.Tensor, batch_sizes: torch.Tensor) -> torch.Tensor:
    """Packed events [T, in] -> outputs [T, H] in the same layout."""
    return gru(PackedSequence(events, batch_sizes)).data


def _initialise(module: nn.Module) -> None:
    """RecBole's `xavier_normal_initialization`: embeddings and dense layers; GRUs keep uniform(+-1/sqrt(H)).

    But the embeddings of what training may never meet start at zero.
    """
    if isinstance(module, nn.Embedding | nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, FeatureEmbedding):
        # After its tables, which `Module.apply` reaches first.
        module.blank()
