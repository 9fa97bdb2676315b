"""Rows that are no events: kept in quarantine.jsonl with file, line, reason and raw values."""

import json

import pytest

from data_prep import json_lines, readers
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.prepared import Prepared, run

GOOD = [f"s{n},{item},{n}" for n in range(12) for item in ("a", "b", "c", "d")]


def quarantine(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_bad_rows_of_csv(tmp_path, monkeypatch, block_bytes):
    """Lines are numbered right whether a file is one block of the parser or many."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    bad = ["s1,,5", ",a,5", "s1,a,", "s1,a,noon", "s1,a", "s1,a,1,2", "s1,a,nan"]
    lines = ["session_id,item_id,timestamp", *GOOD[:3]]
    numbers = {}
    for number, row in enumerate(bad):
        numbers[len(lines) + 1] = row
        lines += [row, *GOOD[3 + 4 * number : 7 + 4 * number]]
    lines += GOOD[31:]
    path = tmp_path / "raw.csv"
    path.write_text("\n".join(lines) + "\n")
    run({"source": str(path), "output": str(tmp_path / "out"), "input": {"format": "csv"}})
    records = quarantine(tmp_path / "out")
    assert [record["line"] for record in records] == list(numbers)
    assert {record["file"] for record in records} == {str(path)}
    assert [record["reason"] for record in records] == [
        "item missing",
        "session missing",
        "time missing",
        "time is not a number",
        "2 columns, not 3",
        "4 columns, not 3",
        "time is not a number",
    ]
    assert records[3]["values"] == {"session": "s1", "item": "a", "time": "noon"}
    assert records[5]["values"] == {"text": "s1,a,1,2"}
    data = Prepared(tmp_path / "out")
    assert data.contents("test") == [["a", "b", "c", "d"]] * 12
    steps = {row["step"]: row["events"] for row in data.manifest["report"]}
    assert (steps["read"], steps["drop bad rows"]) == (len(GOOD) + 7, len(GOOD))


@pytest.mark.parametrize(("nested", "chunk_bytes"), [(False, 100), (True, 300), (True, 1 << 20)])
def test_bad_json_lines_do_not_take_their_neighbours_along(tmp_path, monkeypatch, nested, chunk_bytes):
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", chunk_bytes)

    def line(session, *items):
        events = [{"item": item, "time": number} for number, item in enumerate(items)]
        if nested:
            return [json.dumps({"session": session, "events": events})]
        return [json.dumps({"session": session, **event}) for event in events]

    good = [text for n in range(9) for text in line(n, "a", 5, "c", "d")]
    bad = ["{broken", "[1]", ""]
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join([*good[:2], *bad, *good[2:]]) + "\n")
    given = {"format": "jsonl", "session": "session", "item": "item", "time": "time"}
    run(
        {"source": str(path), "output": str(tmp_path / "out")},
        input={**given, "events": "events"} if nested else given,
    )
    records = quarantine(tmp_path / "out")
    assert [(record["line"], record["values"]["text"]) for record in records] == list(enumerate(bad, start=3))
    assert Prepared(tmp_path / "out").contents("test") == [["a", "5", "c", "d"]] * 9


def test_session_without_events_is_a_bad_line(tmp_path):
    lines = [{"session_id": n, "events": [{"item_id": i, "timestamp": i} for i in range(4)]} for n in range(9)]
    lines.insert(4, {"session_id": "empty", "events": []})
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    run({"source": str(path), "output": str(tmp_path / "out")}, input={"format": "jsonl", "events": "events"})
    (record,) = quarantine(tmp_path / "out")
    assert (record["line"], record["reason"], record["values"]) == (5, "no events", {"session": "empty"})


def test_nothing_but_bad_rows_names_the_first(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text("session_id,item_id,timestamp\n" + "s,i,today\n" * 5)
    with pytest.raises(UserError, match=r"'drop bad rows': 5 came in \(.*raw.csv: line 2: time is not a number\)"):
        run({"source": str(path), "output": str(tmp_path / "out"), "input": {"format": "csv"}})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["raw.csv"]


def test_no_quarantine_without_bad_rows(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text("\n".join(["session_id,item_id,timestamp", *GOOD]))
    run({"source": str(path), "output": str(tmp_path / "out"), "input": {"format": "csv"}})
    assert not (tmp_path / "out/quarantine.jsonl").exists()
