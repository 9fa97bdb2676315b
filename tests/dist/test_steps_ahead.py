"""What the ranks tell each other of a step while the one before it is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.parallel import traffic
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_engines import data  # noqa: F401 (a fixture)
from tests.support.ranks import run_ranks
from tests.support.training import small_config
from tests.support.waits import WaitWatch

pytestmark = pytest.mark.dist


def tell_and_train(ranks: Ranks, config: Config) -> dict:
    """Prepare two steps, and make the first when all is told of the second."""
    trainer, seen = Trainer(config, ranks), {}
    blocks = iter(trainer.loader)
    before = traffic.TOTAL.copy()
    first, second = (trainer.ahead.prepare(next(blocks)) for _ in range(2))
    told = second._told.result(timeout=60)
    seen["counted early"] = (traffic.TOTAL - before).sent.any()
    seen["told"], seen["again"] = [], []
    for exchanges in told.exchanges:
        for exchange in exchanges:
            if exchange is not None:
                again = trainer.table.exchange(exchange.routing)
                seen["told"].append((exchange.send, exchange.receive, exchange.asked.tolist()))
                seen["again"].append((again.send, again.receive, again.asked.tolist()))
    targets = torch.cat([batch.targets[batch.weights > 0] for batch in second.packed])
    seen["targets"], seen["drawn from"] = (
        targets.tolist(),
        (told.targets.ids.tolist(), told.targets.counts.tolist()),
    )
    before = traffic.TOTAL.copy()
    trainer.update(first)
    sent = traffic.TOTAL - before
    seen["ids"] = sent.sent[traffic.PURPOSES.index("ids")]
    # Of the first alone.
    seen["ids of it"] = first.told().sent.sent[traffic.PURPOSES.index("ids")]
    trainer.ahead.settle()
    return seen


@pytest.mark.parametrize("options", [(), ("model.fusion=parallel", "accumulation=2")], ids=["one table", "two tables"])
def test_it_is_what_an_exchange_in_the_step_gives_and_counts_with_the_step(tmp_path, data, options):  # noqa: F811
    config = small_config(data, tmp_path / "run", "loss.in_batch=8", *options)
    ranks = run_ranks(3, tell_and_train, tmp_path, config)
    everyone = np.unique([target for seen in ranks for target in seen["targets"]], return_counts=True)
    for seen in ranks:
        assert not seen["counted early"]
        assert seen["told"] == seen["again"] and len(seen["told"]) == (4 if options else 1)
        assert seen["drawn from"] == tuple(each.tolist() for each in everyone)
        assert seen["ids"] == seen["ids of it"] > 0


def wait_for_the_other(ranks: Ranks, config: Config) -> str | None:
    """Prepare a step that rank 1 lingers over until rank 0 says where it is; returns that, on rank 0."""
    trainer, watch = Trainer(config, ranks), WaitWatch()
    block, route = next(iter(trainer.loader)), trainer.ahead._route
    if ranks.rank == 1:
        trainer.ahead._route = lambda batch: (watch.wait_until_seen(), route(batch))[1]
    prepared = trainer.ahead.prepare(block)
    if ranks.rank == 0:
        watch.start()
    prepared.told()
    return watch.stop()


def test_a_rank_that_waits_for_another_ones_ids_is_known_to_wait(tmp_path, data):  # noqa: F811
    assert run_ranks(2, wait_for_the_other, tmp_path, small_config(data, tmp_path / "run")) == ["ids", None]
