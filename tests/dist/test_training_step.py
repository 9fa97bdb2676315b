"""What a step asks of the table: one exchange for inputs, targets and features, of the distinct ids alone."""

from __future__ import annotations

import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config

pytestmark = pytest.mark.dist


def _exchanges_of_a_step(ranks: Ranks, config: Config) -> tuple[list[list[int]], list[list[int]], int]:
    """The ids of each exchange of one update; those of inputs and targets of each micro-batch; rows of the table."""
    trainer = Trainer(config, ranks)
    exchange, asked = trainer.table.exchange, []

    def watched(routing, host):
        asked.append(routing.ids.tolist())
        return exchange(routing, host)

    trainer.table.exchange = watched
    prepared = trainer.ahead.prepare(next(iter(trainer.loader)))
    trainer.update(prepared)
    used = [torch.cat([batch.items, batch.targets]).unique().tolist() for batch in prepared.packed]
    assert trainer.model.features._columns, "the test is about features too"
    return asked, used, len(trainer.popularity)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_inputs_targets_and_features_share_one_exchange_of_distinct_ids(tmp_path, accumulation):
    data = tmp_path / "data"
    write_dataset(str(data), random_sessions(0, 41, items=300), random_sessions(1, 9, 300), random_sessions(2, 9, 300))
    config = small_config(data, tmp_path / "run", f"accumulation={accumulation}", "loss.in_batch=8")
    for asked, used, rows in run_ranks(2, _exchanges_of_a_step, tmp_path, config):
        assert asked == used and len(asked) == accumulation
        assert all(len(ids) < rows / 2 for ids in asked)
