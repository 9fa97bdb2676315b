"""The page of results: from finished runs of the present recipe only, with baselines and published figures."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import results
from gru4recf_dist import typed_yaml

FIGURES = {0: 0.1, 1: 0.2, 2: 0.4}


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Path:
    """Three finished runs of one experiment, and one of another with an old recipe."""
    recipe = Path(results.RECIPE).resolve()
    monkeypatch.setattr(results, "RECIPE", str(recipe))
    monkeypatch.chdir(tmp_path)
    by_name = {experiment.path: experiment for experiment in results.EXPERIMENTS}
    for path, seed, extra in [
        *(("ml-100k/concat_output", seed, {}) for seed in FIGURES),
        ("ml-100k/item_only", 0, {"batch_size": 999}),
    ]:
        config = by_name[path].config(seed, "data").model_copy(update=extra)
        metrics = {"hit@10": FIGURES[seed], "ndcg@10": FIGURES[seed] / 2}
        measured = {"test": metrics, "test_excluding_seen": metrics}
        names = ("popularity", "popularity_excluding_seen", "markov", "markov_excluding_seen")
        baselines = {name: {"hit@10": 0.05, "ndcg@10": 0.025} for name in names}
        result = {**measured, "baselines": baselines, "steps": 100, "epochs": 10, "best_step": 50}
        folder = Path(config.run_dir)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(typed_yaml.dump(config))
        (folder / "result.json").write_text(json.dumps(result))
    return tmp_path


def _line(page: str, section: str, name: str) -> list[str]:
    part = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    (line,) = (line for line in part.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_means_spreads_epochs_baselines_and_published_figures(finished):
    page = results.page("data")
    values = list(FIGURES.values())
    _, hit, *_, epochs, seeds = _line(page, "ml-100k", "`concat_output`")
    assert hit == f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    assert (epochs, seeds) == ("5", "3 of 3")
    assert _line(page, "ml-100k", "first-order Markov chain")[1:3] == ["0.0500", "0.0250"]
    assert _line(page, "ml-100k", "GRU4Rec, RecBole's documentation")[1:3] == ["0.1103", "0.0513"]


def test_a_run_of_another_recipe_does_not_count(finished):
    assert "Not trained yet: `item_only`, `concat_input`" in results.page("data")


def test_every_experiment_is_a_valid_configuration_with_a_folder_of_its_own():
    folders = [each.config(seed, "data").run_dir for each in results.EXPERIMENTS for seed in each.seeds]
    assert len(folders) == len(set(folders))
    listed = {(each.data, each.name) for each in results.EXPERIMENTS}
    assert {("beauty", name) for name in results.NAMED} | {("diginetica", "item_only")} <= listed


def test_a_name_that_is_not_there_is_one_error(capsys):
    assert results.main(["--only", "ml-1m"]) == 2
    assert "--only: ml-1m names none of ml-100k/concat_output" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_go_on(finished, monkeypatch, capsys):
    started = []

    def train(config):
        started.append(config.run_dir)
        return f"{config.run_dir}: failed"

    monkeypatch.setattr(results, "_train", train)
    assert results.main(["--only", "beauty/item_only", "--jobs", "2", "--output", "page.md"]) == 0
    assert len(started) == 3 and "failed" in capsys.readouterr().out
    assert "`item_only`" in Path("page.md").read_text().partition("## beauty")[2].partition("Not trained yet: ")[2]
