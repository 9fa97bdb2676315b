"""Data larger than the memory that a preparation may take: it spills, and gives the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.duckdb_engine import DuckDBEngine
from tests.unit.data_prep.both_engines import files_of
from tests.unit.data_prep.prepared import run

EVENTS = 200_000
LIMIT_GIB = 0.05


def test_what_does_not_fit_is_spilled_and_the_bytes_are_those_of_enough_memory(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    columns = {
        "session_id": generator.integers(0, EVENTS // 8, EVENTS),
        "item_id": np.minimum(generator.geometric(0.001, EVENTS), 5000),
        "timestamp": generator.integers(0, 10**6, EVENTS),
    }
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    keep, spilled, spill_folders = DuckDBEngine.keep, {"limited": 0, "free": 0}, set()

    def kept(engine, name, expression):
        result = keep(engine, name, expression)
        files = list(Path(engine._spill).iterdir())
        spilled[now] = max(spilled[now], sum(file.stat().st_size for file in files))
        spill_folders.add(os.path.dirname(engine._spill))
        return result

    monkeypatch.setattr(DuckDBEngine, "keep", kept)
    (tmp_path / "scratch").mkdir()
    recipe = {"source": str(tmp_path / "events.parquet"), "input": {"format": "parquet"}, "min_item_support": 20}
    recipe |= {"split": {"method": "temporal"}, "threads": 1, "temporary_folder": str(tmp_path / "scratch")}
    for now, limit in (("limited", {"memory_limit_gib": LIMIT_GIB}), ("free", {})):
        run({**recipe, "output": str(tmp_path / now)}, **limit)
    assert spilled["limited"] > 1 << 20 and spilled["free"] == 0
    assert spill_folders == {str(tmp_path / "scratch")}
    assert files_of(tmp_path / "limited") == files_of(tmp_path / "free")
    # Nothing of it stays.
    assert list((tmp_path / "scratch").iterdir()) == []
