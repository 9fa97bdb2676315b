"""A data set that grows by a day, as a user has it: train, append, train on from there; the old run still works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.test_main_job import SIZES, program

pytestmark = pytest.mark.e2e
ITEMS = {1: 30, 2: 45}


def write_day(folder: Path, day: int) -> None:
    """Events in which each item is mostly followed by the next one; day 2 has more items."""
    generator = np.random.default_rng(day)
    lines = ["visit,product,at"]
    for visit in range(150):
        item = int(generator.integers(ITEMS[day]))
        for event in range(int(generator.integers(4, 15))):
            lines.append(f"{day}-{visit},p{item},{1000 * day + visit + event / 100}")
            item = (item + 1) % ITEMS[day] if generator.random() < 0.9 else int(generator.integers(ITEMS[day]))
    (folder / f"day-{day}.csv").write_text("\n".join(lines) + "\n")
    shelves = "\n".join(f"p{i},shelf{i % (2 + 2 * day)}" for i in range(ITEMS[day]))
    (folder / "products.csv").write_text(f"product,shelf\n{shelves}\n")


def run(*arguments: object, ranks: int | None = None) -> str:
    finished = program(*arguments, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def evaluated(folder: Path, ranks: int | None = None) -> dict:
    return json.loads(run("-m", "gru4recf_dist.evaluate", "--run-dir", folder, ranks=ranks).splitlines()[-1])


def recommended(folder: Path, tmp_path: Path, *items: str) -> list[str]:
    (tmp_path / "in.jsonl").write_text(json.dumps({"items": items}) + "\n")
    paths = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    run("-m", "gru4recf_dist.recommend", "--run-dir", folder, *paths, "-k", 5)
    return json.loads((tmp_path / "out.jsonl").read_text())["items"]


def test_train_append_and_train_on(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
name: shop
source: {tmp_path}
output: {tmp_path}/data
input: {{format: csv, files: [day-1.csv], session: visit, item: product, time: at}}
split: {{method: temporal}}
items: {{format: csv, file: products.csv, item: product}}
features: [{{name: shelf, kind: token}}]
"""
    )
    data, old, new = (tmp_path / name for name in ("data", "day-1-run", "day-2-run"))
    write_day(tmp_path, 1)
    run("-m", "data_prep", "--config", recipe)
    run("train.py", f"data={data}", f"run_dir={old}", *SIZES)
    before = evaluated(old)

    write_day(tmp_path, 2)
    refused = program("-m", "data_prep", "--append", "--config", recipe)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: source: day-1.csv: the data set holds these events already")
    assert "split: train" in run("-m", "data_prep", "--append", "--config", recipe, "input.files=[day-2.csv]")
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["items"] == ITEMS[2] and len(manifest["ancestors"]) == 1

    run("train.py", f"data={data}", f"run_dir={new}", f"init_from={old}", *SIZES, ranks=2)
    assert json.loads((new / "result.json").read_text())["test"]["hit@10"] > 0.7
    assert evaluated(new, ranks=2)["test"]["targets"] > before["test"]["targets"]
    assert "p42" in recommended(new, tmp_path, "p39", "p40", "p41")

    # The run of day 1 knows nothing of day 2, and is none the worse for it.
    assert evaluated(old, ranks=2) == before
    assert not {f"p{item}" for item in range(ITEMS[1], ITEMS[2])} & set(recommended(old, tmp_path, "p3", "p4", "p41"))
    result = json.loads((old / "result.json").read_text())
    run("train.py", f"data={data}", f"run_dir={old}", *SIZES)
    assert json.loads((old / "result.json").read_text())["test"] == result["test"]
