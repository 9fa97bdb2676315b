"""Collectives on 1, 2 and 4 ranks against what their definition says, value by value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.gathering import Gathering
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist
WORLDS = [1, 2, 4]
# SPLITS[w][r][s]: rows that rank r sends to rank s. Zero rows, a rank that sends nothing, one that gets nothing.
SPLITS = {
    1: [[[3]], [[0]]],
    2: [[[0, 3], [2, 1]], [[0, 0], [0, 4]], [[0, 0], [0, 0]]],
    4: [
        [[0, 2, 1, 0], [3, 0, 0, 0], [0, 0, 0, 0], [1, 1, 4, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]],
    ],
}
# COUNTS[w]: rows of each rank in a gathering.
COUNTS = {
    1: [[3], [0]],
    2: [[2, 2], [0, 3], [4, 1], [0, 0]],
    4: [[3, 0, 1, 5], [2, 2, 2, 2], [0, 0, 0, 0], [0, 0, 7, 0]],
}
TAILS = [(), (3,), (2, 2)]


def _rows(kind: str, rank: int, count: int, tail: tuple[int, ...]) -> torch.Tensor:
    """Rows that no other rank, use or shape has."""
    generator = np.random.default_rng((sum(map(ord, kind)), rank, count, len(tail)))
    return torch.from_numpy(generator.standard_normal((count, *tail)))


def _all_to_all(ranks, splits: list[list[int]], tail) -> dict:
    send, receive = splits[ranks.rank], [row[ranks.rank] for row in splits]
    rows = _rows("sent", ranks.rank, sum(send), tail).requires_grad_()
    weights = _rows("weights", ranks.rank, sum(receive), tail)
    plain = collectives.all_to_all(rows.detach(), receive, send, ranks.table)
    result = collectives.differentiable_all_to_all(rows, receive, send, ranks.table)
    (result * weights).sum().backward()
    ids = collectives.all_to_all((rows.detach() * 1000).long(), receive, send, ranks.table)
    counts = collectives.exchange_counts(np.array(send), ranks.host)
    return {"plain": plain, "result": result.detach(), "gradient": rows.grad, "ids": ids, "counts": counts}


def _gather(ranks, counts: list[int], tail) -> dict:
    rows = _rows("own", ranks.rank, counts[ranks.rank], tail).requires_grad_()
    weights = _rows("weights", ranks.rank, sum(counts), tail)
    plain = collectives.all_gather_rows(rows.detach(), counts, ranks.table)
    result = Gathering(rows, counts, ranks.table).rows()
    (result * weights).sum().backward()
    again = _rows("own", ranks.rank, counts[ranks.rank], tail).requires_grad_()
    # The gradient of a plain sum is one expanded number, not a contiguous tensor.
    Gathering(again, counts, ranks.table).rows().sum().backward()
    balanced = _rows("own", ranks.rank, counts[ranks.rank], tail).requires_grad_()
    even = Gathering(balanced, counts, ranks.table, balanced=True).rows()
    (even * weights).sum().backward()
    return {
        "plain": plain,
        "result": result.detach(),
        "gradient": rows.grad,
        "of_sum": again.grad,
        "balanced": even.detach(),
        "balanced_gradient": balanced.grad,
    }


def _exercise(ranks) -> dict:
    world = ranks.world
    total = torch.tensor([ranks.rank + 1.0, 10.0 * ranks.rank])
    summed = collectives.sum_over_ranks(total, ranks.table)
    return {
        "all_to_all": [[_all_to_all(ranks, splits, tail) for tail in TAILS] for splits in SPLITS[world]],
        "gather": [[_gather(ranks, counts, tail) for tail in TAILS] for counts in COUNTS[world]],
        "gather_counts": [collectives.gather_counts(counts[ranks.rank], ranks.host) for counts in COUNTS[world]],
        "summed": summed.tolist(),
        "in_place": summed is total,
    }


@pytest.fixture(scope="module", params=WORLDS)
def results(request, tmp_path_factory) -> list[dict]:
    """What each rank saw, in the order of the ranks."""
    return run_ranks(request.param, _exercise, tmp_path_factory.mktemp("collectives"))


def test_all_to_all_delivers_every_row_in_the_order_of_the_ranks(results):
    world = len(results)
    for number, splits in enumerate(SPLITS[world]):
        for shape, tail in enumerate(TAILS):
            sent = [_rows("sent", r, sum(splits[r]), tail).split(splits[r]) for r in range(world)]
            for rank in range(world):
                seen = results[rank]["all_to_all"][number][shape]
                expected = torch.cat([sent[r][rank] for r in range(world)])
                assert torch.equal(seen["plain"], expected) and torch.equal(seen["result"], expected)
                assert torch.equal(seen["ids"], (expected * 1000).long())


def test_all_to_all_sends_every_gradient_back_to_where_its_row_came_from(results):
    world = len(results)
    for number, splits in enumerate(SPLITS[world]):
        for shape, tail in enumerate(TAILS):
            received = [[splits[r][s] for r in range(world)] for s in range(world)]
            weights = [_rows("weights", s, sum(received[s]), tail).split(received[s]) for s in range(world)]
            for rank in range(world):
                expected = torch.cat([weights[s][rank] for s in range(world)])
                assert torch.equal(results[rank]["all_to_all"][number][shape]["gradient"], expected)


def test_exchange_counts_tells_what_each_rank_will_send(results):
    for number, splits in enumerate(SPLITS[len(results)]):
        for rank, result in enumerate(results):
            for seen in result["all_to_all"][number]:
                assert seen["counts"] == [row[rank] for row in splits]


def test_gathering_gives_every_rank_all_rows_in_order(results):
    for number, counts in enumerate(COUNTS[len(results)]):
        for shape, tail in enumerate(TAILS):
            expected = torch.cat([_rows("own", rank, count, tail) for rank, count in enumerate(counts)])
            for result in results:
                seen = result["gather"][number][shape]
                assert torch.equal(seen["plain"], expected) and torch.equal(seen["result"], expected)
                assert torch.equal(seen["balanced"], expected)


def test_the_gradient_of_gathered_rows_is_summed_over_the_ranks(results):
    world = len(results)
    for number, counts in enumerate(COUNTS[world]):
        for shape, tail in enumerate(TAILS):
            total = sum(_rows("weights", rank, sum(counts), tail) for rank in range(world))
            for rank, part in enumerate(total.split(counts)):
                seen = results[rank]["gather"][number][shape]
                torch.testing.assert_close(seen["gradient"], part, rtol=1e-14, atol=1e-14)
                torch.testing.assert_close(seen["balanced_gradient"], part, rtol=1e-14, atol=1e-14)
                assert torch.equal(seen["of_sum"], torch.full_like(part, world))


def test_gather_counts_and_sums(results):
    world = len(results)
    for result in results:
        assert result["gather_counts"] == COUNTS[world]
        assert result["summed"] == [world * (world + 1) / 2, 10.0 * world * (world - 1) / 2]
        assert result["in_place"]
