"""The recipes of public data sets on small files in exactly their raw formats; all values are made up.

Every sample holds what the real files are known for: ties, gaps, junk, and rows on both sides of a split's bounds. The
fixture `prepared` runs each recipe on both engines.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests.unit.data_prep.conftest import RECIPES
from tests.unit.data_prep.prepared import Prepared, events_after, feature_values, standardized
from tests.unit.data_prep.test_event_features import stored_columns, vocabulary_of


def option(recipe: str) -> list[str]:
    """The overrides of the command that a recipe's comment gives for event features."""
    text = (RECIPES / f"{recipe}.yaml").read_text().replace("\\\n#", "")
    (command,) = [line for line in text.splitlines() if "event_features=" in line]
    return shlex.split(command.partition(f"{recipe}.yaml")[2])


def event_sessions(data: Prepared, split: str) -> list[list[tuple]]:
    """Stored sessions as (item, value of the token feature, bucket of the gap)."""
    (token,) = [feature["name"] for feature in data.manifest["event_features"] if feature["kind"] == "token"]
    words = {0: None, 1: "unknown", **dict(enumerate(vocabulary_of(data, token), start=2))}
    return sorted(
        [
            (data.tokens[int(item)], words[int(value)], int(gap))
            for item, value, gap in zip(columns["items"], columns[token], columns["gap"], strict=True)
        ]
        for columns in stored_columns(data, split)
    )


def yoochoose(raw: Path) -> None:
    lines = []
    for session in range(1, 6):
        for minute, item in enumerate((214536502, 214536500, 214577561)):
            lines.append(f"{session},2014-04-07T10:{50 + minute}:09.277Z,{item},0")
    # Not in the order of time; special offer and brand as category.
    lines += ["6,2014-09-28T02:59:59.429Z,214536500,S", "6,2014-09-28T02:59:59.428Z,214536502,2089046342"]
    # Its last click is on the bound of valid, and of test.
    lines += ["7,2014-09-28T02:59:59.430Z,214577561,12", "7,2014-09-27T23:00:00.000Z,214536502,0"]
    lines += ["8,2014-09-29T02:59:59.429Z,214536500,0", "8,2014-09-29T02:59:59.429Z,214536500,0"]
    lines += ["9,2014-09-29T02:59:59.430Z,214577561,0", "9,2014-09-29T02:00:00.000Z,214536500,0"]
    # A single click, and an item of four clicks only.
    lines += ["10,2014-05-01T00:00:00.000Z,214536502,0"]
    lines += [f"11,2014-05-01T00:00:00.00{n}Z,643078800,0" for n in range(4)]
    (raw / "yoochoose-clicks.dat").write_text("\n".join(lines) + "\n")
    (raw / "yoochoose-buys.dat").write_text("1,2014-04-07T10:55:00.000Z,214536502,1046,1\n")


def test_yoochoose(raw, prepared):
    yoochoose(raw)
    data = prepared("yoochoose", raw, "store_times=true")
    a, b, c = "214536500", "214536502", "214577561"
    assert data.contents("train") == sorted([[b, a, c]] * 5 + [[b, a]])
    assert data.contents("valid") == sorted([[b, c], [a, a]])
    assert data.contents("test") == [[a, c]]
    # 2014-09-29T02:00:00Z and T02:59:59.430Z in microseconds since 1970.
    assert data.sessions("test")[0][3] == [1411956000000000, 1411959599430000]
    assert not (raw.parent / "out/quarantine.jsonl").exists()


@pytest.mark.parametrize("prepared", ["duckdb"], indirect=True)
def test_yoochoose_with_event_features(raw, prepared):
    yoochoose(raw)
    data = prepared("yoochoose", raw, *option("yoochoose"))
    # Of the training clicks 17 have category 0, one has S, one a brand.
    assert vocabulary_of(data, "category") == ["0"]
    gap = data.manifest["event_features"][1]
    # A minute is the longest gap in training: the first bound of its last bucket.
    assert gap["dates"] and (gap["edges"][0], gap["edges"][-1], gap["size"]) == (1, 60, 18)
    a, b, c = "214536500", "214536502", "214577561"
    assert event_sessions(data, "test") == [[(a, "0", 1), (c, "0", 17)]]
    # A millisecond apart.
    assert [(b, "unknown", 1), (a, "unknown", 2)] in event_sessions(data, "train")


def test_diginetica_raw(raw, prepared):
    views = ["sessionId;userId;itemId;timeframe;eventdate"]
    for session in range(1, 6):
        views += [f"{session};NA;{item};{item * 1000};2016-05-09" for item in (11, 12, 13)]
    # Lines out of order: the date comes first, then the milliseconds, as numbers (9 before 10), then the line.
    views += ["6;NA;13;5;2016-05-18", "6;NA;12;10;2016-05-17", "6;77;11;9;2016-05-17", "6;NA;12;5;2016-05-18"]
    views += ["7;5;12;20;2016-05-19", "7;5;11;3;2016-05-18"]
    views += ["8;NA;13;2000;2016-05-26", "8;NA;11;1000;2016-05-26"]
    views += ["9;NA;12;0;2016-05-25", "9;NA;11;90000;2016-05-25"]
    views += ["10;NA;99;0;2016-06-01", "10;NA;11;1;2016-06-01"]
    (raw / "train-item-views.csv").write_text("\n".join(views) + "\n")
    (raw / "products.csv").write_text(
        "itemId;pricelog2;product.name.tokens\n11;10;4875,776,56689\n12;8;776\n13;;4875,4875\n99;3;1\n"
    )
    (raw / "product-categories.csv").write_text("itemId;categoryId\n13;1096\n11;139\n12;139\n")
    data = prepared("diginetica-raw", raw)
    assert data.contents("train") == sorted([["11", "12", "13"]] * 5 + [["11", "12", "13", "12"]])
    assert data.contents("valid") == sorted([["11", "12"], ["12", "11"]])
    assert data.contents("test") == [["11", "13"]]
    assert feature_values(data, "category") == {"11": "139", "12": "139", "13": "1096"}
    assert feature_values(data, "price") == standardized({"11": 10.0, "12": 8.0}, ["13"])
    assert feature_values(data, "name_tokens") == {
        "11": ["4875", "776", "56689"],
        "12": ["776"],
        "13": ["4875", "4875"],
    }


MINUTE = 60_000
TRAIN, VALID, TEST = 1_433_000_000_000, 1_441_400_000_000, 1_442_000_000_000


def retailrocket(raw: Path) -> None:
    events = ["timestamp,visitorid,event,itemid,transactionid"]

    def visit(visitor, start, *items, event="view", transaction="", pause=MINUTE):
        for number, item in enumerate(items):
            events.append(f"{start + number * pause},{visitor},{event},{item},{transaction}")

    for visitor in range(5):
        visit(visitor, TRAIN, 355908, 248676, 318965)
    # A pause of 30 minutes stays within a session, a longer one does not.
    visit(10, TRAIN, 355908, 248676, pause=30 * MINUTE)
    visit(10, TRAIN + 60 * MINUTE + 1, 318965, 318965)
    # Neither cart nor purchase is an event, nor does it bridge a gap.
    visit(11, TRAIN, 355908, 355908)
    visit(11, TRAIN + 20 * MINUTE, 248676, event="addtocart")
    visit(11, TRAIN + 21 * MINUTE, 248676, event="transaction", transaction="4000")
    visit(11, TRAIN + 40 * MINUTE, 248676, 355908)
    visit(12, VALID, 318965, 248676)
    visit(13, TEST, 248676, 355908, 318965)
    (raw / "events.csv").write_text("\n".join(events) + "\n")
    header = "timestamp,itemid,property,value"
    first = [
        "1435460400000,355908,categoryid,1338",
        "1441508400000,248676,888,1116713 960601 n277.200",
        "1441508400000,248676,categoryid,500",
        "1439089200000,355908,790,n15360.000",
        "1431226800000,318965,available,0",
        "1435460400000,318965,categoryid,7",
    ]
    second = [
        "1433041200000,248676,categoryid,400",
        "1439694000000,355908,categoryid,1400",
        "1431831600000,318965,790,n9.500",
        "1442113200000,318965,available,1",
        "1431831600000,248676,790,word",
        "1431831600000,777,categoryid,1",
    ]
    for number, rows in ((1, first), (2, second)):
        (raw / f"item_properties_part{number}.csv").write_text("\n".join([header, *rows]) + "\n")
    (raw / "category_tree.csv").write_text("categoryid,parentid\n1338,\n")


def test_retailrocket(raw, prepared):
    retailrocket(raw)
    data = prepared("retailrocket", raw)
    a, b, c = "355908", "248676", "318965"
    assert data.contents("train") == sorted([[a, b, c]] * 5 + [[a, b], [c, c], [a, a], [b, a]])
    assert (data.contents("valid"), data.contents("test")) == ([[c, b]], [[b, a, c]])
    assert (events_after(data, "read"), events_after(data, "keep rows")) == (30, 28)
    # The latest value counts, whichever file it is in.
    assert feature_values(data, "category") == {a: "1400", b: "500", c: "7"}


@pytest.mark.parametrize("prepared", ["duckdb"], indirect=True)
def test_retailrocket_with_other_properties_and_all_events(raw, prepared):
    retailrocket(raw)
    features = (
        "features=[{name: available, kind: token},{name: words, kind: token_seq, column: '888'},"
        "{name: price, kind: float, column: '790', extract: '^n([0-9.]+)$'}]"
    )
    data = prepared("retailrocket", raw, features, "input.keep={event: [view, addtocart, transaction]}")
    a, b, c = "355908", "248676", "318965"
    assert data.contents("train") == sorted([[a, b, c]] * 5 + [[a, b], [c, c], [a, a, b, b, b, a]])
    assert feature_values(data, "available") == {a: None, b: None, c: "1"}
    assert feature_values(data, "words") == {a: [], b: ["1116713", "960601", "n277.200"], c: []}
    assert feature_values(data, "price") == {a: 15360.0, b: None, c: 9.5}


def test_retailrocket_with_event_features(raw, prepared):
    retailrocket(raw)
    data = prepared("retailrocket", raw, *option("retailrocket"))
    a, b = "355908", "248676"
    assert sorted(vocabulary_of(data, "type")) == ["addtocart", "transaction", "view"]
    (mixed,) = [session for session in event_sessions(data, "train") if any(event[1] != "view" for event in session)]
    kinds = ["view", "view", "addtocart", "transaction", "view", "view"]
    assert [event[:2] for event in mixed] == list(zip([a, a, b, b, b, a], kinds, strict=True))
    gaps = [event[2] for event in mixed]
    # A minute, 19 minutes, a minute, 19 minutes, a minute; a minute is the shortest of all.
    assert gaps[0] == 1 and gaps[1] == gaps[3] == gaps[5] == 3 and gaps[2] == gaps[4] > 3


def otto_line(session: int, start: int, *events: tuple[int, str]) -> str:
    listed = [{"aid": aid, "ts": start + n, "type": kind} for n, (aid, kind) in enumerate(events)]
    return json.dumps({"session": session, "events": listed})


def otto(raw: Path) -> None:
    start = 1659304800025
    # Sessions end in the order of their numbers: the last two of twenty are valid.
    train = [otto_line(n, start + n * 1000, (59625, "clicks"), (1142000, "clicks")) for n in range(19)]
    mixed = [(59625, "clicks"), (7, "carts"), (1142000, "clicks"), (7, "orders"), (582732, "clicks")]
    train.append(otto_line(19, start + 19000, *mixed))
    train.append(otto_line(20, start + 20000, (8, "orders"), (9, "carts")))
    (raw / "otto-recsys-train.jsonl").write_text("\n".join(train) + "\n")
    test = [
        otto_line(12899779, start + 3_000_000_000, (59625, "clicks"), (404, "clicks")),
        otto_line(12899780, start + 3_000_000_000, (1142000, "clicks"), (582732, "carts")),
    ]
    (raw / "otto-recsys-test.jsonl").write_text("\n".join(test) + "\n")


def test_otto(raw, prepared):
    otto(raw)
    data = prepared("otto", raw)
    assert data.contents("train") == [["59625", "1142000"]] * 18
    assert data.contents("valid") == sorted([["59625", "1142000"], ["59625", "1142000", "582732"]])
    assert data.contents("test") == [["59625", "404"]]
    # The carts and orders: 2 + 2 + 1.
    assert events_after(data, "read") - events_after(data, "keep rows") == 5
    assert not (raw.parent / "out/quarantine.jsonl").exists()


@pytest.mark.parametrize("prepared", ["duckdb"], indirect=True)
def test_otto_with_event_features(raw, prepared):
    otto(raw)
    data = prepared("otto", raw, *option("otto"))
    events = [(59625, "clicks"), (7, "carts"), (1142000, "clicks"), (7, "orders"), (582732, "clicks")]
    # Only clicks are in the training sessions; a millisecond is below the first bound.
    expected = [
        (str(aid), kind if kind == "clicks" else "unknown", 2 if place else 1)
        for place, (aid, kind) in enumerate(events)
    ]
    assert expected in event_sessions(data, "valid")
