"""What the exact evaluation of a very large catalog costs: every item is scored for every test session.

python -m benchmarks.full_sort [--items 10000000] [--sessions 1000 10000] [--ranks 1] [--dim 64] [key=value ...]

The model has its initial weights; a session's target is its last event. "GiB above" is the largest rank's peak of
memory less its table and the files that it maps: it must not grow with the sessions. Operations are those of the scores
alone, a rank's share of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

from benchmarks import synthetic_events
from benchmarks.measuring import MemoryGrowth, launch, print_table
from gru4recf_dist import config as configuration
from gru4recf_dist import recommender
from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.errors import exits_cleanly
from gru4recf_dist.evaluation.evaluator import Evaluator
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.node_arrays import NodeArrays
from gru4recf_dist.table.negatives import read_popularity

GIB = 1 << 30
# Sessions use that many of the items.
USED = 100_000


@exits_cleanly
def main() -> None:
    """Print the table; with ``--worker`` be one rank of a measurement."""
    arguments = _parse()
    if arguments.worker:
        settings = ["model.fusion=item_only", f"model.embedding_size={arguments.dim}", "device=cpu"]
        _measure(configuration.load(None, [*settings, *arguments.overrides], training=False))
        return
    lines = [["sessions", "ranks", "s", "ms a session", "GFLOP/s a rank", "GiB", "GiB above"]]
    with tempfile.TemporaryDirectory() as folder:
        for sessions in arguments.sessions:
            data = f"{folder}/{sessions}"
            events = sessions * synthetic_events.MEAN_LENGTH
            used = min(USED, arguments.items)
            synthetic_events.write_dataset(data, events, arguments.items, used, is_test=True)
            given = [
                "--worker",
                f"--dim={arguments.dim}",
                *arguments.overrides,
                f"data={data}",
                f"run_dir={folder}/run",
            ]
            done = launch(
                arguments.ranks,
                "benchmarks.full_sort",
                *given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            seconds = found["seconds"]
            rate = 2.0 * arguments.items * found["targets"] * arguments.dim / arguments.ranks / seconds / 1e9
            times = [f"{seconds:.1f}", f"{1000 * seconds / found['targets']:.2f}", f"{rate:.1f}"]
            memory = [f"{found['peak'] / GIB:.2f}", f"{found['above'] / GIB:.2f}"]
            lines.append([f"{found['targets']:,}", str(arguments.ranks), *times, *memory])
    print_table(f"{arguments.items:,} items, D = {arguments.dim}", lines)


def _measure(config: Config) -> None:
    """One rank: the time of an evaluation, and its memory."""
    ranks = process_ranks.start(config.device, config.timeout_seconds)
    memory = MemoryGrowth()
    manifest = read_manifest(config.data)
    popularity = read_popularity(config.data, manifest, NodeArrays(ranks))
    model = recommender.build(config, manifest, ranks, training=False)
    evaluator = Evaluator(config, manifest, popularity, ranks)
    process_ranks.wait_for_all(ranks)
    started = time.perf_counter()
    targets = evaluator.evaluate(model, "test")["test"]["targets"]
    seconds = time.perf_counter() - started
    held = memory.of_largest_rank(sum(table.weight.nbytes for table in model.tables), ranks)
    if ranks.is_first:
        print(json.dumps({"seconds": seconds, "targets": targets, **held}), flush=True)
    process_ranks.wait_for_all(ranks)
    process_ranks.stop()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.full_sort", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
