"""What a data set holds after a preparation and appends, written out in plain Python; and days of raw data for it."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from tests.unit.data_prep.prepared import Prepared, by_session, feature_values, write_csv

SEED, STREAMS = 7, 4
# Of each day: sessions that end at these times or later.
VALID_FROM, TEST_FROM = 24, 27
RECIPE = {
    "seed": SEED,
    "streams": STREAMS,
    "input": {"format": "csv"},
    "split": {"method": "temporal", "valid_from": VALID_FROM, "test_from": TEST_FROM},
    "store_times": True,
    "shard_sessions": 5,
    "block_sessions": 3,
    "features": [
        {"name": "brand", "kind": "token"},
        {"name": "tags", "kind": "token_seq", "separator": "|"},
        {"name": "price", "kind": "float", "standardize": True},
        {"name": "image", "kind": "vector", "separator": "|"},
    ],
}


def write_day(folder: Path, day: int) -> dict:
    """Raw files of a day, whose catalog has grown; gives the recipe's values for them."""
    rng = np.random.default_rng(day)
    items = 25 + 12 * day
    rows = [
        (f"s{rng.integers(0, 60)}", f"i{min(int(rng.geometric(0.08)), items)}", int(rng.integers(0, 28)))
        for _ in range(260)
    ]
    events = write_csv(folder / f"day-{day}/events.csv", rows)
    # Descriptions of known items are other ones than before. Every seventh item has none, some have holes.
    table = [
        (
            f"i{n}",
            f"b{n % (4 + 3 * day)}" if n % 5 else "",
            "|".join(f"t{(n + k) % (6 + 5 * day)}" for k in range(n % 4)),
            n / 3 + day if n % 6 else "",
            f"{n}|{n + day}",
        )
        for n in range(items + 1)
        if n % 7
    ]
    write_csv(folder / f"day-{day}/items.csv", table, "item_id,brand,tags,price,image")
    return {"source": str(events), "items": {"file": str(folder / f"day-{day}/items.csv")}}


def _order(text: str) -> tuple[str, str]:
    return hashlib.md5(f"{SEED}:{text}".encode()).hexdigest(), text


class Reference:
    """The data set of `RECIPE` after `add` was called with each day in turn."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.popularity: Counter = Counter()
        self.sessions: dict[str, list[tuple]] = {"train": [], "valid": [], "test": []}
        self.vocabularies: dict[str, list[str]] = {"brand": [], "tags": []}
        self.values: dict[str, dict] = {name: {} for name in ("brand", "tags", "price", "image")}
        self.scale: tuple[float, float] | None = None

    def add(self, recipe: dict) -> None:
        lines = Path(recipe["source"]).read_text().splitlines()[1:]
        sessions = {key: rows for key, rows in by_session([tuple(line.split(",")) for line in lines]).items()}
        sessions = {key: rows for key, rows in sessions.items() if len(rows) > 1}
        parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for key, rows in sessions.items():
            end = int(rows[-1][2])
            parts["train" if end < VALID_FROM else "valid" if end < TEST_FROM else "test"].append(key)
        tokens = {row[1] for rows in sessions.values() for row in rows}
        fresh = sorted(tokens - self.ids.keys(), key=_order)
        self.ids |= {token: number for number, token in enumerate(fresh, start=len(self.ids) + 1)}
        trained = [row[1] for key in parts["train"] for row in sessions[key]]
        self.popularity.update(trained)
        for split, keys in parts.items():
            first = len(self.sessions[split])
            for number, key in enumerate(sorted(keys, key=_order), start=first):
                rows = sessions[key]
                self.sessions[split].append((number, [row[1] for row in rows], [int(row[2]) for row in rows]))
        table = [line.split(",") for line in Path(recipe["items"]["file"]).read_text().splitlines()[1:]]
        described = {row[0]: row[1:] for row in table if row[0] in fresh}
        self._add_features(described, sorted(set(trained) & described.keys()))

    def _add_features(self, described: dict[str, list[str]], trained: list[str]) -> None:
        texts = {"brand": {t: [row[0]] for t, row in described.items()}}
        texts["tags"] = {t: row[1].split("|") for t, row in described.items()}
        for name, values in texts.items():
            counts = Counter(value for token in trained for value in values[token] if value)
            known = self.vocabularies[name]
            known += [value for value in sorted(counts, key=lambda v: (-counts[v], v)) if value not in known]
            for token, found in values.items():
                self.values[name][token] = [v if v in known else "unknown" for v in found if v]
        prices = {token: float(row[2]) for token, row in described.items() if row[2]}
        if self.scale is None:
            ordered = [prices[t] for t in sorted(trained, key=self.ids.__getitem__) if t in prices]
            self.scale = float(np.mean(ordered)), float(np.std(ordered))
        for token, row in described.items():
            if token in prices:
                self.values["price"][token] = float(np.float32((prices[token] - self.scale[0]) / self.scale[1]))
            self.values["image"][token] = [float(number) for number in row[3].split("|")]

    def check(self, data: Prepared) -> None:
        """Hold a data set against what it must be."""
        assert data.ids == self.ids
        assert data.manifest["items"] == len(self.ids)
        assert data.popularity.tolist() == [0, *(self.popularity[token] for token in self.ids)]
        for split, expected in self.sessions.items():
            found = data.sessions(split)
            assert sorted(session[1:] for session in found) == expected
            assert data.manifest["splits"][split]["sessions"] == len(expected)
            assert data.manifest["splits"][split]["targets"] == sum(len(tokens) - 1 for _, tokens, _ in expected)
        assert all(stream == number % STREAMS for stream, number, _, _ in data.sessions("train"))
        # A stream reads its sessions in the order of their numbers: first the old ones.
        for stream in range(STREAMS):
            numbers = [number for of, number, _, _ in data.sessions("train") if of == stream]
            assert numbers == sorted(numbers)
            names = [shard["url"] for shard in data.shards("train") if shard["stream"] == stream]
            assert sorted(names) == [f"train/s{stream:04d}-{number:06d}.tar" for number in range(len(names))]
        for split in ("valid", "test"):
            named = [(shard["stream"], shard["url"]) for shard in data.shards(split)]
            assert named == [(number, f"{split}/{number:06d}.tar") for number in range(len(named))]
        assert all(shard["sessions"] <= 5 for split in self.sessions for shard in data.shards(split))
        self._check_features(data)

    def _check_features(self, data: Prepared) -> None:
        brands, tags, prices = (feature_values(data, name) for name in ("brand", "tags", "price"))
        (image,) = [data.npy(each["values"]) for each in data.manifest["features"] if each["name"] == "image"]
        for token, number in self.ids.items():
            assert brands[token] == next(iter(self.values["brand"].get(token, [])), None)
            assert tags[token] == self.values["tags"].get(token, [])
            assert prices[token] == self.values["price"].get(token)
            assert image[number].tolist() == self.values["image"].get(token, [0.0, 0.0])
        sizes = {feature["name"]: feature["size"] for feature in data.manifest["features"]}
        assert {name: sizes[name] - 2 for name in self.vocabularies} == {
            name: len(known) for name, known in self.vocabularies.items()
        }
