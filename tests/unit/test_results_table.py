"""The table that `make quickstart` ends with."""

from __future__ import annotations

import json

import pytest

from gru4recf_dist import results_table

RESULT = {
    "valid": {"hit@10": 0.9, "ndcg@10": 0.9, "mrr@10": 0.9},
    "test": {"hit@10": 0.12345, "ndcg@10": 0.06, "mrr@10": 0.0412, "hit@20": 0.3},
    "baselines": {
        "popularity": {"hit@10": 0.04, "ndcg@10": 0.02, "mrr@10": 0.01},
        "markov": {"hit@10": 1.0, "ndcg@10": 0.05, "mrr@10": 0.03},
    },
}


def test_table_is_aligned_and_shows_the_test_split():
    assert results_table.table(RESULT).splitlines() == [
        "                            hit@10   ndcg@10    mrr@10",
        "model                       0.1235    0.0600    0.0412",
        "popularity                  0.0400    0.0200    0.0100",
        "first-order Markov chain    1.0000    0.0500    0.0300",
    ]


@pytest.mark.parametrize("baselines", [{}, {"baselines": None}, {"baselines": {"popularity": {"hit@20": 0.1}}}])
def test_metrics_that_were_not_computed_are_dashes(baselines):
    lines = results_table.table({"test": {"hit@10": 0.5}, **baselines}).splitlines()
    assert lines[1].split() == ["model", "0.5000", "-", "-"]
    assert lines[2].split() == ["popularity", "-", "-", "-"]


def test_program_prints_the_table_and_where_to_look(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert results_table.main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert results_table.table(RESULT) in output
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in output.splitlines()[-1]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"test": null}'])
def test_unfinished_run_is_one_clear_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    assert results_table.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/result.json: ")
