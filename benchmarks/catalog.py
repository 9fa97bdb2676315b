"""What the size of the catalog costs: a training step and a rank's memory, and dense training beside it.

python -m benchmarks.catalog [--items 100000 10000000] [--ranks 1 2] [--steps 100] [--skip 20] [--rounds 3]
    [--events 400000] [--dense 1000000] [--dense-steps 5] [key=value ...]

The sessions are the same in every catalog: only the number of items that never occur differs. "GiB above" is the
largest rank's peak of memory, less its rows, their optimizer state, what it was before, and "GiB mapped": what was
touched of the popularity's files, which lies in the system's cache, once for all ranks of a machine. `--dense N` trains
beside it as is usual on one process: `nn.Embedding`, softmax over all N items, Adam on every row; one target a session.
0: not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

from benchmarks import synthetic_events
from benchmarks.measuring import MemoryGrowth, launch, print_table
from benchmarks.step_times import step_seconds
from gru4recf_dist import config as configuration
from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import pack_micro_batches
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import exits_cleanly
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.trainer import Trainer

GIB = 1 << 30
SETTINGS = (
    "model.fusion=item_only",
    "model.embedding_size=64",
    "loss.negatives=2048",
    "table.optimizer=rowwise_adagrad",
    "monitoring.progress=false",
    "monitoring.tensorboard=false",
    "device=cpu",
)


@exits_cleanly
def main() -> None:
    """Print the table; with ``--worker`` be one rank of a measurement."""
    arguments = _parse()
    if arguments.worker:
        config = configuration.load(None, [*SETTINGS, *arguments.overrides])
        (_measure_dense if arguments.worker == "dense" else _measure)(config, arguments.steps, arguments.skip)
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = sorted({*arguments.items, *([arguments.dense] if arguments.dense else [])})
        for items in sizes:
            synthetic_events.write_dataset(f"{folder}/{items}", arguments.events, items, used=sizes[0])
        # By turns, so that a change of the machine's load meets all.
        found: dict[tuple[str, int, int], list[dict]] = {}
        for _ in range(arguments.rounds):
            for ranks in arguments.ranks:
                for items in sizes:
                    found.setdefault(("sharded", ranks, items), []).append(_run(arguments, folder, ranks, items))
        if arguments.dense:
            found["dense", 1, arguments.dense] = [_run(arguments, folder, 1, arguments.dense, dense=True)]
    lines = [["", "ranks", "items", "ms a step", "x smallest", "GiB", "GiB above", "GiB mapped"]]
    seconds = {key: statistics.median(each["seconds"] for each in rounds) for key, rounds in found.items()}
    for (kind, ranks, items), rounds in found.items():
        key = (kind, ranks, items)
        base = seconds["sharded", ranks, sizes[0]] if ("sharded", ranks, sizes[0]) in seconds else seconds[key]
        memory = [f"{max(each[name] for each in rounds) / GIB:.2f}" for name in ("peak", "above", "mapped")]
        times = [f"{1000 * seconds[key]:.1f}", f"{seconds[key] / base:.2f}"]
        lines.append([kind, str(ranks), f"{items:,}", *times, *memory])
    print_table(f"{arguments.events:,} events, D = 64, K = 2048", lines)


def _run(arguments: argparse.Namespace, folder: str, ranks: int, items: int, dense: bool = False) -> dict:
    steps = (arguments.dense_steps, 1) if dense else (arguments.steps, arguments.skip)
    given = [f"--worker={'dense' if dense else 'sharded'}", f"--steps={steps[0]}", f"--skip={steps[1]}"]
    given += [*arguments.overrides, f"data={folder}/{items}", f"run_dir={folder}/run"]
    done = launch(ranks, "benchmarks.catalog", *given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(config: Config, steps: int, skip: int) -> None:
    """One rank: the median of ``steps`` steps after ``skip``, and its memory."""
    ranks = process_ranks.start(config.device, config.timeout_seconds)
    memory = MemoryGrowth()
    trainer = Trainer(config, ranks)
    seconds = step_seconds(trainer, steps, skip)
    share = sum(tensor.to_local().nbytes for tensor in trainer.model.tables.state_dict().values())
    held = memory.of_largest_rank(share, ranks)
    if ranks.is_first:
        _report(seconds, held)
    process_ranks.wait_for_all(ranks)
    process_ranks.stop()


def _measure_dense(config: Config, steps: int, skip: int) -> None:
    """The usual training on one process: every row is scored, has a gradient, and is updated by Adam."""
    memory = MemoryGrowth()
    manifest = read_manifest(config.data)
    embedding = nn.Embedding(manifest.items + 1, config.model.embedding_size, padding_idx=0)
    encoder = SessionEncoder(config.model, [])
    optimizer = torch.optim.Adam([*embedding.parameters(), *encoder.parameters()])
    loader = SessionLoader(config.data, manifest, config.loader, config.batch_size, config.seed, rank=0, world=1)
    seconds: list[float] = []
    for block in loader:
        (batch,) = pack_micro_batches(block, 1, config.loader.max_length, config.loader.context)
        started = time.perf_counter()
        optimizer.zero_grad()
        places = torch.arange(len(batch.items))
        queries = encoder(embedding(batch.items), {}, places, batch.batch_sizes)
        # One target a session, its first, as with prefixes as samples: more than B x N logits would fit nowhere.
        count = int(batch.batch_sizes[0])
        nn.functional.cross_entropy(queries[:count] @ embedding.weight.T, batch.targets[:count]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        if len(seconds) == skip + steps:
            break
    _report(seconds[skip:], memory.of_this_process(3 * embedding.weight.nbytes))


def _report(seconds: list[float], held: dict[str, int]) -> None:
    print(json.dumps({"seconds": statistics.median(seconds), **held}), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.catalog", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 10_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip", type=int, default=20, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--dense", type=int, default=1_000_000, help="items of the dense training; 0: none")
    parser.add_argument("--dense-steps", type=int, default=5)
    parser.add_argument("--worker", choices=("sharded", "dense"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
