"""Several tables as one: a single norm for clipping, frozen ones left alone, broken ones noticed wherever they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.config import TableConfig
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.table_group import TableGroup

IDS = np.array([1, 4, 5])


@pytest.fixture(scope="module")
def alone():
    ranks = process_ranks.start("cpu", timeout_seconds=20)
    yield ranks
    process_ranks.stop()


def _group(ranks, **config) -> TableGroup:
    settings = TableConfig(optimizer="sgd", **config)
    return TableGroup(
        {
            name: ShardedItemTable(7, width, ranks, settings, seed=0, dtype=torch.float64, stream=width)
            for name, width in (("table", 3), ("output", 2), ("output_bias", 1))
        }
    )


def _backward(group: TableGroup, factor: float = 1.0) -> None:
    sum((place * table.gather(IDS).rows()).sum() * factor for place, table in enumerate(group, start=1)).backward()


def test_clipping_bounds_the_norm_over_all_tables(alone):
    group = _group(alone, clip=0.5)
    before = [table.weight.clone() for table in group]
    _backward(group)
    # Three rows each: gradients of 1, 2 and 3 in 3, 2 and 1 columns.
    squared = 3 * (3 * 1 + 2 * 4 + 1 * 9)
    assert float(group.apply_gradients(lr=1.0)) == pytest.approx(squared)
    for place, (table, old) in enumerate(zip(group, before, strict=True), start=1):
        expected = old.clone()
        expected[torch.from_numpy(IDS)] -= place * 0.5 / squared**0.5
        torch.testing.assert_close(table.weight, expected)


def test_a_frozen_table_is_read_and_not_updated(alone):
    group = _group(alone)
    group.freeze({"output"})
    before = group["output"].weight.clone()
    _backward(group)
    assert float(group.apply_gradients(lr=1.0)) == 3 * (3 * 1 + 1 * 9)
    assert torch.equal(group["output"].weight, before)
    assert group.steps == {"table": 1, "output": 0, "output_bias": 1}
    group.freeze(())
    _backward(group)
    group.apply_gradients(lr=1.0)
    assert not torch.equal(group["output"].weight, before)
    group.set_steps({"table": 5, "output": 6, "output_bias": 7})
    assert group["output"].optimizer.steps == 6


@pytest.mark.parametrize("name", ["table", "output", "output_bias"])
def test_what_is_not_finite_is_noticed_in_every_table(alone, name):
    group = _group(alone)
    _backward(group)
    assert not group.has_broken_gradient() and group.broken_gradients() == [] and not group.has_broken_row()
    rows = group[name]._touched[0][1]
    rows.grad[1, 0] = torch.inf
    assert group.has_broken_gradient() and group.broken_gradients() == [name]
    group.discard_gradients()
    assert not group.has_broken_gradient()
    group[name].weight[3, 0] = torch.nan
    assert group.has_broken_row()


def test_a_checkpoints_names_begin_with_the_tables(alone):
    group = _group(alone)
    assert sorted(group.state_dict()) == ["output.weight", "output_bias.weight", "table.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in group.weights().items()}
    assert shapes == {"table.weight": (7, 3), "output.weight": (7, 2), "output_bias.weight": (7, 1)}
    copy = group.host_copy()
    group["output"].weight.zero_()
    assert copy["output.weight"].to_local().any() and not group.state_dict()["output.weight"].to_local().any()
