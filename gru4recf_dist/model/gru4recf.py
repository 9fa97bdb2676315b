"""GRU4RecF as one plain module, with RecBole's four methods: for single-process use, inspection and export.

The trainer runs the same encoder packed, beside sharded tables; this class adds dense ones to it and keeps
RecBole 1.2.1's meaning, names and shapes. There, cross-entropy runs over all N+1 columns: the padding row is a
candidate, and it is not zero.

Shapes: B sessions, L longest, D embedding size, Q size of a query, n = N+1 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.scoring import transform_rows
from gru4recf_dist.model.subnets import BIAS_TABLE, ITEM_TABLE

ITEM_SEQ = "item_id_list"
ITEM_SEQ_LEN = "item_length"
ITEM_ID = "item_id"


class GRU4RecF(SessionEncoder):
    """Hidasi et al., RecSys 2016; by default, and with ``fusion: item_only``, RecBole's `GRU4RecF` and `GRU4Rec`.

    Args:
        config: the model section of the configuration.
        item_count: n = N+1, padding row included.
        specs: features to use.
        item_features: each feature of all n items, by name, as `FeatureEmbedding.forward` takes them; None: a subclass
            has them elsewhere (`features_of`).
        events: event features to use.
    """

    def __init__(
        self,
        config: ModelConfig,
        item_count: int,
        specs: list[FeatureSpec] | None = None,
        item_features: Mapping[str, torch.Tensor] | None = None,
        events: Sequence[FeatureSpec] = (),
    ) -> None:
        super().__init__(config, specs or [], events=events)
        self.item_embedding = nn.Embedding(item_count, config.embedding_size, padding_idx=0)
        # RecBole initialises after the padding row was zeroed: the row is overwritten, and never trained as an input.
        nn.init.xavier_normal_(self.item_embedding.weight)
        # The tables that only outputs have, by their names in a checkpoint.
        self.output_embedding = nn.ModuleDict()
        for part in self.parts:
            if part.table != ITEM_TABLE:
                self.output_embedding[part.table] = nn.Embedding(item_count, part.width)
                weight = self.output_embedding[part.table].weight
                nn.init.zeros_(weight) if part.table == BIAS_TABLE else nn.init.xavier_normal_(weight)
        self.feature_names = [spec.name for spec in specs or []]
        if item_features is not None:
            for name in self.feature_names:
                self.register_buffer(_buffer(name), item_features[name], persistent=False)

    def features_of(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The item features of ``ids`` [U], by name."""
        return {name: getattr(self, _buffer(name))[ids] for name in self.feature_names}

    def encode(
        self, items: torch.Tensor, batch_sizes: torch.Tensor, events: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Encode packed sessions.

        Args:
            items: int64 [T], item ids.
            batch_sizes: int64 [L], on the CPU.
            events: event features, by name, [T] each.

        Returns:
            [T, Q], the output at each event.
        """
        ids, places = torch.unique(items, return_inverse=True)
        return super().forward(self.item_embedding(ids), self.features_of(ids), places, batch_sizes, events)

    def forward(
        self, item_seq: torch.Tensor, item_seq_len: torch.Tensor, events: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Encode padded sessions.

        Args:
            item_seq: int64 [B, L], item ids, padded with 0 at the end.
            item_seq_len: int64 [B], real events of each, at least 1.
            events: event features, by name, [B, L] each, padded likewise.

        Returns:
            [B, Q], the output at each session's last event.
        """

        def pack(padded: torch.Tensor) -> PackedSequence:
            return pack_padded_sequence(padded.T, item_seq_len.cpu(), enforce_sorted=False)

        packed = pack(item_seq)
        packed_events = {name: pack(values).data for name, values in (events or {}).items()}
        output = self.encode(packed.data, packed.batch_sizes, packed_events)
        # The last event of the sequence of packed rank i stands at offset(its last time step) + i.
        offsets = torch.cumsum(packed.batch_sizes, 0) - packed.batch_sizes
        last = offsets.to(output.device)[item_seq_len.to(output.device) - 1] + packed.unsorted_indices
        return output[last]

    def calculate_loss(self, interaction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over all n columns; ``interaction`` holds `ITEM_SEQ`, `ITEM_SEQ_LEN`, `ITEM_ID` [B]."""
        return nn.functional.cross_entropy(self.full_sort_predict(interaction), interaction[ITEM_ID])

    def predict(self, interaction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Score of each session's item `ITEM_ID`, [B]."""
        queries = self(interaction[ITEM_SEQ], interaction[ITEM_SEQ_LEN])
        return (queries * self.candidates(interaction[ITEM_ID])).sum(dim=1)

    def full_sort_predict(self, interaction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores of all rows, [B, n]."""
        queries = self(interaction[ITEM_SEQ], interaction[ITEM_SEQ_LEN])
        return queries @ self.candidates().T

    def candidates(self, ids: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What queries are compared with, of all rows or those of ``ids`` [B]; [n, Q] or [B, Q].

        Args:
            dtype: that rows are brought to before anything is computed with them; None: as they are.
        """
        tables = {ITEM_TABLE: self.item_embedding, **self.output_embedding}
        rows = [tables[part.table].weight if ids is None else tables[part.table](ids) for part in self.parts]
        pairs = zip(rows, self.parts, strict=True)
        return torch.cat([transform_rows(each.to(dtype or each.dtype), part.score) for each, part in pairs], dim=1)


def _buffer(feature: str) -> str:
    # A feature may be called like an attribute of a module, "training" for one.
    return f"item_feature_{feature}"
