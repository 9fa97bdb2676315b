"""The differentiable collectives pass torch's gradcheck on every rank, while the other ranks take part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.gathering import Gathering
from gru4recf_dist.parallel.ranks import Ranks
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

FORWARD, BACKWARD, DONE = range(3)
# Rows that rank r sends to rank s; some none.
SPLITS = [[1, 2], [0, 3]]


class _Announce(torch.autograd.Function):
    """Identity that tells the other ranks, before the backward behind it, that there will be one."""

    @staticmethod
    def forward(ctx, value, tell):
        ctx.tell = tell
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.tell(BACKWARD)
        return gradient, None


def _exchange(ranks: Ranks) -> tuple[Callable, int]:
    receive = [row[ranks.rank] for row in SPLITS]

    def function(rows):
        return collectives.differentiable_all_to_all(rows, receive, SPLITS[ranks.rank], ranks.table)

    return function, sum(SPLITS[ranks.rank])


def _gathering(counts: list[int], balanced: bool) -> Callable[[Ranks], tuple[Callable, int]]:
    def of(ranks: Ranks) -> tuple[Callable, int]:
        return lambda rows: Gathering(rows, counts, ranks.table, balanced=balanced).rows(), counts[ranks.rank]

    return of


CASES = {
    "all-to-all": _exchange,
    "all-gather": _gathering([2, 2], False),
    "uneven all-gather": _gathering([3, 1], False),
    "balanced all-gather": _gathering([5, 1], True),
}


def check(ranks: Ranks, case: str) -> bool:
    """gradcheck on each rank in turn, for what its own rows change in what it gets itself."""
    function, count = CASES[case](ranks)
    rows = torch.arange(count * 2, dtype=torch.float64).view(count, 2) + 10 * ranks.rank
    for checked in range(ranks.world):
        if ranks.rank == checked:

            def tell(what: int, source: int = checked) -> None:
                dist.broadcast(torch.tensor(what), src=source, group=ranks.host)

            def told(value, tell=tell):
                tell(FORWARD)
                return _Announce.apply(function(value), tell)

            torch.autograd.gradcheck(told, rows.clone().requires_grad_())
            tell(DONE)
            continue
        order = torch.tensor(FORWARD)
        while True:
            dist.broadcast(order, src=checked, group=ranks.host)
            if order == DONE:
                break
            if order == FORWARD:
                mine = rows.clone().requires_grad_()
                result = function(mine)
            else:
                # What the others get does not count here.
                result.backward(torch.zeros_like(result), retain_graph=True)
    return True


@pytest.mark.parametrize("case", CASES)
def test_a_collective_passes_gradcheck_on_every_rank(tmp_path, case):
    assert run_ranks(2, check, tmp_path, case) == [True, True]
