"""The planner against the counters of real runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gru4recf_dist import training_step
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.parallel import collectives
from gru4recf_dist.planning import popularity
from gru4recf_dist.planning.wire import sent_bytes
from gru4recf_dist.planning.workload import ItemFeature, StepCounts, Workload, expected_counts
from gru4recf_dist.recommender import feature_specs
from gru4recf_dist.table.negatives import NegativeSampler, read_popularity
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
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four whole batches of sessions, of independent draws; ids in a random order, as preparation gives them."""
    folder = tmp_path_factory.mktemp("data")
    order = np.random.default_rng(9).permutation(ITEMS) + 1
    sessions = [order[session - 1].astype(np.int32) for session in random_sessions(0, BATCH * STEPS, ITEMS)]
    write_dataset(str(folder), sessions, items=ITEMS)
    return folder


def _train_and_count(ranks, config) -> list[tuple[int, int]]:
    """Train; events and distinct ids of each of this rank's micro-batches."""
    seen, route = [], training_step.route

    def recorded(partition, items, targets):
        routing = route(partition, items, targets)
        seen.append((len(items), len(routing.ids)))
        return routing

    training_step.route = recorded
    train(ranks, config)
    return seen


def _workload(config, world: int) -> Workload:
    manifest = read_manifest(config.data)
    train_split = manifest.splits["train"]
    features = [ItemFeature(spec, manifest.feature(spec.name).longest) for spec in feature_specs(config.model, manifest)]
    counts = read_popularity(config.data, manifest)
    events = train_split.events / train_split.sessions
    return Workload(config, ITEMS, world, events, tuple(features), popularity.of_counts(counts[1:]))


def _measured(workload: Workload, seen: np.ndarray) -> StepCounts:
    """``seen``: [W, micro-batches, 2], events and ids. The negatives are drawn here once more."""
    config, shares, moved, distinct = workload.config, [], [], []
    sampler = NegativeSampler(read_popularity(config.data, read_manifest(config.data)), config.loss, config.seed)
    for step in range(1, STEPS + 1):
        ids = sampler.draw(step).ids
        counts, moves = collectives.gather_shares(RowPartition(ITEMS + 1, workload.world).split(ids).tolist())
        distinct.append(len(ids))
        shares.append(max(counts))
        moved.append(0 if moves is None else (moves.sum() - np.trace(moves)) / workload.world)
    return StepCounts(
        events=seen[:, :, 0].mean(),
        events_largest=seen[:, :, 0].max(axis=0).mean(),
        ids=seen[:, :, 1].mean(),
        negatives=np.mean(distinct),
        negatives_share=np.mean(shares),
        negatives_moved=np.mean(moved),
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_bytes_on_the_wire_are_those_of_a_run(tmp_path, data, world, loss):
    config = small_config(data, tmp_path / "run", *SETTINGS, *LOSSES[loss])
    seen = np.array(run_ranks(world, _train_and_count, tmp_path, config))
    assert seen.shape[:2] == (world, STEPS * config.accumulation)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/lr" in line]
    assert len(steps) == STEPS
    names = {name for name in steps[0] if name.startswith("wire/") and name.endswith("_bytes")}
    found = {name[5:-6]: np.mean([line[name] for line in steps]) / world for name in names}

    workload = _workload(config, world)
    measured = _measured(workload, seen)
    # Given the counts of the run, every collective's bytes within 1 %.
    assert sent_bytes(workload, measured) == pytest.approx(found, rel=0.01)
    assert sum(found.values()) == pytest.approx(np.mean([line["wire/bytes"] for line in steps]) / world)
    # The counts themselves, expected by the items' popularity: within 2 %; of the largest rank within 5 %.
    expected = expected_counts(workload)
    sampled = workload.samples
    for name in ("events", "ids", *(["negatives"] if sampled else [])):
        assert getattr(expected, name) == pytest.approx(getattr(measured, name), rel=0.02), name
    for name in ("events_largest", *(["negatives_share"] if sampled else [])):
        assert getattr(expected, name) == pytest.approx(getattr(measured, name), rel=0.05), name
    assert sent_bytes(workload, expected) == pytest.approx(found, rel=0.05)
