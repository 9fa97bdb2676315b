"""Names, shapes and rows: the same weights as this project and as RecBole lay them out.

Rows of the item table and of feature embeddings stand in the order of ids, which differ. Beyond that:

- A value of a feature that no training item has shares one row here (`UNKNOWN_VALUE_ID`); in RecBole it has its own.
- RecBole keeps two rows for a float feature, of which it uses the second.
- Without features (GRU4Rec), RecBole calls the GRU and the dense layer by other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.data.shard_format import PADDING_ID, UNKNOWN_VALUE_ID
from gru4recf_dist.errors import UserError
from gru4recf_dist.model.features import FeatureSpec, encoder_order
from gru4recf_dist.recbole.token_ids import TokenIds

# The name that the item table has among the weights of both sides.
TABLE = "item_embedding.weight"
_TOKENS = "feature_embed_layer.token_embedding_table.item.embedding.weight"
_TOKEN_SEQS = "feature_embed_layer.token_seq_embedding_table.item.{}.weight"
_FLOATS = "feature_embed_layer.float_embedding_table.item.embedding.weight"
_FLOAT_ROWS = 2


@dataclass(frozen=True)
class RowMap:
    """Where the rows of one embedding lie on the other side.

    Attributes:
        places: int64 [rows here], the row there; -1 for one that no row there corresponds to.
        rows: how many there are there.
        shared: the row here that stands for all rows there that are in no place; None: nothing does.
    """

    places: torch.Tensor
    rows: int
    shared: int | None = None

    @property
    def others(self) -> torch.Tensor:
        """Rows there that no row here corresponds to, int64."""
        taken = torch.zeros(self.rows, dtype=torch.bool)
        taken[self.places[self.places >= 0]] = True
        return (~taken).nonzero()[:, 0]

    def to_ours(self, theirs: torch.Tensor) -> torch.Tensor:
        """[rows there, D] -> [rows here, D]; a shared row becomes the mean of those that it stands for, or zero."""
        ours = theirs[self.places.clamp(min=0)]
        ours[self.places < 0] = 0.0
        if self.shared is not None and len(self.others):
            ours[self.shared] = theirs[self.others].mean(dim=0)
        return ours

    def to_theirs(self, ours: torch.Tensor) -> torch.Tensor:
        """[rows here, D] -> [rows there, D]; where no row here corresponds, the shared one or zero."""
        theirs = ours.new_zeros(self.rows, ours.shape[1])
        if self.shared is not None:
            theirs[self.others] = ours[self.shared]
        real = self.places >= 0
        theirs[self.places[real]] = ours[real]
        return theirs


class Layout:
    """The weights of one model on both sides.

    Args:
        config: the model section of this project's configuration.
        specs: features to use.
        items: this project's tokens by id, entry 0 empty.
        vocabularies: of each token feature the values by id, entries 0 and 1 empty.
        ids: RecBole's.
        all_values: whether every value of a feature must be among RecBole's. On the way there it need not: what no
            item has there is left out.

    Raises:
        UserError: an item, or a value of a feature, is not among RecBole's.
    """

    def __init__(
        self,
        config: ModelConfig,
        specs: list[FeatureSpec],
        items: list[str],
        vocabularies: Mapping[str, list[str]],
        ids: TokenIds,
        all_values: bool = True,
    ) -> None:
        self.model = "GRU4RecF" if specs else "GRU4Rec"
        self._ids, self._all_values = ids, all_values
        places = _places(items, ids.items, PADDING_ID + 1)
        self._check(places[PADDING_ID + 1 :], items[PADDING_ID + 1 :], "the item")
        self.items = RowMap(places, len(ids.items))
        self.values = {
            spec.name: self._of_values(spec.name, vocabularies[spec.name])
            for spec in specs
            if spec.kind in ("token", "token_seq")
        }
        tokens, sequences, floats = _by_kind(specs)
        maps = {TABLE: [self.items], _TOKENS: [self.values[spec.name] for spec in tokens]}
        maps[_FLOATS] = [RowMap(torch.arange(len(floats)) * _FLOAT_ROWS + _FLOAT_ROWS - 1, _FLOAT_ROWS * len(floats))]
        maps |= {_TOKEN_SEQS.format(field): [self.values[spec.name]] for field, spec in enumerate(sequences)}
        self._names = weight_names(config, specs)
        self._maps = {name: maps[name] for name in self._names if name in maps}

    def _of_values(self, name: str, vocabulary: list[str]) -> RowMap:
        theirs, first = self._ids.of_feature(name), UNKNOWN_VALUE_ID + 1
        places = _places(vocabulary, theirs, first)
        if self._all_values:
            self._check(places[first:], vocabulary[first:], f"the value of '{name}'")
        return RowMap(places, len(theirs), shared=UNKNOWN_VALUE_ID)

    def _check(self, places: torch.Tensor, tokens: list[str], what: str) -> None:
        missing = (places < 0).nonzero()[:, 0].tolist()
        if missing:
            raise UserError(
                f"{self._ids.source}: {what} {tokens[missing[0]]!r} of the data set is not there "
                f"({len(missing)} of {len(tokens)} are not)"
            )

    def recbole_name(self, name: str) -> str:
        """RecBole's name of a weight of ours."""
        if self.model == "GRU4RecF":
            return name
        return name.replace("item_gru_layers.", "gru_layers.").replace("dense_layer.", "dense.")

    def to_ours(
        self, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], source: str
    ) -> dict[str, torch.Tensor]:
        """RecBole's weights as this project's, by name.

        Args:
            weights: by RecBole's names.
            shapes: of this project's weights, by name.
            source: for messages.

        Raises:
            UserError: a weight is missing, there is one too many, or one has another shape than it should.
        """
        ours = {}
        for name in self._names:
            theirs = weights.get(self.recbole_name(name))
            if theirs is None:
                raise UserError(f"{source}: has no weight '{self.recbole_name(name)}', which {self.model} needs here")
            maps = self._maps.get(name)
            rows = shapes[name][0] if maps is None else sum(part.rows for part in maps)
            expected = [rows, *shapes[name][1:]]
            if list(theirs.shape) != expected:
                raise UserError(
                    f"{source}: '{self.recbole_name(name)}' has shape {list(theirs.shape)}; by its configuration and "
                    f"the ids of {self._ids.source} it should have {expected}"
                )
            if maps is None:
                ours[name] = theirs
                continue
            parts = theirs.split([part.rows for part in maps])
            ours[name] = torch.cat([each.to_ours(part) for each, part in zip(maps, parts, strict=True)])
        unknown = set(weights) - {self.recbole_name(name) for name in self._names}
        if unknown:
            raise UserError(f"{source}: has a weight '{min(unknown)}', which has no counterpart here")
        return ours

    def to_theirs(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This project's weights as RecBole's, by its names and in the order of its parameters.

        ``weights`` are those of `weight_names`.
        """
        theirs = {}
        for name in self._names:
            maps = self._maps.get(name)
            values = weights[name]
            if maps is not None:
                parts = values.split([len(part.places) for part in maps])
                values = torch.cat([each.to_theirs(part) for each, part in zip(maps, parts, strict=True)])
            theirs[self.recbole_name(name)] = values.contiguous().clone()
        return theirs


def weight_names(config: ModelConfig, specs: list[FeatureSpec]) -> list[str]:
    """This project's names of all weights that RecBole has too, in RecBole's order, which its optimizer goes by."""
    tokens, sequences, floats = _by_kind(specs)
    recurrent = [f"weight_{part}_l{layer}" for layer in range(config.num_layers) for part in ("ih", "hh")]
    return [
        TABLE,
        *([_TOKENS] if tokens else []),
        *([_FLOATS] if floats else []),
        *(_TOKEN_SEQS.format(field) for field in range(len(sequences))),
        *(f"item_gru_layers.{name}" for name in recurrent),
        *(f"feature_gru_layers.{name}" for name in recurrent if specs),
        "dense_layer.weight",
        "dense_layer.bias",
    ]


def _by_kind(specs: list[FeatureSpec]) -> tuple[list[FeatureSpec], ...]:
    """Token, token_seq and float features, each in the encoder's order."""
    return tuple(
        [spec for spec in encoder_order(specs) if spec.kind == kind] for kind in ("token", "token_seq", "float")
    )


def _places(ours: list[str], theirs: list[str], first: int) -> torch.Tensor:
    """RecBole's id of each token from ``first`` on, -1 where it has none and before; padding's is padding's."""
    by_token = {token: number for number, token in enumerate(theirs) if number != PADDING_ID}
    places = torch.full((len(ours),), -1)
    places[PADDING_ID] = PADDING_ID
    places[first:] = torch.tensor([by_token.get(token, -1) for token in ours[first:]], dtype=torch.int64)
    return places
