"""The recipes of MovieLens and of Amazon's reviews on small files in exactly their raw formats; all values made up."""

import gzip
import json
from pathlib import Path

import pytest

from tests.unit.data_prep.both_engines import ON_SPARK
from tests.unit.data_prep.prepared import Prepared, events_after, feature_values, standardized

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
