"""A data set of this project as RecBole's atomic files, in an order that tells which ids RecBole will give."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import PADDING_ID, UNKNOWN_VALUE_ID, Feature, Manifest, file_url
from gru4recf_dist.data.shards import read_blocks
from gru4recf_dist.errors import UserError
from gru4recf_dist.recbole.atomic_files import MISSING
from gru4recf_dist.recbole.token_ids import PADDING, TokenIds

USER_FIELD, ITEM_FIELD, TIME_FIELD = "user_id", "item_id", "timestamp"
# What stands for the values that no training item has, which are one value here.
_UNKNOWN = "[UNKNOWN]"
# Between the values of a token_seq, as RecBole has it by default.
_SEPARATOR = " "


@dataclass(frozen=True)
class WrittenDataSet:
    """What RecBole will make of the files.

    Attributes:
        ids: that it will give.
        items: this project's item tokens by id, as they stand in the files.
        values: the same of each token feature, by name.
        changed: how many of these tokens had to be percent-encoded.
    """

    ids: TokenIds
    items: list[str]
    values: dict[str, list[str]]
    changed: int


def write_data_set(
    folder: str,
    name: str,
    data: str,
    manifest: Manifest,
    features: list[Feature],
    items: list[str],
    vocabularies: Mapping[str, list[str]],
) -> WrittenDataSet:
    """Write `FOLDER/NAME/NAME.inter` and `NAME.item`.

    The events are those of the test sessions (of the training sessions, if there are none), which under
    `leave_one_out` are the whole sessions; a session is a user, and an event's time its place. Every item is in
    NAME.item, with the values of its features as they are here.

    Args:
        items: tokens by id, entry 0 empty.
        vocabularies: of each token feature the values by id, entries 0 and 1 empty.

    Raises:
        UserError: a feature has a name that RecBole's files need for another column, or two tokens would be one.
    """
    for feature in features:
        if feature.name in (USER_FIELD, ITEM_FIELD, TIME_FIELD):
            raise UserError(f"model.features: '{feature.name}' is the name of another column in RecBole's files")
    written = _readable(items, PADDING_ID + 1, "items")
    values = {
        feature.name: _readable(
            vocabularies[feature.name],
            UNKNOWN_VALUE_ID + 1,
            f"feature '{feature.name}'",
            _SEPARATOR if feature.kind == "token_seq" else None,
        )
        for feature in features
        if feature.name in vocabularies
    }
    changed = sum(before != after for before, after in zip(items, written, strict=True))
    for feature, after in values.items():
        changed += sum(before != now for before, now in zip(vocabularies[feature], after, strict=True))
    base = storage.join(folder, name, name)
    order = _write_events(f"{base}.inter", data, manifest, written)
    columns = [_Column(data, feature, values.get(feature.name)) for feature in features]
    header = [f"{ITEM_FIELD}:token", *(f"{column.feature.name}:{column.feature.kind}" for column in columns)]
    with storage.open_atomic(f"{base}.item") as stream, io.TextIOWrapper(stream, "utf-8", newline="\n") as text:
        text.write("\t".join(header) + "\n")
        for item in order:
            text.write("\t".join([written[item], *(column.cell(item) for column in columns)]) + "\n")
    ids = TokenIds(
        base,
        [PADDING, *(written[item] for item in order)],
        {column.feature.name: [PADDING, *column.appeared] for column in columns if column.feature.name in values},
    )
    return WrittenDataSet(ids, written, values, changed)


def _readable(tokens: list[str], first: int, what: str, separator: str | None = None) -> list[str]:
    """``tokens`` by id as RecBole reads them back; what it would not has every byte percent-encoded."""
    written = list(tokens)
    for number in range(first, len(tokens)):
        token = tokens[number]
        is_special = token in MISSING or token in (PADDING, _UNKNOWN) or (separator is not None and separator in token)
        if is_special or not token.isprintable() or '"' in token:
            written[number] = "".join(f"%{byte:02X}" for byte in token.encode())
    if len(set(written[first:])) != len(written) - first:
        raise UserError(f"{what}: two tokens would be one in RecBole's files (give --ids)")
    return written


def _write_events(url: str, data: str, manifest: Manifest, items: list[str]) -> list[int]:
    """Write NAME.inter; all items in the order in which RecBole will number them."""
    split = manifest.splits["test"] if manifest.splits["test"].sessions else manifest.splits["train"]
    order: dict[int, None] = {}
    with storage.open_atomic(url) as stream, io.TextIOWrapper(stream, "utf-8", newline="\n") as text:
        text.write(f"{USER_FIELD}:token\t{ITEM_FIELD}:token\t{TIME_FIELD}:float\n")
        for shard in split.shards:
            for block in read_blocks(data, shard, manifest.items, event_features=manifest.event_features):
                ends = np.cumsum(block.lengths)
                for session, start, stop in zip(block.sessions, ends - block.lengths, ends, strict=True):
                    events = block.items[start:stop].tolist()
                    order.update(dict.fromkeys(events))
                    for place, item in enumerate(events):
                        text.write(f"{session}\t{items[item]}\t{place}\n")
    # RecBole numbers what only NAME.item has after what NAME.inter has.
    return [*order, *(item for item in range(1, manifest.items + 1) if item not in order)]


class _Column:
    """A feature of all items as cells of NAME.item; ``appeared`` are the values of the cells so far, in order."""

    def __init__(self, data: str, feature: Feature, values: list[str] | None) -> None:
        self.feature = feature
        self.appeared: dict[str, None] = {}
        self._names = values and ["", _UNKNOWN, *values[UNKNOWN_VALUE_ID + 1 :]]
        self._values = storage.read_npy_rows(file_url(data, feature.values))
        self._bounds = None if feature.indptr is None else storage.read_npy_rows(file_url(data, feature.indptr))

    def cell(self, item: int) -> str:
        """What stands in the row of an item."""
        if self._names is None:
            # All digits, so that RecBole gets the same float32.
            return repr(float(self._values[item]))
        start, stop = (item, item + 1) if self._bounds is None else self._bounds[item : item + 2]
        values = [self._names[number] for number in self._values[start:stop].tolist() if number != PADDING_ID]
        self.appeared.update(dict.fromkeys(values))
        return _SEPARATOR.join(values)
