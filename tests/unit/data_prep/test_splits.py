"""Splits, k-core, ids, streams against a plain Python account of them."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gru4recf_dist.table.partition import RowPartition
from tests.unit.data_prep.prepared import Prepared, by_session, random_rows, run, write_csv


def md5(seed: int, text: str) -> str:
    return hashlib.md5(f"{seed}:{text}".encode()).hexdigest()


def expected_leave_one_out(sessions: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    parts: dict[str, list[list[str]]] = {"train": [], "valid": [], "test": []}
    for items in sessions.values():
        if len(items) >= 3:
            parts["test"].append(items)
            parts["valid"].append(items[:-1])
            items = items[:-2]
        if len(items) >= 2:
            parts["train"].append(items)
    return {name: sorted(part) for name, part in parts.items()}


def brute_k_core(rows: list[tuple], support: int, shortest: int) -> list[tuple]:
    while True:
        items = Counter(row[1] for row in rows)
        kept = [row for row in rows if items[row[1]] >= support]
        lengths = Counter(row[0] for row in kept)
        kept = [row for row in kept if lengths[row[0]] >= shortest]
        if len(kept) == len(rows):
            return rows
        rows = kept


def tokens_of(rows: list[tuple]) -> dict[str, list[str]]:
    return {key: [event[1] for event in events] for key, events in by_session(rows).items()}


def check_against_reference(data: Prepared, expected: dict[str, list[list[str]]], seed: int) -> None:
    for name, sessions in expected.items():
        assert data.contents(name) == sessions, name
    catalog = {token for part in expected.values() for session in part for token in session}
    assert data.ids == {
        token: number for number, token in enumerate(sorted(catalog, key=lambda t: md5(seed, t)), start=1)
    }
    counts = Counter(token for session in expected["train"] for token in session)
    assert data.popularity.tolist() == [0, *(counts[data.tokens[n]] for n in range(1, len(catalog) + 1))]


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 4)), min_size=12, max_size=70),
    support=st.integers(1, 4),
    shortest=st.integers(1, 4),
)
def test_k_core_and_leave_one_out_equal_brute_force(tmp_path_factory, rows, support, shortest):
    folder = tmp_path_factory.mktemp("core")
    # One session that survives anything keeps every split non-empty.
    rows = [(f"s{s}", f"i{i}", t) for s, i, t in rows] + [("keep", "k", n) for n in range(6)]
    write_csv(folder / "raw.csv", rows)
    run(
        {"source": str(folder / "raw.csv"), "output": str(folder / "out"), "input": {"format": "csv"}, "seed": 4},
        min_item_support=support,
        min_session_length=shortest,
    )
    filtered = [row for row in rows if Counter(r[0] for r in rows)[row[0]] >= shortest]
    filtered = brute_k_core(filtered, support, shortest) if support > 1 else filtered
    data = Prepared(folder / "out")
    check_against_reference(data, expected_leave_one_out(tokens_of(filtered)), seed=4)
    assert data.manifest["protocol"] == "leave_one_out"
    assert data.manifest["splits"]["test"]["targets"] == data.manifest["splits"]["test"]["sessions"]


@pytest.mark.parametrize("seed", [0, 1])
def test_temporal_by_share_orders_sessions_by_their_last_event(tmp_path, seed):
    rows = random_rows(seed)
    write_csv(tmp_path / "raw.csv", rows)
    run(
        {"source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out"), "input": {"format": "csv"}},
        split={"method": "temporal", "valid_share": 0.2, "test_share": 0.15},
    )
    numbered = [(*row, line) for line, row in enumerate(rows)]
    sessions = [events for events in by_session(numbered).values() if len(events) > 1]
    sessions.sort(key=lambda events: (events[-1][2], events[-1][3]))
    test, valid = round(len(sessions) * 0.15), round(len(sessions) * 0.2)
    tokens = [[event[1] for event in events] for events in sessions]
    cuts = np.cumsum([len(tokens) - test - valid, valid])
    expected = {"train": tokens[: cuts[0]], "valid": tokens[cuts[0] : cuts[1]], "test": tokens[cuts[1] :]}
    data = Prepared(tmp_path / "out")
    check_against_reference(data, {name: sorted(part) for name, part in expected.items()}, seed=1)
    for info in data.manifest["splits"].values():
        assert info["targets"] == info["events"] - info["sessions"]
    assert data.manifest["protocol"] == "every_position"


def test_given_files_keep_test_items_that_training_lacks(tmp_path):
    """Session keys of train and test files may be equal without being the same session."""
    train = [(f"s{n}", item, 10 * n) for n in range(20) for item in ("a", "b", "rare" if n == 3 else "c")]
    test = [("s1", "a", 500), ("s1", "new", 501), ("s2", "rare", 502), ("s2", "new", 503), ("s3", "a", 504)]
    write_csv(tmp_path / "train.csv", train)
    write_csv(tmp_path / "test.csv", test)
    report = run(
        {"source": str(tmp_path), "output": str(tmp_path / "out"), "split": {"method": "files"}},
        input={"format": "csv", "train_files": ["train.csv"], "test_files": ["test.csv"]},
        min_item_support=2,
    )
    data = Prepared(tmp_path / "out")
    assert data.contents("test") == [["a", "new"], ["rare", "new"]]
    # Of 20 training sessions the last 10 % by time.
    assert data.manifest["splits"]["valid"]["sessions"] == 2
    assert data.manifest["splits"]["train"]["sessions"] == 18
    assert sorted(data.ids) == ["a", "b", "c", "new", "rare"]
    assert data.popularity[data.ids["new"]] == data.popularity[data.ids["rare"]] == 0
    row = next(row for row in report.rows if row.get("step") == "split: test")
    assert (row["targets"], row["untrained_targets"], row["untrained_share"]) == (2, 2, 1.0)


def test_given_valid_files_are_used(tmp_path):
    for name in ("train", "valid", "test"):
        text = "session_id:token\titem_id:token\ttimestamp:float\n"
        text += "".join(f"{name}{n}\t{item}\t{n}\n" for n in range(4) for item in ("x", name))
        (tmp_path / f"{tmp_path.name}.{name}.inter").write_text(text)
    run({"source": str(tmp_path), "output": str(tmp_path / "out"), "split": {"method": "files"}})
    data = Prepared(tmp_path / "out")
    assert data.contents("valid") == [["x", "valid"]] * 4
    assert data.contents("train") == [["x", "train"]] * 4


def test_single_event_training_sessions_are_dropped_and_counted(tmp_path):
    rows = [("three", "a", 1), ("three", "b", 2), ("three", "c", 3)]
    rows += [("four", item, n) for n, item in enumerate("abcd")] + [("two", "e", 1), ("two", "f", 2)]
    write_csv(tmp_path / "raw.csv", rows)
    report = run({"source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out"), "input": {"format": "csv"}})
    row = next(row for row in report.rows if row.get("step") == "split: train")
    assert row["sessions_without_target"] == 1
    data = Prepared(tmp_path / "out")
    assert data.contents("train") == [["a", "b"], ["e", "f"]]
    assert data.contents("test") == [["a", "b", "c"], ["a", "b", "c", "d"]]


@pytest.mark.parametrize("streams", [1, 4, 16])
def test_streams_take_the_sessions_in_turn(tmp_path, streams):
    rows = random_rows(7, sessions=70)
    write_csv(tmp_path / "raw.csv", rows)
    run(
        {"source": str(tmp_path / "raw.csv"), "output": str(tmp_path / "out"), "input": {"format": "csv"}, "seed": 9},
        split={"method": "temporal"},
        streams=streams,
        shard_sessions=3,
        block_sessions=2,
    )
    data = Prepared(tmp_path / "out")
    keys = {}
    for key, items in tokens_of(rows).items():
        keys.setdefault(tuple(items), []).append(key)
    for name in ("train", "valid", "test"):
        found = data.sessions(name)
        numbers = [number for _, number, _, _ in found]
        assert sorted(numbers) == list(range(len(found)))
        # Contents name their keys; sessions in the order of their numbers have ascending digests.
        in_order = [keys[tuple(tokens)] for _, _, tokens, _ in sorted(found, key=lambda entry: entry[1])]
        digests = [md5(9, options[0]) for options in in_order if len(options) == 1]
        assert digests == sorted(digests)
        assert all(shard["sessions"] <= 3 for shard in data.shards(name))
    sizes = Counter(stream for stream, _, _, _ in data.sessions("train"))
    assert len(sizes) == streams
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert all(number % streams == stream for stream, number, _, _ in data.sessions("train"))
    assert [shard["stream"] for shard in data.shards("valid")] == list(range(len(data.shards("valid"))))


def test_default_number_of_streams_follows_the_size():
    from data_prep.writer import choose_streams

    expected = {1: 8, 4096 * 8: 8, 4096 * 16 - 1: 8, 4096 * 16: 16, 4096 * 700: 512, 10**9: 1024}
    assert {sessions: choose_streams(sessions) for sessions in expected} == expected


@pytest.fixture(scope="module")
def zipf(tmp_path_factory) -> dict[str, Prepared]:
    """Events whose items follow Zipf's law, by the order of the ids."""
    folder, mass = tmp_path_factory.mktemp("zipf"), 1.0 / np.arange(1, 20_001)
    items = np.random.default_rng(0).choice(len(mass), (6000, 8), p=mass / mass.sum())
    write_csv(folder / "raw.csv", [(f"s{n}", f"i{item}", n) for n, row in enumerate(items) for item in row])
    content = {
        "source": str(folder / "raw.csv"),
        "input": {"format": "csv"},
        "split": {"method": "temporal"},
        "seed": 3,
    }
    for order in ("md5", "balanced"):
        run({**content, "output": str(folder / order)}, item_order=order)
    return {order: Prepared(folder / order) for order in ("md5", "balanced")}


def test_the_balanced_order_gives_every_stretch_of_ids_items_of_every_popularity(zipf):
    data = zipf["balanced"]
    falling = sorted(data.ids, key=lambda token: (-data.popularity[data.ids[token]], md5(3, token)))
    places = {token: place for place, token in enumerate(falling)}
    in_order = sorted(data.ids, key=lambda token: f"{places[token]:031b}"[::-1])
    assert data.ids == {token: number for number, token in enumerate(in_order, start=1)}


@pytest.mark.parametrize(("world", "events"), [(16, 1280), (48, 2500), (64, 2500)])
def test_the_balanced_order_loads_many_ranks_evenly(zipf, world, events):
    """Each rank asks for the distinct items of its events: rows asked of the most loaded rank, over the mean."""

    def imbalance(popularity: np.ndarray) -> float:
        partition, generator = RowPartition(len(popularity), world), np.random.default_rng(1)
        draws = generator.choice(len(popularity), (20, world, events), p=popularity / popularity.sum())
        asked = [sum(partition.split(np.unique(each)) for each in step) for step in draws]
        return float(np.mean([counts.max() / counts.mean() for counts in asked]))

    assert imbalance(zipf["balanced"].popularity) <= 1.1
    assert world < 48 or imbalance(zipf["md5"].popularity) > 1.15
