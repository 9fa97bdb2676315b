"""Lookup, backward and update of the item table beside TorchRec's row-wise sharded embedding, on 2 ranks with gloo.

python -m benchmarks.torchrec [--rows 1000000] [--dim 64] [--batch 8192] [--ranks 2] [--rounds 15] [--steps 10]
    [--alpha 1.05] [--alone] [--output FILE]

A step: the rows of `--batch` ids a rank, the gradient of each, the update by row-wise Adagrad; for this project its
routing is in it, which training does ahead. All contenders run in the same processes on the same ids, uniform ones and
such that fall by rank ** -alpha, and take turns. First they must have updated the same rows to the same values.
TorchRec is measured as it is, and asked for distinct ids only. It lives in an environment of its own, `.venv-torchrec`,
together with this project; `--alone` measures without it, and needs none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.measuring import interleaved, launch, print_table
from gru4recf_dist.config import TableConfig
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.model.places import rows_at
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.partition import route

LEARNING_RATE = 0.05
# fbgemm is built for one torch; resolved by pip, torchrec would take its build for CUDA.
ALONE = ("torchrec==1.8.0", "fbgemm-gpu-cpu==1.8.0")
OURS, THEIRS = "this project", {"TorchRec": False, "TorchRec, distinct ids": True}
# Steps after which the contenders' rows are compared, and how far float32 sums in another order may be apart.
COMPARED_STEPS, TOLERANCE = 5, 1e-5
BATCHES = 8


@exits_cleanly
def main() -> None:
    """Print the table; with ``--worker`` be one rank."""
    arguments = _parse()
    if arguments.worker:
        _worker(arguments)
        return
    python = sys.executable
    if not arguments.alone:
        own = ["-c", str(peers.ROOT / "constraints.txt"), "-e", str(peers.ROOT)]
        python = peers.python(".venv-torchrec", [*own, *peers.requirements("torchrec-requirements.txt")], ALONE)
    given = ["--worker", *sys.argv[1:]]
    done = launch(arguments.ranks, "benchmarks.torchrec", *given, python=python, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = json.loads(done.stdout.splitlines()[-1])
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"settings": vars(arguments), **measured}, indent=1))
    lines = [["", "ids", "distinct a rank", "ms a step", "x this project"]]
    for kind, found in measured["kinds"].items():
        base = found["seconds"][OURS]
        for name, seconds in found["seconds"].items():
            lines.append([name, kind, f"{found['distinct']:,}", f"{1000 * seconds:.2f}", f"{seconds / base:.2f}"])
    title = f"{arguments.rows:,} rows of {arguments.dim}, {arguments.batch:,} ids a rank, {arguments.ranks} ranks"
    print_table(title + f", rows differ by at most {measured['difference']:.1e}", lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.torchrec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192, help="ids of a rank and step")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of a contender in its turn")
    parser.add_argument("--alpha", type=float, default=1.05, help="how steeply the uneven ids fall")
    parser.add_argument("--alone", action="store_true", help="without TorchRec")
    parser.add_argument("--output", default="runs/benchmarks/torchrec.json", metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class ItemTable:
    """This project's table as a contender."""

    def __init__(self, ranks: Ranks, rows: int, dim: int) -> None:
        config = TableConfig(optimizer="rowwise_adagrad", lr=LEARNING_RATE)
        self.table = ShardedItemTable(rows, dim, ranks, config, seed=0, std=0.1)
        self.weight = self.table.weight

    def prepare(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def step(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """Look up, and update by the gradient [n, D] of what was looked up."""
        routing = route(self.table.partition, ids)
        rows = self.table.lookup(self.table.exchange(routing))
        rows_at(rows, routing.inverse[0]).backward(gradient)
        self.table.apply_gradients(LEARNING_RATE)


def _worker(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with process_ranks.running("cpu", 600) as ranks:
        ours = ItemTable(ranks, arguments.rows, arguments.dim)
        contenders: dict[str, Any] = {OURS: ours}
        if not arguments.alone:
            from benchmarks.torchrec_table import TorchrecTable

            contenders |= {name: TorchrecTable(ours.table, dedup) for name, dedup in THEIRS.items()}
        generator = np.random.default_rng((1, ranks.rank))
        gradient = torch.from_numpy(generator.standard_normal((arguments.batch, arguments.dim), np.float32))
        found: dict[str, Any] = {"kinds": {}, "difference": 0.0}
        for kind in ("uniform", "zipf"):
            batches = [_ids(arguments, kind, generator) for _ in range(BATCHES)]
            prepared = {name: [side.prepare(ids) for ids in batches] for name, side in contenders.items()}
            found["difference"] = max(found["difference"], _compare(contenders, prepared, gradient, ranks))
            turns = {
                name: _turn(side, prepared[name], gradient, arguments.steps, ranks) for name, side in contenders.items()
            }
            seconds = interleaved(turns, arguments.rounds)
            distinct = sum(len(ids.unique()) for ids in batches) // BATCHES
            found["kinds"][kind] = {"seconds": seconds, "distinct": distinct}
        if ranks.is_first:
            print(json.dumps(found), flush=True)


def _ids(arguments: argparse.Namespace, kind: str, generator: np.random.Generator) -> torch.Tensor:
    """int64 [batch]; item ids are in no order of popularity, so the frequent ones lie anywhere."""
    if kind == "uniform":
        return torch.from_numpy(generator.integers(arguments.rows, size=arguments.batch))
    weights = np.arange(1, arguments.rows + 1, dtype=np.float64) ** -arguments.alpha
    cumulative = np.cumsum(weights)
    places = np.searchsorted(cumulative, generator.random(arguments.batch) * cumulative[-1])
    # The same order on every rank.
    order = np.random.default_rng(0).permutation(arguments.rows)
    return torch.from_numpy(order[np.minimum(places, arguments.rows - 1)])


def _compare(contenders: dict, prepared: dict, gradient: torch.Tensor, ranks: Ranks) -> float:
    """Largest difference of a value between this project's rows and another's, after the same steps.

    Raises:
        UserError: they do not do the same.
    """
    for number in range(COMPARED_STEPS):
        for name, side in contenders.items():
            side.step(prepared[name][number % BATCHES], gradient)
    ours = contenders[OURS].weight
    difference = max(float((side.weight - ours).abs().max()) for side in contenders.values())
    worst = float(collectives.max_over_ranks(torch.tensor(difference), ranks.host))
    if worst > TOLERANCE:
        raise UserError(f"the contenders do not make the same updates: their rows differ by {worst:.2g}")
    return worst


def _turn(side: Any, batches: list, gradient: torch.Tensor, steps: int, ranks: Ranks) -> Callable[[], float]:
    """Seconds of a step, the mean of ``steps`` that all ranks begin together."""

    def measure() -> float:
        process_ranks.wait_for_all(ranks)
        started = time.perf_counter()
        for number in range(steps):
            side.step(batches[number % len(batches)], gradient)
        process_ranks.wait_for_all(ranks)
        return (time.perf_counter() - started) / steps

    return measure


if __name__ == "__main__":
    sys.exit(main())
