"""Who did not arrive, from what the ranks told; and who is slow."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gru4recf_dist.parallel.roll_call import describe, missing
from gru4recf_dist.parallel.slow_ranks import SlowRanks, ratios
from gru4recf_dist.parallel.whereabouts import Position, Whereabouts


def position(calls: int, phase: str = "forward", waiting_in: str | None = None, told_at: float = 100.0) -> Position:
    return Position(12, phase, calls, waiting_in, 16.0, told_at)


def test_those_that_began_fewer_collectives_are_missing():
    mine = position(8, "backward", "row_gradients")
    positions = [mine, position(7), None, position(8, "backward", "row_gradients"), position(6, told_at=70.0)]
    late = missing(positions, mine)
    assert late == [1, 2, 4]
    assert describe(late, positions, mine, silent_after=20.0) == (
        "step 12, phase backward: waited 16 s in the collective 'row_gradients' for rank 1 (last at step 12, phase "
        "forward, for 16 s), rank 2 (never heard of), rank 4 (last at step 12, phase forward, for 16 s; silent for "
        "30 s: stopped, or gone)"
    )


def test_a_rank_that_waits_for_the_missing_one_is_not_missing_itself():
    mine = position(9, "forward", "negatives")
    waits, hangs, is_slow = position(8, "forward", "rows"), position(7, "forward", "rows"), position(8, "reading")
    assert missing([waits, hangs, mine], mine) == [1]
    assert missing([waits, hangs, mine, is_slow], mine) == [1, 3]
    assert missing([waits, hangs, mine], waits) == [1]


def test_where_all_are_in_the_same_collective_nobody_is_blamed():
    mine = position(8, "backward", "rows")
    assert missing([mine, mine], mine) == []
    assert "in which all ranks are" in describe([], [mine, mine], mine, 20.0)


def test_of_many_missing_ranks_eight_are_named():
    mine = position(8, "backward", "rows")
    positions = [mine] + [position(7)] * 12
    text = describe(missing(positions, mine), positions, mine, 20.0)
    assert text.count("last at") == 8 and text.endswith("and 4 more")


def test_a_collective_that_fails_keeps_the_position_within_it():
    here = Whereabouts()
    here.enter("update", step=5)
    with here.waiting("loss"):
        assert here.position().waiting_in == "loss"
    assert (here.calls, here.position().waiting_in) == (1, None)
    with pytest.raises(RuntimeError), here.waiting("rows"):
        raise RuntimeError
    assert (here.calls, here.position().waiting_in, here.position().step) == (2, "rows", 5)


def test_the_collectives_of_a_thread_beside_the_training_do_not_count():
    here = Whereabouts()

    def beside() -> None:
        here.ignore_this_thread()
        with here.waiting("other"):
            assert here.position().waiting_in is None

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    with here.waiting("loss"):
        pass
    assert here.calls == 1


def test_a_rank_is_compared_with_the_median_of_the_others():
    np.testing.assert_allclose(ratios(np.array([1.0, 3.0])), [1 / 3, 3.0])
    np.testing.assert_allclose(ratios(np.array([1.0, 1.0, 2.0, 5.0])), [0.5, 0.5, 2.0, 5.0])
    assert ratios(np.array([7.0])) == [1.0]


def test_only_a_rank_that_is_slow_without_a_break_is_named():
    slow = SlowRanks(factor=2.0, seconds=30.0)
    usual, late = np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.5, 1.0])
    assert [slow.look(late, 10.0), slow.look(late, 10.0)] == [[], []]
    # A break: from the beginning.
    assert slow.look(usual, 10.0) == []
    assert [slow.look(late, 10.0), slow.look(late, 10.0)] == [[], []]
    (line,) = slow.look(late, 10.0)
    assert line.startswith("warning: rank 1 has been 2.5 times as slow as the median of the others for 30 s")
    # Said once in so many seconds, not at every log line.
    assert [slow.look(late, 10.0), slow.look(late, 10.0)] == [[], []]
    assert len(slow.look(late, 10.0)) == 1
