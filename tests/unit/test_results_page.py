"""The page of results: from finished runs of the present recipe only, with baselines and published figures."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from benchmarks import results
from benchmarks.result_records import Records
from gru4recf_dist import typed_yaml

FIGURES = {0: 0.1, 1: 0.2, 2: 0.4}


def _finish(path: str, seed: int, hit: float, **extra) -> None:
    """The folder of a finished run, as `results` would leave it; its NDCG is half of ``hit``."""
    (experiment,) = (each for each in results.EXPERIMENTS if each.path == path)
    config = experiment.config(seed, "data").model_copy(update=extra)
    metrics = {"hit@10": hit, "ndcg@10": hit / 2}
    names = ("popularity", "popularity_excluding_seen", "markov", "markov_excluding_seen")
    baselines = {name: {"hit@10": 0.05, "ndcg@10": 0.025} for name in names}
    result = {"test": metrics, "test_excluding_seen": metrics, "baselines": baselines}
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(typed_yaml.dump(config))
    (folder / "result.json").write_text(json.dumps({**result, "steps": 100, "epochs": 10, "best_step": 50}))


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Path:
    """Three finished runs of one experiment, and one of another with an old recipe."""
    recipe = Path(results.RECIPE).resolve()
    monkeypatch.setattr(results, "RECIPE", str(recipe))
    monkeypatch.chdir(tmp_path)
    for seed, hit in FIGURES.items():
        _finish("ml-100k/concat_output", seed, hit)
    _finish("ml-100k/item_only", 0, FIGURES[0], batch_size=999)
    return tmp_path


def _page() -> str:
    """What the command writes when it has nothing to train."""
    records = Records("page.json", results.RECIPE)
    for experiment in results.EXPERIMENTS:
        for seed in experiment.seeds:
            results._keep(records, experiment, seed, "data")
    return results.page(records)


def _line(page: str, section: str, name: str) -> list[str]:
    part = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    (line,) = (line for line in part.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_means_spreads_epochs_baselines_and_published_figures(finished):
    page = _page()
    values = list(FIGURES.values())
    _, hit, *_, epochs, seeds = _line(page, "ml-100k", "`concat_output`")
    assert hit == f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    assert (epochs, seeds) == ("5", "3 of 3")
    assert _line(page, "ml-100k", "first-order Markov chain")[1:3] == ["0.0500", "0.0250"]
    assert _line(page, "ml-100k", "GRU4Rec, RecBole's documentation")[1:3] == ["0.1103", "0.0513"]


def test_what_has_finished_is_on_the_page_whatever_was_asked_for(finished, monkeypatch):
    monkeypatch.setattr(results, "_train", lambda config: "failed")
    assert results.main(["--only", "beauty", "--output", "page.md"]) == 0
    assert _line(Path("page.md").read_text(), "ml-100k", "`concat_output`")[-1] == "3 of 3"


def test_what_features_add_is_the_mean_difference_of_the_same_seeds(finished):
    assert "| what features add |" not in _page()
    for seed, hit in {0: 0.15, 2: 0.25}.items():
        _finish("ml-100k/item_only", seed, hit)
    _, hit, ndcg, *_, seeds = _line(_page(), "ml-100k", "what features add")
    # Seeds 0 and 2: 0.1 - 0.15 and 0.4 - 0.25.
    assert (hit, seeds) == (f"+0.0500 ± {statistics.stdev([-0.05, 0.15]):.4f}", "2")
    assert ndcg == f"+0.0250 ± {statistics.stdev([-0.025, 0.075]):.4f}"


def test_a_run_of_another_recipe_does_not_count(finished):
    assert "Not trained yet: `item_only`, `concat_input`" in _page()


def test_what_was_made_is_kept_when_the_runs_are_gone_and_made_again_for_another_recipe(finished, monkeypatch):
    before = _page()
    shutil.rmtree("runs")
    asked = []
    monkeypatch.setattr(results, "_train", lambda config: asked.append(config.seed) or "trained")
    assert results.main(["--only", "ml-100k/concat_output", "--output", "page.md"]) == 0
    assert asked == [] and Path("page.md").read_text() == before
    other = yaml.safe_load(Path(results.RECIPE).read_text())
    Path("other.yaml").write_text(yaml.safe_dump({**other, "batch_size": 64}))
    monkeypatch.setattr(results, "RECIPE", "other.yaml")
    assert results.main(["--only", "ml-100k/concat_output", "--output", "page.md", "--jobs", "1"]) == 0
    assert asked == [0, 1, 2] and "Not trained yet: `concat_output`" in Path("page.md").read_text()


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
