"""RecBole 1.2.1 itself loads what was exported: `make test-recbole` sets up its environment and runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from gru4recf_dist import evaluate, recommend
from tests.recbole.test_export import export_run, train_run
from tests.recbole.test_import import ITEMS, import_run

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-recbole" / "bin" / "python"
pytestmark = [
    pytest.mark.recbole,
    pytest.mark.skipif(not PYTHON.exists(), reason="RecBole's environment is made by make test-recbole"),
]
SESSIONS = [["p127", "p138"], ["p114"], ["p109", "p124", "p134", "p141", "p159", "p136", "p120", "p102", "p103"]]
TRAINED = {
    "features": ["model.temperature=0.5", "model.features=[price,tags,brand]"],
    "learned-temperature": ["model.learn_temperature=true", "model.pooling=sum", "model.num_layers=2"],
    "max": ["model.pooling=max", "model.features=[brand,tags]"],
    "items": ["model.fusion=item_only"],
}


def in_recbole(folder: Path, run: Path, where: Path, *data: object) -> dict:
    """What RecBole says of an exported run, beside this project's answers."""
    sessions, answers, output = where / "sessions.jsonl", where / "answers.jsonl", where / "recbole.json"
    sessions.write_text("".join(json.dumps({"session": each, "items": each}) + "\n" for each in SESSIONS))
    assert recommend.main([f"--run={run}", f"--input={sessions}", f"--output={answers}", f"-k={ITEMS}"]) == 0
    command = [PYTHON, Path(__file__).with_name("check_export.py"), folder, answers, output, *data]
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())
    print(f"{found['scores']} scores, largest difference {found['difference']:.2g}")
    assert found["trained_epochs"] == 1
    return found


def assert_metrics_are_ours(found: dict, run: Path) -> None:
    for split in ("valid", "test"):
        assert evaluate.main([f"--run={run}", f"--split={split}"]) == 0
        ours = json.loads((run / f"eval-{split}.json").read_text())[split]
        for name, value in found[split].items():
            assert round(value, 4) == pytest.approx(round(ours[name], 4), abs=1e-9), (split, name)


@pytest.mark.parametrize("name", TRAINED)
def test_scores_and_metrics_of_what_was_trained_here(name, recbole, tmp_path):
    run = train_run(recbole / "data", tmp_path / "run", *TRAINED[name])
    found = in_recbole(export_run(run, tmp_path / "out"), run, tmp_path)
    assert found["difference"] < 1e-6
    assert_metrics_are_ours(found, run)


@pytest.mark.parametrize("name", ["trained-items", "trained-features"])
def test_there_and_back_on_recboles_own_data_set(name, recbole, tmp_path):
    run = import_run(recbole, name, tmp_path / "run")
    folder = export_run(run, tmp_path / "out", f"--ids={run}/recbole-ids")
    found = in_recbole(folder, run, tmp_path, recbole, "shop")
    # Scores reach 6, where neighbouring float32 numbers are 5e-7 apart.
    assert found["difference"] < 6e-6
    expected = json.loads((recbole / "metrics.json").read_text())[name]
    for split in ("valid", "test"):
        for key, value in expected[split].items():
            assert found[split][key] == pytest.approx(value, abs=2e-6), (split, key)
