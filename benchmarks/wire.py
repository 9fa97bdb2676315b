"""What a training step sends between the ranks, beside the least that it could send.

python -m benchmarks.wire [--ranks 4] [--steps 20] [--config configs/beauty.yaml] [key=value ...]

The least: every distinct row that a rank reads from another once, and its gradient once back; its id and features once;
every distinct negative once to each other rank and its gradient once back (full softmax: every query, its gradient, and
a partial sum each way); the encoder's gradients in a ring. It is counted from the batches themselves, not from what was
sent. Sizes that the exchanges need, and the loss, are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict

import numpy as np

from benchmarks.measuring import ONLY_STEPS, launch, print_table
from gru4recf_dist import config as configuration
from gru4recf_dist.config import Config
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.model.subnets import ITEM_TABLE, has_item_subnet, output_parts
from gru4recf_dist.parallel import collectives, traffic
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.gathering import Gathering
from gru4recf_dist.parallel.replicated import parameter_bytes
from gru4recf_dist.recommender import feature_specs
from gru4recf_dist.steps_ahead import PreparedStep
from gru4recf_dist.trainer import Trainer


@exits_cleanly
def main() -> None:
    """Print the table."""
    arguments = _parse()
    if arguments.worker:
        _worker(_config(arguments, arguments.run_dir))
        return
    with tempfile.TemporaryDirectory() as folder:
        given = ["--worker", "--run_dir", folder, *sys.argv[1:]]
        done = launch(arguments.ranks, "benchmarks.wire", *given, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    sent, least = measured["sent"], measured["least"]
    lines = [["KiB a step, all ranks", "sent", "least", "x"]]
    for purpose in sent:
        lines.append([purpose, *_cells(sent[purpose], least.get(purpose, 0.0))])
    lines.append(["total", *_cells(sum(sent.values()), sum(least.values()))])
    of_table = [purpose for purpose in sent if purpose != "encoder_gradients"]
    totals = (sum(side.get(purpose, 0.0) for purpose in of_table) for side in (sent, least))
    lines.append(["total without the encoder's", *_cells(*totals)])
    print_table(f"{arguments.ranks} ranks, {' '.join([arguments.config, *arguments.overrides])}", lines)


def _cells(sent: float, least: float) -> list[str]:
    return [f"{sent / 1024:,.1f}", f"{least / 1024:,.1f}", f"{sent / least:.3f}" if least else "-"]


def _config(arguments: argparse.Namespace, run_dir: str) -> Config:
    settings = [*ONLY_STEPS, *arguments.overrides, f"run_dir={run_dir}", f"max_steps={arguments.steps}"]
    config = configuration.load(arguments.config, settings)
    only_items = has_item_subnet(config.model) and {part.table for part in output_parts(config.model)} == {ITEM_TABLE}
    if config.training.strategy != "simultaneous" or not only_items:
        raise UserError(
            "model, training: the least is known where item rows are inputs and outputs, and all is trained"
        )
    return config


def _worker(config: Config) -> None:
    """One rank: trains, and counts the least of its part of the steps; rank 0 prints the sums over the ranks."""
    ranks = process_ranks.start(config.device, config.timeout_seconds)
    trainer = Trainer(config, ranks)
    least = _Least(trainer)
    sent, update = traffic.Traffic(), trainer.update

    def counted(prepared):
        nonlocal sent
        before, least.counts = traffic.TOTAL.copy(), True
        least.count(prepared)
        done = update(prepared)
        sent, least.counts = sent + (traffic.TOTAL - before), False
        return done

    trainer.update = counted
    trainer.train()
    mine = np.array([least.sent[purpose] for purpose in traffic.PURPOSES])
    mine[traffic.PURPOSES.index("encoder_gradients")] = (
        2 * (ranks.world - 1) / ranks.world * parameter_bytes(trainer.model.encoder) * config.max_steps
    )
    sums = collectives.gather_vector(np.concatenate([sent.sent, mine]) / config.max_steps, ranks.host).sum(axis=0)
    if ranks.is_first:
        sides = [dict(zip(traffic.PURPOSES, side.tolist(), strict=True)) for side in sums.reshape(2, -1)]
        named = [{purpose: size for purpose, size in side.items() if size} for side in sides]
        print(json.dumps({"sent": named[0], "least": named[1]}), flush=True)
    process_ranks.wait_for_all(ranks)
    process_ranks.stop()


class _Least:
    """The least that this rank could send, from what it asks of the table; of negatives, while ``counts`` is set.

    A rank's rows for others are counted where they are asked for: sums over the ranks are the same.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.sent: dict[str, float] = defaultdict(float)
        self.counts = False
        self._others, self._rank = trainer.ranks.world - 1, trainer.ranks.rank
        self._config, table = trainer.config, trainer.table
        self._value_bytes = table.weight.element_size()
        self._row_bytes = table.dim * self._value_bytes
        names = {spec.name for spec in feature_specs(trainer.config.model, trainer.manifest)}
        features = [feature for feature in trainer.manifest.features if feature.name in names]
        self._feature_bytes = 4 * sum(
            {"token_seq": feature.longest, "vector": feature.size}.get(feature.kind, 1) for feature in features
        )
        self._gather, table.gather = table.gather, self._gathered

    def count(self, prepared: PreparedStep) -> None:
        """All of a step but its negatives."""
        for exchanges in prepared.told().exchanges:
            routing = exchanges.inputs.routing
            remote = len(routing.ids) - int(routing.send[self._rank])
            self._add(ids=8 * remote, features=self._feature_bytes * remote)
            self._add(rows=self._row_bytes * remote, row_gradients=self._row_bytes * remote)
            events = routing.inverse[0].numel() * self._others
            if self._config.loss.name == "full_softmax":
                self._add(queries=self._row_bytes * events, query_gradients=self._row_bytes * events)
                self._add(partial_sums=self._value_bytes * events, partial_sum_gradients=self._value_bytes * events)
            elif self._config.loss.in_batch:
                self._add(batch_targets=4 * events)

    def _gathered(self, ids: np.ndarray) -> Gathering:
        if self.counts:
            # Every rank gets those of the others.
            size = self._row_bytes * len(ids) * self._others / (self._others + 1)
            self._add(negatives=size, negative_gradients=size)
        return self._gather(ids)

    def _add(self, **sizes: float) -> None:
        for purpose, size in sizes.items():
            self.sent[purpose] += size


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.wire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--config", default="configs/beauty.yaml")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run_dir", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
