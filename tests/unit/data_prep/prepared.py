"""Small raw data, a runner, and a reader of shards that shares no code with the writer."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq

from data_prep.prepare import prepare
from data_prep.recipe import Recipe


def make(content: dict, **more) -> Recipe:
    """A recipe from plain values, through the validation that YAML goes through."""
    return Recipe.model_validate({"name": "test", "streams": 1, "threads": 2, **content, **more})


def run(content: dict, **more):
    return prepare(make(content, **more))


class Prepared:
    """A data set read back with tarfile, numpy and pyarrow only."""

    def __init__(self, folder: str) -> None:
        self.folder = str(folder).rstrip("/")
        self.manifest = json.loads(self.bytes("manifest.json"))
        table = pq.read_table(io.BytesIO(self.bytes(self.manifest["tokens"])))
        self.ids = dict(zip(table["token"].to_pylist(), table["id"].to_pylist(), strict=True))
        self.tokens = {number: token for token, number in self.ids.items()}
        self.popularity = self.npy(self.manifest["popularity"])

    def bytes(self, name: str) -> bytes:
        with fsspec.open(f"{self.folder}/{name}", "rb") as stream:
            return stream.read()

    def npy(self, name: str) -> np.ndarray:
        return np.load(io.BytesIO(self.bytes(name)), allow_pickle=False)

    def shards(self, split: str) -> list[dict]:
        return self.manifest["splits"][split]["shards"]

    def sessions(self, split: str) -> list[tuple[int, int, list[str], list[int] | None]]:
        """(stream, number, tokens, times) of every stored session, in the order of the shards."""
        found = []
        for shard in self.shards(split):
            members = {}
            with tarfile.open(fileobj=io.BytesIO(self.bytes(shard["url"]))) as tar:
                for member in tar:
                    key, column, _ = member.name.split(".", 2)
                    content = tar.extractfile(member)
                    assert content is not None
                    members.setdefault(key, {})[column] = np.load(io.BytesIO(content.read()), allow_pickle=False)
            for block in members.values():
                ends = np.cumsum(block["lengths"])
                for number, start, stop in zip(block["sessions"], ends - block["lengths"], ends, strict=True):
                    tokens = [self.tokens[int(item)] for item in block["items"][start:stop]]
                    times = block["times"][start:stop].tolist() if "times" in block else None
                    found.append((shard["stream"], int(number), tokens, times))
        return found

    def contents(self, split: str) -> list[list[str]]:
        return sorted(tokens for _, _, tokens, _ in self.sessions(split))


def write_csv(path: Path, rows: list[tuple], header: str = "session_id,item_id,timestamp") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def random_rows(seed: int, events: int = 600, sessions: int = 80, items: int = 40, times: int = 30) -> list[tuple]:
    """(session, item, time) with many ties."""
    rng = np.random.default_rng(seed)
    columns = (
        rng.integers(0, sessions, events),
        np.minimum(rng.geometric(0.08, events), items),
        rng.integers(0, times, events),
    )
    return [(f"s{s}", f"i{i}", int(t)) for s, i, t in zip(*columns, strict=True)]


def by_session(rows: list[tuple]) -> dict[str, list[tuple]]:
    """Events of each session in the order of (time, line): Python's sort is stable."""
    sessions: dict[str, list[tuple]] = {}
    for row in rows:
        sessions.setdefault(row[0], []).append(row)
    return {key: sorted(events, key=lambda row: float(row[2])) for key, events in sessions.items()}


def feature_values(data: Prepared, name: str) -> dict[str, object]:
    """Item token -> its value: text, list of texts, or number; None where it has none."""
    (feature,) = [entry for entry in data.manifest["features"] if entry["name"] == name]
    values = data.npy(feature["values"])
    if feature["kind"] == "float":
        numbers = {token: float(values[number]) for token, number in data.ids.items()}
        return {token: None if math.isnan(number) else number for token, number in numbers.items()}
    vocabulary = pq.read_table(io.BytesIO(data.bytes(feature["vocabulary"])))
    texts = {
        0: None,
        1: "unknown",
        **dict(zip(vocabulary["id"].to_pylist(), vocabulary["token"].to_pylist(), strict=True)),
    }
    if feature["kind"] == "token":
        return {token: texts[int(values[number])] for token, number in data.ids.items()}
    indptr = data.npy(feature["indptr"])
    return {
        token: [texts[int(value)] for value in values[indptr[number] : indptr[number + 1]]]
        for token, number in data.ids.items()
    }


def events_after(data: Prepared, step: str) -> int:
    return next(row["events"] for row in data.manifest["report"] if row.get("step") == step)


def standardized(values: dict[str, float], missing: list[str] = ()) -> dict[str, float | None]:
    """All of ``values`` are of items with training events."""
    numbers = np.array(list(values.values()))
    scaled = (numbers - numbers.mean()) / numbers.std()
    return {**dict(zip(values, scaled, strict=True)), **dict.fromkeys(missing)}
