"""Embedding of item features, each to the item embedding's size, in RecBole's order and with its parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class FeatureSpec:
    """A feature that the encoder embeds. ``size``: rows of the embedding (tokens), 1 (float), or the vector's size."""

    name: str
    kind: Literal["token", "token_seq", "float", "vector"]
    size: int


# RecBole's FeatureSeqEmbLayer concatenates token fields, then token_seq fields, then float fields.
_ORDER = ("token", "token_seq", "float", "vector")


def encoder_order(specs: list[FeatureSpec]) -> list[FeatureSpec]:
    """``specs`` as the encoder concatenates them: by kind, and within a kind as given."""
    return sorted(specs, key=lambda spec: _ORDER.index(spec.kind))


def kept_rows(old: list[FeatureSpec], new: list[FeatureSpec]) -> dict[str, torch.Tensor]:
    """Where the embedded values of ``old`` features lie among those of ``new`` ones, whose vocabularies are longer.

    Args:
        old, new: the same features, in the same order.

    Returns:
        by name of a parameter of `FeatureEmbedding`, int64 [rows of the old one]: the new place of each row.
    """
    pairs = list(zip(encoder_order(old), encoder_order(new), strict=True))
    places: dict[str, torch.Tensor] = {}
    # Token fields share one parameter: a longer vocabulary moves the rows of the fields after it.
    offset, shared = 0, []
    for before, after in pairs:
        if before.kind == "token":
            shared.append(torch.arange(before.size) + offset)
            offset += after.size
    if shared:
        places["token_embedding_table.item.embedding.weight"] = torch.cat(shared)
    sequences = [before for before, _ in pairs if before.kind == "token_seq"]
    for field, before in enumerate(sequences):
        places[f"token_seq_embedding_table.item.{field}.weight"] = torch.arange(before.size)
    return places


class _OffsetEmbedding(nn.Module):
    """One table for all token fields, each with its own range of rows (RecBole's FMEmbedding)."""

    def __init__(self, sizes: list[int], dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(sizes), dim)
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]

    def forward(self, field: int, values: torch.Tensor) -> torch.Tensor:
        return self.embedding(values + self.offsets[field])


class _FloatEmbedding(nn.Module):
    """A learned vector for each float field; the value scales it (RecBole's FLEmbedding)."""

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(fields, dim)

    def forward(self, field: int, values: torch.Tensor) -> torch.Tensor:
        return values[:, None] * self.embedding.weight[field]


class FeatureEmbedding(nn.Module):
    """Embeds the features of U items and concatenates them.

    The module tree repeats the names of RecBole 1.2.1's `FeatureSeqEmbLayer`, so that state dicts correspond.

    Args:
        specs: features in any order; they are taken as tokens, token_seqs, floats, vectors.
        dim: D.
        pooling: how the values of a token_seq become one vector: `mean`, `sum` or `max` over the real values.
    """

    def __init__(self, specs: list[FeatureSpec], dim: int, pooling: str) -> None:
        super().__init__()
        self.dim, self.pooling = dim, pooling
        self.specs = encoder_order(specs)
        kinds = {kind: [spec for spec in self.specs if spec.kind == kind] for kind in _ORDER}
        self.token_embedding_table = nn.ModuleDict()
        self.float_embedding_table = nn.ModuleDict()
        self.token_seq_embedding_table = nn.ModuleDict()
        # By place, not by name: a ModuleDict refuses names such as "type" or "values".
        self.vector_projection = nn.ModuleList([nn.Linear(spec.size, dim, bias=False) for spec in kinds["vector"]])
        if kinds["token"]:
            self.token_embedding_table["item"] = _OffsetEmbedding([spec.size for spec in kinds["token"]], dim)
        if kinds["token_seq"]:
            tables = [nn.Embedding(spec.size, dim) for spec in kinds["token_seq"]]
            self.token_seq_embedding_table["item"] = nn.ModuleList(tables)
        if kinds["float"]:
            self.float_embedding_table["item"] = _FloatEmbedding(len(kinds["float"]), dim)

    @property
    def width(self) -> int:
        """Size of the output: F x D."""
        return len(self.specs) * self.dim

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embed.

        Args:
            features: by name, for U items: token int64 [U], token_seq int64 [U, n] (0: padding), float [U],
                vector [U, size].

        Returns:
            [U, F*D].
        """
        place: dict[str, int] = {}
        embedded = []
        for spec in self.specs:
            field = place.get(spec.kind, 0)
            place[spec.kind] = field + 1
            embedded.append(self._embed(spec, field, features[spec.name]))
        return torch.cat(embedded, dim=-1)

    def _embed(self, spec: FeatureSpec, field: int, values: torch.Tensor) -> torch.Tensor:
        if spec.kind == "token":
            return self.token_embedding_table["item"](field, values)
        if spec.kind == "token_seq":
            return self._pool(self.token_seq_embedding_table["item"][field](values), values != 0)
        if spec.kind == "float":
            table = self.float_embedding_table["item"]
            return table(field, values.to(table.embedding.weight.dtype))
        projection = self.vector_projection[field]
        return projection(values.to(projection.weight.dtype))

    def _pool(self, embedded: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """[U, n, D] and mask [U, n] -> [U, D], as RecBole pools."""
        mask = real[..., None].to(embedded.dtype)
        if self.pooling == "max":
            # -1e9 rather than -inf: an item without any value gets exactly RecBole's result.
            return (embedded - (1.0 - mask) * 1e9).amax(dim=-2)
        total = (embedded * mask).sum(dim=-2)
        if self.pooling == "sum":
            return total
        return total / (mask.sum(dim=-2) + 1e-8)
