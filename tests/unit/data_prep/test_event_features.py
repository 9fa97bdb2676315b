"""Event features in the shards, against the same written out in plain Python; and the same bytes on both engines."""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import math
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from pydantic import ValidationError

from data_prep.prepare import prepare
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.shards import read_blocks
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.both_engines import ON_SPARK, SPARK, check_same
from tests.unit.data_prep.prepared import Prepared, by_session, make, run, write_csv

HEADER = "session_id,item_id,timestamp,event,price"
VALID_FROM, TEST_FROM = 800, 900
FEATURES = [
    {"name": "gap", "kind": "time_gap", "buckets": 6},
    {"name": "type", "kind": "token", "column": "event", "min_count": 3},
    {"name": "price", "kind": "float", "standardize": True},
    {"name": "raw-price_2", "kind": "float", "column": "price"},
]
RECIPE = {
    "input": {"format": "csv"},
    "split": {"method": "temporal", "valid_from": VALID_FROM, "test_from": TEST_FROM},
    "event_features": FEATURES,
    "streams": 2,
    "shard_sessions": 7,
    "block_sessions": 3,
}
# What is no number that float32 holds is missing.
NUMBERS = {
    "": None,
    "x": None,
    "1e39": None,
    "nan": None,
    "-inf": None,
    "0.1": 0.1,
    "7": 7.0,
    "2.5e1": 25.0,
    "-3": -3.0,
}
TYPES = ["view", "view", "cart", "buy", "", "view", "wish"]


def write_events(folder: Path, seed: int = 0, more_types: tuple[str, ...] = ()) -> list[tuple]:
    """Rows with ties of time, in three files."""
    rng = np.random.default_rng(seed)
    types, numbers = [*TYPES, *more_types], list(NUMBERS)
    rows = []
    for session in range(60):
        start = int(rng.integers(0, 1000))
        for _ in range(int(rng.integers(1, 9))):
            start += int(rng.integers(0, 5) ** 3)
            values = types[rng.integers(len(types))], numbers[rng.integers(len(numbers))]
            rows.append((f"s{seed}-{session}", f"i{rng.integers(12)}", start, *values))
    rows += [(f"t{seed}", "i0", 3 * n, kind, "7") for n, kind in enumerate(("rare", "twice", "view", "twice"))]
    rows = [rows[place] for place in rng.permutation(len(rows))]
    for part in range(3):
        write_csv(folder / f"{part}.csv", rows[part::3], HEADER)
    return [row for part in range(3) for row in rows[part::3]]


def kept_sessions(rows: list[tuple]) -> dict[str, list[tuple]]:
    """By split and key: its rows in the order of time."""
    found: dict[str, dict[str, list[tuple]]] = {"train": {}, "valid": {}, "test": {}}
    for key, events in by_session(rows).items():
        if len(events) > 1:
            end = events[-1][2]
            found["train" if end < VALID_FROM else "valid" if end < TEST_FROM else "test"][key] = events
    return found


def stored_columns(data: Prepared, split: str) -> list[dict[str, np.ndarray]]:
    """Of every stored session, in the order of their numbers: its columns, cut out of the tars without our reader."""
    sessions = {}
    for shard in data.shards(split):
        blocks: dict[str, dict[str, np.ndarray]] = {}
        with tarfile.open(fileobj=io.BytesIO(data.bytes(shard["url"]))) as tar:
            for member in tar:
                key, column, _ = member.name.split(".", 2)
                blocks.setdefault(key, {})[column] = np.load(io.BytesIO(tar.extractfile(member).read()))
        for block in blocks.values():
            cuts = np.cumsum(block.pop("lengths"))[:-1]
            numbers = block.pop("sessions")
            parts = {name: np.split(column, cuts) for name, column in block.items()}
            for place, number in enumerate(numbers.tolist()):
                sessions[number] = {name: part[place] for name, part in parts.items()}
    return [sessions[number] for number in range(len(sessions))]


def vocabulary_of(data: Prepared, name: str) -> list[str]:
    (feature,) = [each for each in data.manifest["event_features"] if each["name"] == name]
    table = pq.read_table(io.BytesIO(data.bytes(feature["vocabulary"])))
    assert table["id"].to_pylist() == list(range(2, 2 + len(table)))
    assert feature["size"] == 2 + len(table)
    return table["token"].to_pylist()


class Reference:
    """What `FEATURES` must be, by the training events."""

    def __init__(self, train: dict[str, list[tuple]]) -> None:
        events = [row for rows in train.values() for row in rows]
        counts = Counter(row[3] for row in events if row[3])
        self.types = [t for t in sorted(counts, key=lambda t: (-counts[t], t)) if counts[t] >= 3]
        numbers = [NUMBERS[row[4]] for row in events if NUMBERS[row[4]] is not None]
        self.mean, self.deviation = math.fsum(numbers) / len(numbers), float(np.std(numbers))
        gaps = [b[2] - a[2] for rows in train.values() for a, b in pairwise(rows) if b[2] > a[2]]
        # Five bounds of six buckets, each the same multiple of the one before.
        ratio = (max(gaps) / min(gaps)) ** (1 / 4)
        self.edges = [min(gaps) * ratio**n for n in range(5)]

    def columns(self, rows: list[tuple]) -> dict[str, list]:
        numbers = [NUMBERS[row[4]] for row in rows]
        types = [0 if not row[3] else 2 + self.types.index(row[3]) if row[3] in self.types else 1 for row in rows]
        gaps = [b[2] - a[2] for a, b in pairwise(rows)]
        return {
            "gap": [1, *(2 + bisect.bisect_right(self.edges, gap * (1 + 1e-6)) for gap in gaps)],
            "type": types,
            "price": [math.nan if n is None else (n - self.mean) / self.deviation for n in numbers],
            "raw-price_2": [math.nan if n is None else n for n in numbers],
        }


def check(
    data: Prepared, reference: Reference, sessions: dict[str, dict[str, list[tuple]]], first: dict | None = None
) -> None:
    """Hold the sessions of a data set, from number ``first`` of each split on, against the reference."""
    for split, expected in sessions.items():
        stored = stored_columns(data, split)[(first or {}).get(split, 0) :]
        ordered = sorted(expected, key=lambda key: hashlib.md5(f"1:{key}".encode()).hexdigest())
        assert len(stored) == len(ordered)
        for key, columns in zip(ordered, stored, strict=True):
            rows = expected[key]
            assert [data.tokens[item] for item in columns["items"].tolist()] == [row[1] for row in rows]
            for name, values in reference.columns(rows).items():
                dtype = np.int32 if name in ("gap", "type") else np.float32
                assert columns[name].dtype == dtype
                np.testing.assert_allclose(columns[name], values, rtol=1e-6, atol=1e-7, err_msg=f"{key} {name}")


def test_the_columns_are_those_of_plain_python(tmp_path):
    rows = write_events(tmp_path / "raw")
    report = run({**RECIPE, "source": str(tmp_path / "raw"), "output": str(tmp_path / "out")})
    data, sessions = Prepared(tmp_path / "out"), kept_sessions(rows)
    reference = Reference(sessions["train"])
    assert all(sessions.values()) and "rare" not in reference.types and {1, 2} <= set(by_count(sessions))
    check(data, reference, sessions)
    assert vocabulary_of(data, "type") == reference.types
    gap, kind, price, raw = data.manifest["event_features"]
    assert gap["edges"] == pytest.approx(reference.edges, rel=1e-5) and gap["size"] == 2 + 6 and not gap["dates"]
    assert (price["mean"], price["deviation"]) == pytest.approx((reference.mean, reference.deviation), rel=1e-12)
    assert raw["mean"] is None and raw["size"] == 1 and kind["kind"] == "token"
    trained = [row for events in sessions["train"].values() for row in events]
    without = {row["event_feature"]: row["events_without"] for row in data.manifest["report"] if "event_feature" in row}
    no_number = sum(NUMBERS[row[4]] is None for row in trained)
    assert without == {"gap": None, "type": sum(not row[3] for row in trained), "price": no_number,
                       "raw-price_2": no_number}  # fmt: skip
    assert "event feature  kind" in report.table()


def by_count(sessions: dict[str, dict[str, list[tuple]]]) -> set[int]:
    """How often a type occurs in training: those that occur once or twice must be there for a test of `min_count`."""
    return set(Counter(row[3] for events in sessions["train"].values() for row in events if row[3]).values())


def test_plain_webdataset_reads_them_and_so_do_we(tmp_path):
    write_events(tmp_path / "raw")
    run({**RECIPE, "source": str(tmp_path / "raw"), "output": str(tmp_path / "out"), "store_times": True})
    manifest = read_manifest(str(tmp_path / "out"))
    shard = manifest.splits["train"].shards[0]
    url = str(tmp_path / "out" / shard.url)
    plain = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    ours = list(read_blocks(str(tmp_path / "out"), shard, manifest.items, event_features=manifest.event_features))
    assert len(plain) == len(ours) == 3
    for sample, block in zip(plain, ours, strict=True):
        for name in ("gap", "type", "price", "raw-price_2"):
            np.testing.assert_array_equal(sample[f"{name}.npy"], block.event_features[name])
        np.testing.assert_array_equal(sample["times.npy"], block.times)


def test_neither_threads_nor_the_size_of_shards_change_a_value(tmp_path):
    write_events(tmp_path / "raw")
    content = {**RECIPE, "source": str(tmp_path / "raw")}
    run({**content, "output": str(tmp_path / "a")}, threads=1)
    run({**content, "output": str(tmp_path / "b")}, threads=3, shard_sessions=3, block_sessions=2, streams=4)
    one, other = Prepared(tmp_path / "a"), Prepared(tmp_path / "b")
    assert one.manifest["event_features"] == other.manifest["event_features"]
    for split in ("train", "valid", "test"):
        for first, second in zip(stored_columns(one, split), stored_columns(other, split), strict=True):
            for name in first:
                np.testing.assert_array_equal(first[name], second[name])


def test_an_append_keeps_what_the_columns_mean(tmp_path):
    first = write_events(tmp_path / "day-1")
    second = write_events(tmp_path / "day-2", seed=1, more_types=("scan", "scan", "zoom", "zoom"))
    content = {**RECIPE, "output": str(tmp_path / "out")}
    run({**content, "source": str(tmp_path / "day-1")})
    before = Prepared(tmp_path / "out")
    prepare(make({**content, "source": str(tmp_path / "day-2")}), append=True)
    data, old, new = Prepared(tmp_path / "out"), kept_sessions(first), kept_sessions(second)
    reference, added = Reference(old["train"]), Reference(new["train"])
    assert added.types != reference.types
    reference.types += [each for each in added.types if each not in reference.types]
    check(data, reference, new, {split: len(sessions) for split, sessions in old.items()})
    assert vocabulary_of(data, "type") == reference.types
    for then, now in zip(before.manifest["event_features"], data.manifest["event_features"], strict=True):
        changed = {key for key in then if then[key] != now[key]}
        assert changed == ({"size", "vocabulary"} if then["name"] == "type" else set())
    shards = {shard["url"]: shard for shard in data.shards("train")}
    assert all(shards[shard["url"]] == shard for shard in before.shards("train"))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (FEATURES[:2], r"event_features: gap \(time_gap\), type \(token\), but .* was prepared with gap"),
        (
            [*FEATURES[:2], {**FEATURES[2], "standardize": False}, FEATURES[3]],
            "event_features.price.standardize: False",
        ),
    ],
)
def test_an_append_with_other_event_features_is_refused(tmp_path, features, message):
    write_events(tmp_path / "raw")
    write_events(tmp_path / "more", seed=1)
    run({**RECIPE, "source": str(tmp_path / "raw"), "output": str(tmp_path / "out")})
    changed = {**RECIPE, "source": str(tmp_path / "more"), "output": str(tmp_path / "out"), "event_features": features}
    with pytest.raises(UserError, match=message):
        prepare(make(changed), append=True)


def test_dates_give_gaps_in_seconds_and_bounds_may_be_given(tmp_path):
    rows = [
        (f"s{n}", f"i{i}", f"2024-01-0{n % 3 + 1}T10:00:{seconds:06.3f}Z")
        for n in range(9)
        for i, seconds in enumerate((0.0, 0.25, 1.25, 11.25, 51.25))
    ]
    write_csv(tmp_path / "events.csv", rows)
    gap = {"name": "gap", "kind": "time_gap", "buckets": 3}
    bounds = {"shortest": 0.5, "longest": 20}
    run(
        {
            "source": str(tmp_path),
            "output": str(tmp_path / "out"),
            "event_features": [gap, {**gap, **bounds, "name": "g"}],
        },
        input={"format": "csv", "files": ["events.csv"], "time_format": "datetime"},
    )
    data = Prepared(tmp_path / "out")
    found, given = data.manifest["event_features"]
    # Two events of each session are held out.
    assert found["edges"] == [0.25, 1.0] and given["edges"] == [0.5, 20.0] and found["dates"]
    for columns in stored_columns(data, "test"):
        assert columns["gap"].tolist() == [1, 3, 4, 4, 4] and columns["g"].tolist() == [1, 2, 3, 3, 4]


def test_sessions_cut_by_a_gap_and_a_k_core_keep_the_features_of_their_events(tmp_path):
    rows = []
    for user in range(6):
        for n in range(12):
            item = "seldom" if user == 3 and n == 5 else f"i{n % 4}"
            rows.append((f"u{user}", item, 10 * n + 500 * (n > 6), f"{item}-{user}-{n}"))
    write_csv(tmp_path / "events.csv", rows, "session_id,item_id,timestamp,mark")
    features = [{"name": "mark", "kind": "token"}, {"name": "gap", "kind": "time_gap"}]
    run(
        {"source": str(tmp_path), "output": str(tmp_path / "out"), "event_features": features},
        input={"format": "csv", "files": ["events.csv"], "user": "session_id"},
        session_gap=100,
        min_item_support=3,
        deduplicate=True,
    )
    data = Prepared(tmp_path / "out")
    words = ["", "unknown", *vocabulary_of(data, "mark")]
    marks = []
    for columns in stored_columns(data, "train"):
        tokens = [data.tokens[item] for item in columns["items"].tolist()]
        marks += [words[number] for number in columns["mark"].tolist()]
        assert [mark.split("-")[0] for mark in marks[-len(tokens) :]] == tokens
        assert (columns["gap"] == 1).tolist() == [True] + [False] * (len(tokens) - 1)
    assert len(set(marks)) == len(marks) and not any("seldom" in mark for mark in marks)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "nested", "recbole"])
def test_every_format_gives_the_same_columns(tmp_path, form):
    kinds, costs = ["a", None, "b"], [1.5, 2, None]
    events = [
        {"aid": f"i{(s + n) % 5}", "ts": 10 * n, "kind": kinds[(s + n) % 3], "cost": costs[n % 3]}
        for s in range(8)
        for n in range(6)
    ]
    sessions = {f"s{s}": events[6 * s : 6 * s + 6] for s in range(8)}
    flat = [{"session": key, **event} for key, rows in sessions.items() for event in rows]
    raw = tmp_path / "raw"
    raw.mkdir()
    given = {"session": "session", "item": "aid", "time": "ts", "format": form, "files": ["events"]}
    if form == "jsonl":
        (raw / "events").write_text("\n".join(map(json.dumps, flat)))
    elif form == "nested":
        lines = [json.dumps({"session": key, "events": rows}) for key, rows in sessions.items()]
        (raw / "events").write_text("\n".join(lines))
        given |= {"format": "jsonl", "events": "events"}
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(flat), raw / "events")
    else:
        lines = ["\t".join("" if v is None else str(v) for v in row.values()) for row in flat]
        header = "session:token\taid:token\tts:float\tkind:token\tcost:float"
        (raw / "events").write_text("\n".join([header, *lines]))
    features = [{"name": "kind", "kind": "token"}, {"name": "cost", "kind": "float"}]
    run({"source": str(raw), "output": str(tmp_path / "out"), "event_features": features}, input=given)
    data = Prepared(tmp_path / "out")
    assert sorted(vocabulary_of(data, "kind")) == ["a", "b"]
    ids = {None: 0, **{value: number for number, value in enumerate(vocabulary_of(data, "kind"), start=2)}}
    expected = [
        ([ids[event["kind"]] for event in rows], [-1 if event["cost"] is None else event["cost"] for event in rows])
        for rows in sessions.values()
    ]
    found = [
        (columns["kind"].tolist(), np.nan_to_num(columns["cost"], nan=-1).tolist())
        for columns in stored_columns(data, "test")
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"name": "Type", "kind": "token"}, "String should match pattern"),
        ({"name": "items", "kind": "token"}, "name 'items' is that of another column"),
        ({"name": "a.b", "kind": "token"}, "String should match pattern"),
        ({"name": "a", "kind": "vector"}, "Input should be 'token', 'float' or 'time_gap'"),
        ({"name": "a", "kind": "time_gap", "column": "b"}, "column is of no use with kind time_gap"),
        ({"name": "a", "kind": "token", "standardize": True}, "standardize is of no use with kind token"),
        ({"name": "a", "kind": "float", "buckets": 3}, "buckets is of no use with kind float"),
        ({"name": "a", "kind": "time_gap", "shortest": 2, "longest": 2}, r"shortest \(2\) must be less than longest"),
        ({"name": "brand", "kind": "token"}, "'brand' is listed twice"),
    ],
)
def test_wrong_recipes_are_refused(feature, message):
    features = [{"name": "brand", "kind": "token"}]
    with pytest.raises(ValidationError, match=message):
        make({"source": "x", "output": "y", "features": features, "event_features": [feature]})


def test_a_missing_column_is_one_clear_error(tmp_path):
    write_events(tmp_path / "raw")
    feature = {"name": "colour", "kind": "token"}
    with pytest.raises(UserError, match=r"0.csv: no column 'colour' \(it has: session_id, .*, price\)"):
        run({**RECIPE, "source": str(tmp_path / "raw"), "output": str(tmp_path / "out"), "event_features": [feature]})


@pytest.mark.parametrize("engine", [pytest.param("spark", marks=ON_SPARK)])
def test_spark_gives_the_same_bytes_and_appends_the_same(tmp_path, request, engine):
    request.getfixturevalue("spark_application")
    on_spark = {"engine": engine, "spark": SPARK, "threads": None}
    for day, more in ((1, ()), (2, ("scan", "zoom", "zoom"))):
        write_events(tmp_path / f"day-{day}", seed=day, more_types=more)
        content = {**RECIPE, "source": str(tmp_path / f"day-{day}")}
        for name, settings in (("duckdb", {}), ("spark", on_spark)):
            prepare(make({**content, "output": str(tmp_path / name), **settings}), append=day > 1)
        first, second = ({**read_manifest(str(tmp_path / name)).model_dump()} for name in ("duckdb", "spark"))
        assert first["event_features"] == second["event_features"]
        if day == 1:
            check_same(tmp_path / "duckdb", tmp_path / "spark")
        assert [s["sha256"] for s in first["splits"]["train"]["shards"]] == [
            s["sha256"] for s in second["splits"]["train"]["shards"]
        ]
