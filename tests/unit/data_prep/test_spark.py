"""Preparation on Spark gives what it gives on DuckDB: the same files, byte for byte."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.recipe import Spark
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.both_engines import ON_SPARK, SPARK, check_same
from tests.unit.data_prep.prepared import Prepared, random_rows, run, write_csv

pytestmark = [*ON_SPARK, pytest.mark.usefixtures("spark_application")]

ODD_NUMBERS = ["1_0.5", "1_", "1.5f", " 7 ", "0x1p3", "1e1", ".5", "5.", "inf", "NaN", "1e400", "noon", "+3", "1\x1f"]
ODD_DATES = [
    *("2024-01-02", "2024-1-2", " 2024-01-02", "2024-01-02 ", "2024-01-02 3:4:5", "2024-01-02T03", "2024-01-02 03:04"),
    *("2024-01-02T03:04:05.1", "2024-01-02 03:04:05.123456789", "2024-01-02T03:04:05.Z", "2024-01-02T03:04:05z"),
    *("2024-01-02T03:04:05+02", "2024-01-02T03:04:05-05:30", "2024-01-02T03:04:05+0530", "2024-01-02 03:04:05 +02"),
    *("2024-01-02 03:04:05 UTC", "2024-07-02 03:04:05 Europe/Berlin", "2024-01-02 03:04Z", "2024-01-02Z", "2024/1/2"),
    *("2024/01/02 03:04:05", "2024/01-02", "20240102", "2024", "2024-01", "12:30", "now", "today", "2024-02-30"),
    *(
        "2023-02-29",
        "2024-13-01",
        "2024-01-02 25:00",
        "2024-01-02 23:59:60",
        "1969-12-31 23:59:59.999999",
        "0999-01-01",
    ),
    *("10000-01-01", "300000-01-01", "2024-01-02t03:04:05", "2024-01-02T03:04:05,5", "2024-01-02 03:04:05+2"),
]


def test_missing_java_is_one_line(monkeypatch, tmp_path):
    """Asked of a process without a running application, which this one is not."""
    from data_prep import spark_session

    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^engine: spark needs Java, 17 or later: .*JAVA_HOME"):
        spark_session._application(Spark(), None)


def test_setting_that_spark_refuses_is_one_line(tmp_path):
    from data_prep import spark_session

    settings = Spark(master="local[2]", settings={"spark.sql.shuffle.partitions": "many"})
    with pytest.raises(UserError, match=r"^spark.settings: [^\n]*'many'[^\n]*$"):
        spark_session.start(settings, None)


def test_errors_of_executors_in_one_line():
    """Spark's texts as they are; all of its pages otherwise."""
    from pyspark.errors import PySparkException

    from data_prep import spark_session, spark_tasks

    ours = 'a.csv: "quoted"'
    lines = {
        f"Job aborted\n at org.x\n{spark_tasks.TaskError(ours)}\n at org.y": ours,
        "Traceback\nModuleNotFoundError: No module named 'pyarrow'\n": "spark: the executors have no package pyarrow",
        "java.io.IOException: No space left on device\n\tat": "temporary_folder: no space left on device",
    }
    for message, line in lines.items():
        with pytest.raises(UserError) as error, spark_session.explained():
            raise PySparkException(message)
        assert str(error.value).startswith(line)
        assert "\n" not in str(error.value)
    with pytest.raises(PySparkException), spark_session.explained():
        raise PySparkException("a bug of ours")


def run_both(tmp_path, content: dict) -> Prepared:
    content = {"shard_sessions": 7, "block_sessions": 3, "streams": 4, "store_times": True, **content}
    duckdb, spark = tmp_path / "duckdb", tmp_path / "spark"
    run({**content, "output": str(duckdb)})
    run_spark(tmp_path, {**content, "output": str(spark)})
    check_same(duckdb, spark)
    return Prepared(spark)


def run_spark(tmp_path, content: dict) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run({**content, "threads": None, "engine": "spark", "spark": SPARK, "temporary_folder": str(scratch)})
    assert not any(scratch.iterdir())


def test_leave_one_out_with_k_core_bad_rows_and_features(tmp_path):
    """Several files with ties, lines that are no rows, odd numbers, every kind of feature."""
    rows = random_rows(1)
    odd = [(f"s{n}", f"i{n + 1}", text) for n, text in enumerate(ODD_NUMBERS)]
    for part in range(3):
        path = write_csv(tmp_path / f"raw/{part}.csv", [*rows[part::3], *odd[part::3]])
        path.write_text(path.read_text() + f"s1,i1\ns1,,{part}\n,i2,3\ns2,i2,1,2\n" + "s3,i3,4\n" * part)
    numbers = ODD_NUMBERS * 3
    items = [f"i{n},{'ab'[n % 2] * (n % 4)},x y  {'z' * (n % 3)},{number},5" for n, number in enumerate(numbers)]
    # Rows that count before or after those, or do not, by an odd time.
    items += [f"i{n},late,,{n},{number}" for n, number in enumerate(numbers)]
    (tmp_path / "raw/items.txt").write_text("\n".join(["item_id,brand,tags,price,seen", *items, items[4], ""]))
    np.save(tmp_path / "raw/images.npy", np.arange(30, dtype=np.float32).reshape(10, 3))
    (tmp_path / "raw/names.txt").write_text("\n".join(f"i{n}" for n in range(10)))
    features = [
        {"name": "brand", "kind": "token"},
        {"name": "tags", "kind": "token_seq"},
        {"name": "price", "kind": "float", "standardize": True},
        {"name": "image", "kind": "vector", "npy": "images.npy", "npy_items": "names.txt"},
    ]
    content = {"source": str(tmp_path / "raw"), "input": {"format": "csv"}, "min_item_support": 6}
    table = {"file": "items.txt", "format": "csv", "time": "seen"}
    data = run_both(tmp_path, {**content, "items": table, "features": features})
    assert len(data.shards("train")) > 8
    steps = {row["step"]: row for row in data.manifest["report"] if "step" in row}
    assert steps["k-core filter"]["events"] < steps["drop short sessions"]["events"]
    assert len(data.bytes("quarantine.jsonl").splitlines()) > 12


def test_users_cut_by_gap_with_dates_as_text(tmp_path):
    """Dates with ties and many spellings, odd places within them, repeated events, split by shares of time."""
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    rows = [
        (user, item, (start + datetime.timedelta(seconds=97 * time)).strftime("%Y-%m-%d %H:%M:%S"), -line)
        for line, (user, item, time) in enumerate(random_rows(2, events=500, sessions=12, times=60))
    ]
    odd = [("odd", f"i{number}", f'"{date}"', 1) for number, date in enumerate(ODD_DATES)]
    odd += [("places", f"i{number}", "2024-01-02", place) for number, place in enumerate(ODD_NUMBERS)]
    path = write_csv(tmp_path / "raw.csv", [*rows[:250], *odd, *rows[200:]], "user,item_id,timestamp,place")
    given = {"format": "csv", "user": "user", "time_format": "datetime", "time_within": "place"}
    content = {"source": str(path), "input": given, "session_gap": 600, "deduplicate": True}
    data = run_both(tmp_path, {**content, "split": {"method": "temporal"}})
    steps = {row["step"]: row for row in data.manifest["report"]}
    assert steps["deduplicate"]["events"] < steps["drop bad rows"]["events"]
    assert steps["sessionize"]["sessions"] > 1.5 * steps["users"]["sessions"]
    reasons = [json.loads(line)["reason"] for line in data.bytes("quarantine.jsonl").splitlines()]
    assert 5 < reasons.count("time is not a datetime") < len(ODD_DATES) - 5
    assert 3 < reasons.count("time_within is not a number") < len(ODD_NUMBERS) - 3


def test_given_files_of_parquet(tmp_path):
    """Timestamps, nested events, several row groups, and a valid split that is cut from training."""

    def write(name: str, seed: int, offset: int) -> None:
        sessions: dict[str, list[dict]] = {}
        for session, item, time in random_rows(seed, events=300):
            moment = datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=time + offset)
            sessions.setdefault(session, []).append({"item": item, "time": moment})
        table = pa.table({"session_id": list(sessions), "events": list(sessions.values())})
        pq.write_table(table, tmp_path / name, row_group_size=20)

    for number, name in enumerate(["a.parquet", "b.parquet", "c.parquet"]):
        write(name, number + 3, 30 * number)
    given = {
        **{"format": "parquet", "events": "events", "item": "item", "time": "time", "time_format": "datetime"},
        **{"train_files": ["a.parquet", "b.parquet"], "test_files": ["c.parquet"]},
    }
    content = {"source": str(tmp_path), "input": given, "split": {"method": "files", "valid_share": 0.2}}
    data = run_both(tmp_path, {**content, "min_item_support": 3, "item_order": "balanced"})
    assert all(data.manifest["splits"][name]["sessions"] for name in ("train", "valid", "test"))


def test_json_lines_split_by_date(tmp_path):
    """Lines that are no sessions, whole numbers beyond float64, and times just at the bounds."""
    first = 10**18
    sessions: dict[str, list[dict]] = {}
    for session, item, time in random_rows(6, events=400, sessions=60):
        sessions.setdefault(session, []).append({"item_id": item, "timestamp": first + time})
    lines = [json.dumps({"session_id": session, "events": events}) for session, events in sessions.items()]
    lines.insert(9, '{"session_id": "none", "events": []}')
    lines.insert(20, "{broken")
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:30]) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[30:]) + "\n")
    given = {"format": "jsonl", "events": "events", "time_format": "integer"}
    # As text: a float would round it.
    split = {"method": "temporal", "valid_from": str(first + 27), "test_from": str(first + 29)}
    data = run_both(tmp_path, {"source": str(tmp_path), "input": given, "split": split})
    assert len(data.bytes("quarantine.jsonl").splitlines()) == 2


@pytest.mark.parametrize("header", ["session_id,item_id", "session_id,item_id,timestamp"])
def test_error_is_the_same_line(tmp_path, header):
    """A file that lacks a column, found by the task that reads it; no row to keep in any. Nothing is left behind."""
    write_csv(tmp_path / "raw/0.csv", random_rows(1))
    write_csv(tmp_path / "raw/1.csv", [("s1", "i1", 1)[: header.count(",") + 1]], header)
    given = {"format": "csv", "keep": {"item_id": ["none"]}}
    content = {"source": str(tmp_path / "raw"), "output": str(tmp_path / "out"), "input": given}
    with pytest.raises(UserError) as duckdb:
        run(content)
    with pytest.raises(UserError) as spark:
        run_spark(tmp_path, content)
    assert str(spark.value) == str(duckdb.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "scratch"]
    assert not any((tmp_path / "scratch").iterdir())


def test_shard_that_cannot_be_written_is_one_line(tmp_path):
    """An error of storage on an executor."""
    from data_prep.engine import open_engine
    from tests.unit.data_prep.prepared import make

    recipe = make({"source": "x", "output": "y", "threads": None, "engine": "spark"})
    (tmp_path / "file").write_text("not a folder")

    def task(batches):
        from gru4recf_dist.data import storage

        storage.write_bytes(f"{tmp_path}/file/shard.tar", b"")
        yield "never"

    with open_engine(recipe) as engine:
        table = engine.stage("rows", pa.schema({"number": pa.int64()}), iter([pa.table({"number": [1, 2]})]))
        with pytest.raises(UserError, match=r"^[^\n]*file/shard.tar: cannot be written \(File exists\)$"):
            list(engine.run_sorted(table, ["number"], ["number"], ["number"], task))


def test_executors_reach_storage_with_the_recipes_settings():
    from data_prep.engine import open_engine
    from gru4recf_dist.data import filesystems
    from gru4recf_dist.data.storage_config import StorageConfig
    from tests.unit.data_prep.prepared import make

    filesystems.configure(StorageConfig(attempts=3))

    def task(batches):
        from gru4recf_dist.data import filesystems

        rows = sum(batch.num_rows for batch in batches)
        yield f"{rows} {filesystems.settings().attempts}"

    with open_engine(make({"source": "x", "output": "y", "threads": None, "engine": "spark"})) as engine:
        table = engine.stage("rows", pa.schema({"number": pa.int64()}), iter([pa.table({"number": [1]})]))
        assert "1 3" in list(engine.run_sorted(table, ["number"], ["number"], ["number"], task))
