"""Checkpoints that RecBole 1.2.1 wrote: the same scores and the same metrics here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gru4recf_dist import evaluate, export, import_recbole, recommend
from gru4recf_dist import train as train_program
from gru4recf_dist.recbole.inert_pickle import load_torch
from tests.support.training import logged_lines

KINDS = ["brand", "tags", "price", "brand+tags", "brand+price", "tags+price", "brand+tags+price"]
UNTRAINED = [f"none-{layers}" for layers in (1, 2)] + [
    f"{kinds}-{pooling}-{layers}" for kinds in KINDS for pooling in ("mean", "sum", "max") for layers in (1, 2)
]
TRAINED = ["trained-items", "trained-features"]
ITEMS = 60


def import_run(recbole: Path, name: str, run: Path, *arguments: object) -> Path:
    """The run's folder of a checkpoint; the ids of GRU4Rec's come from JSON files, GRU4RecF's have their own."""
    if not arguments and name.split("-")[0] in ("none", "trained") and name != "trained-features":
        arguments = ("--ids", recbole / "ids")
    checkpoint = recbole / "checkpoints" / f"{name}.pth"
    given = ["--checkpoint", checkpoint, "--data", recbole / "data", "--run", run, *arguments]
    assert import_recbole.main([str(argument) for argument in given]) == 0
    return run


def scores_of(run: Path, sessions: list[list[str]], folder: Path) -> list[dict[str, float]]:
    """Every item's score after each session, by token."""
    lines, answers = folder / "sessions.jsonl", folder / "answers.jsonl"
    lines.write_text("".join(json.dumps({"items": session}) + "\n" for session in sessions))
    assert recommend.main([f"--run={run}", f"--input={lines}", f"--output={answers}", f"-k={ITEMS}"]) == 0
    found = map(json.loads, answers.read_text().splitlines())
    return [dict(zip(answer["items"], answer["scores"], strict=True)) for answer in found]


def assert_scores_are_recboles(recbole: Path, name: str, run: Path, folder: Path) -> None:
    expected = np.load(recbole / "scores.npz")[name]
    tokens = json.loads((recbole / "ids" / "items.json").read_text())
    found = scores_of(run, json.loads((recbole / "inputs.json").read_text()), folder)
    assert len(found) == len(expected) > 1
    ours = np.array([[scores[token] for token in tokens[1:]] for scores in found])
    # Scores of the trained ones reach 6, where neighbouring float32 numbers are 5e-7 apart.
    np.testing.assert_allclose(ours, expected[:, 1:], rtol=0, atol=1e-6 * max(1.0, abs(expected).max()))
    assert expected[:, 1:].std(axis=1).min() > 1e-3


@pytest.mark.parametrize("name", UNTRAINED + TRAINED)
def test_scores_are_recboles(name, recbole, tmp_path):
    assert_scores_are_recboles(recbole, name, import_run(recbole, name, tmp_path / "run"), tmp_path)


@pytest.mark.parametrize("name", TRAINED)
def test_metrics_are_recboles_to_four_decimals(name, recbole, tmp_path):
    run = import_run(recbole, name, tmp_path / "run")
    expected = json.loads((recbole / "metrics.json").read_text())[name]
    for split in ("valid", "test"):
        assert evaluate.main([f"--run={run}", f"--split={split}", "evaluation.ks=[5,10]"]) == 0
        found = json.loads((run / f"eval-{split}.json").read_text())[split]
        assert {key: round(found[key], 4) for key in expected[split]} == {
            key: round(value, 4) for key, value in expected[split].items()
        }
        assert expected[split]["ndcg@10"] > 0.2, "a model that knows something"


@pytest.mark.parametrize("name", ["trained-items", "trained-features", "brand+tags+price-max-2", "none-2"])
def test_exported_again_it_has_recboles_own_weights_in_recboles_order(name, recbole, tmp_path):
    run = import_run(recbole, name, tmp_path / "run")
    arguments = [f"--run={run}", "--format=recbole", f"--output={tmp_path}/out", f"--ids={run}/recbole-ids"]
    assert export.main(arguments) == 0
    original, _ = load_torch((recbole / "checkpoints" / f"{name}.pth").read_bytes())
    # What torch takes without being told to trust the file.
    exported = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert list(exported["state_dict"]) == list(original["state_dict"])
    for key, tensor in original["state_dict"].items():
        found = exported["state_dict"][key]
        if "float_embedding" in key:
            # Of the two rows of a float RecBole uses the second.
            found, tensor = found[1::2], tensor[1::2]
        assert torch.equal(found, tensor), key
    groups = exported["optimizer"]["param_groups"]
    assert [len(group["params"]) for group in groups] == [len(original["state_dict"])]


@pytest.mark.parametrize("origin", ["--ids", "--recbole-data", "saved"])
def test_every_source_of_ids_gives_the_same_run(origin, recbole, tmp_path):
    given = {
        "--ids": ("--ids", recbole / "ids"),
        "--recbole-data": ("--recbole-data", recbole / "shop"),
        "saved": ("--ids", recbole / "shop-SequentialDataset.pth"),
    }[origin]
    run = import_run(recbole, "trained-features", tmp_path / "run", *given)
    assert_scores_are_recboles(recbole, "trained-features", run, tmp_path)
    own = import_run(recbole, "trained-features", tmp_path / "own")
    for name in ("items.json", "features.json"):
        kept = [json.loads((each / "recbole-ids" / name).read_text()) for each in (run, own)]
        if name == "features.json":
            # The data set in the checkpoint has the users' ids too.
            kept = [{key: values for key, values in each.items() if key != "user_id"} for each in kept]
        assert kept[0] == kept[1]


def test_training_goes_on_from_it(recbole, tmp_path, monkeypatch):
    # train.py's own handlers of signals would stay in this process.
    monkeypatch.setattr("gru4recf_dist.stopping.catch_signals", lambda: None)
    run = import_run(recbole, "trained-features", tmp_path / "run", "monitoring.tensorboard=false")
    model = ["fusion=concat_output", "features=[price,tags,brand]", "embedding_size=6", "hidden_size=5", "pooling=mean"]
    settings = ["loss.name=full_softmax", "max_epochs=1", "device=cpu", "loader.max_length=8", "loader.context=7"]
    settings += [f"model.{each}" for each in model] + ["monitoring.tensorboard=false", "evaluation.baselines=false"]
    started = ["init_from=" + str(run), f"data={recbole}/data", f"run_dir={tmp_path}/new", *settings]
    assert train_program.main(started) == 0
    fresh = [f"data={recbole}/data", f"run_dir={tmp_path}/fresh", *settings]
    assert train_program.main(fresh) == 0
    first = {name: logged_lines(tmp_path / name)[0]["train/loss"] for name in ("new", "fresh")}
    assert first["new"] < first["fresh"] - 0.5
    # The folder itself is a run that has made no step yet.
    shutil.copytree(run, tmp_path / "resumed")
    assert (
        train_program.main(["--config", str(run / "config.yaml"), f"run_dir={tmp_path}/resumed", "max_epochs=1"]) == 0
    )
    assert json.loads((tmp_path / "resumed" / "result.json").read_text())["steps"] > 0


def test_what_was_not_run_is_named(recbole, tmp_path, capsys):
    import_run(recbole, "trained-features", tmp_path / "run")
    said = capsys.readouterr().err
    assert "GRU4RecF of 60 items" in said
    for name in ("recbole.config.configurator.Config", "SequentialDataset", "logging.getLogger"):
        assert name in said
    assert "Traceback" not in said
