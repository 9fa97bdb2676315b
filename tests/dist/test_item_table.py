"""The sharded table against one dense tensor on one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.config import TableConfig
from gru4recf_dist.table.item_table import ShardedItemTable, initial_rows, xavier_normal_std
from gru4recf_dist.table.partition import RowPartition, route
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist
ROWS, DIM = 23, 4
NEGATIVES = np.array([1, 2, 7, 8, 15, 22])
ASKED = [[3, 3, 7, 0, 22], [1, 7, 5], [0], [22, 21, 3, 3]]


def _weights(rank: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(rank).standard_normal((len(ASKED[rank]), DIM)))


def _negative_weights(rank: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(100 + rank).standard_normal((len(NEGATIVES), DIM)))


def _step(ranks, users: int) -> tuple[range, torch.Tensor, list]:
    """Each rank plays the ``users`` it is given in turn, so that any world size makes the same sums."""
    table = ShardedItemTable(ROWS, DIM, ranks, TableConfig(optimizer="sgd"), seed=5, dtype=torch.float64)
    mine = range(ranks.rank, users, ranks.world)
    ids = torch.tensor([i for user in mine for i in ASKED[user]], dtype=torch.int64)
    routing = route(table.partition, ids)
    rows = table.lookup(table.exchange(routing))[routing.inverse[0]]
    negatives = table.gather(NEGATIVES).rows()
    loss = (rows * torch.cat([_weights(user) for user in mine])).sum()
    loss = loss + sum((negatives * _negative_weights(user)).sum() for user in mine)
    (loss * ranks.world).backward()
    seen = [rows.detach(), negatives.detach()]
    table.apply_gradients(lr=0.5)
    return table.own, table.weight, seen


@pytest.mark.parametrize("world", [1, 2, 4])
def test_reading_and_updating_equal_a_dense_table(tmp_path, world):
    users = 4
    dense = initial_rows(5, range(ROWS), DIM, xavier_normal_std(ROWS, DIM), torch.float64)
    expected = dense.clone()
    for user in range(users):
        expected.index_add_(0, torch.tensor(ASKED[user]), _weights(user), alpha=-0.5)
        expected.index_add_(0, torch.from_numpy(NEGATIVES), _negative_weights(user), alpha=-0.5)

    results = run_ranks(world, _step, tmp_path, users)

    assert [own for own, _, _ in results] == [RowPartition(ROWS, world).range_of(rank) for rank in range(world)]
    torch.testing.assert_close(torch.cat([weight for _, weight, _ in results]), expected, rtol=0, atol=1e-14)
    for rank, (_, _, (rows, negatives)) in enumerate(results):
        asked = [i for user in range(rank, users, world) for i in ASKED[user]]
        assert torch.equal(rows, dense[asked])
        assert torch.equal(negatives, dense[NEGATIVES])


def _dtensor_rows(ranks, rows: int) -> tuple[list[int], torch.Tensor]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(ranks.dense, "cpu")
    table = ShardedItemTable(rows, 2, ranks, TableConfig(), seed=0)
    theirs = distribute_tensor(torch.arange(rows * 2.0).view(rows, 2), mesh, [Shard(0)]).to_local()
    return table.weight.shape, theirs.shape, (theirs[:1, 0] / 2).tolist(), table.own.start


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 23])
def test_rows_lie_as_dtensor_chunks_them(tmp_path, rows):
    for ours, theirs, first, start in run_ranks(4, _dtensor_rows, tmp_path, rows):
        assert ours == theirs
        assert first in ([], [start])


def test_initial_rows_of_several_tables_have_nothing_in_common():
    tables = [initial_rows(3, range(5000), 8, 0.1, stream=stream) for stream in (None, 0, 1, 2)]
    blocks = [block for table in tables for block in table.double().flatten().split(1024 * 8)[:4]]
    correlation = torch.corrcoef(torch.stack(blocks)) - torch.eye(len(blocks), dtype=torch.float64)
    # Of 8192 independent values: a standard deviation of 0.011.
    assert float(correlation.abs().max()) < 0.06
    assert torch.equal(initial_rows(3, range(1500, 4000), 8, 0.1, stream=1), tables[2][1500:4000])


def test_initial_rows_depend_on_seed_and_row_only():
    whole = initial_rows(3, range(5000), 8, 0.1)
    for start, stop in ((0, 1), (1023, 1025), (1500, 4000), (4999, 5000), (10, 10)):
        assert torch.equal(initial_rows(3, range(start, stop), 8, 0.1), whole[start:stop])
    assert abs(float(whole.std()) - 0.1) < 0.002
    assert not torch.equal(initial_rows(4, range(5), 8, 0.1), whole[:5])
