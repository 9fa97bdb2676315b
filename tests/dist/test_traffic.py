"""What the collectives count as sent, against what each rank must hand to others by definition."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from data_prep.__main__ import main as prepare
from gru4recf_dist.parallel import collectives, traffic
from gru4recf_dist.parallel.gathering import Gathering
from tests.support.ranks import run_ranks
from tests.support.training import small_config, train

pytestmark = pytest.mark.dist


def _sent(action) -> dict[str, float]:
    before = traffic.TOTAL.copy()
    action()
    sent = (traffic.TOTAL - before).sent
    return {purpose: size for purpose, size in zip(traffic.PURPOSES, sent, strict=True) if size}


def _exercise(ranks, splits: list[list[int]], counts: list[int]) -> dict[str, dict[str, float]]:
    send, receive = splits[ranks.rank], [row[ranks.rank] for row in splits]
    rows = torch.ones(sum(send), 3, dtype=torch.float64, requires_grad=True)
    own = torch.ones(counts[ranks.rank], 5, requires_grad=True)
    group = ranks.table
    return {
        "rows": _sent(
            lambda: collectives.differentiable_all_to_all(rows, receive, send, group, "rows").sum().backward()
        ),
        "gather": _sent(lambda: Gathering(own, counts, group, "queries").rows().sum().backward()),
        "balanced": _sent(lambda: Gathering(own, counts, group, "negatives", balanced=True).rows().sum().backward()),
        "counts": _sent(lambda: collectives.exchange_counts(np.array(send), ranks.host)),
        "sum": _sent(lambda: collectives.sum_over_ranks(torch.ones(7), group, "loss")),
    }


def test_what_each_rank_sends_is_counted(tmp_path):
    splits = [[9, 2, 1, 0], [3, 8, 0, 0], [0, 0, 7, 0], [1, 1, 4, 6]]
    counts = [30, 10, 10, 10]
    for rank, seen in enumerate(run_ranks(4, _exercise, tmp_path, splits, counts)):
        others = [other for other in range(4) if other != rank]
        away = sum(splits[rank][other] for other in others)
        back = sum(splits[other][rank] for other in others)
        # Rows of 3 float64; a rank that sends nothing does not show.
        assert seen["rows"].get("rows", 0) == away * 24 and seen["rows"].get("row_gradients", 0) == back * 24
        # Rows of 5 float32, padded to the longest share, to each of 3 others; each of theirs gets its gradient back.
        gradients = (sum(counts) - counts[rank]) * 20
        assert seen["gather"] == {"queries": 3 * 30 * 20, "query_gradients": gradients}
        # Rank 0 hands 15 of its 30 rows on: 5 fill rank 1 up to 15, in the order of ranks what follows moves too.
        moved = {0: 15, 1: 10, 2: 5, 3: 0}[rank]
        returned = {0: 0, 1: 15, 2: 10, 3: 5}[rank]
        assert seen["balanced"] == {
            "negatives": (3 * 15 + moved) * 20,
            "negative_gradients": (3 * 15 + returned) * 20,
        }
        assert seen["counts"] == {"counts": 3 * 8}
        assert seen["sum"] == {"loss": 2 * 3 / 4 * 28}


def test_ranks_are_evenly_loaded_by_a_zipf_catalog(tmp_path):
    """Prepared from raw events as a user does it: ids in the order of md5, so the popular items lie anywhere."""
    generator = np.random.default_rng(0)
    mass = 1.0 / np.arange(1, 20_001)
    with open(tmp_path / "events.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["session_id", "item_id", "timestamp"])
        items = generator.choice(len(mass), (4000, 8), p=mass / mass.sum())
        for session, row in enumerate(items):
            lines.writerows([session, f"item-{item}", 8 * session + place] for place, item in enumerate(row))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: zipf\nsource: {tmp_path}/events.csv\noutput: {tmp_path}/data\ninput: {{format: csv}}\n")
    assert prepare(["--config", str(recipe), "streams=8"]) == 0
    settings = ["batch_size=2048", "max_steps=2", "loss.negatives=1024", "loss.block_rows=256"]
    config = small_config(tmp_path / "data", tmp_path / "run", "model.fusion=item_only", *settings)
    run_ranks(4, train, tmp_path, config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/lr" in line]
    assert len(steps) == 2
    for line in steps:
        # Distinct ids that a rank asks other ranks for, by 512 sessions of 6 events.
        assert line["perf/wire/ids_bytes"] / 8 / 4 > 900
        assert 1.0 <= line["table/lookup_imbalance"] <= 1.1
        assert 1.0 <= line["perf/wire/imbalance"] <= 1.1
