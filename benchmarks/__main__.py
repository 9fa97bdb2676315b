"""Where the time goes on this machine: loading, training steps at 1 and 2 ranks, evaluation.

python -m benchmarks [--config configs/default.yaml] [--steps 60] [key=value ...]

The data set must be prepared (`make quickstart` prepares the default one).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.measuring import launch, packed_events
from gru4recf_dist import config as configuration
from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import exits_cleanly
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.trainer import Trainer

WORLD_SIZES = (1, 2)


@exits_cleanly
def main() -> None:
    """Print a table of the measurements."""
    arguments = _parse()
    if arguments.worker:
        _worker(_config(arguments), arguments.steps)
        return
    rows = [("shards to packed batches", "1", f"{_loading(_config(arguments)):,.0f} events/s")]
    for world in WORLD_SIZES:
        measured = _start_worker(world)
        name = f"median of {arguments.steps} steps"
        step = f"{measured['step_ms']:.1f} ms ({measured['events_per_second']:,.0f} events/s)"
        rows.append((f"training step, {name}", str(world), step))
        rows.append(("evaluation of the test split", str(world), f"{measured['targets_per_second']:,.0f} targets/s"))
    width = max(len(name) for name, _, _ in rows)
    print(f"{'':<{width}}  ranks")
    for name, world, value in rows:
        print(f"{name:<{width}}  {world:>5}  {value}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/default.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def _config(arguments: argparse.Namespace, *more: str) -> Config:
    return configuration.load(arguments.config, [*arguments.overrides, *more])


def _loading(config: Config) -> float:
    """Events a second from shards to packed batches, in this process alone."""
    manifest = read_manifest(config.data)
    loader = SessionLoader(config.data, manifest, config.loader, config.batch_size, config.seed, rank=0, world=1)
    events, started = 0, time.perf_counter()
    # At least one whole epoch, and long enough that opening files is not all there is.
    while time.perf_counter() - started < 2.0:
        events += packed_events(loader, config.loader)
    return events / (time.perf_counter() - started)


def _start_worker(world: int) -> dict[str, float]:
    finished = launch(world, "benchmarks", "--worker", *sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def _worker(config: Config, steps: int) -> None:
    """One rank: times training steps and one evaluation; rank 0 prints them as JSON."""
    ranks = process_ranks.start(config.device, config.timeout_seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config.model_copy(update={"run_dir": folder}), ranks)
        seconds, events = [], 0
        while len(seconds) < steps:
            for block in trainer.loader:
                batches = trainer.ahead.prepare(block)
                started = time.perf_counter()
                events += trainer.update(batches).events
                seconds.append(time.perf_counter() - started)
                if len(seconds) == steps:
                    break
        started = time.perf_counter()
        metrics = trainer.evaluator.evaluate(trainer.model, "test")
        evaluation = time.perf_counter() - started
    if ranks.is_first:
        measured = {
            "step_ms": statistics.median(seconds) * 1000,
            "events_per_second": events / sum(seconds),
            "targets_per_second": metrics["test"]["targets"] / evaluation,
        }
        print(json.dumps(measured), flush=True)
    process_ranks.wait_for_all(ranks)
    process_ranks.stop()


if __name__ == "__main__":
    sys.exit(main())
