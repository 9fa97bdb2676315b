"""Ranks whose copies of the encoder drift apart end the run, and are named."""

from __future__ import annotations

import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.replicas import checksum
from gru4recf_dist.trainer import Trainer
from tests.dist.test_engines import data, engine  # noqa: F401 (a fixture)
from tests.support.ranks import run_ranks
from tests.support.training import small_config, train

pytestmark = pytest.mark.dist


def drift(ranks: Ranks, config: Config, broken: int) -> tuple[str, int]:
    """Train with the last bit of one weight turned over on one rank after step 3: the error, and the step of it."""
    trainer = Trainer(config, ranks)
    update = trainer.update

    def update_and_drift(batches):
        done = update(batches)
        if trainer.progress.step == 3 and ranks.rank == broken:
            weight = next(iter(trainer.engine.module.parameters())).detach().flatten()
            weight[-1:].view(torch.int32).bitwise_xor_(1)
        return done

    trainer.update = update_and_drift
    with pytest.raises(UserError) as caught:
        trainer.train()
    return str(caught.value), trainer.progress.step


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_drifts_is_named_at_the_next_check(tmp_path, data, broken):  # noqa: F811
    config = small_config(data, tmp_path / "run", "monitoring.replica_check_steps=4")
    for message, step in run_ranks(3, drift, tmp_path, config, broken):
        assert step == 4
        assert message.startswith(f"step 4: the encoder's weights of rank {broken} are not those of rank")


@pytest.mark.parametrize("stage", ["ddp", 1, 2, 3])
def test_ranks_that_do_not_drift_train_to_the_end(tmp_path, data, stage):  # noqa: F811
    settings = (*engine(stage), "monitoring.replica_check_steps=1", "max_steps=3")
    run_ranks(2, train, tmp_path, small_config(data, tmp_path / "run", *settings))


def test_the_checksum_sees_every_bit_and_values_that_change_places():
    module = torch.nn.Linear(3, 2)
    first = checksum(module)
    bits = module.weight.data.view(torch.int32)
    for bit in range(32):
        bits[1, 2] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
        assert checksum(module) != first
        bits[1, 2] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert checksum(module) == first
    module.weight.data[0] = module.weight.data[0].flip(0)
    assert checksum(module) != first
