"""Training, evaluation and top 20 of the same sessions by RecBole's GRU4RecF and by this project, one thread each.

python -m benchmarks.recbole source=FOLDER [--epochs 1 3] [--users N] [--reuse FILE] [--output FILE]
    [--recipe configs/data/beauty.yaml] [--config configs/beauty.yaml] [sizes: see --help]

FOLDER/NAME.inter and FOLDER/NAME.item are RecBole's files, NAME the folder's own name. RecBole (in an environment of
its own, `.venv-recbole`) and this project take the same sizes, and are evaluated after every epoch: leave-one-out,
every item a candidate, nothing excluded. NDCG@10 is that on the test split of the epoch that was best on the validation
split within the time (training and validation) that RecBole takes for each number of `--epochs`; this project ends
earlier if `--patience` epochs bring nothing better.

Seconds are of the CPU: with one thread on one core that is wall time, less what other programs took of the core. What
RecBole did is in `recbole-training.json` beside `--output`, and can be given to `--reuse`. `--users N` takes the first
N users only: a check in a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measuring import ONLY_STEPS, print_table
from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from gru4recf_dist import config as configuration
from gru4recf_dist import typed_yaml
from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import pack_queries
from gru4recf_dist.data.shard_format import Manifest, read_manifest
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.evaluation.sessions import read_batches
from gru4recf_dist.evaluation.topk import top_k
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer

METRIC = "ndcg@10"
TOP_K = 20
# What both sides do alike; the values are RecBole's defaults.
DROPOUT, LEARNING_RATE = 0.3, 0.001
_MATCHED = (
    "model.score=dot",
    "model.pooling=sum",
    f"model.dropout={DROPOUT}",
    f"optimizer.lr={LEARNING_RATE}",
    f"table.lr={LEARNING_RATE}",
)
MATCHED = {
    "sampled softmax, else as RecBole": (*_MATCHED, "loss.name=sampled_softmax", "loss.negatives=2048"),
    "full softmax, as RecBole": (*_MATCHED, "loss.name=full_softmax"),
}


@exits_cleanly
def main() -> None:
    """Print the table and write what it was made of."""
    arguments = _parse()
    # One core for all: the processes that are started inherit it.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if arguments.core is None else arguments.core})
    torch.set_num_threads(1)
    output = Path(arguments.output).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = _copy(Path(arguments.source), Path(folder), arguments.users)
        data = f"{folder}/data"
        prepare(typed_yaml.load(Recipe, arguments.recipe, [f"source={source}", f"output={data}"]))
        manifest = read_manifest(data)
        theirs = _recbole(arguments, manifest, source, output.with_name("recbole-training.json"))
        budgets = [theirs["epochs"][count - 1]["clock"] for count in arguments.epochs]
        sides = {f"RecBole {theirs['versions']['recbole']}": theirs}
        title = f"{source.name}: {manifest.splits['train'].targets:,} targets an epoch, {manifest.items:,} items"
        with process_ranks.running("cpu", 1800) as ranks:
            for name, config in _contenders(arguments, manifest, data).items():
                config = config.model_copy(update={"run_dir": f"{folder}/run-{len(sides)}"})
                sides[name] = _ours(config, ranks, max(budgets), arguments)
                # After every one: what was measured stays if the program is ended.
                output.write_text(json.dumps({"title": title, "budgets_seconds": budgets, "sides": sides}, indent=1))
    print_table(title, _lines(sides, budgets))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.recbole", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3], help="of RecBole; each gives a time")
    parser.add_argument("--users", type=int, help="how many of the first users to take; default: all")
    parser.add_argument("--reuse", metavar="FILE", help="what RecBole did before, in place of running it")
    parser.add_argument("--output", default="runs/benchmarks/recbole.json", metavar="FILE")
    parser.add_argument("--recipe", default="configs/data/beauty.yaml", help="that prepares the files")
    parser.add_argument("--config", default="configs/beauty.yaml", help="recipe of the first contender")
    parser.add_argument("--embedding-size", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=50, help="most events of a session")
    parser.add_argument("--batch-targets", type=int, default=2048, help="targets a step, about; not for --config")
    parser.add_argument("--patience", type=int, default=5, help="epochs of this project without a better one")
    parser.add_argument("--topk-sessions", type=int, default=2048, help=f"whose best {TOP_K} items are asked for")
    parser.add_argument("--topk-batch", type=int, default=256, help="sessions that are asked for at once")
    parser.add_argument("--core", type=int, help="that all is pinned to; default: the last one")
    parser.add_argument("source", metavar="source=FOLDER", help="RecBole's files")
    arguments = parser.parse_intermixed_args()
    key, _, arguments.source = arguments.source.partition("=")
    if key != "source" or not os.path.isdir(arguments.source):
        raise UserError("the only key is source=FOLDER, a folder with RecBole's files")
    if min(arguments.epochs) < 1:
        raise UserError("--epochs: must be at least 1")
    return arguments


def _copy(source: Path, folder: Path, users: int | None) -> Path:
    """RecBole's two files, of the first ``users`` only and the items that they met, under ``folder``."""
    target = folder / source.name
    target.mkdir()
    events, items = (source / f"{source.name}.{ending}" for ending in ("inter", "item"))
    for path in (events, items):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
    kept_users, met = set(), set()
    with events.open() as read, (target / events.name).open("w") as write:
        header = next(read)
        fields = [field.partition(":")[0] for field in header.rstrip("\n").split("\t")]
        user, item = fields.index("user_id"), fields.index("item_id")
        write.write(header)
        for line in read:
            values = line.rstrip("\n").split("\t")
            if values[user] not in kept_users and len(kept_users) == users:
                continue
            kept_users.add(values[user])
            met.add(values[item])
            write.write(line)
    with items.open() as read, (target / items.name).open("w") as write:
        header = next(read)
        item = [field.partition(":")[0] for field in header.rstrip("\n").split("\t")].index("item_id")
        write.write(header)
        write.writelines(line for line in read if line.rstrip("\n").split("\t")[item] in met)
    return target


def _recbole(arguments: argparse.Namespace, manifest: Manifest, source: Path, output: Path) -> dict:
    """What RecBole did, now or before."""
    features = [feature.name for feature in manifest.features]
    settings = {
        "embedding_size": arguments.embedding_size,
        "hidden_size": arguments.hidden_size,
        "num_layers": arguments.layers,
        "dropout_prob": DROPOUT,
        "pooling_mode": "sum",
        "learning_rate": LEARNING_RATE,
        "train_batch_size": arguments.batch_targets,
        "MAX_ITEM_LIST_LENGTH": arguments.max_length,
        "selected_features": features,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", *features]},
    }
    if arguments.reuse is None:
        given = {"data_path": str(source.parent), "dataset": source.name, "output": str(output), "settings": settings}
        given |= {"epochs": max(arguments.epochs), "topk_sessions": arguments.topk_sessions}
        given["topk_batch"] = arguments.topk_batch
        python = peers.python(".venv-recbole", peers.requirements("recbole-requirements.txt"))
        script = str(peers.ROOT / "benchmarks" / "recbole_training.py")
        print(f"RecBole trains {max(arguments.epochs)} epochs: {output} has each as it ends", file=sys.stderr)
        command = [python, script, json.dumps(given)]
        done = subprocess.run(command, env=peers.environment_of_peers(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    try:
        result = json.loads(Path(arguments.reuse or output).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--reuse: {arguments.reuse}: {error}") from error
    expected = {"settings": settings, "train_targets": manifest.splits["train"].targets}
    for key, value in expected.items():
        if result[key] != value:
            raise UserError(f"{arguments.reuse or output}: {key} is {result[key]}, here it is {value}")
    if len(result["epochs"]) < max(arguments.epochs):
        raise UserError(f"{arguments.reuse}: holds {len(result['epochs'])} epochs, --epochs asks for more")
    return result


def _contenders(arguments: argparse.Namespace, manifest: Manifest, data: str) -> dict[str, Config]:
    """This project's sides. RecBole's samples are prefixes, one target each; a session here has all of its targets."""
    train, streams = manifest.splits["train"], manifest.streams
    sessions = arguments.batch_targets * train.sessions / train.targets
    batch = f"batch_size={max(1, round(sessions / streams)) * streams}"
    common = [
        *ONLY_STEPS,
        f"data={data}",
        "run_dir=unused",
        "max_steps=1000000000",
        f"model.embedding_size={arguments.embedding_size}",
        f"model.hidden_size={arguments.hidden_size}",
        f"model.num_layers={arguments.layers}",
        f"loader.max_length={arguments.max_length}",
        f"loader.context={min(10, arguments.max_length - 1)}",
        "device=cpu",
    ]
    contenders = {arguments.config: configuration.load(arguments.config, common, training=False)}
    for name, settings in MATCHED.items():
        contenders[name] = configuration.load(None, [*settings, batch, *common], training=False)
    return contenders


def _ours(config: Config, ranks: Ranks, budget: float, arguments: argparse.Namespace) -> dict:
    """Train until ``budget`` seconds have gone into training and validation, or nothing gets better."""
    trainer = Trainer(config, ranks)
    epochs: list[dict] = []
    clock, best, since_best = 0.0, -1.0, 0
    while clock < budget and since_best < arguments.patience:
        started, wall = time.process_time(), time.perf_counter()
        with trainer.ahead.rest_of_epoch(trainer.loader) as batches:
            for _ in range(trainer.loader.steps_left):
                trainer.update(next(batches))
        trained, train_wall_seconds = time.process_time(), time.perf_counter() - wall
        trainer.engine.copy_weights_to(trainer.model.encoder)
        valid = trainer.evaluator.evaluate(trainer.model, "valid")["valid"]
        validated = time.process_time()
        # Outside of the clock, as on the other side.
        test = trainer.evaluator.evaluate(trainer.model, "test")["test"]
        evaluation = time.process_time() - validated
        clock += validated - started
        since_best = 0 if valid[METRIC] > best else since_best + 1
        best = max(best, valid[METRIC])
        spent = {"train_seconds": trained - started, "train_wall_seconds": train_wall_seconds}
        spent |= {"valid_seconds": validated - trained, "clock": clock}
        epochs.append({**spent, "valid": valid, "test": test})
    result = {"settings": config.model_dump(mode="json"), "epochs": epochs, "test_targets": test["targets"]}
    return {**result, "evaluation_seconds": evaluation, **_time_topk(trainer, config, arguments)}


@torch.no_grad()
def _time_topk(trainer: Trainer, config: Config, arguments: argparse.Namespace) -> dict:
    """Seconds for the best items of the first test sessions, whose events are in memory."""
    blocks, sessions = [], 0
    for block in read_batches(config.data, trainer.manifest, "test", arguments.topk_batch):
        blocks.append(block)
        sessions += len(block.lengths)
        if sessions >= arguments.topk_sessions:
            break
    model, started = trainer.model, time.process_time()
    for block in blocks:
        batch = pack_queries(block, config.loader.max_length, config.loader.context, every_position=False)
        queries = model.encode(batch.items, batch.batch_sizes)[batch.positions]
        top_k(queries, TOP_K, model.candidates, config.evaluation.tile_rows)
    return {"topk_seconds": time.process_time() - started, "topk_sessions": sessions}


def _lines(sides: dict[str, dict], budgets: list[float]) -> list[list[str]]:
    lines = [["", "s an epoch", "x RecBole", *(f"{METRIC} in {budget:.0f} s" for budget in budgets)]]
    lines[0] += ["(epoch)", "evaluation, ms a session", f"top {TOP_K}, ms a session"]
    seconds = [statistics.median(epoch["train_seconds"] for epoch in side["epochs"]) for side in sides.values()]
    for (name, side), taken in zip(sides.items(), seconds, strict=True):
        chosen = [_best_within(side["epochs"], budget) for budget in budgets]
        shown = [f"{side['epochs'][number]['test'][METRIC]:.4f}" if number is not None else "-" for number in chosen]
        last = "-" if chosen[-1] is None else str(chosen[-1] + 1)
        evaluation = f"{1000 * side['evaluation_seconds'] / side['test_targets']:.3f}"
        topk = f"{1000 * side['topk_seconds'] / side['topk_sessions']:.3f}"
        lines.append([name, f"{taken:.2f}", f"{seconds[0] / taken:.1f}", *shown, last, evaluation, topk])
    return lines


def _best_within(epochs: list[dict], budget: float) -> int | None:
    """The epoch, from 0, that was best on the validation split among those that ended within ``budget`` seconds."""
    ended = [number for number, epoch in enumerate(epochs) if epoch["clock"] <= budget]
    return max(ended, key=lambda number: epochs[number]["valid"][METRIC], default=None)


if __name__ == "__main__":
    sys.exit(main())
