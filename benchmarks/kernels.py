"""How near the matrix work of training and evaluation comes to the machine's rate for plain matrix products.

python -m benchmarks.kernels [--threads 1] [--sessions 128] [--dim 64] [--hidden 128] [--negatives 2048]
    [--block-rows 256] [--items 200000] [--rounds 15]

Rates are floating-point operations of the matrix products alone (what is exponentiated, masked or compared counts as
nothing) by the best of the rounds, beside that of a 2048 x 2048 product on as many threads, in float32. The loss makes
its logits twice, in forward and in backward; both are work. Sessions have the lengths of a shopping log: many short,
few long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measuring import print_table
from gru4recf_dist.config import Config, ModelConfig
from gru4recf_dist.data.batches import packed_positions
from gru4recf_dist.evaluation import ranking, score_tiles
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.losses import NOTHING, sampled_softmax
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.table.candidates import CandidatePart, Candidates
from gru4recf_dist.table.item_table import ShardedItemTable

PRODUCT_SIZE = 2048
LONGEST = 50


def main() -> None:
    """Print the table."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lengths = np.minimum(np.random.default_rng(0).geometric(0.12, arguments.sessions), LONGEST)
    events = int(lengths.sum())
    works = {
        f"product of {PRODUCT_SIZE} x {PRODUCT_SIZE}": _product(),
        "encoder, item path": _encoder(arguments, lengths, features=False),
        "encoder, item and feature paths": _encoder(arguments, lengths, features=True),
        "sampled softmax": _loss(arguments, events),
        "encoder (both paths) and loss": _both(arguments, lengths, events),
        "evaluation's counting": _counting(arguments),
    }
    # A single thread's own time: what other programs take does not count.
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    best = dict.fromkeys(works, float("inf"))
    # They take turns, so that a change of the machine's load meets them all.
    for _ in range(arguments.rounds):
        for name, (work, _) in works.items():
            started = clock()
            work()
            best[name] = min(best[name], clock() - started)
    rates = {name: operations / best[name] / 1e9 for name, (_, operations) in works.items()}
    top = next(iter(rates.values()))
    lines = [["", "ms", "GFLOP/s", "of the product's"]]
    lines += [
        [name, f"{1000 * best[name]:.2f}", f"{rates[name]:.1f}", f"{100 * rates[name] / top:.0f} %"] for name in works
    ]
    sizes = f"D = {arguments.dim}, H = {arguments.hidden}, K = {arguments.negatives}, N = {arguments.items}"
    print_table(f"{events} events of {arguments.sessions} sessions, {sizes}, {arguments.threads} threads", lines)


def _product() -> tuple[Callable[[], object], float]:
    left, right = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE), torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
    return lambda: left @ right, 2.0 * PRODUCT_SIZE**3


def _encode(arguments, lengths: np.ndarray, features: bool) -> tuple[Callable[[], torch.Tensor], float]:
    """One forward, and the operations of forward and backward: three products where forward has one."""
    events, hidden, dim = int(lengths.sum()), arguments.hidden, arguments.dim
    specs = [FeatureSpec("brand", "token", 1000), FeatureSpec("category", "token", 100)] if features else []
    config = ModelConfig(
        fusion="concat_output" if features else "item_only", embedding_size=dim, hidden_size=hidden, dropout=0.0
    )
    encoder = SessionEncoder(config, specs)
    _, batch_sizes = packed_positions(lengths)
    rows = torch.randn(events, dim, requires_grad=True)
    values = {spec.name: torch.randint(0, spec.size, (events,)) for spec in specs}
    places, sizes = torch.arange(events), torch.from_numpy(batch_sizes)
    widths = [dim, *([len(specs) * dim] if specs else [])]
    products = sum(3 * hidden * (width + hidden) for width in widths) + len(widths) * hidden * dim
    return lambda: encoder(rows, values, places, sizes), 3 * 2.0 * events * products


def _encoder(arguments, lengths: np.ndarray, features: bool) -> tuple[Callable[[], object], float]:
    encode, operations = _encode(arguments, lengths, features)
    return lambda: encode().sum().backward(), operations


def _cost(arguments, events: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    """The loss of queries [events, D], and the operations of its forward and backward: four products."""
    count, dim = arguments.negatives, arguments.dim
    positives = torch.randn(events, dim, requires_grad=True)
    negatives = torch.randn(count, dim, requires_grad=True)
    correction, exclude = torch.randn(count), torch.randint(NOTHING, count, (events,))

    def cost(queries: torch.Tensor) -> torch.Tensor:
        return sampled_softmax(
            queries, positives, negatives, correction, exclude, block_rows=arguments.block_rows
        ).sum()

    return cost, 4 * 2.0 * events * count * dim


def _loss(arguments, events: int) -> tuple[Callable[[], object], float]:
    cost, operations = _cost(arguments, events)
    queries = torch.randn(events, arguments.dim, requires_grad=True)
    return lambda: cost(queries).backward(), operations


def _both(arguments, lengths: np.ndarray, events: int) -> tuple[Callable[[], object], float]:
    encode, encoding = _encode(arguments, lengths, features=True)
    cost, costing = _cost(arguments, events)
    return lambda: cost(encode()).backward(), encoding + costing


def _counting(arguments) -> tuple[Callable[[], object], float]:
    """The evaluator's loop over the items, for as many targets as it counts together."""
    evaluation = Config(data="-", run_dir="-").evaluation
    ranks = process_ranks.start("cpu", timeout_seconds=60)
    process_ranks.stop()
    table = ShardedItemTable(
        arguments.items + 1, arguments.dim, ranks, Config(data="-", run_dir="-").table, seed=0, training=False
    )
    count = ranking.QUERIES
    queries, targets = torch.randn(count, arguments.dim), torch.randint(1, arguments.items + 1, (count,))
    scores = (queries.double() * table.weight[targets].double()).sum(dim=1)

    candidates = Candidates([CandidatePart(table, "dot")])
    tile_rows = score_tiles.default_tile_rows(queries.device)

    def work() -> torch.Tensor:
        return ranking.count_above(queries, targets, scores, candidates, tile_rows, evaluation.ties)

    return work, 2.0 * count * arguments.items * arguments.dim


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=128)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--negatives", type=int, default=2048)
    parser.add_argument("--block-rows", type=int, default=256)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
