"""Several item tables, long ones, the latest of several rows, and values cut out of text."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare import prepare
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.prepared import Prepared, feature_values, make, run, write_csv

# All four items have training events.
EVENTS = [(f"s{n}", item, number) for n in range(6) for number, item in enumerate("abcdab")]


def recipe_of(tmp_path, features, **more) -> dict:
    write_csv(tmp_path / "events.csv", EVENTS)
    given = {"format": "csv", "files": ["events.csv"]}
    return {"source": str(tmp_path), "output": str(tmp_path / "out"), "input": given, "features": features, **more}


def prepared(tmp_path, features, **more) -> Prepared:
    run(recipe_of(tmp_path, features, **more))
    return Prepared(tmp_path / "out")


def test_features_of_tables_in_other_formats(tmp_path):
    """Features keep the recipe's order whatever table they are of; a column may share our own columns' names."""
    write_csv(tmp_path / "one.csv", [("a", "x y", 1), ("b", "z", 2)], "item_id,item,ordinal")
    pq.write_table(pa.table({"sku": ["b", "c"], "price": [1.5, 2.5]}), tmp_path / "two.parquet")
    (tmp_path / "three.jsonl").write_text(json.dumps({"item_id": "d", "tags": ["u", "v"]}) + "\n")
    features = [
        {"name": "price", "kind": "float", "table": "prices"},
        {"name": "item", "kind": "token_seq"},
        {"name": "tags", "kind": "token_seq", "table": "more-tags"},
        {"name": "ordinal", "kind": "token"},
    ]
    tables = {
        "prices": {"file": "two.parquet", "format": "parquet", "item": "sku"},
        "more-tags": {"file": "three.jsonl", "format": "jsonl"},
    }
    data = prepared(tmp_path, features, items={"file": "one.csv"}, item_tables=tables)
    assert [feature["name"] for feature in data.manifest["features"]] == ["price", "item", "tags", "ordinal"]
    assert feature_values(data, "price") == {"a": None, "b": 1.5, "c": 2.5, "d": None}
    assert feature_values(data, "item") == {"a": ["x", "y"], "b": ["z"], "c": [], "d": []}
    assert feature_values(data, "tags") == {"a": [], "b": [], "c": [], "d": ["u", "v"]}
    assert feature_values(data, "ordinal") == {"a": "1", "b": "2", "c": None, "d": None}


def test_first_or_latest_row_of_an_item_over_several_files(tmp_path):
    """By file and line, or by a time: compared as numbers, a missing one before all others, ties to the first."""
    header = "item_id,color,seen"
    write_csv(tmp_path / "part1.csv", [("a", "red", 9), ("b", "", 5), ("d", "tied", 7)], header)
    write_csv(tmp_path / "part2.csv", [("a", "blue", 10), ("b", "old", 4), ("d", "later", 7), ("c", "x", "")], header)
    write_csv(tmp_path / "part3.csv", [("c", "y", 0), ("a", "green", "never")], header)
    features = [{"name": "color", "kind": "token"}]
    data = prepared(tmp_path, features, items={"file": "part*.csv"})
    assert feature_values(data, "color") == {"a": "red", "b": None, "c": "x", "d": "tied"}
    data = prepared(tmp_path, features, items={"file": "part*.csv", "time": "seen"})
    assert feature_values(data, "color") == {"a": "blue", "b": None, "c": "y", "d": "tied"}


@pytest.mark.parametrize(
    ("time", "colors", "prices"),
    [
        (None, {"a": "red", "b": "blue", "c": None, "d": None}, {"a": 3.0, "b": None, "c": 7.0, "d": None}),
        ("at", {"a": "green", "b": "blue", "c": None, "d": None}, {"a": 3.0, "b": None, "c": 8.0, "d": None}),
    ],
)
def test_long_table(tmp_path, time, colors, prices):
    """Each property has its own first (or latest) row; one property may give several features."""
    rows = [
        ("a", "color", "red", 1),
        ("a", "price", "3", 8),
        ("a", "color", "green", 2),
        ("a", "size", "not a number", 9),
        ("b", "color", "blue", 5),
        ("b", "price", "free", 5),
        ("c", "price", "7", 5),
        ("c", "price", "8", 6),
        ("c", "vector", "1.5;2.5", 6),
    ]
    write_csv(tmp_path / "long.csv", rows, "sku,what,value,at")
    items = {"file": "long.csv", "item": "sku", "property": "what", "value": "value", "time": time}
    features = [
        {"name": "color", "kind": "token"},
        {"name": "price", "kind": "float"},
        {"name": "price_text", "kind": "token_seq", "column": "price"},
        {"name": "vector", "kind": "vector", "separator": ";"},
    ]
    data = prepared(tmp_path, features, items=items)
    assert feature_values(data, "color") == colors
    assert feature_values(data, "price") == prices
    texts = feature_values(data, "price_text")
    assert texts == {"a": ["3"], "b": ["free"], "c": [str(int(prices["c"]))], "d": []}
    vectors = data.npy(data.manifest["features"][3]["values"])
    assert {token: vectors[number].tolist() for token, number in data.ids.items()} == {
        **{token: [0.0, 0.0] for token in "abd"},
        "c": [1.5, 2.5],
    }


def test_extract_and_remove(tmp_path):
    """`extract` first, then `remove`; what does not match is missing, in lists element by element."""
    rows = [
        ("a", "Film (1999)", "keep|x1|drop|x2", "$1,299.50"),
        ("b", "Film (1999", "drop", "EUR 5"),
        ("c", "(2001) Film (2002)", "x1", "$2"),
        ("d", "", "", ""),
    ]
    (tmp_path / "items.csv").write_text(
        "item_id,title,tags,price\n" + "".join(",".join(f'"{value}"' for value in row) + "\n" for row in rows)
    )
    features = [
        {"name": "year", "kind": "token", "column": "title", "extract": r"\((\d{4})\)$"},
        {"name": "tags", "kind": "token_seq", "separator": "|", "extract": "^(?:(x.)|keep)$", "remove": "x"},
        {"name": "price", "kind": "float", "extract": r"^\$(.*)$", "remove": ",]^"},
        {"name": "all", "kind": "token", "column": "price", "remove": "$ "},
    ]
    data = prepared(tmp_path, features, items={"file": "items.csv"})
    assert feature_values(data, "year") == {"a": "1999", "b": None, "c": "2002", "d": None}
    assert feature_values(data, "tags") == {"a": ["1", "2"], "b": [], "c": ["1"], "d": []}
    assert feature_values(data, "price") == {"a": 1299.5, "b": None, "c": 2.0, "d": None}
    assert feature_values(data, "all") == {"a": "1,299.50", "b": "EUR5", "c": "2", "d": None}


LONG = {"file": "items.csv", "property": "what", "value": "value"}


@pytest.mark.parametrize(
    ("feature", "more", "message"),
    [
        ({"kind": "token", "table": "x"}, {}, r"features.f.table: no 'x' in item_tables \(it has: none\)"),
        ({"kind": "token", "table": "x"}, {"item_tables": {"x": {}}}, "item_tables.x.file must be given"),
        ({"kind": "token", "table": "x"}, {"item_tables": {"x": {"file": "no.csv"}}}, "no.csv: no such file"),
        ({"kind": "token"}, {"items": {"file": "no*.csv"}}, r"no\*.csv: no file matches"),
        (
            {"kind": "token", "column": "what"},
            {"items": {"file": "items.csv", "time": "t"}},
            "items.csv: no column 't'",
        ),
        ({"kind": "token"}, {"items": {**LONG, "value": "v"}}, "items.csv: no column 'v'"),
        ({"kind": "token"}, {"items": LONG}, r"items.csv: no row has the property 'f' \(features.f\)"),
        ({}, {"items": LONG}, "features.f: kind must be given"),
        ({"kind": "vector", "remove": "x"}, {"items": LONG}, "extract and remove are not for vectors"),
    ],
)
def test_errors(tmp_path, feature, more, message):
    write_csv(tmp_path / "items.csv", [("a", "color", "red")], "item_id,what,value")
    with pytest.raises((UserError, ValueError), match=message):
        prepare(make(recipe_of(tmp_path, [{"name": "f", **feature}], **more)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.csv", "items.csv"]
