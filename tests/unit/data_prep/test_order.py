"""Events are ordered by (time, input file, line), exactly, however the engine reads and sorts."""

import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from tests.unit.data_prep.prepared import Prepared, by_session, make, random_rows, run, write_csv

BASE = {"input": {"format": "csv"}, "split": {"method": "temporal"}}


def all_sessions(data: Prepared) -> dict:
    """Every stored session's tokens of a split of whole sessions, by nothing but content."""
    return sorted(tokens for split in ("train", "valid", "test") for tokens in data.contents(split))


def test_ties_follow_files_and_lines(tmp_path):
    rows = random_rows(0)
    write_csv(tmp_path / "raw/b.csv", rows[:250])
    write_csv(tmp_path / "raw/a.csv", rows[250:])
    recipe = {**BASE, "source": str(tmp_path / "raw"), "output": str(tmp_path / "out")}
    recipe["input"] = {"format": "csv", "files": ["b.csv", "a.csv"]}
    run(recipe)
    expected = sorted([row[1] for row in events] for events in by_session(rows).values() if len(events) > 1)
    assert all_sessions(Prepared(tmp_path / "out")) == expected
    # A glob reads by name, so that the order of files is the other one.
    recipe["input"] = {"format": "csv", "files": ["*.csv"]}
    run(recipe)
    expected = sorted(
        [row[1] for row in events] for events in by_session(rows[250:] + rows[:250]).values() if len(events) > 1
    )
    assert all_sessions(Prepared(tmp_path / "out")) == expected


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_many_lines_read_in_parallel_keep_their_order(tmp_path, suffix):
    """Large enough that DuckDB's own reader would use several threads; all times tie."""
    rng = np.random.default_rng(3)
    count = 300_000
    sessions, items = rng.integers(0, 500, count), rng.integers(0, 2000, count)
    table = pa.table(
        {
            "session_id": pa.array(sessions).cast(pa.string()),
            "item_id": pa.array(items).cast(pa.string()),
            "timestamp": np.zeros(count, dtype=np.int64),
        }
    )
    (tmp_path / "raw").mkdir()
    if suffix == "csv":
        pa_csv.write_csv(table, tmp_path / "raw/events.csv")
    else:
        pq.write_table(table, tmp_path / "raw/events.parquet", row_group_size=20_000)
    run({**BASE, "input": {"format": suffix}, "source": str(tmp_path / "raw"), "output": str(tmp_path / "out")})
    order = np.argsort(sessions, kind="stable")
    parts = np.split(items[order], np.flatnonzero(np.diff(sessions[order])) + 1)
    assert all_sessions(Prepared(tmp_path / "out")) == sorted([str(item) for item in part] for part in parts)


def _flat(rows):
    return [{"session_id": s, "item_id": i, "timestamp": t, "other": [1]} for s, i, t in rows]


@pytest.mark.parametrize(
    "form", ["tsv.gz", "no header", "jsonl", "nested jsonl", "parquet", "nested parquet", "recbole"]
)
def test_every_format_gives_the_same_sessions(tmp_path, form):
    rows = sorted(random_rows(1, events=200), key=lambda row: row[0])
    source = tmp_path / "raw"
    source.mkdir()
    given: dict = {"format": form.split(".")[0].split()[-1]}
    by_line = [{"session_id": s, "events": [{"item_id": i, "timestamp": t} for _, i, t in events]}
               for s, events in _grouped(rows).items()]  # fmt: skip
    if form == "tsv.gz":
        text = "\n".join(["session_id\titem_id\ttimestamp", *("\t".join(map(str, row)) for row in rows)])
        (source / "x.tsv.gz").write_bytes(gzip.compress(text.encode()))
    elif form == "no header":
        given = {"format": "csv", "header": False, "columns": ["a", "item_id", "timestamp"], "session": "a"}
        (source / "x.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    elif form == "recbole":
        lines = ["session_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in rows)]
        (source / "raw.inter").write_text("\n".join(lines) + "\n")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(_flat(rows)), source / "x.parquet")
    else:
        given["events"] = "events"
        lines = by_line if form.startswith("nested") else _flat(rows)
        if form == "jsonl":
            del given["events"]
        if form == "nested parquet":
            pq.write_table(pa.Table.from_pylist(lines), source / "x.parquet")
        else:
            (source / "x.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    run({**BASE, "input": given, "source": str(source), "output": str(tmp_path / "out"), "store_times": True})
    expected = sorted(
        ([row[1] for row in events], [row[2] for row in events])
        for events in by_session(rows).values()
        if len(events) > 1
    )
    data = Prepared(tmp_path / "out")
    found = [(tokens, times) for split in ("train", "valid", "test") for _, _, tokens, times in data.sessions(split)]
    assert sorted(found) == expected


def _grouped(rows):
    grouped: dict[str, list] = {}
    for row in rows:
        grouped.setdefault(row[0], []).append(row)
    return grouped


def test_integer_items_and_nanosecond_times(tmp_path):
    """Beyond 2^53 a float64 cannot tell neighbours apart; `integer` can."""
    stamp = 1_700_000_000_000_000_000
    rows = [(1, 10 + n, stamp + 5 - n) for n in range(5)] * 1
    rows += [(s, 7, stamp + s) for s in range(2, 30) for _ in range(2)]
    write_csv(tmp_path / "raw.csv", rows)
    recipe = {**BASE, "source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out")}
    run({**recipe, "input": {"format": "csv", "time_format": "integer"}})
    assert ["14", "13", "12", "11", "10"] in all_sessions(Prepared(tmp_path / "out"))


def test_dates_with_offsets_are_one_time_line(tmp_path):
    rows = [("a", "late", "2024-05-01T10:00:00Z"), ("a", "early", "2024-05-01 11:30:00+02:00")]
    rows += [(f"s{n}", item, f"2024-04-{n:02d}") for n in range(1, 21) for item in ("x", "y")]
    write_csv(tmp_path / "raw.csv", rows)
    split = {"method": "temporal", "valid_from": "2024-04-15", "test_from": "2024-04-18"}
    run(
        {"source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out"), "split": split, "store_times": True},
        input={"format": "csv", "time_format": "datetime"},
    )
    data = Prepared(tmp_path / "out")
    assert ["early", "late"] in data.contents("test")
    assert {split: data.manifest["splits"][split]["sessions"] for split in ("train", "valid", "test")} == {
        "train": 14,
        "valid": 3,
        "test": 4,
    }
    times = next(times for _, _, tokens, times in data.sessions("test") if tokens == ["early", "late"])
    assert times == [1714555800 * 10**6, 1714557600 * 10**6]


def test_named_zone_is_that_of_its_own_line_only(tmp_path):
    rows = [
        ("s", "a", "2024-07-02 03:00:00 Europe/Berlin"),
        ("s", "b", "2024-07-02"),
        ("s", "c", "2024-07-02 00:00:00"),
    ]
    rows += [("s", "d", "2024-07-02 00:00:00 UTC"), ("s", "e", "2024-07-02T00:00:00Z")]
    write_csv(tmp_path / "raw.csv", [*rows, *((f"s{n}", "a", "2024-01-01") for n in range(3) for _ in range(4))])
    content = {"source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out"), "store_times": True}
    run(content, input={"format": "csv", "time_format": "datetime"})
    found = next(session for session in Prepared(tmp_path / "out").sessions("test") if len(session[2]) == 5)
    # Berlin is two hours ahead of UTC in July.
    assert found[2] == ["b", "c", "d", "e", "a"]
    assert np.diff(found[3]).tolist() == [0, 0, 0, 3600 * 10**6]


def test_gaps_cut_users_into_sessions(tmp_path):
    rng = np.random.default_rng(5)
    rows = [(f"u{rng.integers(8)}", f"i{n}", int(rng.integers(0, 4000))) for n in range(500)]
    write_csv(tmp_path / "raw.csv", rows, header="user,item_id,timestamp")
    run(
        {**BASE, "source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out"), "session_gap": 60},
        input={"format": "csv", "user": "user"},
    )
    expected = []
    for events in by_session(rows).values():
        session = [events[0]]
        for previous, event in itertools.pairwise(events):
            if event[2] - previous[2] > 60:
                expected.append(session)
                session = []
            session.append(event)
        expected.append(session)
    tokens = sorted([event[1] for event in session] for session in expected if len(session) > 1)
    assert all_sessions(Prepared(tmp_path / "out")) == tokens


def test_duplicates_go_only_if_the_recipe_says_so(tmp_path):
    rows = [("a", "x", 1), ("a", "x", 1), ("a", "y", 2), ("a", "x", 3)] + [(f"s{n}", "x", n) for n in range(9)] * 2
    rows += [(f"s{n}", "y", 50 + n) for n in range(9)]
    write_csv(tmp_path / "raw.csv", rows)
    recipe = {**BASE, "source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out")}
    run(recipe)
    assert ["x", "x", "y", "x"] in all_sessions(Prepared(tmp_path / "out"))
    run(recipe, deduplicate=True)
    assert ["x", "y", "x"] in all_sessions(Prepared(tmp_path / "out"))


def test_recipe_defaults_are_valid():
    assert make({"source": "a", "output": "b"}).input.format == "recbole"
