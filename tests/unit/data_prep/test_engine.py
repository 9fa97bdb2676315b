"""Which engine runs, and what it says when it cannot."""

import sys

import pytest

from gru4recf_dist.errors import UserError
from tests.unit.data_prep.prepared import run, write_csv


def test_spark_without_its_package(tmp_path, monkeypatch):
    for name in ["pyspark", *(name for name in sys.modules if name.startswith("pyspark."))]:
        monkeypatch.setitem(sys.modules, name, None)
    path = write_csv(tmp_path / "raw.csv", [("s", "i", 1)])
    content = {"source": str(path), "output": str(tmp_path / "out"), "threads": None, "engine": "spark"}
    with pytest.raises(
        UserError, match=r"^engine: spark needs the package pyspark: pip install 'gru4recf-dist\[spark\]'$"
    ):
        run({**content, "temporary_folder": str(tmp_path)}, input={"format": "csv"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw.csv"]
