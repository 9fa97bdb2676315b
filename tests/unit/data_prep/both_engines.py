"""Preparations on Spark, held against those on DuckDB: what they share to be quick, and what must be equal."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

ON_SPARK = [
    pytest.mark.spark,
    pytest.mark.skipif(find_spec("pyspark") is None, reason="needs pyspark"),
    pytest.mark.skipif(shutil.which("java") is None, reason="needs Java (apt-get install default-jre-headless)"),
]
# Of the Java machine: it runs too short for code that takes time to be made fast.
APPLICATION_SETTINGS = {"spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
SETTINGS = {
    # Tiny tables would otherwise all be in one partition, where nothing can come out of order.
    "spark.sql.shuffle.partitions": "3",
    "spark.sql.adaptive.coalescePartitions.enabled": "false",
    # Compiling a query takes longer than running it here.
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}
SPARK = {"master": "local[2]", "settings": SETTINGS}
# For the many recipes: as above, but without the plans that change while they run, which take a third longer.
QUICK_SPARK = {
    "master": "local[2]",
    "settings": {**SETTINGS, "spark.sql.adaptive.enabled": "false", "spark.sql.shuffle.partitions": "2"},
}


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file but the manifest, which holds the recipe."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check_same(duckdb: Path, spark: Path) -> None:
    """All is equal but the recipe that the manifest keeps."""
    # First what tells most of a difference.
    assert _quarantine(spark) == _quarantine(duckdb)
    assert files_of(spark) == files_of(duckdb)
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (duckdb, spark))
    assert first.pop("recipe")["engine"] == "duckdb"
    assert second.pop("recipe")["engine"] == "spark"
    assert second == first


def _quarantine(folder: Path) -> list[str]:
    path = folder / "quarantine.jsonl"
    return path.read_text().splitlines() if path.exists() else []
