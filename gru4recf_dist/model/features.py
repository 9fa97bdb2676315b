"""Embedding of item features, each to the item embedding's size, in RecBole's order and with its parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

# Of every vocabulary: values that it does not have.
UNKNOWN_ID = 1


@dataclass(frozen=True)
class FeatureSpec:
    """A feature that the encoder embeds.

    Attributes:
        size: rows of the embedding (token, token_seq), 1 (float), or the vector's size.
        dim: of its embedded value; None: the one that features have by default.
        pooling: of a token_seq; None: the default one.
        missing: float: missing values arrive as NaN, and have a learned vector of their own.
        blank: token, token_seq: rows that training may never meet, such as that of unknown values. They start at zero,
            which adds nothing to what an RNN sees, until they are trained.
    """

    name: str
    kind: Literal["token", "token_seq", "float", "vector"]
    size: int
    dim: int | None = None
    pooling: Literal["mean", "sum", "max"] | None = None
    missing: bool = False
    blank: tuple[int, ...] = (UNKNOWN_ID,)


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
    own = [before for before, _ in pairs if before.kind == "token" and before.dim is not None]
    for before, after in pairs:
        if before.kind == "token" and before.dim is None:
            shared.append(torch.arange(before.size) + offset)
            offset += after.size
    if shared:
        places["token_embedding_table.item.embedding.weight"] = torch.cat(shared)
    for field, before in enumerate(own):
        places[f"sized_token_tables.{field}.weight"] = torch.arange(before.size)
    sequences = [before for before, _ in pairs if before.kind == "token_seq"]
    for field, before in enumerate(sequences):
        places[f"token_seq_embedding_table.item.{field}.weight"] = torch.arange(before.size)
    return places


def new_parameters(old: list[FeatureSpec], new: list[FeatureSpec]) -> set[str]:
    """Names of the parameters of `FeatureEmbedding` that ``new`` features have and ``old`` ones, otherwise the same,
    have not: the vectors of missing values, for floats of which none was missing."""
    flagged = [(was.missing, now.missing) for was, now in zip(encoder_order(old), encoder_order(new), strict=True)]
    return {f"missing_vectors.{field}" for field, (was, now) in enumerate(flagged) if now and not was}


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
    """Embeds the features of U items, or of U events, and concatenates them.

    The module tree repeats the names of RecBole 1.2.1's `FeatureSeqEmbLayer`, so that state dicts correspond. What
    RecBole does not have lies beside: fields of a size of their own, vectors, and missing values of floats.

    Args:
        specs: features in any order; they are taken as tokens, token_seqs, floats, vectors.
        dim: D, the size of an embedded feature that has none of its own.
        pooling: how the values of a token_seq become one vector: `mean`, `sum` or `max` over the real values.
    """

    def __init__(self, specs: list[FeatureSpec], dim: int, pooling: str) -> None:
        super().__init__()
        self.dim, self.pooling = dim, pooling
        self.specs = encoder_order(specs)
        kinds = {kind: [spec for spec in self.specs if spec.kind == kind] for kind in _ORDER}
        shared = {kind: [spec for spec in kinds[kind] if spec.dim is None] for kind in ("token", "float")}
        own = {kind: [spec for spec in kinds[kind] if spec.dim is not None] for kind in ("token", "float")}
        self.token_embedding_table = nn.ModuleDict()
        self.float_embedding_table = nn.ModuleDict()
        self.token_seq_embedding_table = nn.ModuleDict()
        # By place, not by name: a ModuleDict refuses names such as "type" or "values".
        self.vector_projection = nn.ModuleList(
            [nn.Linear(spec.size, self._dim(spec), bias=False) for spec in kinds["vector"]]
        )
        if shared["token"]:
            self.token_embedding_table["item"] = _OffsetEmbedding([spec.size for spec in shared["token"]], dim)
        if kinds["token_seq"]:
            tables = [nn.Embedding(spec.size, self._dim(spec)) for spec in kinds["token_seq"]]
            self.token_seq_embedding_table["item"] = nn.ModuleList(tables)
        if shared["float"]:
            self.float_embedding_table["item"] = _FloatEmbedding(len(shared["float"]), dim)
        self.sized_token_tables = nn.ModuleList([nn.Embedding(spec.size, spec.dim) for spec in own["token"]])
        self.sized_float_tables = nn.ModuleList([_FloatEmbedding(1, spec.dim) for spec in own["float"]])
        # At first a missing value weighs as much as a value of 0: nothing. By the feature's place, so that one that
        # begins to miss values moves no other.
        self.missing_vectors = nn.ParameterDict(
            {str(place): torch.zeros(self._dim(spec)) for place, spec in enumerate(self.specs) if spec.missing}
        )

    @torch.no_grad()
    def blank(self) -> None:
        """Bring the rows to zero that `FeatureSpec.blank` names; what draws the other rows is asked no less for it."""
        shared = [spec for spec in self.specs if spec.kind == "token" and spec.dim is None]
        own = [spec for spec in self.specs if spec.kind == "token" and spec.dim is not None]
        sequences = [spec for spec in self.specs if spec.kind == "token_seq"]
        for field, spec in enumerate(shared):
            table = self.token_embedding_table["item"]
            table.embedding.weight[[table.offsets[field] + row for row in _there(spec)]] = 0.0
        for table, spec in zip(self.sized_token_tables, own, strict=True):
            table.weight[_there(spec)] = 0.0
        for field, spec in enumerate(sequences):
            self.token_seq_embedding_table["item"][field].weight[_there(spec)] = 0.0

    def _dim(self, spec: FeatureSpec) -> int:
        return self.dim if spec.dim is None else spec.dim

    @property
    def width(self) -> int:
        """Size of the output: F x D, unless features have sizes of their own."""
        return sum(self._dim(spec) for spec in self.specs)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embed.

        Args:
            features: by name, for U items: token int64 [U], token_seq int64 [U, n] (0: padding), float [U],
                vector [U, size].

        Returns:
            [U, width].
        """
        next_field: dict[tuple[str, bool], int] = {}
        embedded = []
        for place, spec in enumerate(self.specs):
            group = (spec.kind, spec.dim is None or spec.kind not in ("token", "float"))
            field = next_field.get(group, 0)
            next_field[group] = field + 1
            embedded.append(self._embed(spec, place, field, features[spec.name]))
        return torch.cat(embedded, dim=-1)

    def _embed(self, spec: FeatureSpec, place: int, field: int, values: torch.Tensor) -> torch.Tensor:
        """``field``: its number among those of its kind (with or without a size of their own)."""
        if spec.kind == "token":
            if spec.dim is not None:
                return self.sized_token_tables[field](values)
            return self.token_embedding_table["item"](field, values)
        if spec.kind == "token_seq":
            embedded = self.token_seq_embedding_table["item"][field](values)
            return _pool(embedded, values != 0, spec.pooling or self.pooling)
        if spec.kind == "float":
            return self._embed_float(spec, place, field, values)
        projection = self.vector_projection[field]
        return projection(values.to(projection.weight.dtype))

    def _embed_float(self, spec: FeatureSpec, place: int, field: int, values: torch.Tensor) -> torch.Tensor:
        table = self.float_embedding_table["item"] if spec.dim is None else self.sized_float_tables[field]
        field = field if spec.dim is None else 0
        values = values.to(table.embedding.weight.dtype)
        if not spec.missing:
            return table(field, values)
        missing = values.isnan()
        # Zero before the product: backward would make NaN of the weight's gradient otherwise.
        embedded = table(field, values.masked_fill(missing, 0.0))
        return embedded + missing[:, None].to(embedded.dtype) * self.missing_vectors[str(place)]


def _there(spec: FeatureSpec) -> list[int]:
    """The blank rows of a vocabulary; one without any value has no row of unknown ones."""
    return [row for row in spec.blank if row < spec.size]


def _pool(embedded: torch.Tensor, real: torch.Tensor, pooling: str) -> torch.Tensor:
    """[U, n, D] and mask [U, n] -> [U, D], as RecBole pools."""
    mask = real[..., None].to(embedded.dtype)
    if pooling == "max":
        # -1e9 rather than -inf: an item without any value gets exactly RecBole's result.
        return (embedded - (1.0 - mask) * 1e9).amax(dim=-2)
    total = (embedded * mask).sum(dim=-2)
    if pooling == "sum":
        return total
    return total / (mask.sum(dim=-2) + 1e-8)
