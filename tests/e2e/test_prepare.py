"""`python -m data_prep` as a user runs it: report, one-line errors, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
# Where the recipes look for raw files; elsewhere by an environment variable.
REAL_DATA = Path(os.environ.get("RAW_DATA", ROOT / "data/raw"))
CSV = "session_id,item_id,timestamp\n" + "".join(f"s{n},i{i},{i}\n" for n in range(20) for i in range(n % 5 + 3))


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "raw.csv").write_text(CSV)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: tiny\nsource: {tmp_path}/raw.csv\noutput: {tmp_path}/out\ninput: {{format: csv}}\n")
    return path


def test_program_prints_a_report_and_writes_the_data_set(recipe, tmp_path):
    command = [sys.executable, "-m", "data_prep", "--config", str(recipe), "seed=5", "streams=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "split: train" in done.stdout and f"tiny: {tmp_path}/out" in done.stdout
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["name"], manifest["seed"], manifest["streams"], manifest["format"]) == ("tiny", 5, 2, 1)
    assert manifest["report"][0]["events"] == CSV.count("\n") - 1
    assert manifest["recipe"]["input"]["format"] == "csv"


def test_program_never_imports_torch():
    code = "import sys, data_prep.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["source=nowhere.csv"], "nowhere.csv"),
        (["input.item=product"], "no column 'product' (it has: session_id, item_id, timestamp)"),
        (["inputt.item=x"], "unknown key 'inputt'"),
        (["streams=3"], "streams"),
        (["min_session_length=50"], "no events left after the step 'drop short sessions'"),
        (["min_item_support=50"], "no events left after the step 'k-core filter'"),
        (["split.method=files"], "input.train_files must be given"),
        (["split.method=temporal", "split.valid_from=900", "split.test_from=901"], "no valid session"),
        (["split.method=temporal", "split.valid_from=soon", "split.test_from=901"], "split.valid_from"),
        (["input.files=['*.tsv']"], "no file matches"),
        (["output=pipe:cat"], "protocol 'pipe' is not supported"),
        (["input.format=recbole", "source=."], ".inter: no such file"),
        (["input.format=parquet"], "raw.csv: "),
        (["temporary_folder=nowhere/at/all"], "temporary_folder"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(recipe, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    if "input.files=['*.tsv']" in arguments:
        arguments = [*arguments, f"source={tmp_path}"]
    assert main(["--config", str(recipe), "streams=1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.csv", "recipe.yaml"]


def test_missing_recipe_is_named(capsys):
    assert main(["--config", "gone.yaml"]) == 2
    assert capsys.readouterr().err == "error: gone.yaml: no such file\n"


EXPECTED = {
    "ml-100k": {"items": 1682, "sessions": {"train": 943, "valid": 943, "test": 943}, "features": [21, 75]},
    "beauty": {"items": 12101, "sessions": {"train": 22363, "valid": 22363, "test": 22363}, "features": [639]},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_shipped_recipes_on_real_data(name, tmp_path):
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"needs the raw files in {REAL_DATA / name} (RAW_DATA=FOLDER)")
    overrides = [f"source={REAL_DATA / name}", f"output={tmp_path / name}"]
    assert main(["--config", str(ROOT / f"configs/data/{name}.yaml"), *overrides]) == 0
    manifest = json.loads((tmp_path / name / "manifest.json").read_text())
    expected = EXPECTED[name]
    assert manifest["items"] == expected["items"]
    assert {split: info["sessions"] for split, info in manifest["splits"].items()} == expected["sessions"]
    assert [feature["size"] for feature in manifest["features"]] == expected["features"]
