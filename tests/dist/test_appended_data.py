"""Runs on a data set that has been appended to since they were trained: they go on with what they were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gru4recf_dist import train as train_program
from gru4recf_dist import trained_run
from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import Manifest, kept_manifest, read_manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.evaluation.evaluator import Evaluator
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.negatives import read_popularity
from tests.dist.test_resume import train_until
from tests.support.ranks import RankFailed, run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train

pytestmark = pytest.mark.dist

OLD_ITEMS, NEW_ITEMS = 30, 47
FILES = ("url", "values", "indptr", "tokens", "popularity")
STEPS = ("max_steps=9", "checkpoint.every_steps=4", "checkpoint.every_epochs=null")


def write_old(data: Path) -> Manifest:
    held_out = random_sessions(1, 9, OLD_ITEMS)
    return write_dataset(str(data), random_sessions(0, 41, OLD_ITEMS), held_out, held_out, items=OLD_ITEMS)


def grow(data: Path) -> None:
    """Another, larger data set in place of the one at ``data``, whose files and manifest stay beside it."""
    old = read_manifest(str(data))
    held_out = random_sessions(6, 20, NEW_ITEMS)
    write_dataset(str(data / "grown"), random_sessions(5, 57, NEW_ITEMS), held_out, held_out, items=NEW_ITEMS)

    def renamed(content):
        if isinstance(content, list):
            return [renamed(each) for each in content]
        if not isinstance(content, dict):
            return content
        return {key: f"grown/{each}" if key in FILES and each else renamed(each) for key, each in content.items()}

    manifest = renamed(json.loads((data / "grown/manifest.json").read_text()))
    kept = data / kept_manifest(old.training_digest)
    kept.parent.mkdir()
    (data / "manifest.json").rename(kept)
    (data / "manifest.json").write_text(json.dumps({**manifest, "ancestors": ["0" * 64, old.training_digest]}))


def evaluated(ranks: Ranks, config: Config) -> tuple[int, dict, torch.Tensor]:
    """What `gru4recf_dist.evaluate` does: N, metrics, the table's rows."""
    model, manifest = trained_run.load_model(config, ranks)
    metrics = Evaluator(config, manifest, read_popularity(config.data, manifest), ranks).evaluate(model, "test")
    return manifest.items, metrics, model.table.weight


def test_an_earlier_run_is_resumed_and_evaluated_as_if_nothing_had_been_appended(tmp_path):
    write_old(tmp_path / "data")
    unbroken = small_config(tmp_path / "data", tmp_path / "unbroken", *STEPS)
    before = run_ranks(1, train, tmp_path, unbroken)[0]
    expected = run_ranks(1, evaluated, tmp_path, unbroken)[0]
    broken = small_config(tmp_path / "data", tmp_path / "broken", *STEPS)
    run_ranks(1, train_until, tmp_path, broken, 6)
    grow(tmp_path / "data")
    resumed = run_ranks(1, train, tmp_path, broken)[0]
    for name, tensor in before.items():
        assert torch.equal(resumed[name], tensor), name
    for items, metrics, _ in run_ranks(2, evaluated, tmp_path, unbroken):
        assert (items, metrics) == (OLD_ITEMS, expected[1])
    # A run without a checkpoint of its own sees what has been appended.
    fresh = run_ranks(1, train, tmp_path, small_config(tmp_path / "data", tmp_path / "fresh", "max_steps=1"))[0]
    assert len(fresh["table.weight"]) == NEW_ITEMS + 1


def test_check_looks_at_the_state_that_the_run_was_trained_on(tmp_path, capsys):
    write_old(tmp_path / "data")
    config = small_config(tmp_path / "data", tmp_path / "run", "max_steps=1")
    run_ranks(1, train, tmp_path, config)
    grow(tmp_path / "data")

    def check(run: str) -> tuple[int, str, str]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps(config.model_dump(mode="json")))
        code = train_program.main(["--check", "--config", str(recipe), f"run_dir={tmp_path}/{run}"])
        return code, *capsys.readouterr()

    assert check("run")[1].startswith(f"ok: synthetic, {OLD_ITEMS} items")
    assert check("another")[1].startswith(f"ok: synthetic, {NEW_ITEMS} items")
    shutil.rmtree(tmp_path / "data/manifests")
    code, _, error = check("run")
    assert (code, error.count("\n")) == (2, 1)
    assert "has been appended to since, and manifests/" in error


def test_a_data_set_that_did_not_grow_from_the_runs_is_refused_when_it_is_resumed(tmp_path):
    write_old(tmp_path / "data")
    config = small_config(tmp_path / "data", tmp_path / "run", *STEPS)
    run_ranks(1, train_until, tmp_path, config, 6)
    shutil.rmtree(tmp_path / "data")
    write_dataset(str(tmp_path / "data"), random_sessions(9, 41, OLD_ITEMS), items=OLD_ITEMS)
    with pytest.raises(RankFailed, match=r"is not the data set that the checkpoints in .* were made with"):
        run_ranks(1, train, tmp_path, config)


def test_the_state_of_a_digest(tmp_path):
    old = write_old(tmp_path)
    assert read_manifest(str(tmp_path), old.training_digest) == old
    grow(tmp_path)
    assert read_manifest(str(tmp_path), old.training_digest) == old
    new = read_manifest(str(tmp_path))
    assert new.items == NEW_ITEMS
    for digest in (None, new.training_digest, "1" * 64):
        assert read_manifest(str(tmp_path), digest) == new
    with pytest.raises(UserError, match=r"and manifests/0{64}.json, its manifest of then, is gone"):
        read_manifest(str(tmp_path), "0" * 64)
