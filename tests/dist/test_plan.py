"""The planner against the counters of real runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gru4recf_dist import steps_ahead
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.parallel.gathering import gather_shares
from gru4recf_dist.planning import popularity
from gru4recf_dist.planning.wire import sent_bytes
from gru4recf_dist.planning.workload import ItemFeature, StepCounts, Workload, expected_counts
from gru4recf_dist.recommender import feature_specs
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.negatives import read_popularity
from gru4recf_dist.table.partition import RowPartition
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train

pytestmark = pytest.mark.dist

ITEMS, BATCH, STEPS = 3000, 512, 4
SETTINGS = (f"batch_size={BATCH}", f"max_steps={STEPS}", "loader.max_length=50", "loss.negatives=2048")
LOSSES = {
    "sampled": ("loss.name=sampled_softmax", "table.clip=1.0"),
    "full": ("loss.name=full_softmax", "loss.block_rows=512"),
    "micro-batches": ("accumulation=2",),
    "in-batch": ("loss.in_batch=64",),
    "ranking": ("loss.name=bpr_max", "loss.in_batch=all"),
    "batch alone": ("loss.name=top1", "loss.negatives=0", "loss.in_batch=all"),
    "two tables": ("model.fusion=parallel", "model.output_table=tied", "model.output_bias=true", "table.clip=1.0"),
    "other outputs": ("model.fusion=shared_w", "model.hidden_size=12"),
    "outputs only": ("model.fusion=feature_only", "loss.name=full_softmax", "loss.block_rows=512"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four whole batches of sessions, of independent draws; ids in a random order, as preparation gives them."""
    folder = tmp_path_factory.mktemp("data")
    order = np.random.default_rng(9).permutation(ITEMS) + 1
    sessions = [order[session - 1].astype(np.int32) for session in random_sessions(0, BATCH * STEPS, ITEMS)]
    write_dataset(str(folder), sessions, items=ITEMS)
    return folder


def _train_and_count(ranks, config) -> tuple[list[list[int]], list[np.ndarray]]:
    """Train; of each of this rank's micro-batches events, distinct ids and target ids, and the negatives."""
    routed, route = [], steps_ahead.route
    negatives, gather = [], ShardedItemTable.gather

    def recorded(partition, *ids):
        routing = route(partition, *ids)
        routed.append((len(ids[0]), len(routing.ids)))
        return routing

    def gathered(table, ids):
        negatives.append(ids)
        return gather(table, ids)

    steps_ahead.route, ShardedItemTable.gather = recorded, gathered
    train(ranks, config)
    # What was prepared beyond the last step does not count. Targets with rows of their own are routed too, last.
    exchanges = 2 if config.model.fusion in ("parallel", "shared_w", "feature_only") else 1
    batches = [routed[start : start + exchanges] for start in range(0, len(routed), exchanges)]
    seen = [[*batch[0], batch[1][1] if exchanges == 2 else 0] for batch in batches]
    return seen[: STEPS * config.accumulation], negatives


def _workload(config, world: int) -> Workload:
    manifest = read_manifest(config.data)
    train_split = manifest.splits["train"]
    features = [
        ItemFeature(spec, manifest.feature(spec.name).longest) for spec in feature_specs(config.model, manifest)
    ]
    counts = read_popularity(config.data, manifest)
    events = train_split.events / train_split.sessions
    return Workload(config, ITEMS, world, events, tuple(features), popularity.of_counts(counts[1:]))


def _measured(workload: Workload, seen: np.ndarray, negatives: list[np.ndarray]) -> StepCounts:
    """``seen``: [W, micro-batches, 3], events, ids, target ids; ``negatives``: ids of each micro-batch."""
    shares, moved, distinct = [], [], []
    for ids in negatives:
        counts, moves = gather_shares(RowPartition(ITEMS + 1, workload.world).split(ids).tolist())
        distinct.append(len(ids))
        shares.append(max(counts))
        moved.append(0 if moves is None else (moves.sum() - np.trace(moves)) / workload.world)
    return StepCounts(
        events=seen[:, :, 0].mean(),
        events_largest=seen[:, :, 0].max(axis=0).mean(),
        ids=seen[:, :, 1].mean(),
        target_ids=seen[:, :, 2].mean(),
        negatives=np.mean(distinct or [0]),
        negatives_share=np.mean(shares or [0]),
        negatives_moved=np.mean(moved or [0]),
        # It decides a time, and no bytes.
        longest=0.0,
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_bytes_on_the_wire_are_those_of_a_run(tmp_path, data, world, loss):
    config = small_config(data, tmp_path / "run", *SETTINGS, *LOSSES[loss])
    results = run_ranks(world, _train_and_count, tmp_path, config)
    seen = np.array([events_and_ids for events_and_ids, _ in results])
    assert seen.shape[:2] == (world, STEPS * config.accumulation)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/lr" in line]
    assert len(steps) == STEPS
    names = {name for name in steps[0] if name.startswith("perf/wire/") and name.endswith("_bytes")}
    found = {
        name[len("perf/wire/") : -len("_bytes")]: np.mean([line[name] for line in steps]) / world for name in names
    }

    workload = _workload(config, world)
    measured = _measured(workload, seen, results[0][1])
    # Given the counts of the run, every collective's bytes within 1 %.
    assert sent_bytes(workload, measured) == pytest.approx(found, rel=0.01)
    assert sum(found.values()) == pytest.approx(np.mean([line["perf/wire/bytes"] for line in steps]) / world)
    # The counts themselves, expected by the items' popularity: within 2 %; of the largest rank within 5 %.
    expected = expected_counts(workload)
    for name in ("events", "ids", "target_ids", "negatives"):
        assert getattr(expected, name) == pytest.approx(getattr(measured, name), rel=0.02), name
    for name in ("events_largest", "negatives_share"):
        assert getattr(expected, name) == pytest.approx(getattr(measured, name), rel=0.05), name
    assert sent_bytes(workload, expected) == pytest.approx(found, rel=0.05)
