"""A gathering is under way while other work goes on, there and back. Its values: `test_collectives`."""

from __future__ import annotations

import pytest
import torch

from gru4recf_dist.parallel import gathering
from gru4recf_dist.parallel.gathering import Gathering
from gru4recf_dist.parallel.ranks import Ranks
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist
SENDING = ("send", "receive", "send_gradients", "receive_gradients")


class _Work(torch.autograd.Function):
    """Stands for what is computed meanwhile."""

    @staticmethod
    def forward(ctx, value, seen):
        ctx.seen = seen
        seen.append("work")
        return value * 2

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append("work backward")
        return gradient * 2, None


def work_meanwhile(ranks: Ranks, counts: list[int]) -> list[str]:
    """What happened, in order."""
    seen: list[str] = []

    def recorded(name: str):
        method = getattr(gathering._Transfer, name)
        return lambda transfer, *arguments: (seen.append(name), method(transfer, *arguments))[1]

    for name in SENDING:
        setattr(gathering._Transfer, name, recorded(name))
    rows = torch.ones(counts[ranks.rank], 3, requires_grad=True)
    input_rows = torch.ones(3, requires_grad=True)
    negatives = Gathering(rows, counts, ranks.table, balanced=True)
    queries = _Work.apply(_Work.apply(input_rows, seen), seen)
    (negatives.rows() @ queries).sum().backward()
    assert torch.equal(rows.grad, torch.full_like(rows, 4.0 * ranks.world))
    assert torch.equal(input_rows.grad, torch.full((3,), 4.0 * sum(counts)))
    return seen


@pytest.mark.parametrize("counts", [[2, 2], [7, 1]], ids=["even", "handed over"])
def test_what_is_computed_meanwhile_is_waited_for_by_nobody(tmp_path, counts):
    expected = ["send", "work", "work", "receive", "send_gradients", "work backward", "work backward"]
    for seen in run_ranks(2, work_meanwhile, tmp_path, counts):
        assert seen == [*expected, "receive_gradients"]
