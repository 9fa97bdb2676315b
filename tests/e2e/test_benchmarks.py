"""The benchmarks run as their descriptions say: small, for their tables' shape only."""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_main_job import SIZES, program
from tests.support.synthetic import random_sessions, write_dataset

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["benchmarks", "--steps", "2"], ["shards to packed batches", "training step", "evaluation"]),
        (
            [
                "benchmarks.engines",
                "--ranks=1",
                "--rounds=1",
                "--steps=12",
                "--skip=2",
                "--only=ddp",
                "--only=ddp, bf16",
            ],
            ["ddp ", "ddp, bf16"],
        ),
        (
            ["benchmarks.waiting", "--steps=8", "--skip=2", "loader.shuffle_window=2"],
            ["share of waiting", "events/s"],
        ),
    ],
    ids=["overview", "engines", "waiting"],
)
def test_a_benchmark_prints_its_table(tmp_path, arguments, rows):
    data = tmp_path / "data"
    write_dataset(str(data), random_sessions(0, 80, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    (tmp_path / "recipe.yaml").write_text("{}\n")
    places = ["--config", tmp_path / "recipe.yaml", f"data={data}", f"run_dir={tmp_path / 'run'}"]
    done = program("-m", *arguments, *places, *SIZES)
    assert done.returncode == 0, done.stderr
    for row in rows:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)][:1]
        assert any(character.isdigit() for character in line)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (
            ["benchmarks.kernels", "--rounds=1", "--sessions=4", "--items=500", "--negatives=8"],
            [
                "product",
                "encoder, item path",
                "sampled softmax",
                "encoder (both paths) and loss",
                "evaluation's counting",
            ],
        ),
        (
            ["benchmarks.bias", "--items=50", "--events=20", "--draws=2", "--negatives", "8"],
            ["popularity ", "log_uniform, half in batch", "uniform ", "sum of q over the items, uniform"],
        ),
        (
            ["benchmarks.torchrec", "--alone", "--rows=100", "--dim=4", "--batch=32", "--rounds=1", "--steps=2"],
            ["this project  uniform", "this project     zipf"],
        ),
        (
            [
                *("benchmarks.catalog", "--items", "300", "2000", "--ranks=1", "--steps=3", "--skip=1", "--rounds=1"),
                *("--events=3000", "--dense=300", "--dense-steps=2", "loss.negatives=8"),
            ],
            ["sharded      1    300", "sharded      1  2,000", "dense        1    300"],
        ),
        (
            [
                *("benchmarks.overlap", "--delay-ms=0.5", "--rounds=1", "--steps=3", "--skip=1"),
                *("--items=300", "--events=3000", "loss.negatives=8", "loss.in_batch=4"),
            ],
            ["0.5 "],
        ),
        (
            [
                *("benchmarks.plan", "--ranks=1", "--cases", "few negatives", "--rounds=2", "--steps=2"),
                # Fewer batches an epoch than steps.
                *("--items=300", "--events=600", "loss.negatives=8", "batch_size=16"),
            ],
            ["few negatives      1"],
        ),
        (
            ["benchmarks.loading", "--events=3000", "--rounds=1", "--alone"],
            ["plain read()", "this project, 128 sessions a batch"],
        ),
        (["benchmarks.preparation", "--events=3000", "threads=1"], ["end to end", "processor time"]),
        (["benchmarks.full_sort", "--items=300", "--sessions", "30", "60", "--dim=4"], ["30 ", "60 "]),
    ],
    ids=["kernels", "bias", "torchrec", "catalog", "overlap", "plan", "loading", "preparation", "full_sort"],
)
def test_a_benchmark_without_a_data_set_prints_its_table(tmp_path, arguments, rows):
    output = ["--output", tmp_path / "out.json"] if "benchmarks.torchrec" in arguments else []
    done = program("-m", *arguments, *output)
    assert done.returncode == 0, done.stderr
    for row in rows:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)][:1]
        assert any(character.isdigit() for character in line)


def test_the_benchmark_beside_recbole_takes_what_recbole_did_before(tmp_path):
    """Forty users of sixty are taken; the measurements of the other side are made up."""
    source = tmp_path / "shop"
    source.mkdir()
    events = [f"{user}\t{(user + step) % 9}\t{step}" for user in range(60) for step in range(6)]
    (source / "shop.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *events]) + "\n")
    items = [f"{item}\ta{item % 3} a{item % 2}" for item in range(9)]
    (source / "shop.item").write_text("\n".join(["item_id:token\tattributes:token_seq", *items]) + "\n")
    (tmp_path / "recipe.yaml").write_text("batch_size: 8\n")
    before = tmp_path / "before.json"
    command = ["-m", "benchmarks.recbole", f"source={source}", "--users=40", "--epochs", "1", "2", "--max-length=8"]
    command += ["--embedding-size=8", "--hidden-size=8", "--batch-targets=32", "--topk-sessions=20", "--topk-batch=8"]
    command += ["--config", tmp_path / "recipe.yaml", "--output", tmp_path / "all.json", "--reuse", before]

    def recbole(targets: int) -> None:
        columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "attributes"]}
        sizes = {"embedding_size": 8, "hidden_size": 8, "num_layers": 1, "train_batch_size": 32}
        rest = {"dropout_prob": 0.3, "pooling_mode": "sum", "learning_rate": 0.001, "MAX_ITEM_LIST_LENGTH": 8}
        settings = {**sizes, **rest, "selected_features": ["attributes"], "load_col": columns}
        found = [{"train_seconds": 5.0, "clock": 6.0, "valid": {"ndcg@10": 0.3}, "test": {"ndcg@10": 0.25}}]
        # The second is worse on the validation split: within both times the first epoch counts.
        found += [{"train_seconds": 7.0, "clock": 14.0, "valid": {"ndcg@10": 0.2}, "test": {"ndcg@10": 0.4}}]
        times = {"evaluation_seconds": 4.0, "test_targets": 40, "topk_seconds": 0.2, "topk_sessions": 20}
        versions = {"recbole": "0"}
        made = {"settings": settings, "versions": versions, "train_targets": targets, "epochs": found, **times}
        before.write_text(json.dumps(made))

    recbole(targets=40 * 3)
    done = program(*command)
    assert done.returncode == 0, done.stderr
    (line,) = [line.split() for line in done.stdout.splitlines() if line.startswith("RecBole 0")]
    assert line == ["RecBole", "0", "6.00", "1.0", "0.2500", "0.2500", "1", "100.000", "10.000"]
    sides = json.loads((tmp_path / "all.json").read_text())["sides"]
    assert len(sides) == 4
    for side in list(sides.values())[1:]:
        assert side["test_targets"] == 40
        assert side["epochs"][-1]["clock"] > 0
        assert side["settings"]["model"]["hidden_size"] == 8

    recbole(targets=40 * 3 - 1)
    refused = program(*command)
    assert refused.returncode == 2
    assert "train_targets" in refused.stderr and str(before) in refused.stderr
