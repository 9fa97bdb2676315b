"""RecBole's ids: which item, and which value of a feature, each row of its embeddings is for.

    FOLDER/items.json       ["[PAD]", "token of id 1", ...]
    FOLDER/features.json    {"brand": ["[PAD]", "value of id 1", ...], ...}

RecBole numbers tokens in the order in which they appear in its files, so the same token has another id than here. A
checkpoint of GRU4Rec does not tell them; one of GRU4RecF does, in the data set that is pickled with its features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.recbole.inert_pickle import Inert, load_pickle, strings, text

PADDING = "[PAD]"
ITEMS, FEATURES = "items.json", "features.json"


@dataclass(frozen=True)
class TokenIds:
    """Tokens by RecBole's id; entry 0 of every list is its padding.

    Attributes:
        source: where they are from, for messages.
        items: of the items.
        features: of each token or token_seq feature, by name.

    Raises:
        UserError: a list does not begin with the padding, or has a token twice.
    """

    source: str
    items: list[str]
    features: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tokens in {"items": self.items, **self.features}.items():
            if not tokens or tokens[0] != PADDING:
                raise UserError(f"{self.source}: {name}: entry 0 must be {PADDING!r}, as in RecBole's field2id_token")
            if len(set(tokens)) != len(tokens):
                first: dict[str, int] = {}
                for number, token in enumerate(tokens):
                    if first.setdefault(token, number) != number:
                        raise UserError(f"{self.source}: {name}: {token!r} has two ids, {first[token]} and {number}")

    def of_feature(self, name: str) -> list[str]:
        """The values of a feature; UserError if they are not there."""
        if name not in self.features:
            raise UserError(f"{self.source}: has no ids of the feature '{name}'")
        return self.features[name]


def read_ids(url: str) -> TokenIds:
    """Ids of a folder of JSON files, or of a data set as RecBole saves it (`NAME-SequentialDataset.pth`), unexecuted.

    Raises:
        UserError: there is no such thing at ``url``, or it is not in order.
    """
    if not storage.is_folder(url):
        return _of_saved_data_set(url)
    items_url, features_url = storage.join(url, ITEMS), storage.join(url, FEATURES)
    items = storage.read_json(items_url)
    features = storage.read_json(features_url) if storage.exists(features_url) else {}
    if not _is_text(items):
        raise UserError(f"{items_url}: must be a list of tokens")
    if not isinstance(features, dict) or not all(_is_text(values) for values in features.values()):
        raise UserError(f"{features_url}: must be an object with a list of values for every feature")
    return TokenIds(url, items, features)


def write_ids(folder: str, ids: TokenIds) -> None:
    """Write the two files of `read_ids` into a folder."""
    storage.write_json(storage.join(folder, ITEMS), ids.items)
    storage.write_json(storage.join(folder, FEATURES), ids.features)


def pickled_ids(source: str, data_set: Any, item_field: str) -> TokenIds | None:
    """Ids of a RecBole data set that was unpickled as `Inert`; None if it is none."""
    found = data_set.attribute("field2id_token") if isinstance(data_set, Inert) else None
    if not isinstance(found, dict):
        return None
    by_field = {text(name): strings(tokens) for name, tokens in found.items()}
    items = by_field.pop(item_field, None)
    if items is None:
        return None
    return TokenIds(source, items, {name: tokens for name, tokens in by_field.items() if name and tokens is not None})


def _of_saved_data_set(url: str) -> TokenIds:
    try:
        data_set, _ = load_pickle(storage.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url}: neither a folder with {ITEMS} nor a data set that RecBole saved ({error})") from error
    item_field = data_set.attribute("iid_field") if isinstance(data_set, Inert) else None
    ids = pickled_ids(url, data_set, item_field)
    if ids is None:
        raise UserError(f"{url}: neither a folder with {ITEMS} nor a data set that RecBole saved")
    return ids


def _is_text(tokens: Iterable[Any]) -> bool:
    return isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
