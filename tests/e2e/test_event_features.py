"""Raw events whose type says what comes next: who sees the type can predict it, who does not cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.e2e.test_main_job import program

pytestmark = pytest.mark.e2e
ITEMS = 24
# What is added to an item's number for the next event's, by type.
STEPS = {"view": 1, "cart": 7, "buy": 13}
SIZES = [
    *("batch_size=16", "max_epochs=12", "model.embedding_size=16", "model.hidden_size=32", "model.dropout=0"),
    *("loss.name=full_softmax", "table.lr=0.02", "optimizer.lr=0.02", "loader.max_length=20"),
    *("evaluation.ks=[1]", "early_stopping.metric=hit@1", "evaluation.baselines=false", "monitoring.progress=false"),
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Raw events, a recipe and the prepared data set."""
    folder = tmp_path_factory.mktemp("shop")
    generator = np.random.default_rng(0)
    lines = ["session,item,time,event,price"]
    for session in range(240):
        item, time = int(generator.integers(ITEMS)), 0
        for _ in range(int(generator.integers(6, 14))):
            kind = str(generator.choice(list(STEPS)))
            price = "" if generator.random() < 0.2 else round(float(generator.random()), 2)
            lines.append(f"s{session},p{item},{time},{kind},{price}")
            item, time = (item + STEPS[kind]) % ITEMS, time + int(generator.integers(1, 900))
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    recipe = {
        "name": "shop",
        "source": str(folder),
        "output": f"{folder}/data",
        "input": {"format": "csv", "files": ["events.csv"], "session": "session", "item": "item", "time": "time"},
        "split": {"method": "leave_one_out"},
        "event_features": [
            {"name": "type", "kind": "token", "column": "event"},
            {"name": "price", "kind": "float", "standardize": True},
            {"name": "gap", "kind": "time_gap", "buckets": 8},
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    finished = program("-m", "data_prep", "--config", folder / "recipe.yaml")
    assert finished.returncode == 0, finished.stderr
    assert "event feature" in finished.stdout
    return folder


def trained(shop: Path, name: str, *options: str, ranks: int | None = None) -> dict:
    arguments = (f"data={shop}/data", f"run_dir={shop}/{name}", *SIZES, "model.fusion=item_only", *options)
    finished = program("train.py", *arguments, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    return json.loads((shop / name / "result.json").read_text())


def test_training_with_the_type_beats_training_without_by_far(shop, tmp_path):
    blind = trained(shop, "blind", "model.event_features=[]")
    seeing = trained(shop, "seeing", ranks=2)
    # Three items may follow; which one the type of the last event says.
    assert blind["test"]["hit@1"] < 0.5
    assert seeing["test"]["hit@1"] > 0.9

    sessions = [
        {"items": ["p3", f"p{(3 + STEPS['view']) % ITEMS}"], "events": {"type": ["view", kind]}, "times": [0, 60]}
        for kind in STEPS
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*sessions, {"items": ["p3"]}]))
    arguments = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "-k", 1)
    finished = program("-m", "gru4recf_dist.recommend", "--run", shop / "seeing", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert "0 unknown values of events" in finished.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["items"] for line in lines[:3]] == [[f"p{(4 + step) % ITEMS}"] for step in STEPS.values()]
    assert lines[0]["events"] == sessions[0]["events"] and len(lines[3]["items"]) == 1


def test_check_and_plan_know_event_features(shop):
    arguments = (f"data={shop}/data", f"run_dir={shop}/none", "model.fusion=item_only", "batch_size=16")
    assert program("train.py", "--check", *arguments).returncode == 0
    (shop / "data/items/features/type.vocabulary.parquet").rename(shop / "vocabulary")
    try:
        finished = program("train.py", "--check", *arguments)
    finally:
        (shop / "vocabulary").rename(shop / "data/items/features/type.vocabulary.parquet")
    assert finished.returncode == 2 and "type.vocabulary.parquet" in finished.stderr
    plan = ("-m", "gru4recf_dist.plan", "--data", f"{shop}/data", "--json", "model.fusion=item_only", "batch_size=16")
    found = [
        json.loads(program(*plan, more).stdout) for more in ("model.event_features=all", "model.event_features=[]")
    ]
    key = "encoder, gradients, moments"
    assert found[0]["device_bytes"][key] > found[1]["device_bytes"][key]
