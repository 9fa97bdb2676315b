"""Item features: ids of values, CSR, unknown and missing values, floats, vectors."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru4recf_dist.errors import UserError
from tests.unit.data_prep.prepared import Prepared, feature_values, run, write_csv

# Item `only_test` is never trained on: its values are unknown unless a trained item has them.
EVENTS = [(f"s{n}", item, n) for n in range(10) for item in ("a", "b", "c")] + [
    ("z", "a", 90),
    ("z", "only_test", 91),
    ("y", "a", 80),
    ("y", "bare", 81),
]
SPLIT = {"method": "temporal", "valid_from": 80, "test_from": 90}


def prepared(tmp_path, features, **more) -> Prepared:
    write_csv(tmp_path / "events.csv", EVENTS)
    run(
        {"source": str(tmp_path), "output": str(tmp_path / "out"), "split": SPLIT, "features": features},
        input={"format": "csv", "files": ["events.csv"]},
        **more,
    )
    return Prepared(tmp_path / "out")


def vocabulary(data: Prepared, feature: dict) -> list[str]:
    table = pq.read_table(io.BytesIO(data.bytes(feature["vocabulary"])))
    assert table["id"].to_pylist() == list(range(2, 2 + len(table)))
    return table["token"].to_pylist()


def test_token_and_token_seq(tmp_path):
    rows = {"a": ("red", "u v"), "b": ("blue", " v  w v "), "c": ("red", ""), "only_test": ("green", "v x")}
    write_csv(tmp_path / "items.csv", [(k, *v) for k, v in rows.items()] + [("a", "pink", "q")], "item_id,color,tags")
    features = [{"name": "color", "kind": "token"}, {"name": "labels", "kind": "token_seq", "column": "tags"}]
    data = prepared(tmp_path, features, items={"file": "items.csv"})
    color, labels = data.manifest["features"]
    values = data.npy(color["values"])
    assert values.dtype == np.int32 and values.shape == (6,)
    assert vocabulary(data, color) == ["red", "blue"]
    assert {token: int(values[number]) for token, number in data.ids.items()} == {
        "a": 2, "b": 3, "c": 2, "only_test": 1, "bare": 0,
    }  # fmt: skip
    assert (color["size"], color["longest"], values[0]) == (4, 1, 0)

    order = vocabulary(data, labels)
    counts = Counter(["u", "v", "v", "w", "v"])
    assert order == sorted(counts, key=lambda value: (-counts[value], value))
    indptr, flat = data.npy(labels["indptr"]), data.npy(labels["values"])
    assert indptr.dtype == np.int64 and indptr.shape == (7,) and flat.dtype == np.int32
    code = {value: number + 2 for number, value in enumerate(order)}
    expected = {"a": ["u", "v"], "b": ["v", "w", "v"], "only_test": ["v", "x"], "c": [], "bare": []}
    for token, number in data.ids.items():
        assert flat[indptr[number] : indptr[number + 1]].tolist() == [code.get(v, 1) for v in expected[token]], token
    assert (labels["size"], labels["longest"], indptr[1]) == (5, 3, 0)
    report = {row["feature"]: row["items_without"] for row in data.manifest["report"] if "feature" in row}
    assert report == {"color": 1, "labels": 2}


def test_floats_raw_and_standardised(tmp_path):
    write_csv(tmp_path / "items.csv", [("a", 1.5), ("b", "x"), ("c", 4.5), ("only_test", 9), ("bare", "nan")],
              "item_id,price")  # fmt: skip
    features = [{"name": "price", "kind": "float"},
                {"name": "scaled", "column": "price", "kind": "float", "standardize": True},
                {"name": "zeros", "column": "price", "kind": "float", "flag_missing": False}]  # fmt: skip
    data = prepared(tmp_path, features, items={"file": "items.csv"})
    raw, scaled, zeros = (data.npy(feature["values"]) for feature in data.manifest["features"])
    assert raw.dtype == np.float32 and raw[0] == scaled[0] == 0
    ids = data.ids
    expected = {"a": 1.5, "b": None, "c": 4.5, "only_test": 9, "bare": None}
    assert feature_values(data, "price") == expected
    assert {token: zeros[number] for token, number in ids.items()} == {t: v or 0 for t, v in expected.items()}
    assert [feature["missing"] for feature in data.manifest["features"]] == [True, True, False]
    # Mean 3 and deviation 1.5 of the two trained values.
    assert [float(scaled[ids[token]]) for token in ("a", "c", "only_test")] == [-1, 1, 4]
    assert np.isnan(scaled[[ids["b"], ids["bare"]]]).all()


def test_floats_of_which_none_is_missing_are_not_flagged_and_what_float32_cannot_hold_is_missing(tmp_path):
    rows = [("a", 1, 1e39), ("b", 2, -1), ("c", 3, "1e-50"), ("only_test", 4, "inf"), ("bare", 5, 2)]
    write_csv(tmp_path / "items.csv", rows, "item_id,whole,odd")
    features = [{"name": name, "kind": "float"} for name in ("whole", "odd")]
    data = prepared(tmp_path, features, items={"file": "items.csv"})
    assert [feature["missing"] for feature in data.manifest["features"]] == [False, True]
    assert feature_values(data, "odd") == {"a": None, "b": -1, "c": 0, "only_test": None, "bare": 2}


def test_values_of_few_training_items_are_unknown(tmp_path):
    rows = {"a": ("red", "u v"), "b": ("red", "v w"), "c": ("blue", "v"), "only_test": ("blue", "w"), "bare": ("", "u")}
    write_csv(tmp_path / "items.csv", [(k, *v) for k, v in rows.items()], "item_id,color,tags")
    features = [
        {"name": "color", "kind": "token", "min_count": 2},
        {"name": "tags", "kind": "token_seq", "min_count": 3},
    ]
    data = prepared(tmp_path, features, items={"file": "items.csv"})
    assert [vocabulary(data, feature) for feature in data.manifest["features"]] == [["red"], ["v"]]
    assert [feature["size"] for feature in data.manifest["features"]] == [3, 3]
    # `c` is trained on: its unknown color is, too.
    assert feature_values(data, "color") == {
        "a": "red",
        "b": "red",
        "c": "unknown",
        "only_test": "unknown",
        "bare": None,
    }
    assert feature_values(data, "tags")["b"] == ["v", "unknown"]


def test_vectors_from_npy_and_from_a_list_column(tmp_path):
    vectors = np.arange(12, dtype=np.float64).reshape(4, 3)
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "names.txt").write_text("c\nunseen\na\nonly_test\n")
    lists = {"item_id": ["a", "b"], "image": [[1.0, 2.0], [3.0, 4.0]], "brand": [7, 8]}
    pq.write_table(pa.table(lists), tmp_path / "items.parquet")
    features = [
        {"name": "text", "npy": "v.npy", "npy_items": "names.txt"},
        {"name": "image", "kind": "vector"},
        {"name": "brand", "kind": "token"},
    ]
    data = prepared(tmp_path, features, items={"file": "items.parquet", "format": "parquet"})
    text, image, brand = data.manifest["features"]
    values = data.npy(text["values"])
    assert (text["kind"], text["size"], values.dtype, values.shape) == ("vector", 3, np.float32, (6, 3))
    expected = {"c": vectors[0], "a": vectors[2], "only_test": vectors[3]}
    for token, number in data.ids.items():
        np.testing.assert_array_equal(values[number], expected.get(token, np.zeros(3)))
    images = data.npy(image["values"])
    assert images[data.ids["b"]].tolist() == [3, 4] and images[data.ids["c"]].tolist() == [0, 0]
    assert vocabulary(data, brand) == ["7", "8"]


def test_item_tables_of_json_lines(tmp_path):
    (tmp_path / "items.jsonl").write_text(
        '{"item_id": "a", "tags": ["p", "q"], "price": 2, "v": [1, 2]}\n{"item_id": "b", "tags": null, "price": 2.5}\n'
    )
    features = [{"name": "tags", "kind": "token_seq"}, {"name": "price", "kind": "float"},
                {"name": "v", "kind": "vector"}]  # fmt: skip
    data = prepared(tmp_path, features, items={"file": "items.jsonl", "format": "jsonl"})
    tags, price, vector = data.manifest["features"]
    assert np.diff(data.npy(tags["indptr"])).tolist()[data.ids["a"]] == 2
    assert data.npy(price["values"])[data.ids["b"]] == 2.5
    assert data.npy(vector["values"])[data.ids["a"]].tolist() == [1, 2]


def test_recbole_header_gives_the_kinds(tmp_path):
    name = tmp_path.name
    lines = ["session_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in EVENTS)]
    (tmp_path / f"{name}.inter").write_text("\n".join(lines))
    (tmp_path / f"{name}.item").write_text(
        "item_id:token\tt:token\ts:token_seq\tf:float\tv:float_seq\na\tone two\tone two\t3\t1 2\nb\tone\tone\t4\t3 4\n"
    )
    features = [{"name": name} for name in "tsfv"]
    run({"source": str(tmp_path), "output": str(tmp_path / "out"), "split": SPLIT, "features": features})
    data = Prepared(tmp_path / "out")
    assert [feature["kind"] for feature in data.manifest["features"]] == ["token", "token_seq", "float", "vector"]
    assert vocabulary(data, data.manifest["features"][0]) == ["one", "one two"]
    assert vocabulary(data, data.manifest["features"][1]) == ["one", "two"]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"name": "colr", "kind": "token"}, r"items.csv: no column 'colr' \(it has: item_id, color, v, w\)"),
        ({"name": "color"}, "features.color: kind must be given"),
        ({"name": "v", "kind": "vector"}, "features.v: vectors have different sizes"),
        ({"name": "color", "kind": "vector"}, "'red' is not a number"),
        ({"name": "x", "npy": "gone.npy", "npy_items": "names.txt"}, "features.x: .*gone.npy: no such file"),
        ({"name": "x", "npy": "v.npy", "npy_items": "names.txt"}, "v.npy: has fewer rows than .*names.txt"),
        ({"name": "w", "kind": "vector"}, "features.w: a vector has an element that is missing or no finite"),
        ({"name": "x", "npy": "w.npy", "npy_items": "names.txt"}, "w.npy: a vector has an element that is missing"),
    ],
)
def test_wrong_features_are_one_clear_error(tmp_path, feature, message):
    write_csv(
        tmp_path / "items.csv", [("a", "red", "1 2", "1 2"), ("b", "blue", "1 2 3", "1 nan")], "item_id,color,v,w"
    )
    np.save(tmp_path / "v.npy", np.zeros((1, 3)))
    np.save(tmp_path / "w.npy", np.array([[1, 1e39], [2, 2]]))
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path, [feature], items={"file": "items.csv"})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
