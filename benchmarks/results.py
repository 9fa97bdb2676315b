"""The quality of architectures, strategies and baselines on three public data sets, as a table in docs/results.md.

    make results [ARGS="--only ml-100k/item_only beauty --jobs 2"]

trains what is listed in `EXPERIMENTS`, one process a run, and writes the table after each. It can be ended and started
again at any time: finished runs stay, others go on from their checkpoint. What finished runs gave is kept beside the
table, in docs/results.json, so that another machine makes only what is missing. The data sets must be prepared in data/
(configs/data/).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result_records import BASELINES, Records
from gru4recf_dist import config as configuration
from gru4recf_dist import typed_yaml
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.train import is_finished

RECIPE = "configs/recommended.yaml"
SEEDS = (0, 1, 2)
_PARALLEL = "model.fusion=parallel"


@dataclass(frozen=True)
class Experiment:
    """A recipe on a data set, with several seeds.

    Attributes:
        settings: on top of `RECIPE`.
    """

    data: str
    name: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS

    @property
    def path(self) -> str:
        return f"{self.data}/{self.name}"

    def config(self, seed: int, root: str) -> Config:
        """Of the run with ``seed``, on the data set in ``root``."""
        own = [f"data={root}/{self.data}", f"run_dir=runs/results/{self.path}-{seed}", f"seed={seed}"]
        return configuration.load(RECIPE, [*own, "monitoring.progress=false", *self.settings])


def _fusion(data: str, fusion: str, seeds: tuple[int, ...] = SEEDS) -> Experiment:
    return Experiment(data, fusion, (f"model.fusion={fusion}",), seeds)


NAMED = ("concat_input", "concat_output", "weighted_sum")
# In the order in which they are run: what is asked for most comes first.
EXPERIMENTS = [
    *(_fusion("ml-100k", fusion) for fusion in ("concat_output", "item_only")),
    *(_fusion("beauty", fusion) for fusion in ("concat_output", "item_only")),
    *(_fusion("diginetica", fusion, (0,)) for fusion in ("concat_output", "item_only")),
    *(_fusion("ml-100k", fusion) for fusion in ("concat_input", "weighted_sum", "feature_only")),
    *(_fusion("ml-100k", fusion) for fusion in ("parallel", "shared_w", "interaction")),
    Experiment("ml-100k", "parallel, alternating", (_PARALLEL, "training.strategy=alternating")),
    Experiment("ml-100k", "parallel, interleaving", (_PARALLEL, "training.strategy=interleaving")),
    Experiment(
        "ml-100k", "parallel, residual", (_PARALLEL, "training.strategy=residual", "training.epochs_per_phase=8")
    ),
    *(_fusion("beauty", fusion) for fusion in ("concat_input", "weighted_sum")),
]

# Data set -> what it is evaluated by: (split of the result, metric, heading).
COLUMNS = {
    "ml-100k": [
        ("test", "hit@10", "HR@10"),
        ("test", "ndcg@10", "NDCG@10"),
        ("test_excluding_seen", "hit@10", "HR@10, new items"),
        ("test_excluding_seen", "ndcg@10", "NDCG@10, new items"),
    ],
    "diginetica": [
        ("test", "recall@20", "recall@20"),
        ("test", "mrr@20", "MRR@20"),
        ("test", "recall@10", "recall@10"),
        ("test", "mrr@10", "MRR@10"),
    ],
}
COLUMNS["beauty"] = COLUMNS["ml-100k"]
# Figures of others, in the columns' order; None where they are not given.
PUBLISHED = {
    "ml-100k": [("GRU4Rec, RecBole's documentation", (0.1103, 0.0513, None, None))],
    "beauty": [
        ("GRU4Rec, S3-Rec (CIKM 2020)", (None, None, 0.0283, 0.0137)),
        ("GRU4Rec_F, the same", (None, None, 0.0420, 0.0211)),
        ("SASRec, the same", (None, None, 0.0605, None)),
        ("FDSA, the same", (None, None, 0.0407, None)),
    ],
    "diginetica": [
        ("GRU4Rec, RecBole-GNN's page", (None, None, 0.3691, 0.1632)),
        ("NARM, the same", (None, None, 0.3801, 0.1695)),
    ],
}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [experiment.path for experiment in EXPERIMENTS]
    parser.add_argument("--only", nargs="+", metavar="DATA[/NAME]", help="some of: " + ", ".join(known))
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of an experiment's seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--data", default="data", help="folder of the prepared data sets")
    parser.add_argument("--output", default="docs/results.md", help="the page; figures lie beside it, as .json")
    arguments = parser.parse_args(argv)
    chosen = [each for each in EXPERIMENTS if _is_chosen(each, arguments.only)]
    if not chosen:
        raise UserError(f"--only: {' '.join(arguments.only)} names none of {', '.join(known)}")
    output = Path(arguments.output)
    records = Records(output.with_suffix(".json"), RECIPE)
    # Also what was not asked for now, or the page would leave it out.
    for experiment in EXPERIMENTS:
        for seed in experiment.seeds:
            if records.get(experiment.path, experiment.settings, seed) is None:
                _keep(records, experiment, seed, arguments.data)
    runs = [(each, seed) for each in chosen for seed in each.seeds if seed in (arguments.seeds or each.seeds)]
    missing = [(each, seed) for each, seed in runs if records.get(each.path, each.settings, seed) is None]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs were made before: {output.with_suffix('.json')}", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {pool.submit(_train, each.config(seed, arguments.data)): (each, seed) for each, seed in missing}
        for future in as_completed(futures):
            print(future.result(), flush=True)
            _keep(records, *futures[future], arguments.data)
            output.write_text(page(records))
    output.write_text(page(records))


def _is_chosen(experiment: Experiment, only: list[str] | None) -> bool:
    return only is None or any(experiment.path == each or experiment.data == each for each in only)


def _train(config: Config) -> str:
    """Bring a run to its end, if it is not there yet; what is to be said of it."""
    if is_finished(config):
        return f"{config.run_dir}: finished before"
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(typed_yaml.dump(config))
    with (folder / "log").open("ab") as log:
        finished = subprocess.run(
            [sys.executable, "train.py", "--config", str(recipe)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    return f"{config.run_dir}: " + ("done" if finished.returncode == 0 else f"failed, see {folder / 'log'}")


def _keep(records: Records, experiment: Experiment, seed: int, root: str) -> None:
    """Record a run that has finished."""
    config = experiment.config(seed, root)
    if is_finished(config):
        result = storage.read_json(storage.join(config.run_dir, "result.json"))
        columns = [(split, metric) for split, metric, _ in COLUMNS[experiment.data]]
        records.put(experiment.path, experiment.settings, seed, result, columns)


def page(records: Records) -> str:
    """docs/results.md, of the runs that were made with the present recipe."""
    return _HEAD + "".join(_section(data, records) for data in ("ml-100k", "beauty", "diginetica"))


_HEAD = f"""# Results

Written by `make results`, which trains everything here on one core a run and can be ended and started again at any
time; every run's figures are in [results.json](results.json). Every run has the settings of
[{RECIPE}](../{RECIPE}), but for `model.fusion` and `training.strategy`; these settings were chosen on validation
splits. Test splits, full ranking over all items; "new items" leaves the session's own out of the candidates. Mean of
the seeds, and their standard deviation where there are several. Epochs: until the best validation result.

What features add is `concat_output` less `item_only` of the same seed: where it is not clear of its spread, or below 0,
the features do not help.

Published figures are of other programs, partly with other filters or features, and stand here for orientation only.
"""


def _section(data: str, records: Records) -> str:
    columns = COLUMNS[data]
    headings = ["", *(heading for _, _, heading in columns), "epochs", "seeds"]
    lines = [headings, ["---"] * len(headings)]
    baselines: dict[str, dict] | None = None
    missing = []
    finished: dict[str, dict[int, dict]] = {}
    for experiment in (each for each in EXPERIMENTS if each.data == data):
        of_seeds = {seed: records.get(experiment.path, experiment.settings, seed) for seed in experiment.seeds}
        finished[experiment.name] = {seed: record for seed, record in of_seeds.items() if record}
        results = list(finished[experiment.name].values())
        if not results:
            missing.append(f"`{experiment.name}`")
            continue
        baselines = baselines or results[0]
        cells = [_cell([result[split][metric] for result in results]) for split, metric, _ in columns]
        seeds = f"{len(results)} of {len(experiment.seeds)}"
        lines.append([f"`{experiment.name}`", *cells, _epochs(results), seeds])
    featured, plain = finished["concat_output"], finished["item_only"]
    if both := featured.keys() & plain.keys():
        differences = [
            _cell([featured[seed][split][metric] - plain[seed][split][metric] for seed in both], "+")
            for split, metric, _ in columns
        ]
        lines.append(["what features add", *differences, "", f"{len(both)}"])
    for name in BASELINES if baselines else ():
        shown = [f"{baselines[name + split.removeprefix('test')][metric]:.4f}" for split, metric, _ in columns]
        lines.append([{"markov": "first-order Markov chain"}.get(name, name), *shown, "", "baseline"])
    for name, figures in PUBLISHED[data]:
        lines.append([name, *("-" if figure is None else f"{figure:.4f}" for figure in figures), "", "published"])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\n## {data}\n\n{table}" + (f"\nNot trained yet: {', '.join(missing)}.\n" if missing else "")


def _cell(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def _epochs(results: list[dict]) -> str:
    return f"{statistics.mean(result['best_epoch'] for result in results):.0f}"


if __name__ == "__main__":
    sys.exit(main())
