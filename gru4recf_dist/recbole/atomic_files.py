"""The ids that RecBole gives to the tokens of its atomic files.

RecBole numbers the items in their order of appearance in NAME.inter and then in NAME.item, and a feature's values in
their order of appearance in NAME.item. Settings that leave rows out, or number several columns together, change that.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.recbole.token_ids import PADDING, TokenIds

# What pandas, by which RecBole reads, takes for a missing value.
MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
) | {"NULL", "NaN", "None", "n/a", "nan", "null"}
# Settings that must be as here for the order of appearance to be that of the files; None stands for unset, too.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "rm_dup_inter": (None,),
    "val_interval": (None,),
    "user_inter_num_interval": (None, "[0,inf)"),
    "item_inter_num_interval": (None, "[0,inf)"),
    "alias_of_item_id": (None,),
    "benchmark_filename": (None,),
}


def ids_of_files(folder: str, features: list[str], settings: dict[str, Any]) -> TokenIds:
    """The ids that RecBole gives to the tokens of a data set with ``settings``, which are those of its configuration.

    Args:
        folder: holds NAME.inter and, if there are ``features``, NAME.item; NAME is the folder's own name.
        features: token and token_seq features that ids are needed of; others among them are left out.

    Raises:
        UserError: a file or column is missing, or a setting changes the order of the ids.
    """
    for name, harmless in _WITHOUT_EFFECT.items():
        if (settings.get(name) or None) not in harmless:
            raise UserError(
                f"{folder}: RecBole's {name} was {settings[name]!r}, which changes its ids: they cannot be told from "
                "the files (give --ids)"
            )
    item_field, user_field = settings.get("ITEM_ID_FIELD", "item_id"), settings.get("USER_ID_FIELD", "user_id")
    base = storage.join(folder, folder.rstrip("/").rsplit("/", 1)[-1])
    if _is_loaded(f"{base}.user", settings):
        raise UserError(f"{base}.user: RecBole leaves out events by it: ids cannot be told from the files (give --ids)")
    has_item_file = _is_loaded(f"{base}.item", settings)
    if features and not has_item_file:
        raise UserError(f"{base}.item: no such file, or RecBole's load_col leaves it out, but the model has features")
    # Dictionaries keep the order in which their keys came first.
    described: dict[str, None] = {}
    values: dict[str, dict[str, None]] = {}
    if has_item_file:
        header, rows = _read(f"{base}.item", settings)
        values = {name: {} for name in features if header.get(name, (0, ""))[1] in ("token", "token_seq")}
        for row in rows:
            item = _value(row, header, item_field, f"{base}.item")
            if item is None or item in described:
                continue
            described[item] = None
            for name, seen in values.items():
                value = _value(row, header, name, f"{base}.item")
                if header[name][1] == "token_seq":
                    parts = (value or "").split(settings.get("seq_separator", " "))
                    seen.update(dict.fromkeys(filter(None, parts)))
                elif value is not None:
                    seen[value] = None
    # RecBole leaves out events of items that NAME.item does not have, unless it is told not to.
    only_described = has_item_file and settings.get("filter_inter_by_user_or_item", True) is True
    items: dict[str, None] = {}
    header, rows = _read(f"{base}.inter", settings)
    for row in rows:
        item = _value(row, header, item_field, f"{base}.inter")
        user = _value(row, header, user_field, f"{base}.inter")
        if item is not None and user is not None and (not only_described or item in described):
            items[item] = None
    items |= described
    return TokenIds(folder, [PADDING, *items], {name: [PADDING, *seen] for name, seen in values.items()})


def _is_loaded(url: str, settings: dict[str, Any]) -> bool:
    """Whether RecBole reads the file NAME.user or NAME.item, which it does if it is there and named, or none is."""
    load_col = settings.get("load_col")
    return (load_col is None or url.rsplit(".", 1)[-1] in load_col) and storage.exists(url)


def _read(url: str, settings: dict[str, Any]) -> tuple[dict[str, tuple[int, str]], Iterator[list[str]]]:
    """The columns of a file (name: place and type) and its rows."""
    rows = _rows(url, settings.get("field_separator", "\t"), settings.get("encoding") or "utf-8")
    header = {}
    for place, column in enumerate(next(rows, [])):
        name, _, kind = column.partition(":")
        header[name] = (place, kind)
    return header, rows


def _rows(url: str, delimiter: str, encoding: str) -> Iterator[list[str]]:
    try:
        text = storage.read_bytes(url).decode(encoding)
        # As pandas reads them: a value in double quotes may hold anything, and empty lines are none.
        yield from filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (UnicodeDecodeError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{url}: {error}") from error


def _value(row: list[str], header: dict[str, tuple[int, str]], name: str, url: str) -> str | None:
    """A row's value in a column, None where pandas sees none."""
    if name not in header:
        raise UserError(f"{url}: has no column '{name}' (it has: {', '.join(header)})")
    place = header[name][0]
    value = row[place] if place < len(row) else ""
    return None if value in MISSING else value
