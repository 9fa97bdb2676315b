"""Shared by the tests of the preparation: one Spark application, and shipped recipes on each engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.recipe import Recipe, Spark
from gru4recf_dist import typed_yaml
from tests.unit.data_prep.both_engines import APPLICATION_SETTINGS, ON_SPARK, QUICK_SPARK, check_same
from tests.unit.data_prep.prepared import Prepared

RECIPES = Path(__file__).parents[3] / "configs/data"


@pytest.fixture(scope="package")
def spark_application(tmp_path_factory) -> Iterator[None]:
    """Starting one takes longer than a preparation."""
    from data_prep import spark_session

    settings = Spark(master="local[2]", settings=APPLICATION_SETTINGS)
    session, _ = spark_session.start(settings, str(tmp_path_factory.mktemp("spark")))
    yield
    session.stop()


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=ON_SPARK)])
def prepared(request, tmp_path) -> Callable[..., Prepared]:
    """Runs a shipped recipe as it is, but for the places of the files and what a test overrides.

    Called with the recipe's name, the source and overrides; the data set is in the folder `out`. What Spark gives must
    be what DuckDB gives.
    """

    def run(output: str, name: str, source: Path, *overrides: str) -> Prepared:
        changed = [f"source={source}", f"output={tmp_path / output}", "streams=1", *overrides]
        prepare(typed_yaml.load(Recipe, str(RECIPES / f"{name}.yaml"), changed))
        return Prepared(tmp_path / output)

    def run_on_duckdb(*given: str | Path) -> Prepared:
        return run("out", *given, "threads=2")

    def run_on_both(*given: str | Path) -> Prepared:
        run("duckdb", *given, "threads=2")
        data = run("out", *given, "engine=spark", f"spark={json.dumps(QUICK_SPARK)}")
        check_same(tmp_path / "duckdb", tmp_path / "out")
        return data

    if request.param == "duckdb":
        return run_on_duckdb
    request.getfixturevalue("spark_application")
    return run_on_both


@pytest.fixture
def raw(tmp_path) -> Path:
    """A folder for a data set's raw files."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder
