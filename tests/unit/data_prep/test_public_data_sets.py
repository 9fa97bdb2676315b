"""The recipes of public data sets on small files in exactly their raw formats; all values are made up.

Every sample holds what the real files are known for: ties, gaps, junk, and rows on both sides of a split's bounds. The
fixture `prepared` runs each recipe on both engines.
"""

import gzip
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_prep.both_engines import ON_SPARK
from tests.unit.data_prep.conftest import RECIPES
from tests.unit.data_prep.prepared import Prepared, feature_values
from tests.unit.data_prep.test_event_features import stored_columns, vocabulary_of


def events_after(data: Prepared, step: str) -> int:
    return next(row["events"] for row in data.manifest["report"] if row.get("step") == step)


def standardized(values: dict[str, float], missing: list[str] = ()) -> dict[str, float | None]:
    """All of ``values`` are of items with training events."""
    numbers = np.array(list(values.values()))
    scaled = (numbers - numbers.mean()) / numbers.std()
    return {**dict(zip(values, scaled, strict=True)), **dict.fromkeys(missing)}


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


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


# User -> movies in the order of time; 2959 is in four lists only, so it goes and user 7 becomes too short.
RATED = {
    1: [1193, 661, 914, 3408, 2355],
    2: [661, 1193, 914, 3408, 2355, 2959],
    3: [914, 1193, 661, 3408, 2355, 2959],
    4: [3408, 1193, 661, 914, 2355],
    5: [2355, 3408, 1193, 661, 914],
    6: [2355, 914, 1193, 661, 3408, 2959],
    7: [2959, 914, 1193, 661, 3408],
}
MOVIE_SESSIONS = [[str(movie) for movie in movies if movie != 2959] for user, movies in RATED.items() if user != 7]


def ratings() -> list[tuple[int, int, int, int]]:
    """(user, movie, rating, time), by user and movie: a user's first two ratings share their second."""
    rows = []
    for user, movies in RATED.items():
        times = [978300760, 978300760, *range(978300761, 978300761 + len(movies))]
        tied, rest = list(zip(movies, times, strict=False))[:2], list(zip(movies, times, strict=False))[2:]
        rows += [(user, movie, 5, time) for movie, time in (*sorted(rest), *tied)]
    return rows


def check_movies(data: Prepared, genres: dict[str, list[str]], years: dict[str, str | None]) -> None:
    assert data.contents("train") == sorted(movies[:-2] for movies in MOVIE_SESSIONS)
    assert data.contents("valid") == sorted(movies[:-1] for movies in MOVIE_SESSIONS)
    assert data.contents("test") == sorted(MOVIE_SESSIONS)
    assert feature_values(data, "genres") == genres
    assert feature_values(data, "release_year") == years


def test_ml_1m(raw, prepared):
    (raw / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings()))
    movies = [
        '661::James and the "Giant" Peach (1996)::Animation|Children\'s|Musical',
        "914::Cité des enfants perdus, La (1995)::Adventure|Sci-Fi",
        "1193::2001: A Space Odyssey (1968)::Drama",
        'Not a movie of the list, 3::"Odd (1999)::Drama',
        "2355::Bug's Life, A (1998)::Animation|Children's",
        "3408::No year known::Drama",
    ]
    (raw / "movies.dat").write_bytes(("\n".join(movies) + "\n").encode("latin-1"))
    (raw / "users.dat").write_text("1::F::1::10::48067\n")
    genres = {
        "661": ["Animation", "Children's", "Musical"],
        "914": ["Adventure", "Sci-Fi"],
        "1193": ["Drama"],
        "2355": ["Animation", "Children's"],
        "3408": ["Drama"],
    }
    years = {"661": "1996", "914": "1995", "1193": "1968", "2355": "1998", "3408": None}
    check_movies(prepared("ml-1m", raw), genres, years)


@pytest.mark.parametrize(
    ("newline", "prepared"),
    [("\r\n", "duckdb"), ("\n", "duckdb"), pytest.param("\n", "spark", marks=ON_SPARK)],
    indirect=["prepared"],
)
def test_movielens_csv(raw, prepared, newline):
    lines = ["userId,movieId,rating,timestamp", *(f"{u},{m},{r - 0.5},{t}" for u, m, r, t in ratings())]
    (raw / "ratings.csv").write_bytes((newline.join(lines) + newline).encode())
    movies = [
        "movieId,title,genres",
        '661,"City of Lost Children, The (Cité des enfants perdus, La) (1995)",Adventure|Drama|Sci-Fi',
        '914,"""Great Performances"" Cats (1998)",Musical',
        "1193,Toy Story (1995) ,Adventure|Animation",
        "2355,Babylon 5,(no genres listed)",
        "3408,Some Series (2006\u20132007),Drama",
    ]
    (raw / "movies.csv").write_bytes((newline.join(movies) + newline).encode())
    genres = {
        "661": ["Adventure", "Drama", "Sci-Fi"],
        "914": ["Musical"],
        "1193": ["Adventure", "Animation"],
        "2355": [],
        "3408": ["Drama"],
    }
    years = {"661": "1995", "914": "1998", "1193": "1995", "2355": None, "3408": None}
    check_movies(prepared("movielens", raw), genres, years)


ASINS = ["B000000001", "B000000002", "0000013714", "B00000000X", "B000000005"]


def reviewed() -> list[tuple[str, str, int]]:
    """(reviewer, asin, day): five reviewers of all items, each from another one on; two a day, latest day first."""
    rows = [
        (f"A{user}REVIEWER", ASINS[(user + number) % 5], 1514764800 + number // 2 * 86400)
        for user in range(5)
        for number in range(5)
    ]
    return sorted(rows, key=lambda row: -row[2])


REVIEW_SESSIONS = [[ASINS[(user + number) % 5] for number in range(5)] for user in range(5)]


def check_reviews(data: Prepared) -> None:
    for split, cut in (("train", 3), ("valid", 4), ("test", 5)):
        assert data.contents(split) == sorted(session[:cut] for session in REVIEW_SESSIONS)


def write_lines(path: Path, objects: list[dict]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in objects).encode()))


CSS = ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{background-color:#fffbf3}"


def test_amazon_2018(raw, prepared):
    reviews = []
    for number, (user, asin, time) in enumerate(reviewed()):
        review = {"overall": 5.0, "verified": True, "reviewTime": "01 1, 2018", "reviewerID": user, "asin": asin}
        review |= {"reviewText": "Made\nup", "summary": "So so", "unixReviewTime": time}
        reviews.append(review | ({"vote": "1,204", "style": {"Size:": " Large"}} if number % 2 else {"image": ["u"]}))
    # The same review once more, and a reviewer of one item.
    reviews += [reviews[7], {**reviews[0], "reviewerID": "ALONE"}]
    write_lines(raw / "Video_Games.json.gz", reviews)
    products = [
        {"category": ["Video Games", "PC"], "brand": "Acme & Co", "asin": ASINS[0], "price": "$1,299.00"},
        {
            "category": ["Video Games", "</span></span>\n<b>Best"],
            "brand": "Acme & Co",
            "asin": ASINS[1],
            "price": "$1.00",
        },
        {
            "category": [],
            "brand": "by\n    \n    <script>getTime",
            "asin": ASINS[2],
            "price": CSS,
            "title": "var aPage",
        },
        {"category": ["Video Games"], "brand": "", "asin": ASINS[3], "price": "$9.99 - $15.99"},
        {"brand": "Other", "asin": ASINS[4], "also_buy": ["B000000001"], "details": {}, "similar_item": ""},
        {"category": ["Twice"], "brand": "Twice", "asin": ASINS[0], "price": "$5.00"},
        {"category": ["Nobody's"], "brand": "Nobody's", "asin": "B0UNREVIEWED", "price": ""},
    ]
    write_lines(raw / "meta_Video_Games.json.gz", products)
    data = prepared("amazon-2018", raw)
    check_reviews(data)
    assert (events_after(data, "read"), events_after(data, "deduplicate")) == (27, 26)
    assert feature_values(data, "brand") == dict(
        zip(ASINS, ["Acme & Co", "Acme & Co", None, None, "Other"], strict=True)
    )
    assert feature_values(data, "categories") == dict(
        zip(ASINS, [["Video Games", "PC"], ["Video Games"], [], ["Video Games"], []], strict=True)
    )
    assert feature_values(data, "price") == pytest.approx(
        standardized({ASINS[0]: 1299.0, ASINS[1]: 1.0}, ASINS[2:]), abs=1e-6
    )


def products_2023() -> list[dict]:
    def product(asin, store, price, categories):
        more = {"main_category": "Video Games", "title": "t", "images": [], "details": {"Brand": "b"}, "videos": []}
        return {**more, "price": price, "store": store, "categories": categories, "parent_asin": asin}

    return [
        product(ASINS[0], "Acme", 19.99, ["Video Games", "PC", "Accessories"]),
        product(ASINS[1], "Acme", "None", []),
        product(ASINS[2], None, None, ["Video Games"]),
        product(ASINS[3], "Other, Inc.", "—", ["Video Games", "Xbox 360"]),
        product(ASINS[4], "Acme", "$1,009.99", []),
        product("B0UNREVIEWED", "Nobody's", 3, ["Nobody's"]),
    ]


def check_products_2023(data: Prepared) -> None:
    assert feature_values(data, "store") == dict(zip(ASINS, ["Acme", "Acme", None, "Other, Inc.", "Acme"], strict=True))
    categories = [["Video Games", "PC", "Accessories"], [], ["Video Games"], ["Video Games", "Xbox 360"], []]
    assert feature_values(data, "categories") == dict(zip(ASINS, categories, strict=True))
    expected = standardized({ASINS[0]: 19.99, ASINS[4]: 1009.99}, ASINS[1:4])
    assert feature_values(data, "price") == pytest.approx(expected, abs=1e-6)


def test_amazon_2023(raw, prepared):
    reviews = []
    for number, (user, asin, time) in enumerate(reviewed()):
        review = {"rating": 4.0, "title": "t", "text": "t", "images": [], "asin": f"VARIANT{number}", "helpful_vote": 0}
        reviews.append({**review, "parent_asin": asin, "user_id": user, "timestamp": time * 1000 + 123})
    reviews.append(reviews[3])
    write_lines(raw / "Video_Games.jsonl.gz", reviews)
    write_lines(raw / "meta_Video_Games.jsonl.gz", products_2023())
    data = prepared("amazon-2023", raw)
    check_reviews(data)
    check_products_2023(data)


def test_amazon_2023_5core(raw, prepared):
    rows = [f"{user},{asin},5.0,{time * 1000 + 123}" for user, asin, time in reviewed()]
    text = "\n".join(["user_id,parent_asin,rating,timestamp", *rows]) + "\n"
    (raw / "Video_Games.csv.gz").write_bytes(gzip.compress(text.encode()))
    write_lines(raw / "meta_Video_Games.jsonl.gz", products_2023())
    data = prepared("amazon-2023-5core", raw)
    check_reviews(data)
    check_products_2023(data)
