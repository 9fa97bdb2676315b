"""Popularity and the Markov chain against dictionaries of counts and explicit scores of all items."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from gru4recf_dist.evaluation.baselines import MarkovChain, evaluate_baselines
from gru4recf_dist.table.negatives import read_popularity
from tests.support.synthetic import random_sessions, write_dataset

ITEMS, KS = 25, [1, 5, 20]


def _brute_force(train, sessions, protocol: str, score_of) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics over all items and over those that the session has not seen, averaged over the orders of each tie."""
    counts = Counter(int(item) for session in train for item in session)
    totals = [Counter(), Counter()]
    targets = 0
    for session in ([int(item) for item in session] for session in sessions):
        ends = range(1, len(session)) if protocol == "every_position" else [len(session) - 1]
        for end in ends:
            if end < 1:
                continue
            targets += 1
            history, target = session[:end], session[end]
            for total, excluded in zip(totals, (set(), set(history)), strict=True):
                if counts[target] == 0 or target in excluded:
                    continue
                candidates = [item for item in range(1, ITEMS + 1) if item not in excluded]
                scores = {item: score_of(history[-1], item) for item in candidates}
                above = sum(scores[item] > scores[target] for item in candidates)
                tied = sum(scores[item] == scores[target] for item in candidates)
                for rank in range(above + 1, above + tied + 1):
                    for k in KS:
                        if rank <= k:
                            total[f"hit@{k}"] += 1 / tied
                            total[f"recall@{k}"] += 1 / tied
                            total[f"ndcg@{k}"] += 1 / math.log2(rank + 1) / tied
                            total[f"mrr@{k}"] += 1 / rank / tied
    names = [f"{name}@{k}" for name in ("hit", "recall", "ndcg", "mrr") for k in KS]
    return tuple({name: total[name] / targets if targets else 0.0 for name in names} for total in totals)


def _scorers(train):
    counts = Counter(int(item) for session in train for item in session)
    transitions = Counter((int(a), int(b)) for session in train for a, b in pairwise(session))
    return {
        "popularity": lambda last, item: counts[item],
        "markov": lambda last, item: transitions[last, item],
    }


def _check(data: str, train, test, protocol: str, split: str = "test", **layout) -> dict:
    manifest = write_dataset(
        data, train, valid=test[:3], test=test, items=ITEMS, protocol=protocol, features=False, **layout
    )
    ours = evaluate_baselines(data, manifest, read_popularity(data, manifest), split, protocol, KS)
    sessions = test if split == "test" else test[:3]
    expected = {}
    for name, score_of in _scorers(train).items():
        expected[name], expected[f"{name}_excluding_seen"] = _brute_force(train, sessions, protocol, score_of)
    assert ours.keys() == expected.keys()
    for name in expected:
        assert ours[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-14), name
    for batch_sessions in (1, 3):
        # Equal to the last digit: what is summed are integers.
        popularity = read_popularity(data, manifest)
        again = evaluate_baselines(data, manifest, popularity, split, protocol, KS, batch_sessions=batch_sessions)
        assert again == ours
    return ours


def _sessions(seed: int, count: int, longest: int = 9) -> list[np.ndarray]:
    return random_sessions(seed, count, ITEMS - 5, longest=longest)


@pytest.mark.parametrize("protocol", ["every_position", "leave_one_out"])
@pytest.mark.parametrize("seed", [0, 1])
def test_baselines_equal_brute_force(tmp_path, protocol, seed):
    test = _sessions(seed + 10, 40)
    # Untrained targets, an untrained last item, repeated targets, a session without any target.
    test += [np.array(s, np.int32) for s in ([3, 24], [24, 1, 2, 1, 1], [25, 25], [7], [23, 24, 25, 1])]
    ours = _check(str(tmp_path), _sessions(seed, 60), test, protocol)
    assert ours["markov"]["hit@20"] > 0 and ours["markov"] != ours["markov_excluding_seen"]


@pytest.mark.parametrize("protocol", ["every_position", "leave_one_out"])
def test_baselines_equal_brute_force_where_nearly_everything_is_tied(tmp_path, protocol):
    train = [np.array([i, i + 1], np.int32) for i in range(1, 20, 2)]
    _check(str(tmp_path), train, _sessions(3, 20, longest=6), protocol)


def test_baselines_see_the_whole_history_of_long_sessions(tmp_path):
    _check(str(tmp_path), _sessions(0, 60), _sessions(4, 4, longest=120), "every_position")


def test_the_other_split_and_another_layout_of_the_shards(tmp_path):
    layout = {"streams": 4, "shard_sessions": 3, "block_sessions": 2}
    _check(str(tmp_path), _sessions(0, 30), _sessions(5, 10), "every_position", split="valid", **layout)


def test_transitions_do_not_run_from_one_session_into_the_next(tmp_path):
    train = [np.array([1, 2], np.int32), np.array([3, 4], np.int32)] * 8
    ours = _check(str(tmp_path), train, [np.array([2, 3], np.int32)], "every_position", streams=1)
    # After 2 nothing ever came: all 25 items are tied.
    assert ours["markov"]["hit@1"] == pytest.approx(1 / 25)


def test_training_sessions_of_one_event_have_no_transition(tmp_path):
    _check(str(tmp_path), [np.array([i % 7 + 1], np.int32) for i in range(20)], _sessions(2, 5), "every_position")


def test_sessions_without_any_target_give_zero(tmp_path):
    ours = _check(str(tmp_path), _sessions(0, 30), [np.array([i], np.int32) for i in (1, 2, 3)], "every_position")
    assert set(ours["popularity"].values()) == {0.0}


def test_only_transitions_that_the_split_asks_for_are_kept(tmp_path, monkeypatch):
    kept, train = [], _sessions(0, 60)

    def count(chain, *arguments) -> None:
        build(chain, *arguments)
        kept.append(len(chain._counts) - 1)

    build = MarkovChain.__init__
    monkeypatch.setattr(MarkovChain, "__init__", count)
    # In leave-one-out, each session asks for what follows its last item but one.
    _check(str(tmp_path), train, [np.array(s, np.int32) for s in ([3, 4, 5], [9, 4, 7], [4, 8, 2])], "leave_one_out")
    pairs = {(int(a), int(b)) for session in train for a, b in pairwise(session)}
    assert set(kept) == {len([pair for pair in pairs if pair[0] in (4, 8)])}
