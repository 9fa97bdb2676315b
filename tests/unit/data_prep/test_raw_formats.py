"""Other encodings and separators, rows that are left out, an order within equal times."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import decoded_text
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.prepared import Prepared, run

ROWS = [(f"s{n}", item, n) for n in range(9) for item in ("a", "ü:b", ":c", "d")]
TESTED = [["a", "ü:b", ":c", "d"]] * 9


def prepared(tmp_path, content: bytes, given: dict, name="raw.csv", **more) -> Prepared:
    path = tmp_path / name
    path.write_bytes(content)
    run({"source": str(path), "output": str(tmp_path / "out"), "input": given}, **more)
    return Prepared(tmp_path / "out")


@pytest.mark.parametrize("chunk_bytes", [7, 64, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
def test_long_separators_in_any_encoding(tmp_path, monkeypatch, encoding, chunk_bytes):
    """Separators and characters that lie across the end of a chunk are read like others; ':::' splits at its start."""
    monkeypatch.setattr(decoded_text, "CHUNK_BYTES", chunk_bytes)
    # The column before the item keeps the separator and the item's own colon apart.
    lines = ["session_id::timestamp::item_id", *(f'{s}::{t}::{i}::"x' for s, i, t in ROWS)]
    lines[0] += "::note"
    given = {"format": "csv", "delimiter": "::", "encoding": encoding}
    assert prepared(tmp_path, "\r\n".join(lines).encode(encoding), given).contents("test") == TESTED


def test_encoding_alone_keeps_quotes(tmp_path):
    lines = ["session_id,item_id,timestamp", *(f'{s},"{i}, ""x""",{t}' for s, i, t in ROWS)]
    data = prepared(tmp_path, "\n".join(lines).encode("latin-1"), {"format": "csv", "encoding": "latin-1"})
    assert data.contents("test") == [[f'{item}, "x"' for item in session] for session in TESTED]


def test_bad_lines_keep_their_own_separator(tmp_path):
    lines = [f"{s}::{i}::{t}" for s, i, t in ROWS]
    lines.insert(2, "s1::a::5::6")
    given = {"format": "csv", "delimiter": "::", "header": False, "columns": ["session_id", "item_id", "timestamp"]}
    prepared(tmp_path, "\n".join(lines).encode(), given)
    (record,) = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert (record["line"], record["reason"]) == (3, "4 columns, not 3")
    assert record["values"] == {"text": "s1::a::5::6"}


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ("s,ü,1\n".encode("latin-1"), {"encoding": "utf-8"}, "raw.csv: is not utf-8 text"),
        (b"s::\x1f::1\n", {"delimiter": "::"}, r"raw.csv: holds the character U\+001F"),
        (b"s,a,1\n", {"keep": {"kind": ["view"]}}, r"no column 'kind' \(it has: session_id, item_id, timestamp\)"),
        (b"s,a,1\ns,b,2\n", {"keep": {"item_id": ["c"]}}, r"input.keep leaves out all of its 6 rows"),
        (b"s,a,1\n", {"time_within": "place"}, "no column 'place'"),
    ],
)
def test_errors_name_the_file(tmp_path, content, given, message):
    given = {"format": "csv", "header": False, "columns": ["session_id", "item_id", "timestamp"], **given}
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, content * 3, given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "nested", "parquet"])
def test_rows_are_kept_by_several_columns(tmp_path, file_format):
    """A row stays if every column holds one of its values; an empty one is none of them."""
    kinds = [("view", 1), ("view", 2), ("buy", 1), ("", 1), ("click", 1), ("view", 3), ("view", 1)]
    kept = [f"i{n}" for n, (kind, page) in enumerate(kinds) if kind in ("view", "click") and page in (1, 3)]
    events = [{"item_id": f"i{n}", "timestamp": n, "kind": kind, "page": page} for n, (kind, page) in enumerate(kinds)]
    rows = [{"session_id": f"s{s}", **event} for s in range(4) for event in events]
    given = {"format": file_format, "keep": {"kind": ["view", "click"], "page": [1, 3]}}
    if file_format == "csv":
        lines = ["session_id,item_id,timestamp,kind,page", *(",".join(map(str, row.values())) for row in rows)]
        content = "\n".join(lines).encode()
    elif file_format == "jsonl":
        for row in rows:
            row["kind"] = row["kind"] or None
        content = "\n".join(map(json.dumps, rows)).encode()
    elif file_format == "nested":
        given |= {"format": "jsonl", "events": "events"}
        content = "\n".join(json.dumps({"session_id": f"s{s}", "events": events}) for s in range(4)).encode()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    data = prepared(tmp_path, content, given)
    assert data.contents("test") == [kept] * 4
    steps = {row["step"]: row["events"] for row in data.manifest["report"]}
    assert (steps["read"], steps["keep rows"], steps["drop bad rows"]) == (28, 16, 16)


def test_lines_are_numbered_as_they_stand_in_the_file_where_rows_are_left_out(tmp_path):
    lines = ["session_id,item_id,timestamp,kind", *(f"{s},{i},{t},{k}" for s, i, t in ROWS for k in ("view", "buy"))]
    lines.insert(6, "s1,,1,view")
    data = prepared(tmp_path, "\n".join(lines).encode(), {"format": "csv", "keep": {"kind": ["view"]}})
    assert data.contents("test") == TESTED
    (record,) = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert (record["line"], record["reason"]) == (7, "item missing")


@pytest.mark.parametrize("nested", [False, True])
def test_time_within_orders_events_of_equal_time(tmp_path, nested):
    """Before the line, as a number; the time itself comes first, and the line decides what is left."""
    events = [("e", 2, 1), ("c", 1, 10.5), ("b", 1, 9), ("d", 1, 10.5), ("f", 2, 3), ("a", 0, 99)]
    given = {"format": "jsonl", "time_within": "place"}
    objects = [{"item_id": item, "timestamp": time, "place": place} for item, time, place in events]
    if nested:
        given["events"] = "events"
        lines = [{"session_id": n, "events": objects} for n in range(4)]
    else:
        lines = [{"session_id": n, **event} for event in objects for n in range(4)]
    data = prepared(tmp_path, "\n".join(map(json.dumps, lines)).encode(), given, store_times=True)
    assert data.contents("test") == [["a", "b", "c", "d", "e", "f"]] * 4
    assert {tuple(times) for _, _, _, times in data.sessions("test")} == {(0, 1, 1, 1, 2, 2)}


def test_time_within_decides_ties_of_a_split_and_what_is_a_repetition(tmp_path):
    header = "session_id,item_id,timestamp,place"
    rows = [f"s{n},{item},7,{100 - n + place}" for n in range(10) for place, item in enumerate(("a", f"own{n}"))]
    # Once more at another place of the same time, and once as it was.
    rows += ["s0,a,7,101.5", "s0,a,7,100", "s1,a,7,late", "s1,a,7,"]
    split = {"method": "temporal", "valid_share": 0.1, "test_share": 0.2}
    data = prepared(
        tmp_path,
        "\n".join([header, *rows]).encode(),
        {"format": "csv", "time_within": "place"},
        split=split,
        deduplicate=True,
    )
    # All sessions end at the same time; s0 has the highest place.
    assert data.contents("test") == [["a", "own0", "a"], ["a", "own1"]]
    assert data.contents("valid") == [["a", "own2"]]
    records = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(record["line"], record["reason"]) for record in records] == [
        (24, "time_within is not a number"),
        (25, "time_within is not a number"),
    ]
    assert records[0]["values"] == {"session": "s1", "item": "a", "time": "7", "within": "late"}
