"""Bias and spread of the sampled loss's gradient, by sampler, number of negatives and correction.

python -m benchmarks.bias [--items 2000] [--events 512] [--dim 32] [--draws 400] [--negatives 64 256 1024 4096]

Queries lie near their targets, whose popularity falls as 1/rank; the reference is full softmax's gradient for the rows
of the table and for the queries, in float64. Bias is the norm of (mean gradient - reference), spread that of the
gradients' standard deviation, both in parts of the reference's norm. The mean of so many draws is itself uncertain by
`spread / sqrt(draws)`: a bias below that is shown as less than it. In-batch rows add as many draws of the batch's
targets to half as many of the sampler's, so that rows of equal K cost the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch

from benchmarks.measuring import print_table
from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import PackedBatch
from gru4recf_dist.objective import Objective
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.candidates import CandidatePart, Candidates
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.negatives import NegativeSampler

SAMPLERS = ("popularity", "log_uniform", "uniform")
CORRECTIONS = ("exact", "classic", "off")


def main() -> None:
    """Print the table."""
    arguments = _parse()
    torch.set_num_threads(1)
    ranks = process_ranks.start("cpu", timeout_seconds=60)
    problem = _Problem(arguments, ranks)
    lines = [["", "K", "logq", "bias", "spread"]]
    for sampler, in_batch, count, logq in product(SAMPLERS, (False, True), arguments.negatives, CORRECTIONS):
        drawn = count // 2 if in_batch else count
        loss = {"sampler": sampler, "negatives": drawn, "in_batch": count - drawn, "logq": logq}
        bias, spread = problem.measure(loss, arguments.draws)
        noise = spread / arguments.draws**0.5
        shown = f"{bias:.4f}" if bias > noise else f"< {noise:.4f}"
        name = f"{sampler}, half in batch" if in_batch else sampler
        lines.append([name, str(count), logq, shown, f"{spread:.4f}"])
    process_ranks.stop()
    print_table(f"{arguments.items} items, {arguments.events} targets, {arguments.draws} draws", lines)
    for kind in SAMPLERS:
        q = np.exp(problem.sampler({"sampler": kind}).log_q(np.arange(1, arguments.items + 1)))
        print(f"sum of q over the items, {kind}: 1 {q.sum() - 1:+.1e}")


class _Problem:
    """Queries, targets and a table, and what full softmax's gradient for them is."""

    def __init__(self, arguments: argparse.Namespace, ranks: Ranks) -> None:
        self.ranks, self.items, self.dim = ranks, arguments.items, arguments.dim
        generator = np.random.default_rng(0)
        share = 1.0 / np.arange(1, self.items + 1)
        share = generator.permutation(share / share.sum())
        self.popularity = np.concatenate([[0], np.round(share * 1e6).astype(np.int64)])
        targets = generator.choice(self.items, arguments.events, p=share) + 1
        noise = generator.standard_normal((arguments.events, self.dim))
        self.targets, self.weights = torch.from_numpy(targets), torch.ones(arguments.events)
        table = self._table(_config({}))
        self.queries = 0.25 * (table.weight[self.targets] + torch.from_numpy(noise))
        self.reference = self._gradient(Objective(_config({"name": "full_softmax"}), _candidates(table), None), step=0)

    def sampler(self, loss: dict) -> NegativeSampler:
        return NegativeSampler(self.popularity, _config(loss).loss, seed=1)

    def measure(self, loss: dict, draws: int) -> tuple[float, float]:
        """Relative bias and spread of the gradient over ``draws`` steps."""
        config = _config(loss)
        objective = Objective(config, _candidates(self._table(config)), self.sampler(loss))
        mean, squares = torch.zeros_like(self.reference), torch.zeros_like(self.reference)
        for number, gradient in enumerate(self._gradients(objective, draws), 1):
            change = gradient - mean
            mean += change / number
            squares += change * (gradient - mean)
        norm = self.reference.norm()
        return float((mean - self.reference).norm() / norm), float((squares / (draws - 1)).sum().sqrt() / norm)

    def _gradients(self, objective: Objective, draws: int) -> Iterator[torch.Tensor]:
        return (self._gradient(objective, step) for step in range(draws))

    def _table(self, config: Config) -> ShardedItemTable:
        return ShardedItemTable(
            self.items + 1, self.dim, self.ranks, config.table, seed=0, std=1.0, dtype=torch.float64
        )

    def _gradient(self, objective: Objective, step: int) -> torch.Tensor:
        """Of the mean loss, for the rows of the table and the queries: one vector."""
        table = objective.candidates.parts[0].table
        before = table.weight.clone()
        queries, positives = self.queries.clone().requires_grad_(), before[self.targets].requires_grad_()
        batch = PackedBatch(self.targets, self.targets, self.weights, torch.ones(1), 0, 0, 0)
        proposal = objective.propose(objective.batch_targets([batch], self.ranks), step)
        loss = objective(queries, positives, batch, proposal, objective.fetch(proposal)) / len(self.targets)
        loss.backward()
        # One step of SGD at a rate of 1 is the gradient.
        table.apply_gradients(lr=1.0)
        rows = before - table.weight
        rows.index_add_(0, self.targets, positives.grad)
        table.weight.copy_(before)
        return torch.cat([rows.flatten(), queries.grad.flatten()])


def _candidates(table: ShardedItemTable) -> Candidates:
    return Candidates([CandidatePart(table, "dot")])


def _config(loss: dict) -> Config:
    return Config(data="-", run_dir="-", loss=loss, table={"optimizer": "sgd"})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.bias", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--events", type=int, default=512)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--negatives", type=int, nargs="+", default=[64, 256, 1024, 4096])
    return parser.parse_args()


if __name__ == "__main__":
    main()
