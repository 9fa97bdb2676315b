"""The distributed evaluator against a plain float64 sort of the whole table, ties included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gru4recf_dist import recommender
from gru4recf_dist.config import Config, ModelConfig, TableConfig
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.evaluation import ranking
from gru4recf_dist.evaluation.evaluator import Evaluator
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.gru4recf import ITEM_SEQ, ITEM_SEQ_LEN, GRU4RecF
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.table.candidates import CandidatePart, Candidates
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.negatives import read_popularity
from gru4recf_dist.table.partition import route
from gru4recf_dist.table.table_group import TableGroup
from tests.support.exact_ranks import ITEMS, D, make_queries, make_rows, reference_rank, reference_scores
from tests.support.ranks import run_ranks
from tests.support.synthetic import write_dataset

pytestmark = pytest.mark.dist
TILES = [1, 7, 64, 10000]

UNTRAINED = [17, 40, 60]


class FixedModel:
    """Stands for a trained model: the query after an event depends on its item only, so that the truth is plain."""

    event_features = ()

    def __init__(self, ranks, broken: str = "", score: str = "dot") -> None:
        rows, self.queries = make_rows(), torch.from_numpy(make_queries(ITEMS + 1, 9))
        self.table = ShardedItemTable(ITEMS + 1, D, ranks, TableConfig(optimizer="sgd"), seed=0)
        self.table.weight = torch.from_numpy(rows[self.table.own.start : self.table.own.stop])
        if broken == "queries":
            self.queries[:] = torch.nan
        elif broken == "every row":
            self.table.weight[:] = torch.nan
        elif broken == "one row":
            self.table.weight[2 - self.table.own.start] = torch.nan

        self.tables, self.candidates = TableGroup({"table": self.table}), Candidates([CandidatePart(self.table, score)])

    def encode(self, items: torch.Tensor, batch_sizes: torch.Tensor, events: dict) -> torch.Tensor:
        assert not events and int(batch_sizes.sum()) == len(items)
        return self.queries[items]


def _sessions(seed: int, count: int) -> list[np.ndarray]:
    """Sessions with repeats, untrained items, lengths beyond the model's window and without any target."""
    generator = np.random.default_rng(seed)
    sessions = [generator.integers(1, ITEMS + 1, generator.integers(2, 14)).astype(np.int32) for _ in range(count)]
    sessions[1] = np.array([5, 10, 5, 10, 11, 40, 10], np.int32)
    sessions[2] = np.array([21], np.int32)
    if count > 12:
        # A whole batch of sessions without any target.
        sessions[8:12] = [np.array([item], np.int32) for item in (1, 2, 3, 4)]
    return sessions


def _write(folder, protocol: str) -> str:
    """30 test sessions make 8 batches; 3 valid ones make one batch, so that most ranks have none."""
    trained = [item for item in range(1, ITEMS + 1) if item not in UNTRAINED]
    train = [np.array(trained[i : i + 5], np.int32) for i in range(0, len(trained), 5)]
    test, valid = _sessions(1, 30), _sessions(2, 3)
    data = str(folder / protocol)
    write_dataset(data, train, valid, test, items=ITEMS, protocol=protocol, shard_sessions=7, block_sessions=3)
    return data


def _config(data: str, **settings) -> Config:
    evaluation = {"batch_sessions": 4, "ks": [1, 5, 20], **settings.pop("evaluation", {})}
    loader = {"max_length": 8, "context": 2}
    return Config(
        data=data, run_dir="-", evaluation=evaluation, loader=loader, early_stopping={"metric": "hit@5"}, **settings
    )


PROTOCOLS = ("every_position", "leave_one_out")
VARIANTS = [
    *(
        (protocol, score, ties, 7)
        for protocol in PROTOCOLS
        for score in ("dot", "cosine")
        for ties in ("against", "for")
    ),
    *(("every_position", "dot", "against", tile_rows) for tile_rows in TILES if tile_rows != 7),
    *(("leave_one_out", "cosine", "for", tile_rows) for tile_rows in TILES if tile_rows != 7),
]


def _evaluate_fixed(ranks, data: str) -> dict[tuple, dict]:
    manifest = read_manifest(data)
    results = {}
    for protocol, score, ties, tile_rows in VARIANTS:
        model = FixedModel(ranks, score=score)
        evaluation = {"protocol": protocol, "ties": ties, "tile_rows": tile_rows}
        config = _config(data, model={"score": score}, evaluation=evaluation)
        evaluator = Evaluator(config, manifest, read_popularity(data, manifest), ranks)
        results[protocol, score, ties, tile_rows] = {
            split: metrics for name in ("test", "valid") for split, metrics in evaluator.evaluate(model, name).items()
        }
    return results


def _evaluate_real(ranks, data: str) -> tuple[dict, dict | None]:
    """Metrics of a freshly built model by protocol, and at one rank its weights."""
    # In several goes, of several rounds each.
    ranking.QUERIES = 9
    manifest = read_manifest(data)
    config = _config(data, seed=4, model={"embedding_size": D, "hidden_size": 10}, evaluation={"tile_rows": 7})
    model = recommender.build(config, manifest, ranks)
    model.table.weight.mul_(3.0)
    metrics = {}
    for protocol in PROTOCOLS:
        config.evaluation.protocol = protocol
        evaluator = Evaluator(config, manifest, read_popularity(data, manifest), ranks)
        metrics[protocol] = {**evaluator.evaluate(model, "test"), **evaluator.evaluate(model, "valid")}
    if ranks.world > 1:
        return metrics, None
    everything = torch.arange(ITEMS + 1)
    features = model.features.lookup(model.table.exchange(route(model.table.partition, everything)))
    return metrics, {"encoder": model.encoder.state_dict(), "rows": model.table.weight, "features": features}


def _evaluate_both(ranks, data: str) -> tuple:
    return _evaluate_fixed(ranks, data), _evaluate_real(ranks, data)


def _average(ranks: list[int | None], ks: list[int]) -> dict[str, float]:
    """Metrics of ranks, None for a miss."""
    result = {}
    for k in ks:
        near = [rank for rank in ranks if rank is not None and rank <= k]
        result[f"hit@{k}"] = result[f"recall@{k}"] = len(near) / len(ranks)
        result[f"ndcg@{k}"] = sum(1 / math.log2(rank + 1) for rank in near) / len(ranks)
        result[f"mrr@{k}"] = sum(1 / rank for rank in near) / len(ranks)
    return result


def _expected(sessions: list[np.ndarray], protocol: str, ties: str, scores_after) -> list[dict[str, float]]:
    """Metrics with all items as candidates, and without those of the history, session by session.

    Args:
        scores_after: (session, end) -> scores [N+1] after its first ``end`` events.
    """
    ranks, unseen_ranks, untrained = [], [], 0
    for session in ([int(item) for item in session] for session in sessions):
        for end in range(1, len(session)):
            if protocol == "leave_one_out" and end != len(session) - 1:
                continue
            target, history, scores = session[end], set(session[:end]), scores_after(session, end)
            untrained += target in UNTRAINED
            miss = target in UNTRAINED
            ranks.append(None if miss else reference_rank(scores, target, ties, set()))
            unseen_ranks.append(None if miss or target in history else reference_rank(scores, target, ties, history))
    common = {"sessions_lost": 0, "targets": len(ranks), "untrained_target_share": untrained / len(ranks)}
    return [{**_average(found, [1, 5, 20]), **common} for found in (ranks, unseen_ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[tuple]]:
    """What every rank returned, by number of ranks."""
    folder = tmp_path_factory.mktemp("ranking")
    data = _write(folder, "every_position")
    return {world: run_ranks(world, _evaluate_both, folder, data) for world in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def fixed(results) -> dict[tuple, dict]:
    return results[1][0][0]


def test_every_number_of_ranks_and_tile_size_gives_the_same_metrics_to_the_last_digit(results, fixed):
    for ranks in results.values():
        for result, _ in ranks:
            assert result == fixed
    for (protocol, score, ties, _), result in fixed.items():
        assert result == fixed[protocol, score, ties, 7]


def test_evaluation_equals_a_plain_sort_of_the_whole_table(fixed):
    rows, queries = make_rows(), make_queries(ITEMS + 1, 9)
    for (protocol, score, ties, _), result in fixed.items():
        scores = reference_scores(queries, rows, score)
        for split, sessions in (("test", _sessions(1, 30)), ("valid", _sessions(2, 3))):
            expected = _expected(sessions, protocol, ties, lambda session, end, s=scores: s[session[end - 1]])
            assert result[split] == pytest.approx(expected[0], rel=1e-13)
            assert result[f"{split}_excluding_seen"] == pytest.approx(expected[1], rel=1e-13)


def test_every_target_is_counted_once_and_misses_stay_in_the_denominator(fixed):
    sessions = _sessions(1, 30)
    every, last = sum(len(s) - 1 for s in sessions), sum(len(s) > 1 for s in sessions)
    assert any(int(s[-1]) in UNTRAINED for s in sessions), "the test needs an untrained target"
    for (protocol, *_), result in fixed.items():
        for name in ("test", "test_excluding_seen"):
            assert result[name]["targets"] == (every if protocol == "every_position" else last)
            assert result[name]["untrained_target_share"] > 0


def test_the_two_metric_sets_and_the_tie_policies_do_differ(fixed):
    for protocol in PROTOCOLS:
        against, lenient = (fixed[protocol, "dot", ties, 7] for ties in ("against", "for"))
        assert against["test"]["mrr@20"] < lenient["test"]["mrr@20"]
        assert against["test"]["mrr@20"] != against["test_excluding_seen"]["mrr@20"]


# -- with the real encoder --------------------------------------------------------------------------------------------


def test_a_real_model_gives_the_same_metrics_to_the_last_digit_at_every_number_of_ranks(results):
    alone = results[1][0][1][0]
    for ranks in results.values():
        for _, (metrics, _) in ranks:
            assert metrics == alone


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_real_model_gives_the_metrics_of_the_plain_module(results, protocol):
    metrics, state = results[1][0][1]
    settings = ModelConfig(embedding_size=D, hidden_size=10)
    features = state["features"]
    specs = [
        FeatureSpec("category", "token", 6),
        FeatureSpec("tags", "token_seq", 9),
        FeatureSpec("price", "float", 1),
        FeatureSpec("image", "vector", 3),
    ]
    plain = GRU4RecF(settings, ITEMS + 1, specs, features)
    plain.load_state_dict({**state["encoder"], "item_embedding.weight": state["rows"]})
    plain.double().eval()

    def scores_after(session: list[int], end: int) -> np.ndarray:
        # The RNN sees 8 events at most: the last ones, or with every position those of windows that overlap by 2.
        start = max(0, end - 8)
        if protocol == "every_position":
            start = 6 * -(-start // 6)
        one = {ITEM_SEQ: torch.tensor([session[start:end]]), ITEM_SEQ_LEN: torch.tensor([end - start])}
        with torch.no_grad():
            return plain.full_sort_predict(one)[0].numpy()

    for split, sessions in (("test", _sessions(1, 30)), ("valid", _sessions(2, 3))):
        expected = _expected(sessions, protocol, "against", scores_after)
        assert metrics[protocol][split] == pytest.approx(expected[0], rel=1e-13)
        assert metrics[protocol][f"{split}_excluding_seen"] == pytest.approx(expected[1], rel=1e-13)


# -- a model that has diverged ----------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    yield process_ranks.start("cpu", timeout_seconds=20)
    process_ranks.stop()


@pytest.mark.parametrize("broken", ["queries", "every row", "one row"])
def test_a_model_of_nan_is_never_the_best(tmp_path, alone, broken):
    """NaN compares false with everything: counted naively, nothing stands above any target."""
    data = _write(tmp_path, "every_position")
    manifest = read_manifest(data)
    evaluator = Evaluator(_config(data), manifest, read_popularity(data, manifest), alone)
    sound = evaluator.evaluate(FixedModel(alone), "test")
    try:
        metrics = evaluator.evaluate(FixedModel(alone, broken), "test")
    except UserError:
        return
    for name, part in metrics.items():
        for key in ("hit@1", "hit@5", "mrr@20", "ndcg@20"):
            assert part[key] <= sound[name][key], (name, key)
